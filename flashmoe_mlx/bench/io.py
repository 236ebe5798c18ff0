"""`flashmoe-bench io`: the speed of disk and page cache, and the expert store's share of it.

Every method reads random records into the same 16 buffers, like the slots of a bank. Because disks
drift, rounds measure all methods and thread counts in random order, and each figure is the median
of its rounds. Before each measurement, the records are dropped from the page cache (cold) or read
into it (warm).
"""

import argparse
import contextlib
import mmap
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import FlashMoEError
from ..format.layout import ExpertLayout, Field, LayerLayout, open_layout
from ..format.model_files import read_config
from ..format.names import FIELDS
from ..loader import find_model
from ..models.qwen3_5.args import ModelArgs
from ..profile import machine, read_speed
from ..profile.counters import Use, disk_bytes
from ..profile.read_speed import BUFFERS, COLD_BY, Range, in_threads, opened, ranges_of, reads_into
from ..progress import bar
from ..store.host import BLOCK
from ..store.io_mode import obstacle
from ..store.sizing import BUFFERED, CachePlan, IoPlan
from ..store.store import ExpertStore
from .arguments import RECORDS
from .model import check_positive
from .output import check_json, write_json

FETCHED = 8  # experts per request to the store
SHORTEST = 3 * 3 * BLOCK  # of a record: three matrices, each with codes, scales and biases
PREADS = ("pread", "pread, no read-ahead", "direct")
STORE = ("store, buffered", "store, direct")
RAW = (*PREADS, "mmap")
METHODS = {
    "cold": ("pread", "pread, no read-ahead", "mmap", "direct", *STORE),
    "warm": ("pread", "mmap", "store, buffered", "memcpy"),
}
_REMEDY = ", because it is not converted: flashmoe-convert lays experts out in blocks"
LIMIT_THREADS = (2, 4, 8)
LIMIT_SAMPLE = 128 << 20  # bytes that each method reads in a round of `Limit`

Read = Callable[[], float]  # reads everything; returns seconds


class Case(NamedTuple):
    """One cell of the table: "cold" or "warm", one of its METHODS, and a number of threads."""

    state: str
    method: str
    threads: int

    @property
    def direct(self) -> bool:
        """Return whether reads bypass the page cache."""
        return self.method.endswith("direct")

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {"state": self.state, "way": self.method, "threads": self.threads}


# By case, for each round: bytes per second, and bytes from the disk per byte read, if the system
# counts them.
Rounds = dict[Case, list[tuple[float, float | None]]]


def run(args: argparse.Namespace) -> int:
    """Print a table per record size; return 0."""
    _check(args)
    check_json(args)
    facts = machine.facts()
    print(machine.describe(facts))
    text = f"GB/s, median of {args.rounds} rounds of {args.sample_mib} MiB in random records"
    print(text, flush=True)
    results = []
    for source, layout in _layouts(args):
        every = cases(layout, args.threads)
        found = measure(layout, every, args.rounds, args.sample_mib << 20)
        results.append(_report(source, layout, found))
    settings = {"rounds": args.rounds, "sample_bytes": args.sample_mib << 20, "fetched": FETCHED}
    write_json(args, {"benchmark": "io", **facts, **settings, "records": results})
    return 0


def _check(args: argparse.Namespace) -> None:
    check_positive(threads=args.threads, rounds=args.rounds, sample_mib=args.sample_mib)
    for record in args.record:
        if record < SHORTEST or record % (3 * BLOCK):
            raise FlashMoEError(
                f"--record must be a multiple of {3 * BLOCK}, at least {SHORTEST}, to fill whole "
                f"blocks, got {record}. Try {RECORDS[0]}."
            )


