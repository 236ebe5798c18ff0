"""Execute a plan file by file, with a few experts or one block of the trunk in memory."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ...format.headers import ITEM_SIZE
from ...format.layout import DATA_ALIGNMENT
from ...format.names import FIELDS
from ..plan.parts import LayerPlan, TrunkFile, TrunkTensor
from ..quant.calibrate import LayerInputs
from ..quant.codes import quantize
from ..quant.quantize import Part
from ..source.checkpoint import Source
from ..source.read import FLOATS, Bytes, Reader, as_array, as_bytes, check_finite, read_ahead
from .checksum import as_text, joined
from .experts import ExpertSteps
from .files import Entry, TensorFile

BLOCK_BYTES = 16 << 20

Progress = Callable[[int], object]


@dataclass(frozen=True)
class Visit:
    """One of several visits to a file.

    Attributes:
        parts: indices of trunk tensors, or experts, to write.
        written: see `TensorFile`.
    """

    parts: Sequence[int]
    written: Sequence[str] = ()


def write_trunk(
    plan: TrunkFile, directory: Path, reader: Reader, progress: Progress, visit: Visit | None = None
) -> Entry:
    """Write one trunk file and return its entry; `progress` gets the bytes of each tensor."""
    chosen = range(len(plan.tensors)) if visit is None else visit.parts
    written = visit.written if visit else None
    with TensorFile(directory / plan.name, plan.outputs, written=written) as file:
        for tensor in (plan.tensors[index] for index in chosen):
            _write_tensor(tensor, file, reader)
            progress(sum(spec.nbytes for spec in tensor.outputs))
    mx.clear_cache()
    return file.entry() | {"tensors": file.tensors()} if file.whole else file.begun()


def _write_tensor(tensor: TrunkTensor, file: TensorFile, reader: Reader) -> None:
    """Write one tensor in blocks of rows (quantized) or elements (otherwise)."""
    path, info = tensor.source
    count = math.prod(info.shape)
    unit = info.shape[-1] if tensor.quant else 1
    size = ITEM_SIZE[info.dtype]
    step = max(1, BLOCK_BYTES // (unit * size)) * unit
    starts = range(0, count, step)

    def load(start: int) -> Bytes:
        data = reader.read(path, info.offset + start * size, min(step, count - start) * size)
        check_finite(data, info.dtype, f"{path}: {tensor.outputs[0].name}")
        return data

    for start, data in zip(starts, read_ahead(load, starts), strict=True):
        parts = _convert_block(tensor, data, unit)
        mx.eval([part for part in parts if isinstance(part, mx.array)])
        for spec, part in zip(tensor.outputs, parts, strict=True):
            file.write(spec.name, as_buffer(part), spec.nbytes * start // count)


def _convert_block(tensor: TrunkTensor, data: Bytes, unit: int) -> Sequence[Part]:
    dtype = tensor.source[1].dtype
    if dtype == tensor.dtype and not tensor.shift and not tensor.quant:
        return [data]
    block = as_array(data, dtype, (data.size // ITEM_SIZE[dtype] // unit, unit))
    if tensor.shift:
        block = block + 1.0  # before the cast, as in mlx-lm
    block = block.astype(FLOATS[tensor.dtype])
    return quantize(block, tensor.quant) if tensor.quant else [block]


def write_layer(
    source: Source,
    plan: LayerPlan,
    directory: Path,
    reader: Reader,
    progress: Progress,
    inputs: LayerInputs | None = None,
    visit: Visit | None = None,
) -> Entry:
    """Write one layer's expert file and return its entry, with a checksum per record."""
    steps = ExpertSteps(source, plan, reader, inputs)
    batches = steps.batches(range(plan.experts) if visit is None else visit.parts)
    path, written = directory / plan.file, visit.written if visit else None
    with TensorFile(path, plan.outputs, DATA_ALIGNMENT, written) as file:
        for batch, loaded in zip(batches, read_ahead(steps.load, batches), strict=True):
            for expert, record in zip(batch, steps.encode(batch, loaded), strict=True):
                write_record(file, expert, record)
                progress(plan.record_bytes)
    mx.clear_cache()
    return file.entry() | record_entry(plan, file) if file.whole else file.begun()


def write_record(file: TensorFile, expert: int, record: Sequence[Part]) -> None:
    """Write one expert's nine tensors, or one buffer that holds them end to end."""
    parts = [as_buffer(part) for part in record]
    data, start = parts[0], 0
    if len(parts) > 1:
        data = Reader.buffer(sum(part.nbytes for part in parts)).data  # aligned for direct I/O
        for part in parts:
            data[start : start + part.nbytes] = part.cast("B")
            start += part.nbytes
    file.write(f"experts.{expert}.{FIELDS[0]}", data)


def record_entry(plan: LayerPlan, file: TensorFile) -> Entry:
    """Return the checksums of records, and of their tensors."""
    records, tensors = [], []
    for expert in range(plan.experts):
        fields = file.checksums(expert * len(FIELDS), len(FIELDS))
        records.append(as_text(joined(fields)))
        tensors.append("".join(as_text(checksum) for checksum, _ in fields))
    field_bytes = [spec.nbytes for spec in plan.record]
    return {"field_bytes": field_bytes, "records": records, "tensors": tensors}


def as_buffer(part: Part) -> memoryview:
    """View the bytes of a part of a record."""
    return as_bytes(part) if isinstance(part, mx.array) else part.data
