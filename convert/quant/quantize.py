"""Turn an expert's source bytes into the nine arrays of its record."""

import itertools
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import mlx.core as mx

from ..plan.parts import LEAST_SQUARES, MIN_MAX, LayerPlan, Projection, Spec
from ..source.read import FLOATS, Bytes, as_array
from .calibrate import LayerInputs
from .codes import Codes, quantize
from .fit import fit

Part: TypeAlias = mx.array | Bytes


def encode_floats(
    matrices: Sequence[tuple[Bytes, str]], plan: LayerPlan, streams: Iterator[mx.Stream]
) -> list[Part]:
    """Quantize one expert's float matrices, given as (bytes, dtype) in the plan's order.

    By extremes the cast to the target dtype comes first: mlx-lm's order, and it changes the codes.
    """
    parts: list[Part] = []
    for (data, dtype), projection in zip(matrices, plan.projections, strict=True):
        with mx.stream(next(streams)):
            weights = as_array(data, dtype, (projection.rows, projection.columns))
            if projection.method == MIN_MAX:
                weights = weights.astype(FLOATS[projection.dtype])
            parts += _quantize(weights, projection)
    return parts


def encode_record(
    record: Bytes, before: Sequence[Spec], plan: LayerPlan, streams: Iterator[mx.Stream]
) -> list[Part]:
    """Requantize one expert's record where bits or group size change, and copy it elsewhere.

    Args:
        record: the nine tensors of the expert as the source has them, end to end.
        before: their dtypes and shapes.
        plan: the layer's plan.
        streams: each projection is computed on the next one.
    """
    pieces = _cut(record, before)
    parts: list[Part] = []
    for index, projection in enumerate(plan.projections):
        own = slice(3 * index, 3 * index + 3)
        if projection.copied:
            parts += pieces[own]
        else:
            with mx.stream(next(streams)):
                parts += _quantize(_restored(pieces[own], before[own], projection), projection)
    return parts


def encode_calibrated(
    record: Bytes, before: Sequence[Spec], plan: LayerPlan, expert: int, seen: LayerInputs
) -> list[Part]:
    """Do what `encode_record` does, for what an expert sees of a text."""
    pieces = _cut(record, before)
    owns = [slice(3 * index, 3 * index + 3) for index in range(len(plan.projections))]
    matrices = [
        _restored(pieces[own], before[own], projection)
        for own, projection in zip(owns, plan.projections, strict=True)
    ]
    found = seen.quantize(expert, matrices, plan.projections)
    parts: list[Part] = []
    for own, projection, codes in zip(owns, plan.projections, found, strict=True):
        parts += pieces[own] if projection.copied else codes
    return parts


def _cut(record: Bytes, specs: Sequence[Spec]) -> list[Bytes]:
    """Cut a record into its tensors."""
    ends = list(itertools.accumulate(spec.nbytes for spec in specs))
    return [record[a:b] for a, b in zip([0, *ends], ends, strict=False)]


def _restored(pieces: list[Bytes], specs: Sequence[Spec], projection: Projection) -> mx.array:
    """Return a projection's weights as float32."""
    assert projection.before
    arrays = (as_array(data, s.dtype, s.shape) for data, s in zip(pieces, specs, strict=True))
    return Codes(*arrays).restored(projection.before)


def _quantize(weights: mx.array, projection: Projection) -> Codes:
    dtype = FLOATS[projection.dtype]
    if projection.method == LEAST_SQUARES:
        return fit(weights, projection.after, dtype)
    codes, scales, biases = quantize(weights, projection.after)
    return Codes(codes, scales.astype(dtype), biases.astype(dtype))