def _layouts(args: argparse.Namespace) -> Iterator[tuple[str, ExpertLayout]]:
    """Yield descriptions and layouts of the experts to read."""
    if args.model:
        path = find_model(args.model)
        model = ModelArgs.from_dict(read_config(path))
        layout = open_layout(path, model.num_hidden_layers, model.num_experts)
        yield f"experts of {args.model}", replace(layout, layers=layout.layers[:1])
        return
    for record in args.record:
        count = max(2 * (args.sample_mib << 20) // record, 4 * BUFFERS)
        try:
            with read_speed.scratch_ranges(args.dir, count * record, record) as ranges:
                yield f"a temporary file in {args.dir}", scratch_layout(ranges, record)
        except OSError as error:
            raise FlashMoEError(
                f"{error.filename or args.dir}: cannot be written ({error.strerror}). "
                "Give another --dir."
            ) from error


def scratch_layout(ranges: Sequence[Range], record: int) -> ExpertLayout:
    """Return a layout of contiguous experts of `record` bytes each in one file."""
    path = ranges[0][0]
    small = max(record // 54 // BLOCK, 1) * BLOCK  # of scales, and of biases: 1/18 of a matrix each
    sizes = [record // 3 - 2 * small, small, small] * 3
    fields, offset = [], 0
    for name, nbytes in zip(FIELDS, sizes, strict=True):
        fields.append(Field(name, "U32", (1, nbytes // 4), nbytes, path, offset, record))
        offset += nbytes
    return ExpertLayout("packed", path.parent, (LayerLayout(0, len(ranges), tuple(fields)),))


def cases(layout: ExpertLayout, threads: Sequence[int]) -> list[Case]:
    """Return all cases that the layout allows: states, methods and thread counts."""
    found = [Case(state, m, n) for state, ms in METHODS.items() for m in ms for n in threads]
    return [case for case in found if not case.direct] if obstacle(layout) else found


def measure(layout: ExpertLayout, cases: Sequence[Case], rounds: int, sample: int) -> Rounds:
    """Measure cases in rounds, in random order.

    Args:
        layout: experts; only the first layer's are read.
        cases: the cases to measure.
        rounds: measurements of each case.
        sample: bytes per measurement; at most half of the experts are read.
    """
    layer = layout.layers[0]
    count = min(sample // layer.record_bytes, layer.num_experts // 2)
    count = max(1, count // FETCHED) * FETCHED
    buffers = read_speed.record_buffers(max(nbytes for _, _, nbytes in ranges_of([(layer, 0)])))
    found: Rounds = {case: [] for case in cases}
    with bar(rounds * len(cases), " reads") as progress:
        for _ in range(rounds):
            for case in random.sample(cases, len(cases)):
                experts = random.sample(range(layer.num_experts), count)
                found[case].append(_run(case, layout, experts, buffers))
                progress.update()
    return found


def _run(
    case: Case, layout: ExpertLayout, experts: Sequence[int], buffers: list[memoryview]
) -> tuple[float, float | None]:
    ranges = ranges_of([(layout.layers[0], expert) for expert in experts])
    ours = case.method in STORE
    with _store(case, layout, experts) if ours else _raw(case, ranges, buffers) as read:
        _prepare(ranges, buffers, cold=case.state == "cold")
        before = disk_bytes()
        seconds = read()
        after, asked = disk_bytes(), sum(nbytes for _, _, nbytes in ranges)
    if before is None or after is None:
        return asked / seconds, None
    return asked / seconds, (after - before) / asked


def _prepare(ranges: Sequence[Range], buffers: list[memoryview], cold: bool) -> None:
    """Drop ranges from the page cache, or read them into it."""
    with opened(ranges) as files:
        read = reads_into(buffers, ranges, files)
        for number, place in enumerate(ranges):
            if cold:
                read_speed.forget(files[place[0]], place)
            else:
                read(number)


@contextlib.contextmanager
def _store(case: Case, layout: ExpertLayout, experts: Sequence[int]) -> Iterator[Read]:
    """Open a store with a bank full of other experts; yield a function that fetches `experts`."""
    io = IoPlan(True, "chosen by the benchmark") if case.direct else BUFFERED
    plan = CachePlan(BUFFERS, BUFFERS * layout.token_bytes, "as many as buffers", io)
    others = set(range(layout.layers[0].num_experts)).difference(experts)
    with contextlib.closing(ExpertStore(layout, plan, case.threads)) as store:
        store.fetch(0, list(others)[: len(store.banks[0])])

        def read() -> float:
            start = time.perf_counter()
            for first in range(0, len(experts), FETCHED):
                store.fetch(0, experts[first : first + FETCHED])
            return time.perf_counter() - start

        yield read


@contextlib.contextmanager
def _raw(case: Case, ranges: Sequence[Range], buffers: list[memoryview]) -> Iterator[Read]:
    """Yield a function that reads ranges without a store."""
    with opened(ranges, case.direct, read_ahead=case.method != "pread, no read-ahead") as files:
        make = reads_into if case.method in PREADS else partial(_copies, case.method == "memcpy")
        work = make(buffers, ranges, files)
        yield lambda: in_threads(work, len(ranges), case.threads)


def _copies(
    memory: bool, buffers: Sequence[memoryview], ranges: Sequence[Range], files: Mapping[Path, int]
) -> Callable[[int], None]:
    """Return a function that copies a range from a mapped file, or the same size from memory."""
    if memory:
        sources = {path: np.ones(max(r[1] + r[2] for r in ranges), np.uint8) for path in files}
    else:
        maps = {p: mmap.mmap(f, 0, access=mmap.ACCESS_READ) for p, f in files.items()}
        sources = {path: np.frombuffer(m, np.uint8) for path, m in maps.items()}

    def copy(index: int) -> None:
        path, offset, nbytes = ranges[index]
        target = np.asarray(buffers[index % BUFFERS])
        np.copyto(target[:nbytes], sources[path][offset : offset + nbytes])

    return copy


def _report(source: str, layout: ExpertLayout, found: Rounds) -> dict[str, Any]:
    """Print the table and the store's share of the best method; return both as JSON values."""
    threads = sorted({case.threads for case in found})
    print(f"\nrecords of {layout.record_bytes} bytes; {source}; {COLD_BY}")
    if why := obstacle(layout):
        print(f"no direct reads: {why}{_REMEDY if layout.kind == 'stock' else ''}")
    print(f"{'threads':>27}", *(f"{n:>6}" for n in threads), " from disk")
    rows = [
        {**case.as_dict(), "bytes_per_s": speed(rounds), "rounds": [round[0] for round in rounds],
         "from_disk": _from_disk(case, rounds)}
        for case, rounds in found.items()
    ]  # fmt: skip
    for state, method in dict.fromkeys(case[:2] for case in found):
        row = [row for row in rows if (row["state"], row["way"]) == (state, method)]
        row.sort(key=lambda cell: cell["threads"])
        ratios = [cell["from_disk"] for cell in row if cell["from_disk"] is not None]
        disk = f"{statistics.median(ratios):>9.2f}x" if ratios else f"{'-':>10}"
        print(f"{state:>5} {method:>21}", *(f"{x['bytes_per_s'] / 1e9:6.2f}" for x in row), disk)
    shares = {state: _share(state, found) for state in METHODS}
    return {"record": layout.record_bytes, "source": source, "cold_by": COLD_BY, **shares,
            "rows": rows}  # fmt: skip


def speed(rounds: list[tuple[float, float | None]]) -> float:
    """Return the median bytes per second of the rounds."""
    return statistics.median(round[0] for round in rounds)


def _from_disk(case: Case, rounds: list[tuple[float, float | None]]) -> float | None:
    ratios = [ratio for _, ratio in rounds if ratio is not None and case.state == "cold"]
    return statistics.median(ratios) if ratios else None


def _best(found: Rounds, state: str, methods: Sequence[str]) -> tuple[Case, float]:
    """Return the fastest case among some methods, and its bytes per second."""
    chosen = [case for case in found if case.state == state and case.method in methods]
    best = max(chosen, key=lambda case: speed(found[case]))
    return best, speed(found[best])


def _share(state: str, found: Rounds) -> dict[str, Any]:
    """Compare the store's best case with the best raw case, and print the result."""
    ours, ours_speed = _best(found, state, STORE)
    best, best_speed = _best(found, state, RAW)
    share = ours_speed / best_speed
    print(
        f"{state}: {ours.method}, {ours.threads} threads: {ours_speed / 1e9:.2f} GB/s, "
        f"{share:.0%} of the best ({best.method}, {best.threads}: {best_speed / 1e9:.2f})"
    )
    return {"store_bytes_per_s": ours_speed, "best_bytes_per_s": best_speed, "share": share,
            "store": ours.as_dict(), "best": best.as_dict()}  # fmt: skip


class Limit:
    """The share of the best raw read speed, for the same model's records, that generation reaches.

    The limit is the time that a run's bytes take at the best raw speed: of cold reads for bytes
    from the disk, of warm reads for the others. The share is the limit over the time during which
    the run had a read in flight.
    """

    def __init__(self, layout: ExpertLayout) -> None:
        """Select the raw cases."""
        self._layout = layout
        self.rounds: Rounds = {c: [] for c in cases(layout, LIMIT_THREADS) if c.method in RAW}

    def measure(self) -> None:
        """Measure each case once more."""
        for case, rounds in measure(self._layout, list(self.rounds), 1, LIMIT_SAMPLE).items():
            self.rounds[case] += rounds

    def share(self, use: Use) -> float | None:
        """Return the share; None if the run read nothing, or the disk's part is unknown."""
        if not (reading := use.stats.seconds_reading) or use.from_disk is None:
            return None
        cold, warm = (_best(self.rounds, state, RAW)[1] for state in ("cold", "warm"))
        return (use.needed / cold + (use.stats.bytes_read - use.needed) / warm) / reading

    def report(self, uses: dict[str, list[Use]]) -> dict[str, Any]:
        """Print the limit and the median of each kind of run; return JSON values."""
        best = {state: _best(self.rounds, state, RAW) for state in ("cold", "warm")}
        texts = [
            f"{s} {x / 1e9:.2f} GB/s ({c.method}, {c.threads} threads)"
            for s, (c, x) in best.items()
        ]
        print(f"best raw reads of the same records, between runs: {'; '.join(texts)}")
        found = {s: {**case.as_dict(), "bytes_per_s": x} for s, (case, x) in best.items()}
        return {"best": found, "reached": {name: self._reached(name, uses[name]) for name in uses}}

    def _reached(self, name: str, uses: list[Use]) -> dict[str, float] | None:
        """Print and return the median of some runs; None if they read nothing."""
        if not (read := [use.stats for use in uses if use.stats.seconds_reading]):
            return None
        found = {"bytes_per_s": statistics.median(s.bytes_read / s.seconds_reading for s in read)}
        line = f"{name}: {found['bytes_per_s'] / 1e9:.2f} GB/s while a read was in flight"
        if shares := [share for use in uses if (share := self.share(use)) is not None]:
            found["share"] = statistics.median(shares)
            line += f", {found['share']:.0%} of the limit"
        print(line)
        return found
