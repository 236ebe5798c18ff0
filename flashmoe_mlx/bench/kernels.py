"""`flashmoe-bench kernels`: time each op, stock MLX's op, and the memory bandwidth's limit."""

import argparse
import json
import math
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import numpy as np

from ..custom_kernels import launch
from ..custom_kernels.autotune import NEEDS_GPU, measure
from ..custom_kernels.case import DTYPES, KernelCase
from ..custom_kernels.cases import cases, label
from ..custom_kernels.experts.router import MAX_TOP_K
from ..custom_kernels.linear.matvec import BITS
from ..custom_kernels.timing import fitting_calls, ops_of, side_by_side
from ..errors import FlashMoEError
from ..models.qwen3_5.geometry import GEOMETRIES
from ..profile import machine

CHAIN_SECONDS = 0.5
COPIED = 256 << 20  # bytes per array when measuring bandwidth
OPS = tuple(dict.fromkeys(case.op for case in cases(GEOMETRIES["35b"], 4, "float32")))
FORMS = ("custom", "naive", "stock")  # of an op: our kernel, a simple one, MLX's
HEADER = (
    f"{'ours':>9} {'naive':>9} {'stock':>9} {'floor':>9} {'share':>6} {'gain':>6}  op and shape"
)


def line(row: dict[str, Any]) -> str:
    """Format a `measure_row` as one line under HEADER."""
    times = " ".join(f"{_or_dash(row[f'{form}_ms'], '.4f'):>9}" for form in (*FORMS, "floor"))
    share, gain = _or_dash(row["share_of_floor"], ".0%"), _or_dash(row["gain_over_stock"], ".2f")
    gain += "x" if gain != "-" else ""
    note = f"  [{row['message']}]" if row["message"] else ""
    return f"{times} {share:>6} {gain:>6}  {row['op']} {row['trial']}{note}"


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    text = "Time each kernel against stock MLX and against the memory bandwidth's limit."
    parser = commands.add_parser("kernels", help=text, description=text)
    parser.set_defaults(run=run)
    add, usual = parser.add_argument, ["35b", "122b", "397b"]
    text = "models whose shapes to use (default: 35b 122b 397b)"
    add("--geometry", nargs="+", choices=GEOMETRIES, default=usual, help=text)
    add("--op", nargs="+", help="only these ops, such as dequant_matvec (default: all)")
    text = "bits per weight (default: 4 2)"
    add("--bits", nargs="+", type=int, default=[4, 2], help=text)
    text = "experts per token (default: 4 8 10)"
    add("--top-k", nargs="+", type=int, default=[4, 8, 10], help=text)
    text = "dtype of activations (default: bfloat16 on a GPU, float32 on a CPU)"
    add("--dtype", choices=DTYPES, help=text)
    add("--calls", type=int, help="calls per chain (default: 64 on a GPU, 8 on a CPU)")
    add("--runs", type=int, default=5, help="chains per op; prints the median (default: 5)")


def run(args: argparse.Namespace) -> int:
    """Print the table, then one JSON line; return 1 if a kernel fails its check, else 0."""
    _check(args)
    facts, dtype = machine.facts(), args.dtype or machine.default_dtype()
    calls = args.calls or (64 if machine.on_gpu() else 8)
    print(machine.describe(facts))
    bandwidth, how = copy_bandwidth()
    print(f"{facts['device']}, {dtype}; copy: {bandwidth / 1e9:.1f} GB/s ({how})")
    print(f"chains of {calls} calls (fewer for slow ops), median of {args.runs}; ms per call")
    print(HEADER, flush=True)
    rows = []
    for case in _selected(args, dtype):
        rows.append(measure_row(case, calls, args.runs, bandwidth))
        print(line(rows[-1]), flush=True)
    settings = {"dtype": dtype, "calls": calls, "runs": args.runs, "copy_bytes_per_s": bandwidth}
    settings["copy_measured_by"] = how
    result = {"benchmark": "kernels", **facts, **settings, "rows": rows}
    print(json.dumps(result))
    return int(any(row["message"] not in ("", NEEDS_GPU) for row in rows))


