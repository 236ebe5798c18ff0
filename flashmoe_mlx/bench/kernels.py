"""`flashmoe-bench kernels`: each op's time beside stock MLX's and beside the memory's limit."""

import argparse
import json
import math
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..custom_kernels import launch
from ..custom_kernels.autotune import NEEDS_GPU, measure
from ..custom_kernels.case import DTYPES, Trial
from ..custom_kernels.cases import label, trials
from ..custom_kernels.experts.router import MAX_TOP_K
from ..custom_kernels.linear.matvec import BITS
from ..custom_kernels.timing import fitting_calls, ops_of, side_by_side
from ..errors import FlashMoEError
from ..models.qwen3_5.geometry import GEOMETRIES
from ..profile import machine

CHAIN_SECONDS = 0.5
COPIED = 256 << 20  # bytes of each array that the bandwidth is measured with
OPS = tuple(dict.fromkeys(trial.op for trial in trials(GEOMETRIES["35b"], 4, "float32")))
FORMS = ("custom", "naive", "stock")  # of an op: ours, ours without care, MLX's
HEADER = (
    f"{'ours':>9} {'naive':>9} {'stock':>9} {'floor':>9} {'share':>6} {'gain':>6}  op and shape"
)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        op: name of the op; `trial` is its shape, as `label` writes it.
        nbytes: bytes that a call must move.
        error: the parity check's, and its `limit`, as shares of the largest output.
        message: why our kernel was not timed; empty if it was.
        custom_ms: milliseconds per call of our kernel; None where not timed.
        naive_ms: of the same op written without care.
        stock_ms: of MLX's own ops.
        floor_ms: of moving `nbytes` at the measured copy bandwidth.
    """

    op: str
    trial: str
    nbytes: int
    error: float | None
    limit: float | None
    message: str
    custom_ms: float | None
    naive_ms: float | None
    stock_ms: float | None
    floor_ms: float

    @property
    def red(self) -> bool:
        """Say whether the kernel failed, rather than having no GPU to run on."""
        return self.message not in ("", NEEDS_GPU)

    @property
    def share(self) -> float | None:
        """Share of the memory's speed that our kernel reaches."""
        return self.floor_ms / self.custom_ms if self.custom_ms else None

    @property
    def gain(self) -> float | None:
        """Stock's time over ours: above 1, ours is faster."""
        return self.stock_ms / self.custom_ms if self.custom_ms and self.stock_ms else None

    def as_dict(self) -> dict[str, Any]:
        """Return fields and ratios as plain JSON values."""
        return {**asdict(self), "share_of_floor": self.share, "gain_over_stock": self.gain}

    def __str__(self) -> str:
        """One line under HEADER."""
        times = self.custom_ms, self.naive_ms, self.stock_ms, self.floor_ms
        share = "-" if self.share is None else f"{self.share:.0%}"
        gain = "-" if self.gain is None else f"{self.gain:.2f}x"
        columns = [f"{'-' if ms is None else f'{ms:.4f}':>9}" for ms in times]
        note = f"  [{self.message}]" if self.message else ""
        return f"{' '.join(columns)} {share:>6} {gain:>6}  {self.op} {self.trial}{note}"


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    text = "Time each kernel beside stock MLX and beside what the memory's bandwidth allows."
    parser = commands.add_parser("kernels", help=text, description=text)
    parser.set_defaults(run=run)
    add, usual = parser.add_argument, ["35b", "122b", "397b"]
    text = "models whose shapes to take (default: 35b 122b 397b)"
    add("--geometry", nargs="+", choices=GEOMETRIES, default=usual, help=text)
    add("--op", nargs="+", help="only these ops, such as dequant_matvec (default: all)")
    text = "bits per weight (default: 4 2)"
    add("--bits", nargs="+", type=int, default=[4, 2], help=text)
    text = "experts (default: 4 8 10)"
    add("--top-k", nargs="+", type=int, default=[4, 8, 10], help=text)
    text = "of activations (default: bfloat16 on a GPU, float32 on a CPU)"
    add("--dtype", choices=DTYPES, help=text)
    add("--calls", type=int, help="calls in one chain (default: 64 on a GPU, 8 on a CPU)")
    add("--runs", type=int, default=5, help="chains of each, of which the median (default: 5)")


