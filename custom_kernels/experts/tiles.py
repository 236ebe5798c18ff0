"""Many tokens' experts on a GPU: pairs of token and expert cut into tiles, and their sums."""

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
EIGHT = 8  # columns that a lane reads at once
_tiles = Kernel("experts/tiles", ("slots", "counts"), ("rows", "tile_slots", "places"))
_take = Kernel(
    "experts/take_rows", ("x", "tokens", "rows"), ("y",), ("affine.metal", "write.metal")
)
_combine = Kernel(
    "experts/combine", ("outputs", "places", "weights"), ("y",), ("affine.metal", "write.metal")
)


class Tiles(NamedTuple):
    """Pairs of token and expert, cut into tiles that have one expert each.

    Attributes:
        rows: `[tiles, rows]` uint32, the pair in each row, 0 where there is none.
        slots: `[tiles]` uint32, ascending. There may be tiles without pairs at the end.
        places: `[pairs]` uint32, which row of all tiles each pair has.
    """

    rows: mx.array
    slots: mx.array
    places: mx.array


def most_tiles(pairs: int, slots: int, rows: int) -> int:
    """Return how many tiles of `rows` pairs can need, however they are spread over slots."""
    return (pairs + min(slots, pairs) * (rows - 1)) // rows


def cut(slots: mx.array, of: int, rows: int) -> Tiles:
    """Cut pairs into tiles, by the GPU kernel; the host need not know how they are spread.

    Args:
        slots: `[pairs]` uint32, the slot of each pair's expert.
        of: slots of the bank.
        rows: of a tile.
    """
    pairs = slots.size
    expect("slots of experts", slots, (pairs,), mx.uint32)
    tiles = most_tiles(pairs, of, rows)
    counts = mx.zeros(of, mx.uint32).at[slots].add(mx.ones(pairs, mx.uint32))
    return Tiles(
        *_tiles(
            [slots, counts],
            [((tiles, rows), mx.uint32), ((tiles,), mx.uint32), ((pairs,), mx.uint32)],
            (of, 1, 1),
            TILES_LANES,
            SLOTS=of,
            ROWS=rows,
        )
    )


def take_rows(x: mx.array, tokens: mx.array, tiles: Tiles) -> mx.array:
    """Return the rows of x that belong in tiles, `[tiles, rows, H]`.

    By the GPU kernel, if its 16-byte loads fit; MLX moves an element at a time.

    Args:
        x: `[N, H]`.
        tokens: `[pairs]` uint32, the row of x of each pair.
        tiles: of the pairs.
    """
    hidden, rows = x.shape[-1], tiles.rows
    expect("tokens", x, (len(x), hidden))
    expect("the token of each pair", tokens, (tokens.size,), mx.uint32)
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
    """Add up what each token's experts gave.

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
    """Do what `combine` does in one launch, with float32 sums."""
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
    """Do what `combine` does with MLX's own ops."""
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
        """Make twice as many outputs as are used, places and weights."""
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
