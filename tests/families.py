"""A tiny checkpoint of random weights for every mixture of experts that mlx-lm has."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path
from mlx_lm.utils import _get_classes, quantize_model, save_config, save_model

EXPERTS, TOP_K, VOCABULARY = 12, 3, 256
LAYERS = 3

# By config key, for whatever family has it; a family's `from_dict` drops the others.
TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "num_layers": LAYERS,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "layer_norm_epsilon": 1e-6,
    "layernorm_epsilon": 1e-6,
    "norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    # attention
    "num_attention_heads": 4,
    "num_attention_groups": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "attention_bias": False,
    "use_qk_norm": True,
    "sliding_window": 32,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "index_n_heads": 2,
    "index_head_dim": 32,
    "index_topk": 64,
    # mixture of experts
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "share_expert_dim": 32,
    "num_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "num_experts_per_token": TOP_K,
    "moe_top_k": TOP_K,
    "moe_topk": TOP_K,
    "moe_k": TOP_K,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [0],
    "moe_layer_freq": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "n_group": 2,
    "topk_group": 1,
    # recurrent layers
    "layer_group_size": 2,
    "group_norm_size": 2,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
}
LINEAR_ATTENTION = {
    "kda_layers": [1, 3],
    "full_attn_layers": [2],
    "num_heads": 4,
    "head_dim": 32,
    "short_conv_kernel_size": 4,
}
SLIDING_AND_FULL = ["sliding_attention", "full_attention", "sliding_attention"]
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
YARN = ROPE | {
    "type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256, "mscale": 1.0,
    "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1,
}  # fmt: skip
GEMMA = {
    "enable_moe_block": True, "top_k_experts": TOP_K, "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": VOCABULARY,
    "global_head_dim": 16, "sliding_window_pattern": 2,
}  # fmt: skip
GRANITE = {
    "logits_scaling": 1.0, "attention_multiplier": 0.25, "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
}  # fmt: skip
LONGCAT = {
    "attention_method": "MLA", "zero_expert_type": "identity", "zero_expert_num": 4,
    "ffn_hidden_size": 64, "expert_ffn_hidden_size": 32, "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True, "num_layers": 2,
}  # fmt: skip

# What a family needs besides, or otherwise. "text_config" marks families that nest their entries.
# fmt: off
FAMILIES: dict[str, dict[str, Any]] = {
    "Klear": {},
    "afmoe": {"layer_types": SLIDING_AND_FULL},
    "bailing_hybrid": {"use_bias": False},
    "bailing_moe": {"partial_rotary_factor": 1.0},
    "bailing_moe_linear": {},
    "bailing_moe_v3": {
        "model_type": "bailing_hybrid", "architectures": ["BailingMoeV3ForCausalLM"],
    },
    "deepseek": {},
    "deepseek_v2": {"topk_method": "group_limited_greedy", "rope_scaling": YARN},
    "deepseek_v3": {},
    "deepseek_v32": {},
    "glm_moe_dsa": {"rope_parameters": ROPE},
    "kimi_k25": {"text_config": {}},
    "kimi_vl": {"text_config": {}},
    "deepseek_v41": {},
    "dots1": {},
    "ernie4_5_moe": {"use_bias": True},
    "exaone_moe": {"layer_types": SLIDING_AND_FULL, "is_moe_layer": [False, True, True]},
    "gemma4": {"text_config": GEMMA, "vocab_size": VOCABULARY},
    "gemma4_text": GEMMA,
    "glm4_moe": {"rope_scaling": None},
    "solar_open": {},
    "glm4_moe_lite": {},
    "gpt_oss": {"layer_types": SLIDING_AND_FULL},
    "granitemoe": GRANITE,
    "granitemoehybrid": GRANITE | {
        "layer_types": ["mamba", "attention", "mamba"], "position_embedding_type": "nope",
        "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_proj_bias": False, "mamba_d_state": 16,
        "mamba_d_conv": 4, "mamba_n_groups": 2, "mamba_conv_bias": True,
    },
    "hunyuan": {
        "moe_topk": [2, 3, 1], "moe_intermediate_size": [32, 64, 96], "num_shared_expert": 1,
        "use_mixed_mlp_moe": True, "use_cla": True, "cla_share_factor": 2,
        "rope_scaling": {"alpha": 10.0, "factor": 1.0, "type": "dynamic"},
    },
    "jamba": {
        "attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1,
        "expert_layer_period": 2, "num_hidden_layers": 4, "mamba_d_conv": 4, "mamba_d_state": 16,
        "mamba_expand": 2,
    },
    "kimi_k3": {"text_config": {"linear_attn_config": LINEAR_ATTENTION}},
    "kimi_linear": {"linear_attn_config": LINEAR_ATTENTION, "model_max_length": 512},
    "laguna": {},
    "lfm2_moe": {
        "use_expert_bias": True, "conv_bias": False, "conv_L_cache": 3,
        "layer_types": ["conv", "full_attention", "conv"],
    },
    "llama4": {
        "text_config": {
            "attention_chunk_size": 32, "interleave_moe_layer_step": 2, "num_hidden_layers": 4,
            "intermediate_size_mlp": 64, "rope_scaling": None, "num_experts_per_tok": 1,
        }
    },
    "longcat_flash": LONGCAT,
    "longcat_flash_ngram": LONGCAT | {"ngram_vocab_size_ratio": 2},
    "mellum": {
        "layer_types": SLIDING_AND_FULL,
        "rope_parameters": {kind: ROPE for kind in SLIDING_AND_FULL[:2]},
    },
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1, 1], "moe_layer_freq": [0, 1, 1], "sliding_window_size": 32,
        "add_swa_attention_sink_bias": True, "add_full_attention_sink_bias": False,
        "swa_rope_theta": 10000.0, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
        "swa_head_dim": 16, "swa_v_head_dim": 16,
    },
    "minimax": {"rotary_dim": 8},
    "minimax_m3_vl": {
        "text_config": {
            "moe_layer_freq": [0, 1, 1], "intermediate_size": 32, "dense_intermediate_size": 64,
        }
    },
    "mistral4": {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.1}},
    "mixtral": {},
    "phimoe": {},
    "muse_spark": {
        "text_config": {
            "post_norm_eps": 1e-6, "rope_parameters": ROPE, "layer_rope_theta": [1e4, 0, 1e4],
            "layer_types": SLIDING_AND_FULL, "final_logit_softcapping": 30.0,
            "output_multiplier": 1.0, "moe_hidden_size": 32, "num_shared_experts": 0,
        }
    },
    "nemotron_h": {
        "hybrid_override_pattern": ["M", "E", "*", "E"], "moe_latent_size": 32,
        "moe_shared_expert_intermediate_size": 32, "mamba_num_heads": 4, "mamba_head_dim": 32,
        "mamba_proj_bias": False, "ssm_state_size": 16, "conv_kernel": 4, "n_groups": 2,
        "mlp_bias": False, "use_bias": False, "use_conv_bias": True,
    },
    "olmoe": {},
    "phixtral": {"model_dim": 64, "num_vocab": VOCABULARY, "num_heads": 4, "rotary_dim": 8},
    "qwen2_moe": {},
    "qwen3_moe": {},
    "qwen3_vl_moe": {"text_config": {}},
    "qwen3_next": {},
    "qwen3_5_moe": {"text_config": {}},
    "step3p5": {},
}
# fmt: on


def affine(bits: int, group_size: int = 32) -> dict[str, Any]:
    """Return the arguments of mlx-lm's `quantize_model`."""
    return {"bits": bits, "group_size": group_size, "mode": "affine"}


