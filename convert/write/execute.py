"""Execute a plan file by file, with a few experts or one block of the trunk in memory."""

import functools
import itertools
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from ...format.headers import ITEM_SIZE
from ...format.layout import DATA_ALIGNMENT, LayerLayout
from ...format.names import FIELDS, layer_prefix
from ..plan.parts import LayerPlan, Spec, TrunkFile, TrunkTensor
from ..quant.calibrate import LayerInputs
from ..quant.codes import has_numba, quantize
from ..quant.compensate import Floats, Rounded
from ..quant.quantize import (
    Part,
    encode_calibrated,
    encode_fields,
    encode_floats,
    encode_record,
    restored_record,
)
from ..source.arrays import FLOATS, as_array, as_bytes
from ..source.checkpoint import Source
from ..source.foreign import piece_of
from ..source.read import Bytes, Reader, check_finite, read_ahead
from .files import Entry, TensorFile, as_text, joined

BLOCK_BYTES = 16 << 20
# Two bfloat16 experts of the 397B model. Three batches of bytes and one of arrays are alive at
# once: about 200 MB.
BATCH_BYTES = 48 << 20

Loaded = list[tuple[Bytes, str]]
NOTHING = np.empty(0, np.uint8), ""  # in the place of bytes that are no longer needed

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
    source: Source,
    plan: TrunkFile,
    directory: Path,
    reader: Reader,
    progress: Progress,
    visit: Visit | None = None,
) -> Entry:
    """Write one trunk file and return its entry; `progress` gets the bytes of each tensor."""
    chosen = range(len(plan.tensors)) if visit is None else visit.parts
    written = visit.written if visit else None
    with TensorFile(directory / plan.name, plan.outputs, written=written) as file:
        for tensor in (plan.tensors[index] for index in chosen):
            if tensor.needs:
                _write_computed(source, tensor, file, reader)
            else:
                _write_tensor(tensor, file, reader)
            progress(sum(spec.nbytes for spec in tensor.outputs))
    mx.clear_cache()
    return file.entry() | {"tensors": file.tensors()} if file.whole else file.begun()