def run(args: argparse.Namespace) -> int:
    """Print the table, then one JSON line. Returns 1 if a kernel failed its check, else 0."""
    _check(args)
    facts, dtype = machine.facts(), args.dtype or machine.default_dtype()
    calls = args.calls or (64 if machine.on_gpu() else 8)
    print(machine.describe(facts))
    bandwidth, how = copy_bandwidth()
    print(f"{facts['device']}, {dtype}; copy: {bandwidth / 1e9:.1f} GB/s ({how})")
    print(f"chains of {calls}, fewer of slow ops; median of {args.runs}; milliseconds per call")
    print(HEADER, flush=True)
    rows = []
    for trial in _selected(args, dtype):
        rows.append(measure_row(trial, calls, args.runs, bandwidth))
        print(rows[-1], flush=True)
    settings = {"dtype": dtype, "calls": calls, "runs": args.runs, "copy_bytes_per_s": bandwidth}
    settings["copy_measured_by"] = how
    result = {"benchmark": "kernels", **facts, **settings, "rows": [r.as_dict() for r in rows]}
    print(json.dumps(result))
    return int(any(row.red for row in rows))


def _check(args: argparse.Namespace) -> None:
    """Refuse settings that no kernel or no model has."""
    for flag, values, allowed in (
        ("--bits", args.bits, BITS),
        ("--top-k", args.top_k, range(1, MAX_TOP_K + 1)),
        ("--calls", [] if args.calls is None else [args.calls], range(1, 10**6)),
        ("--runs", [args.runs], range(1, 10**6)),
        ("--op", args.op or [], OPS),
    ):
        for value in values:
            if value not in allowed:
                names = ", ".join(map(str, allowed))
                known = names if not isinstance(allowed, range) else f"1 to {allowed[-1]}"
                raise FlashMoEError(f"{flag} {value} is not among what can be measured: {known}.")


def _selected(args: argparse.Namespace, dtype: str) -> Iterable[Trial]:
    """Return the trials that the flags ask for, each once."""
    found = [
        trial
        for geometry in args.geometry
        for bits in args.bits
        for top_k in args.top_k
        for trial in trials(GEOMETRIES[geometry], bits, dtype, top_k)
        if not args.op or trial.op in args.op
    ]
    return dict.fromkeys(found)


def measure_row(trial: Trial, calls: int, runs: int, bandwidth: float) -> Row:
    """Check a trial and time it; a kernel that fails its check is not timed, nor its op."""
    found = measure(trial, timed=False)
    times: dict[str, float] = {}
    if found.ok or found.message == NEEDS_GPU:
        names = [name for name in (FORMS if found.ok else ("stock",)) if hasattr(trial, name)]
        if not launch.available():  # the naive form is a GPU kernel
            names = [name for name in names if name != "naive"]
        times = dict(zip(names, _time(trial, names, calls, runs), strict=True))
    custom, naive, stock = map(times.get, FORMS)
    return Row(
        trial.op, label(trial), trial.nbytes, found.error, found.limit, found.message,
        custom, naive, stock, floor_ms=trial.nbytes / bandwidth * 1e3,
    )  # fmt: skip


def _time(trial: Trial, names: list[str], calls: int, runs: int) -> list[float]:
    """Return milliseconds per call of each op, in chains of at most CHAIN_SECONDS or one call."""
    calls, sets = _chain_length(trial, calls)
    inputs = [trial.inputs()]
    ops = ops_of(trial, names)
    calls = fitting_calls(ops, inputs[0], CHAIN_SECONDS, calls, time.perf_counter)
    inputs += [trial.inputs(seed) for seed in range(1, min(calls, sets))]
    return side_by_side(ops, inputs, calls, runs)


def _chain_length(trial: Trial, calls: int) -> tuple[int, int]:
    """Return calls, and sets of inputs: enough that none is in a cache when its turn comes."""
    sets = -(-3 * machine.cache_bytes() // (2 * max(trial.nbytes, 1)))
    sets = min(sets, max(calls, 64))
    return max(calls, sets), sets


def copy_bandwidth() -> tuple[float, str]:
    """Measure the default device's memory: bytes per second, read and written, and how."""
    seconds = _gpu_copy() if machine.on_gpu() else _cpu_copy()
    who = "one kernel" if machine.on_gpu() else f"{machine.cores()} threads"
    how = f"{who}, {COPIED >> 20} MiB to {COPIED >> 20} MiB, reads and writes counted"
    return 2 * COPIED / seconds, how


def _gpu_copy() -> float:
    """Return seconds per copy."""
    source = mx.ones(COPIED // 4)
    (milliseconds,) = side_by_side([lambda x: [-x]], [[source]], calls=8)
    return milliseconds / 1e3


def _cpu_copy() -> float:
    """Return seconds per copy: the best, since other programs run on these cores too."""
    count, best = machine.cores(), math.inf
    sources = np.array_split(np.ones(COPIED, np.uint8), count)
    targets = [np.empty_like(part) for part in sources]
    with ThreadPoolExecutor(count) as pool:
        for _ in range(6):
            start = time.perf_counter()
            list(pool.map(np.copyto, targets, sources))
            best = min(best, time.perf_counter() - start)
    return best
