"""Tiny random checkpoints of other families, in MLX's format and as published."""

import json
import re
import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from convert_helpers import Weights, read, write_tokenizer
from mlx.utils import tree_flatten
from mlx_lm.models import deepseek_v3, gpt_oss, mixtral, qwen3_moe
from mlx_lm.utils import load_model

from flashmoe_mlx.binding import bound_classes

COMMON = {
    "vocab_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512, "rope_theta": 1e4, "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": COMMON | {
        "hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 64, "head_dim": 32,
        "num_hidden_layers": 3, "mlp_only_layers": [1], "num_experts": 8, "decoder_sparse_step": 1,
        "num_key_value_heads": 2, "norm_topk_prob": True, "torch_dtype": "float32",
    },
    "mixtral": COMMON | {
        "hidden_size": 64, "intermediate_size": 128, "num_local_experts": 4,
        "num_key_value_heads": 2, "torch_dtype": "float32",
    },
    "deepseek_v3": COMMON | {
        "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 192,
        "num_hidden_layers": 3, "num_key_value_heads": 4, "n_shared_experts": 1,
        "n_routed_experts": 8, "routed_scaling_factor": 1.0, "kv_lora_rank": 64, "q_lora_rank": 64,
        "qk_rope_head_dim": 16, "v_head_dim": 32, "qk_nope_head_dim": 32, "n_group": 2,
        "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True,
        "topk_group": 1, "moe_layer_freq": 1, "first_k_dense_replace": 1, "attention_bias": False,
        "torch_dtype": "bfloat16",
    },
    "gpt_oss": COMMON | {
        "hidden_size": 64, "intermediate_size": 64, "head_dim": 32, "num_local_experts": 8,
        "num_key_value_heads": 2, "sliding_window": 16, "torch_dtype": "bfloat16",
        "layer_types": ["sliding_attention", "full_attention"],
    },
}  # fmt: skip
MODULES: dict[str, ModuleType] = {
    "qwen3_moe": qwen3_moe, "mixtral": mixtral, "deepseek_v3": deepseek_v3, "gpt_oss": gpt_oss,
}  # fmt: skip
FP8_BLOCK = 128


def config_of(family: str, **entries: Any) -> dict[str, Any]:
    return {"model_type": family, "eos_token_id": 95} | CONFIGS[family] | entries


def stock_model(config: dict[str, Any]) -> nn.Module:
    module = MODULES[config["model_type"]]
    return module.Model(module.ModelArgs.from_dict(dict(config)))


def stock_weights(config: dict[str, Any], seed: int = 3) -> Weights:
    mx.random.seed(seed)
    shapes = {name: a.shape for name, a in tree_flatten(stock_model(config).parameters())}
    return {name: mx.random.normal(shape) * 0.1 for name, shape in sorted(shapes.items())}


def write(directory: Path, config: dict[str, Any], *shards: Weights) -> Path:
    """Write a checkpoint of one or more files, with a tokenizer."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    for number, weights in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        mx.save_safetensors(str(directory / name), weights, metadata={"format": "mlx"})
    write_tokenizer(directory)
    return directory


def mlx_checkpoint(
    directory: Path, family: str, bits: int = 4, group: int = 64, mode: str = "affine"
) -> Path:
    """Write a quantized checkpoint as mlx_lm.convert does."""
    config = config_of(family)
    model = stock_model(config)
    model.load_weights(list(stock_weights(config).items()))
    nn.quantize(model, group, bits, mode=mode)
    config["quantization"] = {"group_size": group, "bits": bits, "mode": mode}
    return write(directory, config, dict(tree_flatten(model.parameters())))


def published(family: str) -> tuple[dict[str, Any], Weights]:
    """Return config and weights as on the Hub."""
    config = config_of(family)
    weights = stock_weights(config)
    if family == "gpt_oss":
        return config | {"quantization_config": {"quant_method": "mxfp4"}}, blocks(weights)
    if family == "mixtral":
        names = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
        return config, one_by_one(weights, names)
    if family == "deepseek_v3":
        entry = {"quant_method": "fp8", "weight_block_size": [FP8_BLOCK, FP8_BLOCK]}
        return config | {"quantization_config": entry}, fp8(one_by_one(joined_heads(weights), {}))
    return config, one_by_one(weights, {})


def streamed(directory: Path, **settings: Any) -> Any:
    """Load a directory without a tokenizer, as `flashmoe_mlx.load` does."""
    classes = bound_classes(directory, read(directory / "config.json"), **settings)
    no_shim = {"model_file": None}
    model, _ = load_model(directory, model_config=no_shim, get_model_classes=lambda config: classes)
    return model


def streamed_logits(directory: Path, tokens: list[int], **settings: Any) -> mx.array:
    """Return a prompt's logits `[tokens, vocabulary]`."""
    with streamed(directory, **settings) as model:
        logits = model(mx.array([tokens]))[0].astype(mx.float32)
        mx.eval(logits)
    return logits


