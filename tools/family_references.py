"""Write tests/fixtures/transformers/FAMILY.json: random tiny checkpoints, transformers' logits.

This tool needs torch, and flashmoe-mlx does not: run it in a separate environment.

    pip install torch==2.13.0 transformers==5.23.0 safetensors numpy
    python tools/family_references.py

A checkpoint's weights follow from the names and shapes that transformers stores, by `weights`, so a
fixture holds these, config.json as on the Hub, and float32 logits. The tests make the checkpoint
again without torch.
"""

import json
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import save_file

FIXTURES = Path(__file__).parents[1] / "tests" / "fixtures" / "transformers"
PROMPT = [5, 17, 33, 2, 90, 41, 7, 64, 12, 77, 28, 3, 55, 81, 19, 46, 9]

# Sizes that code could confuse differ.
COMMON = {
    "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 80, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512, "rope_theta": 10000.0, "rope_scaling": None,
    "num_experts_per_tok": 3, "tie_word_embeddings": False, "torch_dtype": "float32",
    "eos_token_id": 95, "hidden_act": "silu", "norm_topk_prob": True, "attention_bias": False,
}  # fmt: skip
GROUPED = {
    "n_routed_experts": 8, "n_shared_experts": 1, "moe_intermediate_size": 48, "n_group": 4,
    "topk_group": 2, "routed_scaling_factor": 2.5, "first_k_dense_replace": 1,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8, "moe_intermediate_size": 48,
        "decoder_sparse_step": 1, "mlp_only_layers": [1],
    },
    "qwen3_next": {
        "architectures": ["Qwen3NextForCausalLM"], "num_experts": 8, "moe_intermediate_size": 48,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "shared_expert_intermediate_size": 40,
        "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 32,
        "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4, "partial_rotary_factor": 0.25,
        "full_attention_interval": 2, "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "gpt_oss": {
        "architectures": ["GptOssForCausalLM"], "num_local_experts": 8, "intermediate_size": 96,
        "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"],
        "num_hidden_layers": 2, "attention_bias": True, "rope_theta": 150000,
        "max_position_embeddings": 4096,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "original_max_position_embeddings": 512,  # and not "truncate": mlx-lm ignores it
        },
        # As published; mlx-lm reads no other form.
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    },
    "deepseek_v3": GROUPED | {
        "architectures": ["DeepseekV3ForCausalLM"], "num_key_value_heads": 4, "q_lora_rank": 24,
        "kv_lora_rank": 40, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 20,
        "topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1, "head_dim": 8,
    },
    "glm4_moe": GROUPED | {
        "architectures": ["Glm4MoeForCausalLM"], "partial_rotary_factor": 0.5,
        "attention_bias": True, "use_qk_norm": True, "n_group": 1, "topk_group": 1,
    },
}  # fmt: skip


def weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, npt.NDArray[Any]]:
    """Return random weights by name, such that a wrong use of any of them changes the output."""
    return {name: _random(name, tuple(shape)) for name, shape in shapes.items()}


def _random(name: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    # RandomState's streams never change, unlike those of NumPy's newer generators.
    random = np.random.RandomState(zlib.crc32(name.encode()))
    if name.endswith("_blocks"):
        return random.randint(0, 256, shape, np.uint8)
    if name.endswith("_scales"):
        return random.randint(121, 124, shape, np.uint8)  # 2^-6 to 2^-4
    mean, deviation = _spread(name, shape)
    return (mean + deviation * random.standard_normal(shape)).astype(np.float32)


def _spread(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Return mean and deviation of a tensor's weights."""
    if name.endswith("norm.weight"):
        return 1, 0.3
    if name.endswith("embed_tokens.weight"):
        return 0, 1
    if "correction_bias" in name:
        return 0, 0.2
    if len(shape) == 1:
        return 0, 0.5
    # Decisive routing: rounding must not swap the third expert for the fourth.
    return 0, (3 if name.endswith(("router.weight", "mlp.gate.weight")) else 1.5) * shape[
        -1
    ] ** -0.5


def stored_shapes(folder: Path, config: dict[str, Any]) -> dict[str, list[int]]:
    """Return the names and shapes under which a model of this config.json is published."""
    import transformers

    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    built = transformers.AutoConfig.for_model(**plain)
    transformers.AutoModelForCausalLM.from_config(built).save_pretrained(folder)
    shapes: dict[str, list[int]] = {}
    with safe_open(folder / "model.safetensors", "np") as stored:
        for name in sorted(stored.keys()):
            shape = list(stored.get_slice(name).get_shape())
            if plain != config and name.endswith(("gate_up_proj", "down_proj")):
                experts, columns, rows = shape
                shapes[f"{name}_blocks"] = [experts, rows, columns // 32, 16]
                shapes[f"{name}_scales"] = [experts, rows, columns // 32]
            else:
                shapes[name] = shape
    return shapes


def logits(folder: Path) -> list[list[float]]:
    """Return transformers' logits of PROMPT, `[tokens, vocabulary]`."""
    import torch
    import transformers

    quantized = "quantization_config" in json.loads((folder / "config.json").read_text())
    more = {"quantization_config": transformers.Mxfp4Config(dequantize=True)} if quantized else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more)
    with torch.no_grad():
        found = model.eval().float()(input_ids=torch.tensor([PROMPT]), use_cache=False).logits[0]
    return [[round(x, 5) for x in row] for row in found.tolist()]


def main() -> None:
    """Write a fixture for each family."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    for family, own in CONFIGS.items():
        config = {"model_type": family} | COMMON | own
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            shapes = stored_shapes(folder, config)
            save_file(weights(shapes), folder / "model.safetensors", {"format": "pt"})
            (folder / "config.json").write_text(json.dumps(config))
            entry = {
                "made by": versions, "config": config, "shapes": shapes, "prompt": PROMPT,
                "logits": logits(folder),
            }  # fmt: skip
        lines = ",\n".join(f'"{key}": {json.dumps(value)}' for key, value in entry.items())
        (FIXTURES / f"{family}.json").write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
