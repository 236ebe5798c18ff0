"""The sizes of the published Qwen3.5 MoE models, named as in config.json."""

from typing import NamedTuple


class Geometry(NamedTuple):
    """One model's sizes: fields of config.json's text_config."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int


GEOMETRIES = {
    "tiny": Geometry(128, 4, 4, 2, 32, 2, 4, 32, 16, 16, 4, 64),
    "35b": Geometry(2048, 40, 16, 2, 256, 16, 32, 128, 128, 256, 8, 512),
    "122b": Geometry(3072, 48, 32, 2, 256, 16, 64, 128, 128, 256, 8, 1024),
    "397b": Geometry(4096, 60, 32, 2, 256, 16, 64, 128, 128, 512, 10, 1024),
}