def one_by_one(weights: Weights, names: dict[str, str]) -> Weights:
    """Return one tensor per expert and projection."""
    found: Weights = {}
    for key, array in weights.items():
        match = re.match(r"(.*)\.switch_mlp\.(\w+)\.weight$", key)
        if not match:
            found[key] = array
            continue
        name = names.get(match[2], match[2])
        found |= {f"{match[1]}.experts.{e}.{name}.weight": a for e, a in enumerate(array)}
    return found


def joined_heads(weights: Weights) -> Weights:
    """Return DeepSeek's attention with kv_b_proj, which mlx-lm splits in two."""
    found: Weights = {}
    for key, array in weights.items():
        if "embed_q" in key:
            values = weights[key.replace("embed_q", "unembed_out")]
            both = mx.concatenate([array.swapaxes(-1, -2), values], axis=1)
            found[key.replace("embed_q", "kv_b_proj")] = both.reshape(-1, both.shape[-1])
        elif "unembed_out" not in key:
            found[key] = array
    return found


def fp8(weights: Weights) -> Weights:
    """Return matrices in 8-bit floats with a scale per block of 128 x 128."""
    found: Weights = {}
    for key, array in weights.items():
        plain = array.ndim != 2 or re.search(r"embed_tokens|lm_head|mlp\.gate\.weight", key)
        if plain:
            found[key] = array.astype(mx.bfloat16)
            continue
        down, across = (-(-n // FP8_BLOCK) for n in array.shape)
        scales = 0.001 * (1 + mx.arange(down * across).reshape(down, across))
        found[key] = mx.to_fp8(array / spread(scales, array.shape))
        found[f"{key}_scale_inv"] = scales
    return found


def spread(scales: mx.array, shape: tuple[int, ...]) -> mx.array:
    """Repeat a scale per block for each element."""
    wide = mx.repeat(mx.repeat(scales, FP8_BLOCK, axis=0), FP8_BLOCK, axis=1)
    return wide[: shape[0], : shape[1]]


def mark_fp8(path: Path) -> None:
    """Call a file's bytes 8-bit floats, which MLX cannot write."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    for entry in header.values():
        if entry.get("dtype") == "U8":
            entry["dtype"] = "F8_E4M3"
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def blocks(weights: Weights) -> Weights:
    """Return gpt-oss's experts: gate and up interleaved, mxfp4 in blocks of 32."""
    found: Weights = {}
    for key, array in weights.items():
        match = re.match(r"(.*\.experts)\.(gate|up|down)_proj\.(weight|bias)$", key)
        if not match:
            found[key] = array.astype(mx.bfloat16)
        elif match[2] != "up":
            name = f"{match[1]}.down_proj"
            if match[2] == "gate":
                name, up = f"{match[1]}.gate_up_proj", weights[key.replace("gate_", "up_")]
                array = mx.stack([array, up], axis=2).reshape(len(up), -1, *up.shape[2:])
            if match[3] == "bias":
                found[f"{name}_bias"] = array.astype(mx.bfloat16)
                continue
            codes, scales = mx.quantize(array, 32, 4, mode="mxfp4")
            shape = (*array.shape[:2], array.shape[2] // 32, 16)
            found[f"{name}_blocks"] = codes.view(mx.uint8).reshape(shape)
            found[f"{name}_scales"] = scales
    return found
