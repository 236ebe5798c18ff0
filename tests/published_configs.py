"""config.json of published models of other families, from the defaults that transformers has."""

from typing import Any

from transformers import AutoConfig

# What transformers' defaults lack, or have for another model of the family.
OWN: dict[str, dict[str, Any]] = {
    "gpt-oss-120b": {"model_type": "gpt_oss"},
    "qwen3-next-80b": {
        "model_type": "qwen3_next", "full_attention_interval": 4, "partial_rotary_factor": 0.25,
    },
    "qwen3-235b": {
        "model_type": "qwen3_moe", "hidden_size": 4096, "num_hidden_layers": 94, "head_dim": 128,
        "num_attention_heads": 64, "num_key_value_heads": 4, "moe_intermediate_size": 1536,
        "intermediate_size": 12288, "num_experts": 128,
    },
    "glm-4.5-air": {
        "model_type": "glm4_moe", "hidden_size": 4096, "num_hidden_layers": 46,
        "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_attention_heads": 96,
        "num_key_value_heads": 8, "head_dim": 128, "n_routed_experts": 128, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "vocab_size": 151552, "attention_bias": True,
        "partial_rotary_factor": 0.5, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    },
    "glm-5": {
        "model_type": "glm_moe_dsa", "topk_method": "noaux_tc", "scoring_func": "sigmoid",
        "moe_layer_freq": 1,
    },
    "deepseek-v3": {"model_type": "deepseek_v3"},
    "kimi-k2": {
        "model_type": "kimi_k2", "vocab_size": 163840, "n_routed_experts": 384,
        "num_attention_heads": 64, "num_key_value_heads": 64, "first_k_dense_replace": 1,
        "n_group": 1, "topk_group": 1,
    },
    "minimax-m2": {
        "model_type": "minimax_m2", "num_local_experts": 256, "num_experts_per_tok": 8,
        "shared_intermediate_size": 0, "rotary_dim": 64, "scoring_func": "sigmoid",
    },
}  # fmt: skip


def published_config(name: str) -> dict[str, Any]:
    own = OWN[name]
    kind = {"kimi_k2": "deepseek_v3"}.get(own["model_type"], own["model_type"])
    default = AutoConfig.for_model(kind).to_dict()
    rope = {"rope_theta": 10000.0, "rope_scaling": None, "use_qk_norm": True}
    return rope | default | own
