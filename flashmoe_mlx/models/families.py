"""The sizes of published models that mlx-lm's own code computes, named as in config.json."""

from typing import NamedTuple

from .qwen3_5.geometry import GEOMETRIES


class Family(NamedTuple):
    """One model: its experts, and the number of weights of everything else.

    Attributes:
        layers: those with routed experts.
        trunk: weights outside of the routed experts.
        table: those of them in the embedding, of which a token reads one row.
        expert_bits: per weight of the experts as published for MLX, scales included.
    """

    layers: int
    num_experts: int
    num_experts_per_tok: int
    hidden_size: int
    moe_intermediate_size: int
    trunk: int
    table: int
    expert_bits: float = 4.5


FAMILIES = {
    "gpt-oss-120b": Family(36, 128, 4, 2880, 2880, 2_127_557_952, 579_133_440, 4.25),
    "qwen3-next-80b": Family(48, 512, 10, 2048, 512, 2_364_979_968, 311_164_928),
    "qwen3-235b": Family(94, 128, 8, 4096, 1536, 7_997_238_784, 622_329_856),
    "glm-4.5-air": Family(45, 128, 8, 4096, 1408, 7_195_588_224, 620_756_992),
    "glm-5": Family(75, 256, 8, 6144, 2048, 19_135_487_232, 951_582_720),
    "deepseek-v3": Family(58, 256, 8, 7168, 2048, 17_117_648_384, 926_679_040),
    "kimi-k2": Family(60, 384, 8, 7168, 2048, 11_722_208_768, 1_174_405_120),
    "minimax-m2": Family(62, 256, 8, 3072, 1536, 4_009_288_192, 614_596_608),
}
SHAPES: dict[str, NamedTuple] = {**GEOMETRIES, **FAMILIES}
