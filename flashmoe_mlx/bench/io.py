"""`flashmoe-bench io`: what disk and page cache give, and what the expert store makes of it.

Every way of reading brings random records into the same amount of memory: 16 records, as a bank
has slots. All ways and thread counts are measured in turn, in rounds, and each figure is the
median of its rounds, because disks drift. Cold means that the records were dropped from the page
cache before the run, warm that they were read into it.
"""

import argparse
import contextlib
import json
import mmap
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..custom_kernels.kept import cache_dir
from ..errors import FlashMoEError
from ..format.layout import ExpertLayout, Field, LayerLayout, open_layout
from ..format.model_files import read_config
from ..format.names import FIELDS
from ..loader import find_model
from ..models.qwen3_5.args import ModelArgs
from ..profile import machine
from ..profile.counters import Use, disk_bytes
from ..profile.read_speed import (
    BUFFERS,
    COLD_BY,
    Range,
    forget,
    in_threads,
    opened,
    ranges_of,
    reads_into,
    record_buffers,
    scratch_ranges,
)
from ..store.io_mode import obstacle
from ..store.sizing import BUFFERED, CachePlan, IoPlan
from ..store.slots import BLOCK
from ..store.store import ExpertStore
from .model import at_least_one

RECORDS = (1_769_472, 7_077_888)  # bytes of an expert of 35B-A3B and of 397B-A17B, 4 bits
FETCHED = 8  # experts that the store is asked for at a time
SHORTEST = 3 * 3 * BLOCK  # bytes of a record: three matrices of codes, scales and biases
COLD = ("pread", "pread, no read-ahead", "mmap", "direct", "store, buffered", "store, direct")
PREADS = ("pread", "pread, no read-ahead", "direct")
WARM = ("pread", "mmap", "store, buffered", "memcpy")

LIMIT_THREADS = (2, 4, 8)
LIMIT_SAMPLE = 128 << 20  # bytes that each way reads in a round of `Limit`

Read = Callable[[], float]  # read everything; returns seconds


@dataclass(frozen=True)
class Case:
    """One cell of the table: "cold" or "warm", a way of COLD or WARM, and a number of threads."""

    state: str
    way: str
    threads: int

    @property
    def ours(self) -> bool:
        """Say whether the expert store reads."""
        return self.way.startswith("store")

    @property
    def raw(self) -> bool:
        """Say whether files are read without the store; memcpy reads none."""
        return not self.ours and self.way != "memcpy"

    @property
    def direct(self) -> bool:
        """Say whether reads go past the page cache."""
        return self.way.endswith("direct")


@dataclass(frozen=True)
class Cell:
    """What a case gave.

    Attributes:
        case: the way, cold or warm, with so many threads.
        bytes_per_s: of each round.
        from_disk: bytes that the disk delivered for each byte asked for, or None.
    """

    case: Case
    bytes_per_s: list[float]
    from_disk: float | None

    @property
    def median(self) -> float:
        """Bytes per second, the median of the rounds."""
        return statistics.median(self.bytes_per_s)


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    text = "Read experts in every way that this system has, and with the expert store."
    parser = commands.add_parser("io", help=text, description=text)
    parser.set_defaults(run=run)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--model", help="read the experts of a model's first layer")
    where.add_argument(
        "--dir", type=Path, default=cache_dir(),
        help=f"read a temporary file in this directory (default: {cache_dir()})",
    )  # fmt: skip
    add = parser.add_argument
    sizes = f"of an expert in the temporary file (default: {' '.join(map(str, RECORDS))})"
    add("--record", nargs="+", type=int, default=list(RECORDS), metavar="BYTES", help=sizes)
    add("--threads", nargs="+", type=int, default=[1, 2, 4, 8, 16], help="default: 1 2 4 8 16")
    add("--rounds", type=int, default=7, help="of each, of which the median (default: 7)")
    add("--sample-mib", type=int, default=128, help="MiB to read in each (default: 128)")


