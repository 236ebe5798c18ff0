"""Bits per expert matrix: `--quant-predicate`, named as in mlx_lm.convert.

`mixed_LOW_HIGH` is mlx-lm's rule: down projections get HIGH bits in the first and last eighth of
the layers and in every third layer between; every other matrix gets LOW. That rule is made for
dense models; the two other recipes are better at equal size for experts.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ...format.names import PROJECTIONS
from .parts import Quant

LEAST_TRUNK_BITS = 4
LAST = ("down_proj", "fc2")  # an expert's last projection, in SwitchGLU and SwitchMLP

Bits = Callable[[int, str, int], int]  # (layer, projection, number of layers) -> bits


def _by_depth(low: int, high: int) -> Bits:
    """Return the rule of mlx-lm's `mixed_quant_predicate`."""

    def bits(layer: int, projection: str, layers: int) -> int:
        eighth = layers // 8
        outer = layer < eighth or layer >= 7 * layers // 8
        sensitive = outer or (layer - eighth) % 3 == 2
        return high if sensitive and projection in LAST else low

    return bits


def _ends(layer: int, projection: str, layers: int) -> int:
    eighth = max(1, layers // 8)
    return 2 if eighth <= layer < layers - eighth else 4


RECIPES: dict[str, Bits] = {
    "mixed_2_4": _by_depth(2, 4),
    "mixed_2_6": _by_depth(2, 6),
    "mixed_3_4": _by_depth(3, 4),
    "mixed_3_6": _by_depth(3, 6),
    "mixed_4_6": _by_depth(4, 6),
    "mixed_2_2_4": lambda layer, projection, layers: 4 if projection in LAST else 2,
    "mixed_2_4_ends": _ends,
}


@dataclass(frozen=True)
class Target:
    """Quantization to reach: `bits` for every expert, or a `recipe` of RECIPES."""

    layers: int
    group_size: int
    bits: int | None = None
    recipe: str | None = None

    def experts(self, layer: int, projection: str) -> Quant:
        """Return the quantization of one of a layer's projections."""
        bits = self.bits
        if self.recipe:
            bits = RECIPES[self.recipe](layer, projection, self.layers)
        assert bits
        return Quant(bits, self.group_size)

    @property
    def lowest(self) -> int:
        """The fewest bits of any expert matrix."""
        return min(self.experts(n, name).bits for n in range(self.layers) for name in PROJECTIONS)

    @property
    def trunk(self) -> Quant:
        """Quantization of everything but experts."""
        return Quant(max(self.lowest, LEAST_TRUNK_BITS), self.group_size)
