"""Arrays side by side in one buffer: the host takes a microsecond for each array of a launch."""

from collections.abc import Sequence
from itertools import accumulate
from math import prod
from typing import NamedTuple

import mlx.core as mx

ALIGNED = 16  # bytes, as kernels read at once


class Part(NamedTuple):
    """A range of a buffer, which kernels take in the place of an array.

    Attributes:
        array: the array, a view of the buffer.
        buffer: `[words]` uint32.
        offset: bytes.
    """

    array: mx.array
    buffer: mx.array
    offset: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return self.array.shape

    @property
    def dtype(self) -> mx.Dtype:
        """The array's dtype."""
        return self.array.dtype


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNED) * ALIGNED


def parts_of(buffer: mx.array, shapes: Sequence[tuple[Sequence[int], mx.Dtype]]) -> list[Part]:
    """Return evaluated views of a buffer, one after the other; see `room`.

    Args:
        buffer: `[words]` uint32.
        shapes: shape and dtype of each, of whole words.
    """
    sizes = [_padded(prod(shape) * dtype.size) for shape, dtype in shapes]
    parts = []
    for (shape, dtype), start in zip(shapes, accumulate(sizes, initial=0), strict=False):
        words = buffer[start // 4 : start // 4 + -(-prod(shape) * dtype.size // 4)]
        view = words.view(dtype)[: prod(shape)].reshape(shape)
        parts.append(Part(view, buffer, start))
    mx.eval([part.array for part in parts])
    return parts


def room(shapes: Sequence[tuple[Sequence[int], mx.Dtype]]) -> int:
    """Return the words of a buffer for arrays."""
    return sum(_padded(prod(shape) * dtype.size) for shape, dtype in shapes) // 4


def pack(*columns: Sequence[mx.array]) -> list[Part]:
    """Copy arrays into one buffer; those of a column follow each other as one array.

    Args:
        columns: arrays of one dtype that differ in their first dimension only.
    """
    shapes = [
        ((sum(len(x) for x in column), *column[0].shape[1:]), column[0].dtype) for column in columns
    ]
    pieces = []
    for column, (shape, dtype) in zip(columns, shapes, strict=True):
        nbytes = prod(shape) * dtype.size
        pieces += [x.reshape(-1).view(mx.uint8) for x in column]
        pieces.append(mx.zeros(_padded(nbytes) - nbytes, mx.uint8))
    buffer = mx.concatenate(pieces).view(mx.uint32)
    mx.eval(buffer)
    return parts_of(buffer, shapes)