def run(args: argparse.Namespace) -> int:
    """Print a table for each size of record, then one JSON line. Returns 0."""
    _check(args)
    facts = machine.facts()
    print(machine.describe(facts))
    print(f"GB/s, median of {args.rounds} rounds of {args.sample_mib} MiB in random records")
    results = []
    for source, layout in _layouts(args):
        every = cases(layout, args.threads)
        cells = measure(layout, every, args.rounds, args.sample_mib << 20)
        results.append(_report(source, layout, cells))
    settings = {"rounds": args.rounds, "sample_bytes": args.sample_mib << 20, "fetched": FETCHED}
    print(json.dumps({"benchmark": "io", **facts, **settings, "records": results}))
    return 0


def _check(args: argparse.Namespace) -> None:
    at_least_one(threads=args.threads, rounds=args.rounds, sample_mib=args.sample_mib)
    for record in args.record:
        if record < SHORTEST or record % (3 * BLOCK):
            raise FlashMoEError(
                f"--record {record} is not a multiple of {3 * BLOCK} from {SHORTEST} on, of which "
                f"three matrices in whole blocks can be made. Try {RECORDS[0]}."
            )


def _layouts(args: argparse.Namespace) -> Iterator[tuple[str, ExpertLayout]]:
    """Yield what to read, in words, and where it lies."""
    if args.model:
        path = find_model(args.model)
        model = ModelArgs.from_dict(read_config(path))
        layout = open_layout(path, model.num_hidden_layers, model.num_experts)
        yield f"experts of {args.model}", replace(layout, layers=layout.layers[:1])
        return
    for record in args.record:
        count = max(2 * (args.sample_mib << 20) // record, 4 * BUFFERS)
        try:
            with scratch_ranges(args.dir, count * record, record) as ranges:
                yield f"a temporary file in {args.dir}", scratch_layout(ranges, record)
        except OSError as error:
            raise FlashMoEError(
                f"{error.filename or args.dir}: cannot be written ({error.strerror}). "
                "Give another --dir."
            ) from error


def scratch_layout(ranges: Sequence[Range], record: int) -> ExpertLayout:
    """Return experts of `record` bytes each, that lie one behind the other in one file."""
    path = ranges[0][0]
    small = max(record // 54 // BLOCK, 1) * BLOCK  # scales, or biases: an eighteenth of a matrix
    sizes = [record // 3 - 2 * small, small, small] * 3
    fields, offset = [], 0
    for name, nbytes in zip(FIELDS, sizes, strict=True):
        fields.append(Field(name, "U32", (1, nbytes // 4), nbytes, path, offset, record))
        offset += nbytes
    return ExpertLayout("packed", path.parent, (LayerLayout(0, len(ranges), tuple(fields)),))


def cases(layout: ExpertLayout, threads: Sequence[int]) -> list[Case]:
    """Return every way to read that is possible, cold and warm, with each number of threads."""
    found = [Case("cold", way, n) for way in COLD for n in threads]
    found += [Case("warm", way, n) for way in WARM for n in threads]
    return [case for case in found if not case.direct] if obstacle(layout) else found


def measure(layout: ExpertLayout, cases: Sequence[Case], rounds: int, sample: int) -> list[Cell]:
    """Measure cases in rounds, in random order.

    Args:
        layout: experts, of which the first layer's are read.
        cases: what to measure.
        rounds: runs of each.
        sample: bytes in each, at most half of the experts.
    """
    layer = layout.layers[0]
    count = min(sample // layer.record_bytes, layer.num_experts // 2)
    count = max(1, count // FETCHED) * FETCHED
    buffers = record_buffers(max(nbytes for _, _, nbytes in ranges_of([(layer, 0)])))
    found: dict[Case, list[tuple[float, float | None]]] = {case: [] for case in cases}
    for _ in range(rounds):
        for case in random.sample(cases, len(cases)):
            experts = random.sample(range(layer.num_experts), count)
            found[case].append(_run(case, layout, experts, buffers))
    cells = []
    for case, results in found.items():
        disk = [ratio for _, ratio in results if ratio is not None and case.state == "cold"]
        ratio = statistics.median(disk) if disk else None
        cells.append(Cell(case, [speed for speed, _ in results], ratio))
    return cells


def _run(
    case: Case, layout: ExpertLayout, experts: Sequence[int], buffers: list[memoryview]
) -> tuple[float, float | None]:
    """Return bytes per second, and the bytes that the disk delivered for each byte asked for."""
    ranges = ranges_of([(layout.layers[0], expert) for expert in experts])
    source = _store(case, layout, experts) if case.ours else _raw(case, ranges, buffers)
    with source as read:
        _prepare(ranges, buffers, cold=case.state == "cold")
        before = disk_bytes()
        seconds = read()
        after, asked = disk_bytes(), sum(nbytes for _, _, nbytes in ranges)
    from_disk = None if before is None or after is None else (after - before) / asked
    return asked / seconds, from_disk


def _prepare(ranges: Sequence[Range], buffers: list[memoryview], cold: bool) -> None:
    """Drop ranges from the page cache, or read them into it."""
    with opened(ranges) as files:
        read = reads_into(buffers, ranges, files)
        for number, place in enumerate(ranges):
            if cold:
                forget(files[place[0]], place)
            else:
                read(number)


@contextlib.contextmanager
def _store(case: Case, layout: ExpertLayout, experts: Sequence[int]) -> Iterator[Read]:
    """Open a store whose bank is full of other experts; yield a function that fetches these."""
    io = IoPlan(True, "as asked") if case.direct else BUFFERED
    plan = CachePlan(BUFFERS, BUFFERS * layout.token_bytes, "as the others", io)
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
    with opened(ranges, case.direct, read_ahead=case.way != "pread, no read-ahead") as files:
        work = (
            reads_into(buffers, ranges, files)
            if case.way in PREADS
            else _copies(case, ranges, files, buffers)
        )
        yield lambda: in_threads(work, len(ranges), case.threads)


def _copies(
    case: Case, ranges: Sequence[Range], files: dict[Path, int], buffers: list[memoryview]
) -> Callable[[int], None]:
    """Return a function that copies a range from a mapped file, or as many bytes from memory."""
    if case.way == "memcpy":
        sources = {path: np.ones(max(r[1] + r[2] for r in ranges), np.uint8) for path in files}
    else:
        maps = {p: mmap.mmap(f, 0, access=mmap.ACCESS_READ) for p, f in files.items()}
        sources = {path: np.frombuffer(m, np.uint8) for path, m in maps.items()}

    def copy(index: int) -> None:
        path, offset, nbytes = ranges[index]
        target = np.asarray(buffers[index % BUFFERS])
        np.copyto(target[:nbytes], sources[path][offset : offset + nbytes])

    return copy


def _report(source: str, layout: ExpertLayout, cells: list[Cell]) -> dict[str, Any]:
    """Print the table and the store's share of the best, and return all as JSON values."""
    threads = sorted({cell.case.threads for cell in cells})
    print(f"\nrecords of {layout.record_bytes} bytes; {source}; {COLD_BY}")
    if why := obstacle(layout):
        print(f"no direct reads: {why}")
    print(f"{'threads':>27}", *(f"{n:>6}" for n in threads), " from disk")
    for state, way in dict.fromkeys((c.case.state, c.case.way) for c in cells):
        row = {c.case.threads: c for c in cells if (c.case.state, c.case.way) == (state, way)}
        ratios = [c.from_disk for c in row.values() if c.from_disk is not None]
        disk = f"{statistics.median(ratios):>9.2f}x" if ratios else f"{'-':>10}"
        print(f"{state:>5} {way:>21}", *(f"{row[n].median / 1e9:6.2f}" for n in threads), disk)
    rows = [
        {**asdict(c.case), "bytes_per_s": c.median, "rounds": c.bytes_per_s,
         "from_disk": c.from_disk}
        for c in cells
    ]  # fmt: skip
    shares = {state: _share(state, cells) for state in ("cold", "warm")}
    return {"record": layout.record_bytes, "source": source, "cold_by": COLD_BY, **shares,
            "rows": rows}  # fmt: skip


def _share(state: str, cells: list[Cell]) -> dict[str, Any]:
    """Compare the store's best with the best of the raw ways, and print that."""
    ours = _best(c for c in cells if c.case.state == state and c.case.ours)
    best = _best(c for c in cells if c.case.state == state and c.case.raw)
    share = ours.median / best.median
    print(
        f"{state}: {ours.case.way}, {ours.case.threads} threads: {ours.median / 1e9:.2f} GB/s, "
        f"{share:.0%} of the best ({best.case.way}, {best.case.threads}: {best.median / 1e9:.2f})"
    )
    return {"store_bytes_per_s": ours.median, "best_bytes_per_s": best.median, "share": share,
            "store": asdict(ours.case), "best": asdict(best.case)}  # fmt: skip


def _best(cells: Iterable[Cell]) -> Cell:
    return max(cells, key=lambda cell: cell.median)


class Limit:
    """How near generation comes to the best raw way of reading the same model's records.

    Of a run's bytes, those that the disk delivered would take their time at the best cold way, the
    others at the best warm one. The share is that time in the time that the run had a read in
    flight.
    """

    def __init__(self, layout: ExpertLayout) -> None:
        """Choose the cases."""
        self._layout = layout
        raw = (case for case in cases(layout, LIMIT_THREADS) if case.raw)
        self._rounds: dict[Case, list[float]] = {case: [] for case in raw}

    def measure(self) -> None:
        """Measure each case once more."""
        for cell in measure(self._layout, list(self._rounds), 1, LIMIT_SAMPLE):
            self._rounds[cell.case] += cell.bytes_per_s

    def best(self, state: str) -> Cell:
        """Return the fastest way by the median of its rounds; `state` is "cold" or "warm"."""
        return _best(
            Cell(c, speeds, None) for c, speeds in self._rounds.items() if c.state == state
        )

    def share(self, use: Use) -> float | None:
        """Return the share; None if nothing was read, or the disk's part is unknown."""
        stats = use.stats
        if not stats.seconds_reading or use.from_disk is None:
            return None
        cold = use.needed / self.best("cold").median
        warm = (stats.bytes_read - use.needed) / self.best("warm").median
        return (cold + warm) / stats.seconds_reading

    def report(self, uses: dict[str, list[Use]]) -> dict[str, Any]:
        """Print the limit and what each kind of run reached, by the median; return JSON values."""
        best = {state: self.best(state) for state in ("cold", "warm")}
        ways = "; ".join(
            f"{state} {cell.median / 1e9:.2f} GB/s ({cell.case.way}, {cell.case.threads} threads)"
            for state, cell in best.items()
        )
        print(f"raw reads of such records at best, between the runs: {ways}")
        found = {s: {**asdict(c.case), "bytes_per_s": c.median} for s, c in best.items()}
        return {"best": found, "reached": {name: self._reached(name, uses[name]) for name in uses}}

    def _reached(self, name: str, uses: list[Use]) -> dict[str, float] | None:
        """Print and return what runs reached; None if they read nothing."""
        counters = [use.stats for use in uses if use.stats.seconds_reading]
        if not counters:
            return None
        speed = statistics.median(c.bytes_read / c.seconds_reading for c in counters)
        found, line = {"bytes_per_s": speed}, f"{speed / 1e9:.2f} GB/s while a read was in flight"
        if shares := [share for use in uses if (share := self.share(use)) is not None]:
            found["share"] = statistics.median(shares)
            line += f", {found['share']:.0%} of what its bytes allow"
        print(f"{name}: {line}")
        return found
