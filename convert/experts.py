"""One layer's experts on their way from the source's bytes to records, a small batch at a time."""

import itertools
import os
import threading
from collections.abc import Iterator, Sequence

import mlx.core as mx

from flashmoe_mlx.convert.calibrate import LayerInputs
from flashmoe_mlx.convert.parts import LayerPlan, Spec
from flashmoe_mlx.convert.quantize import (
    Part,
    encode_calibrated,
    encode_floats,
    encode_record,
)
from flashmoe_mlx.convert.read import Bytes, Reader, check_finite
from flashmoe_mlx.convert.source import Source
from flashmoe_mlx.layout import LayerLayout

# Two bfloat16 experts of the 397B model. Three batches of raw bytes and one of arrays are alive at
# once: about 200 MB.
BATCH_BYTES = 48 << 20

Loaded = list[tuple[Bytes, str]]


class ExpertSteps:
    """The two steps of one layer's experts: `load` reads (in any thread), `encode` computes."""

    def __init__(
        self, source: Source, plan: LayerPlan, reader: Reader, seen: LayerInputs | None = None
    ) -> None:
        """Prepare; nothing is read yet. `seen` is what to quantise the experts for, if told."""
        self._seen = seen
        self._source, self._plan, self._reader = source, plan, reader
        self._layout = source.layout.layers[plan.layer] if source.layout else None
        self._before: list[Spec] = []
        if self._layout:
            self._before = [Spec(f.name, f.dtype, f.shape) for f in self._layout.fields]
        self._copied = all(projection.copied for projection in plan.projections)

    def batches(self, experts: Sequence[int]) -> list[Sequence[int]]:
        """Cut experts into batches of a bounded size, of one expert at least."""
        size = 1 if self._copied else max(1, BATCH_BYTES // self._float_bytes())
        return [experts[start : start + size] for start in range(0, len(experts), size)]

    def _float_bytes(self) -> int:
        """Return the bytes of one expert as the floats that it is, or is dequantised to."""
        if self._before:
            return sum(4 * p.rows * p.columns for p in self._plan.projections)
        layer, names = self._plan.layer, [p.name for p in self._plan.projections]
        return sum(self._source.matrices[layer, 0, name].nbytes for name in names)

    def load(self, batch: Sequence[int]) -> list[Loaded]:
        """Read the source bytes of some experts: one record each, or one entry a matrix."""
        return [self._load(expert) for expert in batch]

    def _load(self, expert: int) -> Loaded:
        if self._layout:
            return [(read_record(self._reader, self._layout, expert), "U8")]
        found = []
        for projection in self._plan.projections:
            matrix = self._source.matrices[self._plan.layer, expert, projection.name]
            data = self._reader.read(matrix.file, matrix.offset, matrix.nbytes)
            place = f"{matrix.file}: layer {self._plan.layer} expert {expert} {projection.name}"
            check_finite(data, matrix.dtype, place)
            found.append((data, matrix.dtype))
        return found

    def encode(self, batch: Sequence[int], loaded: list[Loaded]) -> list[Sequence[Part]]:
        """Return the records of the experts of a batch, evaluated."""
        if self._copied:
            return [[record] for ((record, _),) in loaded]
        streams = _streams()
        records = [self._encode(e, data, streams) for e, data in zip(batch, loaded, strict=True)]
        mx.eval([part for record in records for part in record if isinstance(part, mx.array)])
        return records

    def _encode(self, expert: int, loaded: Loaded, streams: Iterator[mx.Stream]) -> Sequence[Part]:
        if self._before and self._seen:
            record = loaded[0][0]
            return encode_calibrated(record, self._before, self._plan, expert, self._seen)
        if self._before:
            return encode_record(loaded[0][0], self._before, self._plan, streams)
        return encode_floats(loaded, self._plan, streams)


def read_record(reader: Reader, layout: LayerLayout, expert: int) -> Bytes:
    """Read one quantised expert: its nine tensors end to end, whatever lies between them."""
    spans = layout.spans(expert)
    sizes = [sum(f.nbytes for f in layout.fields[span.first : span.last]) for span in spans]
    record = reader.buffer(sum(sizes))
    start = 0
    for span, size in zip(spans, sizes, strict=True):
        reader.read_into(span.file, span.offset, record[start : start + size])
        start += size
    start = 0
    for field in layout.fields:
        place = f"{field.file}: layer {layout.layer} expert {expert} {field.name}"
        check_finite(record[start : start + field.nbytes], field.dtype, place)
        start += field.nbytes
    return record


_LOCAL = threading.local()  # as streams belong to the thread that made them


def _streams() -> Iterator[mx.Stream]:
    """Take turns between one stream per core on the CPU, where a quantisation uses one thread."""
    if not hasattr(_LOCAL, "streams"):
        cores = min(os.cpu_count() or 1, 8)
        count = cores if mx.default_device() == mx.Device(mx.cpu) else 1
        _LOCAL.streams = [mx.new_stream(mx.default_device()) for _ in range(count)]
    return itertools.cycle(_LOCAL.streams)
