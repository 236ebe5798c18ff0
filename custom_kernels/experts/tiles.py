"""Experts of many tokens on a GPU: tiles of token-expert assignments, and weighted sums."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import mlx.core as mx

from ..autotune import prefers_custom
from ..case import DTYPES, NAMES
from ..device import on_gpu
from ..launch import Kernel
from ..op import Op
from ..shapes import expect

TILES_LANES, LANES = 256, 128
EIGHT = 8  # columns per lane and read
_tiles = Kernel("experts/tiles", ("slots", "counts"), ("rows", "tile_slots", "places"))
_take = Kernel(
    "experts/take_rows", ("x", "tokens", "rows"), ("y",), ("affine.metal", "write.metal")
)
_combine = Kernel(
    "experts/combine", ("outputs", "places", "weights"), ("y",), ("affine.metal", "write.metal")
)


class Tiles(NamedTuple):
    """Token-expert assignments, cut into tiles of one expert each.

    Attributes:
        rows: `[tiles, rows]` uint32, the assignment in each row, 0 if unused.
        slots: `[tiles]` uint32, ascending; the last tiles may be unused.
        places: `[assignments]` uint32, the row of each, counted over all tiles.
    """

    rows: mx.array
    slots: mx.array
    places: mx.array


def most_tiles(assignments: int, slots: int, rows: int) -> int:
    """Return the most tiles of `rows` that assignments need under any distribution over slots."""
    return (assignments + min(slots, assignments) * (rows - 1)) // rows


def cut(slots: mx.array, slot_count: int, rows: int) -> Tiles:
    """Cut assignments into tiles, by the GPU kernel; the host needs no counts per slot.

    Args:
        slots: `[assignments]` uint32, the slot of each.
        slot_count: slots of the layer.
        rows: rows of a tile.
    """
    count = slots.size
    expect("slots of experts", slots, (count,), mx.uint32)
    tiles = most_tiles(count, slot_count, rows)
    each = mx.arange(slot_count, dtype=mx.uint32)[:, None]
    counts = (slots == each).sum(axis=1).astype(mx.uint32)
    return Tiles(
        *_tiles(
            [slots, counts],
            [((tiles, rows), mx.uint32), ((tiles,), mx.uint32), ((count,), mx.uint32)],
            (slot_count, 1, 1),
            TILES_LANES,
            SLOTS=slot_count,
            ROWS=rows,
        )
    )


def take_rows(x: mx.array, tokens: mx.array, tiles: Tiles) -> mx.array:
    """Return the rows of x in tile order, `[tiles, rows, H]`.

    The GPU kernel moves 16 bytes at a time, if H allows; MLX moves one element.

    Args:
        x: `[N, H]`.
        tokens: `[assignments]` uint32, the row of x of each.
        tiles: tiles of the assignments.
    """
    hidden, rows = x.shape[-1], tiles.rows
    expect("tokens", x, (len(x), hidden))
    expect("the token of each assignment", tokens, (tokens.size,), mx.uint32)
    if hidden % EIGHT:
        return x[tokens[rows]]
    (y,) = _take(
        [x, tokens, rows],
        [((*rows.shape, hidden), x.dtype)],
        (-(-hidden // (EIGHT * LANES)), rows.size, 1),
        LANES,
        COLUMNS=hidden,
    )
    return y


@Op
def combine(outputs: mx.array, places: mx.array, weights: mx.array) -> mx.array:
    """Return the weighted sum of each token's expert outputs.

    Args:
        outputs: `[rows, H]`.
        places: `[N, K]` uint32, the rows of each token.
        weights: `[N, K]`, the router's.

    Returns:
        `[N, H]` in the outputs' dtype.
    """
    return combine_by_mlx(outputs, places, weights)


@combine.register
def _combine_by_gpu(outputs: mx.array, places: mx.array, weights: mx.array) -> mx.array | None:
    hidden = outputs.shape[-1]
    kind, weight_kind = NAMES.get(outputs.dtype), NAMES.get(weights.dtype)
    if not (on_gpu(outputs) and hidden % EIGHT == 0 and kind and weight_kind):
        return None
    case = CombineCase(hidden, places.shape[-1], kind, weight_kind)
    return combine_by_kernel(outputs, places, weights) if prefers_custom(case) else None


def combine_by_kernel(outputs: mx.array, places: mx.array, weights: mx.array) -> mx.array:
    """Compute `combine` in one launch, with float32 sums."""
    (tokens, top_k), hidden = places.shape, outputs.shape[-1]
    expect("outputs of experts", outputs, (len(outputs), hidden))
    expect("places of outputs", places, (tokens, top_k), mx.uint32)
    expect("weights of experts", weights, (tokens, top_k))
    (y,) = _combine(
        [outputs, places, weights],
        [((tokens, hidden), outputs.dtype)],
        (-(-hidden // (EIGHT * LANES)), tokens, 1),
        LANES,
        COLUMNS=hidden,
        K=top_k,
    )
    return y


def combine_by_mlx(outputs: mx.array, places: mx.array, weights: mx.array) -> mx.array:
    """Compute `combine` by MLX's own ops."""
    return (outputs[places] * weights[..., None].astype(outputs.dtype)).sum(axis=-2)


@dataclass(frozen=True)
class CombineCase:
    """`combine` at one shape; see `case.KernelCase`."""

    op: ClassVar[str] = "expert_combine"
    hidden: int
    top_k: int
    dtype: str
    weight_dtype: str
    tokens: int = 256

    @property
    def nbytes(self) -> int:
        """Bytes of the outputs and of their sums."""
        return self.tokens * (self.top_k + 1) * self.hidden * DTYPES[self.dtype].size

    def inputs(self, seed: int = 0) -> list[mx.array]:
        """Make outputs (twice as many as used), places and weights."""
        keys = mx.random.split(mx.random.key(seed), 3)
        used = self.tokens * self.top_k
        outputs = mx.random.normal((2 * used, self.hidden), key=keys[0])
        places = mx.random.permutation(2 * used, key=keys[1])[:used].astype(mx.uint32)
        shape = self.tokens, self.top_k
        weights = mx.random.uniform(shape=shape, key=keys[2]).astype(DTYPES[self.weight_dtype])
        arrays = [outputs.astype(DTYPES[self.dtype]), places.reshape(shape), weights]
        mx.eval(arrays)
        return arrays

    def custom(self, *inputs: mx.array) -> list[mx.array]:
        """Compute by our kernel."""
        return [combine_by_kernel(*inputs)]

    def stock(self, *inputs: mx.array) -> list[mx.array]:
        """Compute by MLX's own ops."""
        return [combine_by_mlx(*inputs)]

    def reference(self, *inputs: mx.array) -> list[mx.array]:
        """Compute in float32."""
        outputs, places, weights = inputs
        each = outputs[places].astype(mx.float32)
        return [(each * weights[..., None].astype(mx.float32)).sum(axis=-2)]