def floats(mode: str, bits: int, group_size: int) -> dict[str, Any]:
    """Return the arguments of mlx-lm's `quantize_model` for a mode of MLX without biases."""
    return {"bits": bits, "group_size": group_size, "mode": mode}


# (quantization, dtype), dealt out to the families in turn. With group size 64, matrices of 32
# columns stay unquantized beside quantized ones.
MODES: list[tuple[dict[str, Any], mx.Dtype]] = [
    (affine(4), mx.float32),
    (affine(2), mx.float32),
    (affine(3), mx.float32),
    (affine(5), mx.float32),
    (affine(6), mx.float32),
    (affine(8), mx.float32),
    (floats("mxfp4", 4, 32), mx.float32),
    (floats("mxfp8", 8, 32), mx.float32),
    (floats("nvfp4", 4, 16), mx.float32),
    ({}, mx.float32),
    (affine(4, 64), mx.float32),
    (affine(4), mx.bfloat16),
    (floats("mxfp4", 4, 32), mx.bfloat16),
    ({}, mx.bfloat16),
]


def mode_of(family: str) -> tuple[dict[str, Any], mx.Dtype]:
    """Return a family's quantization and dtype; gpt_oss has its published one."""
    if family == "gpt_oss":
        return floats("mxfp4", 4, 32), mx.bfloat16
    return MODES[list(FAMILIES).index(family) % len(MODES)]


def config_of(family: str) -> dict[str, Any]:
    """Return the config.json of a family's tiny model, unquantized."""
    own = FAMILIES[family]
    name = {"model_type": own.get("model_type", family)}
    if "text_config" in own:
        text = TINY | {"model_type": family} | own["text_config"]
        return name | {k: v for k, v in own.items() if k != "text_config"} | {"text_config": text}
    return TINY | name | own


def make(family: str, directory: Path, quantization: dict[str, Any], dtype=mx.float32) -> nn.Module:
    """Write a family's tiny checkpoint as mlx_lm.convert does, and return stock's model.

    Args:
        family: a key of `FAMILIES`.
        directory: to write.
        quantization: "bits", "group_size", "mode"; {} leaves the weights as they are.
        dtype: of the weights.
    """
    mx.random.seed(0)
    config = config_of(family)
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(json.loads(json.dumps(config))))
    model.update(tree_map_with_path(lambda name, p: _random(p).astype(dtype), model.parameters()))
    if quantization:
        model, config = quantize_model(model, config, **quantization)
    save_model(directory, model)
    save_config(dict(config), directory / "config.json")
    model.eval()
    return model


def _random(p: mx.array) -> mx.array:
    """Return weights that keep the sizes of activations, so that tokens and logits differ."""
    if p.ndim < 2:
        return p + 0.1 * mx.random.normal(p.shape)
    return mx.random.normal(p.shape) * p.shape[-1] ** -0.5
