"""Turn an expert's source bytes into the arrays of its record."""

import itertools
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import mlx.core as mx
import numpy as np

from ...errors import FlashMoEError
from ..plan.parts import LEAST_SQUARES, MIN_MAX, LayerPlan, Projection, Spec
from ..source.arrays import FLOATS, as_array
from ..source.read import Bytes
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
            parts += _quantize(_cast(weights, projection), projection)
    return parts


def encode_fields(
    fields: dict[str, mx.array], projections: Sequence[Projection], place: str
) -> list[Part]:
    """Quantize or copy one expert's fields, which mlx-lm's `sanitize` made; `place` names it.

    Raises:
        FlashMoEError: a field is not finite.
    """
    parts: list[Part] = []
    for projection in projections:  # one by one: a large expert's floats take memory
        prefix = f"{projection.name}."
        names = [name for name in fields if name.startswith(prefix)]
        mine = {name.removeprefix(prefix): mx.contiguous(fields.pop(name)) for name in names}
        mx.eval(mine)
        for name, array in mine.items():
            if mx.issubdtype(array.dtype, mx.floating) and not mx.isfinite(array).all():
                raise FlashMoEError(
                    f"{place} {prefix}{name} holds NaN or infinity. Download the checkpoint "
                    "again, or convert it with mlx_lm.convert."
                )
        if projection.copied:
            parts += [mine[spec.name.removeprefix(prefix)] for spec in projection.outputs]
            continue
        made = [*_quantize(_restored(mine, projection), projection), *_extras(mine, projection)]
        mx.eval(made)
        parts += made
    return parts


def encode_record(
    record: Bytes, before: Sequence[Spec], plan: LayerPlan, streams: Iterator[mx.Stream]
) -> list[Part]:
    """Quantize one expert's record, and copy projections whose quantization stays.

    Args:
        record: the expert's source tensors, end to end.
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
                arrays = _arrays(pieces, specs)
                parts += _quantize(_restored(arrays, projection), projection)
                parts += _extras(arrays, projection)
    return parts


def restored_record(record: Bytes, before: Sequence[Spec], plan: LayerPlan) -> list[Floats]:
    """Return an expert's three matrices as float32; see `encode_record` for the arguments."""
    split = _split(record, before, plan)
    return [np.array(_restored(_arrays(pieces, specs), p)) for p, pieces, specs in split]


def encode_calibrated(
    record: Bytes, before: Sequence[Spec], plan: LayerPlan, found: Sequence[Rounded | None]
) -> list[Part]:
    """Return the parts of a record that was quantized for its inputs; None: copied."""
    parts: list[Part] = []
    for (projection, pieces, _), new in zip(_split(record, before, plan), found, strict=True):
        after = projection.after
        parts += new.packed(after, FLOATS[projection.dtype]) if new and after else pieces
    return parts


def _split(
    record: Bytes, specs: Sequence[Spec], plan: LayerPlan
) -> list[tuple[Projection, list[Bytes], Sequence[Spec]]]:
    """Return each projection with its tensors and their specs."""
    ends = list(itertools.accumulate(spec.nbytes for spec in specs))
    pieces = [record[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    mine = [
        [n for n, s in enumerate(specs) if s.name.startswith(f"{p.name}.")]
        for p in plan.projections
    ]
    return [
        (projection, [pieces[n] for n in places], [specs[n] for n in places])
        for projection, places in zip(plan.projections, mine, strict=True)
    ]


def _arrays(pieces: list[Bytes], specs: Sequence[Spec]) -> dict[str, mx.array]:
    """Return a projection's tensors by the last part of their names."""
    return {
        spec.name.rpartition(".")[2]: as_array(data, spec.dtype, spec.shape)
        for data, spec in zip(pieces, specs, strict=True)
    }


def _restored(arrays: dict[str, mx.array], projection: Projection) -> mx.array:
    """Return a projection's matrix in floats, from its parts by name: float32 if quantized."""
    if (quant := projection.before) is None:
        return _cast(arrays["weight"], projection)
    if quant.mode == "affine":
        return Codes(*(arrays[part] for part in ("weight", "scales", "biases"))).restored(quant)
    return mx.dequantize(
        arrays["weight"], arrays["scales"], None, quant.group_size, quant.bits, quant.mode,
        arrays.get("global_scale"), mx.float32,
    )  # fmt: skip


def _extras(arrays: dict[str, mx.array], projection: Projection) -> list[mx.array]:
    """Return the tensors that are not quantized, in their target dtypes."""
    return [
        arrays[spec.name.rpartition(".")[2]].astype(FLOATS[spec.dtype])
        for spec in projection.extras
    ]


def _cast(weights: mx.array, projection: Projection) -> mx.array:
    """Cast floats to the target dtype, as mlx-lm does before it quantizes."""
    return weights.astype(FLOATS[projection.dtype]) if projection.method == MIN_MAX else weights


def _quantize(weights: mx.array, projection: Projection) -> Codes:
    assert projection.after
    dtype = FLOATS[projection.dtype]
    if projection.method == LEAST_SQUARES:
        return fit(weights, projection.after, dtype)
    codes, scales, biases = quantize(weights, projection.after)
    return Codes(codes, scales.astype(dtype), biases.astype(dtype))