def _write_computed(source: Source, tensor: TrunkTensor, file: TensorFile, reader: Reader) -> None:
    """Write one tensor that mlx-lm's `sanitize` computes, in blocks of rows."""
    name, done, count = tensor.outputs[0].name, 0, math.prod(tensor.source[1].shape)
    for block in source.foreign.computed(tensor.final, reader):
        array = mx.contiguous(block)
        mx.eval(array)
        dtype, data = tensor.source[1].dtype, np.frombuffer(as_bytes(array), np.uint8)
        check_finite(data, dtype, f"{source.name}: {name}")
        parts = _convert_block(tensor, data, array.shape[-1] if tensor.quant else 1)
        mx.eval([part for part in parts if isinstance(part, mx.array)])
        for spec, part in zip(tensor.outputs, parts, strict=True):
            file.write(spec.name, as_buffer(part), spec.nbytes * done // count)
        done += array.size


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


class ExpertSteps:
    """One layer's experts in two steps: `load` reads (in any thread), `encode` computes."""

    def __init__(
        self, source: Source, plan: LayerPlan, reader: Reader, inputs: LayerInputs | None = None
    ) -> None:
        """Read nothing yet. `inputs`, if given, are those to quantize the experts for."""
        self._inputs = inputs
        self._source, self._plan, self._reader = source, plan, reader
        self._layout = source.layout.layers[plan.layer] if source.layout else None
        self._before: list[Spec] = []
        if self._layout:
            self._before = [Spec(f.name, f.dtype, f.shape) for f in self._layout.fields]
        self._copied = all(projection.copied for projection in plan.projections)
        self._foreign = source.foreign

    def batches(self, experts: Sequence[int]) -> list[Sequence[int]]:
        """Split experts into batches without gaps, up to BATCH_BYTES or one expert each.

        Calibrated experts are computed one per thread, so their batches fill all threads.
        """
        most = max(1, BATCH_BYTES // self._float_bytes())
        if self._inputs and not self._copied:
            most = 2 * calibration_threads()
        batches: list[list[int]] = []
        for expert in experts:
            before = expert - self._plan.numbers.step
            if not batches or len(batches[-1]) == most or batches[-1][-1] != before:
                batches.append([])
            batches[-1].append(expert)
        return list(batches)

    def _float_bytes(self) -> int:
        """Return one expert's bytes in memory: as copied, or as floats."""
        if self._foreign:
            return sum(4 * p.rows * p.columns for p in self._plan.projections)
        if self._layout and self._copied:
            return self._layout.record_bytes
        if self._before:
            return sum(4 * p.rows * p.columns for p in self._plan.projections)
        layer, names = self._plan.layer, [p.name for p in self._plan.projections]
        return sum(self._source.matrices[layer, 0, name].nbytes for name in names)

    def loaded(self, batches: Sequence[Sequence[int]]) -> Iterator[list[Loaded]]:
        """Load batches, the next one meanwhile; of experts larger than a batch, one at a time."""
        return map(self.load, batches) if self.large else read_ahead(self.load, batches)

    @property
    def large(self) -> bool:
        """Whether one expert is larger than a batch."""
        return self._float_bytes() > BATCH_BYTES

    def load(self, batch: Sequence[int]) -> list[Loaded]:
        """Read experts' source bytes: one record each, or one entry per matrix or tensor."""
        if self._foreign:
            return [self._load_raws(expert) for expert in batch]
        if self._layout:
            return [[(r, "U8")] for r in read_records(self._reader, self._layout, batch)]
        return [self._load_matrices(expert) for expert in batch]

    def _load_raws(self, expert: int) -> Loaded:
        raws = self._foreign.raws(self._plan.layer, expert)
        return [(self._reader.read(r.file, r.offset, r.nbytes), r.dtype) for r in raws]

    def _load_matrices(self, expert: int) -> Loaded:
        found = []
        for projection in self._plan.projections:
            matrix = self._source.matrices[self._plan.layer, expert, projection.name]
            data = self._reader.read(matrix.file, matrix.offset, matrix.nbytes)
            place = f"{matrix.file}: layer {self._plan.layer} expert {expert} {projection.name}"
            check_finite(data, matrix.dtype, place)
            found.append((data, matrix.dtype))
        return found

    def encode(self, batch: Sequence[int], loaded: list[Loaded]) -> Iterable[Sequence[Part]]:
        """Return a batch's records, evaluated; large bytes are dropped from `loaded` in between."""
        if self._copied and not self._foreign:
            return [[record] for ((record, _),) in loaded]
        if self._inputs:
            return self._calibrated(batch, loaded, self._inputs)
        streams = _streams()
        records = [self._encode(e, data, streams) for e, data in zip(batch, loaded, strict=True)]
        mx.eval([part for record in records for part in record if isinstance(part, mx.array)])
        return records

    def _encode(self, expert: int, loaded: Loaded, streams: Iterator[mx.Stream]) -> Sequence[Part]:
        if self._foreign:
            return self._encode_foreign(expert, loaded)
        if self._before:
            return encode_record(loaded[0][0], self._before, self._plan, streams)
        return encode_floats(loaded, self._plan, streams)

    def _encode_foreign(self, expert: int, loaded: Loaded) -> Sequence[Part]:
        """Encode what mlx-lm's `sanitize` makes, of a large expert one projection after another."""
        layer, raws = self._plan.layer, self._foreign.raws(self._plan.layer, expert)
        pieces = self._foreign.pieces if self.large else {}
        groups = [[p] for p in self._plan.projections] if pieces else [self._plan.projections]
        place, parts = f"{self._source.name}: layer {layer} expert {expert}", list[Part]()
        for group in groups:
            names, arrays = [p.name for p in group], {}
            for index, raw in enumerate(raws):
                if not pieces or pieces[piece_of(raw.key)] in names:
                    arrays[raw.key] = as_array(loaded[index][0], raw.dtype, raw.shape)
                    loaded[index] = NOTHING
            parts += encode_fields(self._foreign.expert(layer, arrays), group, place)
        return parts

    def _calibrated(
        self, batch: Sequence[int], loaded: list[Loaded], inputs: LayerInputs
    ) -> Iterator[Sequence[Part]]:
        """Yield each record as soon as it is done; on CPUs, one thread computes each expert."""

        records = [record for ((record, _),) in loaded]
        matrices = [restored_record(record, self._before, self._plan) for record in records]
        inputs.prepare()

        def quantized(expert: int, weights: list[Floats]) -> list[Rounded | None]:
            return inputs.quantize(expert, weights, self._plan.projections)

        threads = calibration_threads()
        run = map if threads == 1 else _pool(threads).map
        for record, found in zip(records, run(quantized, batch, matrices), strict=True):
            yield encode_calibrated(record, self._before, self._plan, found)


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Return threads for all layers."""
    return ThreadPoolExecutor(threads, thread_name_prefix="calibrate")


def calibration_threads() -> int:
    """Return how many experts to calibrate at once: one per core on a CPU, up to 8.

    Each needs up to 0.6 GB at 397B size.
    """
    if not has_numba():
        return 1
    from numba import config  # slow to import

    return min(int(config.NUMBA_NUM_THREADS), 8)


def read_records(reader: Reader, layout: LayerLayout, experts: Sequence[int]) -> list[Bytes]:
    """Read experts of MLX's format at equal distances, each one's tensors end to end.

    Tensors adjacent in a file are read together.
    """
    count, size = len(experts), layout.record_bytes
    step = experts[1] - experts[0] if count > 1 else 1
    part = layout.part(range(experts[0], experts[-1] + 1, step))
    memory = reader.buffer(count * size).reshape(count, size)
    start = 0
    for span in part.spans(0):
        fields = part.fields[span.first : span.last]
        nbytes, stride = sum(field.nbytes for field in fields), fields[0].stride
        if nbytes == size == stride:
            reader.read_into(span.file, span.offset, memory.reshape(-1))
        elif nbytes == stride:
            together = reader.read(span.file, span.offset, count * nbytes)
            memory[:, start : start + nbytes] = together.reshape(count, nbytes)
        else:
            for n in range(count):
                target = memory[n, start : start + nbytes]
                reader.read_into(span.file, span.offset + n * stride, target)
        start += nbytes
    for expert, record in zip(experts, memory, strict=True):
        start = 0
        for field in layout.fields:
            place = f"{field.file}: layer {layout.layer} expert {expert} {field.name}"
            check_finite(record[start : start + field.nbytes], field.dtype, place)
            start += field.nbytes
    return list(memory)


_LOCAL = threading.local()  # streams belong to the thread that created them


def _streams() -> Iterator[mx.Stream]:
    """Cycle through one stream per core on a CPU, where a quantization uses one thread."""
    if not hasattr(_LOCAL, "streams"):
        cores = min(os.cpu_count() or 1, 8)
        count = cores if mx.default_device() == mx.Device(mx.cpu) else 1
        _LOCAL.streams = [mx.new_stream(mx.default_device()) for _ in range(count)]
    return itertools.cycle(_LOCAL.streams)


@contextmanager
def _no_cache(large: bool) -> Iterator[None]:
    """While experts are large, return what MLX frees to the system, where that costs no time."""
    frugal = large and mx.default_device() == mx.Device(mx.cpu)
    limit = mx.set_cache_limit(0) if frugal else 0
    try:
        yield
    finally:
        if frugal:
            mx.set_cache_limit(limit)


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
    batches = steps.batches(plan.numbers if visit is None else visit.parts)
    path, written = directory / plan.file, visit.written if visit else None
    with TensorFile(path, plan.outputs, DATA_ALIGNMENT, written) as file, _no_cache(steps.large):
        for batch, loaded in zip(batches, steps.loaded(batches), strict=True):
            for expert, record in zip(batch, steps.encode(batch, loaded), strict=True):
                write_record(file, expert, plan.record[0].name, record)
                progress(plan.record_bytes)
                del record  # before the next one is computed
    mx.clear_cache()
    return file.entry() | record_entry(plan, file) if file.whole else file.begun()


def write_record(file: TensorFile, expert: int, first: str, record: Sequence[Part]) -> None:
    """Write one expert's tensors from `first` on, or one buffer that holds them end to end."""
    parts = [as_buffer(part) for part in record]
    data, start = parts[0], 0
    if len(parts) > 1:
        data = Reader.buffer(sum(part.nbytes for part in parts)).data  # aligned for direct I/O
        for part in parts:
            data[start : start + part.nbytes] = part.cast("B")
            start += part.nbytes
    file.write(f"experts.{expert}.{first}", data)


def record_entry(plan: LayerPlan, file: TensorFile) -> Entry:
    """Return the checksums of records, and of their tensors."""
    records, tensors, count = [], [], len(plan.record)
    for place in range(plan.experts):
        fields = file.checksums(place * count, count)
        records.append(as_text(joined(fields)))
        tensors.append("".join(as_text(checksum) for checksum, _ in fields))
    entry: Entry = {"field_bytes": [s.nbytes for s in plan.record]}
    if plan.numbers != range(plan.experts):
        entry["numbers"] = list(plan.numbers)
    entry |= {"records": records, "tensors": tensors}
    names = [spec.name for spec in plan.record]
    if plan.module == f"{layer_prefix(plan.layer)}.mlp.switch_mlp" and names == list(FIELDS):
        return entry  # as in the format's first version
    return {"module": plan.module, "fields": names} | entry


def as_buffer(part: Part) -> memoryview:
    """View the bytes of a part of a record."""
    return as_bytes(part) if isinstance(part, mx.array) else part.data