def _check(args: argparse.Namespace) -> None:
    """Reject settings that kernels or models do not support."""
    for flag, values, allowed in (
        ("--bits", args.bits, BITS),
        ("--top-k", args.top_k, range(1, MAX_TOP_K + 1)),
        ("--calls", [] if args.calls is None else [args.calls], range(1, 10**6)),
        ("--runs", [args.runs], range(1, 10**6)),
        ("--op", args.op or [], OPS),
    ):
        for value in values:
            if value not in allowed:
                known = f"one of {', '.join(map(str, allowed))}"
                if isinstance(allowed, range):
                    known = f"from 1 to {allowed[-1]}"
                raise FlashMoEError(f"{flag} must be {known}, got {value}")


def _selected(args: argparse.Namespace, dtype: str) -> Iterable[KernelCase]:
    """Return the distinct kernel cases that the flags describe."""
    found = [
        case
        for geometry in args.geometry
        for bits in args.bits
        for top_k in args.top_k
        for case in cases(GEOMETRIES[geometry], bits, dtype, top_k)
        if not args.op or case.op in args.op
    ]
    return dict.fromkeys(found)


def measure_row(case: KernelCase, calls: int, runs: int, bandwidth: float) -> dict[str, Any]:
    """Check a kernel case and time it, unless the kernel fails its check.

    Returns:
        JSON values: op and shape; `nbytes` that a call must move; the parity check's `error` and
        `limit`, as shares of the largest output, and its `message`, empty if it passes;
        milliseconds per call of each of FORMS (None if not timed) and of moving `nbytes` at
        `bandwidth` (bytes per second); the floor over our time, and stock's time over ours.
    """
    found = measure(case, timed=False)
    times: dict[str, float] = {}
    if found.ok or found.message == NEEDS_GPU:
        names = [name for name in (FORMS if found.ok else ("stock",)) if hasattr(case, name)]
        if not launch.available():  # the naive form is a GPU kernel
            names = [name for name in names if name != "naive"]
        times = dict(zip(names, _time(case, names, calls, runs), strict=True))
    ours, stock, floor = times.get("custom"), times.get("stock"), case.nbytes / bandwidth * 1e3
    return {
        "op": case.op, "trial": label(case), "nbytes": case.nbytes,
        "error": found.error, "limit": found.limit, "message": found.message,
        **{f"{form}_ms": times.get(form) for form in FORMS}, "floor_ms": floor,
        "share_of_floor": floor / ours if ours else None,
        "gain_over_stock": stock / ours if ours and stock else None,
    }  # fmt: skip


def _time(case: KernelCase, names: list[str], calls: int, runs: int) -> list[float]:
    """Return milliseconds per call of each op, in chains of CHAIN_SECONDS at most."""
    calls, sets = _chain_length(case, calls)
    inputs = [case.inputs()]
    ops = ops_of(case, names)
    calls = fitting_calls(ops, inputs[0], CHAIN_SECONDS, calls, time.perf_counter)
    inputs += [case.inputs(seed) for seed in range(1, min(calls, sets))]
    return side_by_side(ops, inputs, calls, runs)


def _chain_length(case: KernelCase, calls: int) -> tuple[int, int]:
    """Return the number of calls and of input sets, enough to evict each set before its reuse."""
    sets = -(-3 * machine.cache_bytes() // (2 * max(case.nbytes, 1)))
    sets = min(sets, max(calls, 64))
    return max(calls, sets), sets


def copy_bandwidth() -> tuple[float, str]:
    """Return the memory bandwidth of the default device in bytes per second, and the method."""
    if machine.on_gpu():
        (milliseconds,) = side_by_side([lambda x: [-x]], [[mx.ones(COPIED // 4)]], calls=8)
        seconds, copier = milliseconds / 1e3, "one kernel"
    else:
        seconds, copier = _cpu_copy(), f"{machine.cores()} threads"
    how = f"{copier}, {COPIED >> 20} MiB to {COPIED >> 20} MiB, counting reads and writes"
    return 2 * COPIED / seconds, how


def _cpu_copy() -> float:
    """Return seconds per copy: the best of six, because other programs share these cores."""
    count, best = machine.cores(), math.inf
    sources = np.array_split(np.ones(COPIED, np.uint8), count)
    targets = [np.empty_like(part) for part in sources]
    with ThreadPoolExecutor(count) as pool:
        for _ in range(6):
            start = time.perf_counter()
            list(pool.map(np.copyto, targets, sources))
            best = min(best, time.perf_counter() - start)
    return best
