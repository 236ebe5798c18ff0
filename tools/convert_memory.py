"""Convert a made-up checkpoint as published on the Hub, and print the peak of memory. Linux.

    python tools/convert_memory.py FOLDER deepseek_v3 [flags of flashmoe-convert]
    python tools/convert_memory.py FOLDER gpt_oss [flags of flashmoe-convert]

Writes 2.9 GB of DeepSeek-V3's shapes in FP8 (three layers, the first one dense, 16 experts), or
3.7 GB of gpt-oss-120b's in mxfp4 (two layers); 16,384 token ids.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flashmoe_mlx.bench.synthetic import write_tokenizer

HIDDEN, INNER, DENSE, VOCABULARY, EXPERTS, LAYERS = 7168, 2048, 18432, 16384, 16, 3
HEADS, LORA, KV_LORA, ROPE, VALUES = 128, 1536, 512, 64, 128
BLOCK, SIZES = 128, {"BF16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1}
OSS_HIDDEN, OSS_EXPERTS, OSS_HEADS, OSS_KV_HEADS, OSS_DIM = 2880, 128, 64, 8, 64
DEEPSEEK = {
    "model_type": "deepseek_v3", "vocab_size": VOCABULARY, "hidden_size": HIDDEN,
    "intermediate_size": DENSE, "moe_intermediate_size": INNER, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "n_shared_experts": 1,
    "n_routed_experts": EXPERTS, "routed_scaling_factor": 2.5, "kv_lora_rank": KV_LORA,
    "q_lora_rank": LORA, "qk_rope_head_dim": ROPE, "v_head_dim": VALUES, "qk_nope_head_dim": 128,
    "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True, "n_group": 8,
    "topk_group": 4, "num_experts_per_tok": 8, "moe_layer_freq": 1, "first_k_dense_replace": 1,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 10000,
    "attention_bias": False, "torch_dtype": "bfloat16",
}  # fmt: skip
GPT_OSS = {
    "model_type": "gpt_oss", "vocab_size": VOCABULARY, "hidden_size": OSS_HIDDEN,
    "intermediate_size": OSS_HIDDEN, "num_hidden_layers": 2, "num_attention_heads": OSS_HEADS,
    "num_key_value_heads": OSS_KV_HEADS, "head_dim": OSS_DIM, "num_local_experts": OSS_EXPERTS,
    "num_experts_per_tok": 4, "sliding_window": 128, "rms_norm_eps": 1e-5, "rope_theta": 150000,
    "layer_types": ["sliding_attention", "full_attention"], "torch_dtype": "bfloat16",
    "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
                     "original_max_position_embeddings": 4096},
    "quantization_config": {"quant_method": "mxfp4"},
}  # fmt: skip
Tensor = tuple[str, str, tuple[int, ...]]


def matrix(name: str, rows: int, columns: int) -> list[Tensor]:
    """Return an FP8 matrix and its scales."""
    blocks = -(-rows // BLOCK), -(-columns // BLOCK)
    return [
        (f"{name}.weight", "F8_E4M3", (rows, columns)),
        (f"{name}.weight_scale_inv", "F32", blocks),
    ]


def mlp(name: str, inner: int) -> list[Tensor]:
    """Return the three matrices of an MLP."""
    up = [t for part in ("gate_proj", "up_proj") for t in matrix(f"{name}.{part}", inner, HIDDEN)]
    return [*up, *matrix(f"{name}.down_proj", HIDDEN, inner)]


def gpt_oss() -> Iterator[Tensor]:
    """Yield name, dtype and shape of every tensor of gpt-oss."""
    yield "model.embed_tokens.weight", "BF16", (VOCABULARY, OSS_HIDDEN)
    for layer in range(2):
        path = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{path}.{name}.weight", "BF16", (OSS_HIDDEN,)
        sizes = {"q": OSS_HEADS, "k": OSS_KV_HEADS, "v": OSS_KV_HEADS}
        shapes = {f"{n}_proj": (OSS_DIM * count, OSS_HIDDEN) for n, count in sizes.items()}
        for name, shape in (shapes | {"o_proj": (OSS_HIDDEN, OSS_DIM * OSS_HEADS)}).items():
            yield f"{path}.self_attn.{name}.weight", "BF16", shape
            yield f"{path}.self_attn.{name}.bias", "BF16", shape[:1]
        yield f"{path}.self_attn.sinks", "BF16", (OSS_HEADS,)
        yield f"{path}.mlp.router.weight", "BF16", (OSS_EXPERTS, OSS_HIDDEN)
        yield f"{path}.mlp.router.bias", "BF16", (OSS_EXPERTS,)
        for name, rows in (("gate_up_proj", 2 * OSS_HIDDEN), ("down_proj", OSS_HIDDEN)):
            blocks = OSS_EXPERTS, rows, OSS_HIDDEN // 32
            yield f"{path}.mlp.experts.{name}_blocks", "U8", (*blocks, 16)
            yield f"{path}.mlp.experts.{name}_scales", "U8", blocks
            yield f"{path}.mlp.experts.{name}_bias", "BF16", blocks[:2]
    yield "model.norm.weight", "BF16", (OSS_HIDDEN,)
    yield "lm_head.weight", "BF16", (VOCABULARY, OSS_HIDDEN)


def deepseek() -> Iterator[Tensor]:
    """Yield name, dtype and shape of every tensor of DeepSeek-V3."""
    yield "model.embed_tokens.weight", "BF16", (VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        path = f"model.layers.{layer}"
        attention = f"{path}.self_attn"
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{path}.{name}.weight", "BF16", (HIDDEN,)
        yield f"{attention}.q_a_layernorm.weight", "BF16", (LORA,)
        yield f"{attention}.kv_a_layernorm.weight", "BF16", (KV_LORA,)
        yield from matrix(f"{attention}.q_a_proj", LORA, HIDDEN)
        yield from matrix(f"{attention}.q_b_proj", HEADS * (VALUES + ROPE), LORA)
        yield from matrix(f"{attention}.kv_a_proj_with_mqa", KV_LORA + ROPE, HIDDEN)
        yield from matrix(f"{attention}.kv_b_proj", HEADS * 2 * VALUES, KV_LORA)
        yield from matrix(f"{attention}.o_proj", HIDDEN, HEADS * VALUES)
        if layer == 0:
            yield from mlp(f"{path}.mlp", DENSE)
            continue
        yield f"{path}.mlp.gate.weight", "BF16", (EXPERTS, HIDDEN)
        yield f"{path}.mlp.gate.e_score_correction_bias", "F32", (EXPERTS,)
        for name in ("shared_experts", *(f"experts.{n}" for n in range(EXPERTS))):
            yield from mlp(f"{path}.mlp.{name}", INNER)
    yield "model.norm.weight", "BF16", (HIDDEN,)
    yield "lm_head.weight", "BF16", (VOCABULARY, HIDDEN)


FAMILIES = {"deepseek_v3": (DEEPSEEK, deepseek), "gpt_oss": (GPT_OSS, gpt_oss)}


def write(folder: Path, config: dict[str, Any], tensors: Callable[[], Iterator[Tensor]]) -> None:
    """Write the checkpoint: random codes, small bfloat16 numbers, equal scales."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    codes = random.integers(0, 127, 1 << 22, np.uint8)  # 127 is NaN
    small = random.normal(0, 0.02, 1 << 20).astype(np.float32).view(np.uint32) >> 16
    data = {
        "F8_E4M3": codes,
        "U8": codes,
        "BF16": small.astype(np.uint16),
        "F32": np.float32([0.0005]),
    }
    header, place = {}, 0
    for name, dtype, shape in tensors():
        end = place + math.prod(shape) * SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, dtype, shape in tensors():
            file.write(np.resize(data[dtype], math.prod(shape)).tobytes())
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)


def main() -> None:
    """Write the checkpoint if it is missing, convert it, print the peak."""
    folder = Path(sys.argv[1])
    if not (folder / "source").exists():
        write(folder / "source", *FAMILIES[sys.argv[2]])
    places = ["--hf-path", str(folder / "source"), "--mlx-path", str(folder / "out")]
    command = [sys.executable, "-m", "flashmoe_mlx.convert.cli", *places, *sys.argv[3:]]
    _, status, usage = os.wait4(os.spawnv(os.P_NOWAIT, sys.executable, command), 0)
    print(
        f"exit code {os.waitstatus_to_exitcode(status)}, peak {usage.ru_maxrss * 1024 / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    main()
