"""Turn an expert's source bytes into the nine arrays of its record."""

import itertools
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import mlx.core as mx
import numpy as np

from ..plan.parts import LEAST_SQUARES, MIN_MAX, LayerPlan, Projection, Spec
from ..source.read import FLOATS, Bytes, as_array
from .codes import Codes, quantize
from .compensate import Floats, Rounded
from .fit import fit

Part: TypeAlias = mx.array | Bytes


def encode_floats(
    matrices: Sequence[tuple[Bytes, str]], plan: LayerPlan, streams: Iterator[mx.Stream]
) -> list[Part]:
    """Quantize one expert's float matrices, given as (bytes, dtype) in the plan's order.

    Min-max casts to the target dtype first: mlx-lm's order, which changes the codes.
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
    """Requantize one expert's record, and copy projections whose quantization stays.

    Args:
        record: the expert's nine source tensors, end to end.
        before: their dtypes and shapes.
        plan: the layer's plan.
        streams: each projection is computed on the next one.
    """
    parts: list[Part] = []
    for projection, pieces, specs in _split(record, before, plan):
        if projection.copied:
            parts += pieces
        else:
            with mx.stream(next(streams)):
                parts += _quantize(_restored(pieces, specs, projection), projection)
    return parts


def restored_record(record: Bytes, before: Sequence[Spec], plan: LayerPlan) -> list[Floats]:
    """Return an expert's three matrices as float32; see `encode_record` for the arguments."""
    split = _split(record, before, plan)
    return [np.array(_restored(pieces, specs, projection)) for projection, pieces, specs in split]


def encode_calibrated(
    record: Bytes, before: Sequence[Spec], plan: LayerPlan, found: Sequence[Rounded | None]
) -> list[Part]:
    """Return the parts of a record that was quantized for its inputs; None: copied."""
    parts: list[Part] = []
    for (projection, pieces, _), new in zip(_split(record, before, plan), found, strict=True):
        dtype = FLOATS[projection.dtype]
        parts += pieces if new is None else new.packed(projection.after, dtype)
    return parts


def _split(
    record: Bytes, specs: Sequence[Spec], plan: LayerPlan
) -> list[tuple[Projection, list[Bytes], Sequence[Spec]]]:
    """Return each projection with its three tensors and their specs."""
    ends = list(itertools.accumulate(spec.nbytes for spec in specs))
    pieces = [record[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    return [
        (projection, pieces[n : n + 3], specs[n : n + 3])
        for n, projection in zip(range(0, len(specs), 3), plan.projections, strict=True)
    ]


def _restored(pieces: list[Bytes], specs: Sequence[Spec], projection: Projection) -> mx.array:
    """Dequantize a projection to float32."""
    assert projection.before
    arrays = (as_array(data, s.dtype, s.shape) for data, s in zip(pieces, specs, strict=True))
    return Codes(*arrays).restored(projection.before)


def _quantize(weights: mx.array, projection: Projection) -> Codes:
    dtype = FLOATS[projection.dtype]
    if projection.method == LEAST_SQUARES:
        return fit(weights, projection.after, dtype)
    codes, scales, biases = quantize(weights, projection.after)
    return Codes(codes, scales.astype(dtype), biases.astype(dtype))
