"""Carry out a plan: one file at a time, a few experts or one block of the trunk in memory."""

import math
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx

from flashmoe_mlx.convert.parts import LayerPlan, Spec, TrunkFile, TrunkTensor
from flashmoe_mlx.convert.quantize import Part, encode_floats, encode_record, quantize
from flashmoe_mlx.convert.read import FLOATS, Bytes, Reader, as_array, as_bytes, read_ahead
from flashmoe_mlx.convert.source import Source
from flashmoe_mlx.convert.write import TensorFile
from flashmoe_mlx.layout import DATA_ALIGNMENT, ITEM_SIZE, LayerLayout
from flashmoe_mlx.names import FIELDS

CHECKSUM = "crc32"  # 4 GB/s where blake2b does 0.8: never slower than the disk
BATCH_BYTES = 32 << 20
BLOCK_BYTES = 16 << 20

Progress = Callable[[int], object]


def write_trunk(plan: TrunkFile, directory: Path, reader: Reader, progress: Progress) -> None:
    """Write one file of the trunk. `progress` is told of every byte written."""
    specs = [(spec.name, spec.dtype, spec.shape) for spec in plan.outputs]
    with TensorFile(directory / plan.name, specs) as file:
        for tensor in plan.tensors:
            _write_tensor(tensor, file, reader)
            progress(sum(spec.nbytes for spec in tensor.outputs))
    mx.clear_cache()


def _write_tensor(tensor: TrunkTensor, file: TensorFile, reader: Reader) -> None:
    """Write one tensor in blocks of rows (quantised) or of elements (everything else)."""
    path, info = tensor.source
    count = math.prod(info.shape)
    unit = info.shape[-1] if tensor.quant else 1
    size = ITEM_SIZE[info.dtype]
    step = max(1, BLOCK_BYTES // (unit * size)) * unit
    starts = range(0, count, step)

    def load(start: int) -> Bytes:
        return reader.read(path, info.offset + start * size, min(step, count - start) * size)

    for start, data in zip(starts, read_ahead(load, starts), strict=True):
        parts = _convert_block(tensor, data, unit)
        mx.eval([part for part in parts if isinstance(part, mx.array)])
        for spec, part in zip(tensor.outputs, parts, strict=True):
            file.write(spec.name, _buffer(part), spec.nbytes * start // count)


def _convert_block(tensor: TrunkTensor, data: Bytes, unit: int) -> Sequence[Part]:
    dtype = tensor.source[1].dtype
    if dtype == tensor.dtype and not tensor.shift and not tensor.quant:
        return [data]
    block = as_array(data, dtype, (data.size // ITEM_SIZE[dtype] // unit, unit))
    if tensor.shift:
        block = block + 1.0  # before the cast, in the checkpoint's dtype, as mlx-lm does it
    block = block.astype(FLOATS[tensor.dtype])
    return quantize(block, tensor.quant) if tensor.quant else [block]


def write_layer(
    source: Source, plan: LayerPlan, directory: Path, reader: Reader, progress: Progress
) -> list[str]:
    """Write one layer's expert file and return the checksum of every record, in hexadecimal."""
    steps = ExpertSteps(source, plan, reader)
    batches = _batches(plan)
    checksums = []
    specs = ((spec.name, spec.dtype, spec.shape) for spec in plan.outputs())
    with TensorFile(directory / plan.file, specs, DATA_ALIGNMENT) as file:
        for batch, loaded in zip(batches, read_ahead(steps.load, batches), strict=True):
            for expert, record in zip(batch, steps.encode(loaded), strict=True):
                checksums.append(_write_record(file, expert, record))
                progress(plan.record_bytes)
    mx.clear_cache()
    return checksums


def _write_record(file: TensorFile, expert: int, record: Sequence[Part]) -> str:
    checksum, start = 0, 0
    for part in record:
        data = _buffer(part)
        checksum = zlib.crc32(data, checksum)
        file.write(f"experts.{expert}.{FIELDS[0]}", data, start)
        start += data.nbytes
    return f"{checksum:08x}"


def _buffer(part: Part) -> memoryview:
    return as_bytes(part) if isinstance(part, mx.array) else part.data


def _batches(plan: LayerPlan) -> list[range]:
    """Cut the experts so that one batch, as float32, stays within a fixed share of memory."""
    size = 1
    if any(not projection.copied for projection in plan.projections):
        floats = sum(4 * projection.rows * projection.columns for projection in plan.projections)
        size = max(len(_streams()), BATCH_BYTES // floats)
    return [range(n, min(n + size, plan.experts)) for n in range(0, plan.experts, size)]


class ExpertSteps:
    """The two steps of one layer's experts: `load` reads (in any thread), `encode` computes."""

    def __init__(self, source: Source, plan: LayerPlan, reader: Reader) -> None:
        """Prepare; nothing is read yet."""
        self._source, self._plan, self._reader = source, plan, reader
        self._layout = source.layout.layers[plan.layer] if source.layout else None
        self._before: list[Spec] = []
        if self._layout:
            self._before = [Spec(f.name, f.dtype, f.shape) for f in self._layout.fields]

    def load(self, batch: range) -> list[list[tuple[Bytes, str]]]:
        """Read the source bytes of some experts: one record each, or one entry a matrix."""
        return [self._load(expert) for expert in batch]

    def _load(self, expert: int) -> list[tuple[Bytes, str]]:
        if self._layout:
            return [(read_record(self._reader, self._layout, expert), "U8")]
        found = []
        for projection in self._plan.projections:
            matrix = self._source.matrices[self._plan.layer, expert, projection.name]
            nbytes = math.prod(matrix.shape) * ITEM_SIZE[matrix.dtype]
            found.append((self._reader.read(matrix.file, matrix.offset, nbytes), matrix.dtype))
        return found

    def encode(self, loaded: list[list[tuple[Bytes, str]]]) -> list[Sequence[Part]]:
        """Return the records of those experts, evaluated."""
        if all(projection.copied for projection in self._plan.projections):
            return [[record] for ((record, _),) in loaded]
        records = []
        streams = _streams()
        for index, expert in enumerate(loaded):
            with mx.stream(streams[index % len(streams)]):
                records.append(self._encode(expert))
        mx.eval([part for record in records for part in record if isinstance(part, mx.array)])
        return records

    def _encode(self, loaded: list[tuple[Bytes, str]]) -> Sequence[Part]:
        if self._before:
            return encode_record(loaded[0][0], self._before, self._plan)
        return encode_floats(loaded, self._plan)


def read_record(reader: Reader, layout: LayerLayout, expert: int) -> Bytes:
    """Read one quantised expert: its nine tensors end to end, whatever lies between them."""
    spans = layout.spans(expert)
    sizes = [sum(f.nbytes for f in layout.fields[span.first : span.last]) for span in spans]
    record = reader.buffer(sum(sizes))
    start = 0
    for span, size in zip(spans, sizes, strict=True):
        reader.read_into(span.file, span.offset, record[start : start + size])
        start += size
    return record


_STREAMS: list[mx.Stream] = []


def _streams() -> list[mx.Stream]:
    """Return one stream per core on the CPU, where a quantisation uses one thread; else one."""
    if not _STREAMS:
        cores = min(os.cpu_count() or 1, 8)
        count = cores if mx.default_device() == mx.Device(mx.cpu) else 1
        _STREAMS.extend(mx.new_stream(mx.default_device()) for _ in range(count))
    return _STREAMS
