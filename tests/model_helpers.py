"""A tiny model with random weights."""

import mlx.core as mx
from mlx.utils import tree_map

from flashmoe_mlx import Model, ModelArgs

CONFIG = {
    "model_type": "qwen3_5_moe_text",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 16,
    "rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.25},
}


def make_model(dtype=mx.float32, **change) -> Model:
    mx.random.seed(0)
    model = Model(ModelArgs.from_dict(CONFIG | change))
    model.update(tree_map(lambda p: p.astype(dtype), model.parameters()))
    model.eval()
    return model


def tokens(*shape: int) -> mx.array:
    return mx.random.randint(0, 100, shape, key=mx.random.key(1))
