"""Bits matrix by matrix: `--quant-predicate`, with names in mlx_lm.convert's style.

`mixed_LOW_HIGH` is mlx-lm's own rule: down projections have HIGH bits in the first and the last
eighth of the layers and in every third one between, and everything else has LOW. Its rule is for
dense models; for experts two more are named, which give equal sizes a better use.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ...errors import FlashMoEError
from .parts import Quant

TRUNK_BITS = 4  # at least

Bits = Callable[[int, str, int], int]  # of layer, projection and number of layers


def _by_depth(low: int, high: int) -> Bits:
    """Choose as mlx-lm's `mixed_quant_predicate` does."""

    def bits(layer: int, projection: str, layers: int) -> int:
        eighth = layers // 8
        outer = layer < eighth or layer >= 7 * layers // 8
        sensitive = outer or (layer - eighth) % 3 == 2
        return high if sensitive and projection == "down_proj" else low

    return bits


def _ends(low: int, high: int) -> Bits:
    """Give whole layers more bits: the first and the last eighth, one at least of each."""

    def bits(layer: int, projection: str, layers: int) -> int:
        eighth = max(1, layers // 8)
        return low if eighth <= layer < layers - eighth else high

    return bits


def _by_matrix(gate: int, up: int, down: int) -> Bits:
    """Give the same to every layer."""
    of = {"gate_proj": gate, "up_proj": up, "down_proj": down}
    return lambda layer, projection, layers: of[projection]


RECIPES: dict[str, Bits] = {
    "mixed_2_4": _by_depth(2, 4),
    "mixed_2_6": _by_depth(2, 6),
    "mixed_3_4": _by_depth(3, 4),
    "mixed_3_6": _by_depth(3, 6),
    "mixed_4_6": _by_depth(4, 6),
    "mixed_2_2_4": _by_matrix(2, 2, 4),
    "mixed_2_4_ends": _ends(2, 4),
}


@dataclass(frozen=True)
class Target:
    """How to quantize a model whose experts have `layers` layers.

    Attributes:
        layers: of the model.
        group_size: weights that share a scale and a bias.
        bits: of every expert's weight, or
        recipe: a name in RECIPES.
    """

    layers: int
    group_size: int
    bits: int | None = None
    recipe: str | None = None

    def experts(self, layer: int, projection: str) -> Quant:
        """Return how one layer's gate_proj, up_proj or down_proj is quantized."""
        bits = self.bits
        if self.recipe:
            bits = RECIPES[self.recipe](layer, projection, self.layers)
        assert bits
        return Quant(bits, self.group_size)

    @property
    def lowest(self) -> int:
        """The fewest bits that any expert's matrix gets."""
        names = "gate_proj", "up_proj", "down_proj"
        return min(self.experts(n, name).bits for n in range(self.layers) for name in names)

    @property
    def trunk(self) -> Quant:
        """How what is not an expert is quantized: by the fewest bits, and by 4 at least."""
        return Quant(max(self.lowest, TRUNK_BITS), self.group_size)


def check_recipe(name: str) -> None:
    """Refuse a name that is none of RECIPES."""
    if name not in RECIPES:
        raise FlashMoEError(
            f"--quant-predicate {name}: no such recipe. Choose among {', '.join(RECIPES)}."
        )
