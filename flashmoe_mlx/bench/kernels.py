"""`flashmoe-bench kernels`: time each op, stock MLX's op, and the memory bandwidth's limit."""

import argparse
import math
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import numpy as np

from ..custom_kernels import launch
from ..custom_kernels.autotune import NEEDS_GPU, measure
from ..custom_kernels.case import KernelCase
from ..custom_kernels.cases import cases, label
from ..custom_kernels.experts.router import MAX_TOP_K
from ..custom_kernels.linear.matvec import BITS
from ..custom_kernels.timing import fitting_calls, ops_of, timed
from ..errors import FlashMoEError
from ..models.families import SHAPES
from ..profile import machine
from ..progress import bar
from .output import check_json, show, write_json

CHAIN_SECONDS = 0.5
SHORTEST = 0.05  # of a call with its link; below, a difference of the two is noise
COPIED = 256 << 20  # bytes per array when measuring bandwidth
OPS = tuple(dict.fromkeys(case.op for case in cases(SHAPES["35b"], 4, "float32")))
FORMS = ("custom", "naive", "stock")  # of an op: our kernel, a simple one, MLX's
HEADER = (
    f"{'ours':>9} {'naive':>9} {'stock':>9} {'floor':>9} {'share':>6} {'gain':>6}  op and shape"
)


def line(row: dict[str, Any]) -> str:
    """Format a `measure_row` as one line under HEADER."""
    times = " ".join(f"{_time_text(row, form):>9}" for form in (*FORMS, "floor"))
    share, gain = _or_dash(row["share_of_floor"], ".0%"), _or_dash(row["gain_over_stock"], ".2f")
    gain += "x" if gain != "-" else ""
    note = f"  [{row['message']}]" if row["message"] else ""
    return f"{times} {share:>6} {gain:>6}  {row['op']} {row['trial']}{note}"


def _time_text(row: dict[str, Any], form: str) -> str:
    """Format milliseconds; "<" marks a call that takes no longer than linking it to the next."""
    if (bound := row.get(f"{form}_below_ms")) is not None:
        return f"<{bound:.4f}"
    return _or_dash(row[f"{form}_ms"], ".4f")


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def run(args: argparse.Namespace) -> int:
    """Print the table row by row; return 1 if a kernel fails its check, else 0."""
    _check(args)
    check_json(args)
    facts, dtype = machine.facts(), args.dtype or machine.default_dtype()
    calls = args.calls or (64 if machine.on_gpu() else 8)
    print(machine.describe(facts))
    bandwidth, how = copy_bandwidth()
    print(f"{facts['device']}, {dtype}; copy: {bandwidth / 1e9:.1f} GB/s ({how})")
    print(f"chains of {calls} calls (fewer for slow ops), median of {args.runs}; ms per call")
    print(HEADER, flush=True)
    rows, absent = _rows(list(_selected(args, dtype)), calls, args.runs, bandwidth)
    if absent:
        print(f"not listed, because their kernels need a GPU: {', '.join(absent)}")
    settings = {"dtype": dtype, "calls": calls, "runs": args.runs, "copy_bytes_per_s": bandwidth}
    settings["copy_measured_by"] = how
    write_json(
        args, {"benchmark": "kernels", **facts, **settings, "rows": rows, "need_gpu": absent}
    )
    return int(any(row["message"] for row in rows))


def _rows(
    cases: list[KernelCase], calls: int, runs: int, bandwidth: float
) -> tuple[list[dict[str, Any]], list[str]]:
    """Measure and print each case; return the rows, and the ops that need a GPU."""
    rows, absent = [], dict[str, None]()
    with bar(len(cases), " cases") as progress:
        for case in cases:
            progress.set_description(f"{case.op} {label(case)}")
            row = measure_row(case, calls, runs, bandwidth)
            if row["message"] == NEEDS_GPU:
                absent[case.op] = None
            else:
                rows.append(row)
                show(line(row))
            progress.update()
    return rows, list(absent)


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
        for case in cases(SHAPES[geometry], bits, dtype, top_k)
        if not args.op or case.op in args.op
    ]
    return dict.fromkeys(found)


def measure_row(case: KernelCase, calls: int, runs: int, bandwidth: float) -> dict[str, Any]:
    """Check a kernel case and time it, unless the kernel fails its check.

    Returns:
        JSON values: op and shape; `nbytes` that a call must move; the parity check's `error` and
        `limit`, as shares of the largest output, and its `message`, empty if it passes;
        milliseconds per call of each of FORMS (None if not timed) and of moving `nbytes` at
        `bandwidth` (bytes per second); the floor over our time, and stock's time over ours. A call
        too short to be timed has None, and an upper bound `.._below_ms`.
    """
    found = measure(case, timed=False)
    times: dict[str, float | None] = {}
    bounds: dict[str, float] = {}
    if found.ok:
        names = [name for name in FORMS if hasattr(case, name)]
        if not launch.available():  # the naive form is a GPU kernel
            names = [name for name in names if name != "naive"]
        for name, (net, gross) in zip(names, _time(case, names, calls, runs), strict=True):
            if net < SHORTEST * gross:
                times[name], bounds[f"{name}_below_ms"] = None, gross
            else:
                times[name] = net
    ours, stock, floor = times.get("custom"), times.get("stock"), case.nbytes / bandwidth * 1e3
    return {
        "op": case.op, "trial": label(case), "nbytes": case.nbytes,
        "error": found.error, "limit": found.limit, "message": found.message,
        **{f"{form}_ms": times.get(form) for form in FORMS}, **bounds, "floor_ms": floor,
        "share_of_floor": floor / ours if ours else None,
        "gain_over_stock": stock / ours if ours and stock else None,
    }  # fmt: skip


def _time(case: KernelCase, names: list[str], calls: int, runs: int) -> list[tuple[float, float]]:
    """Return milliseconds per call of each op, without and with the cost of linking calls.

    Chains take CHAIN_SECONDS at most.
    """
    calls, sets = _chain_length(case, calls)
    inputs = [case.inputs()]
    ops = ops_of(case, names)
    calls = fitting_calls(ops, inputs[0], CHAIN_SECONDS, calls, time.perf_counter)
    inputs += [case.inputs(seed) for seed in range(1, min(calls, sets))]
    return timed(ops, inputs, calls, runs)


def _chain_length(case: KernelCase, calls: int) -> tuple[int, int]:
    """Return the number of calls and of input sets, enough to evict each set before its reuse."""
    sets = -(-3 * machine.cache_bytes() // (2 * max(case.nbytes, 1)))
    sets = min(sets, max(calls, 64))
    return max(calls, sets), sets


def copy_bandwidth() -> tuple[float, str]:
    """Return the memory bandwidth of the default device in bytes per second, and the method."""
    if machine.on_gpu():
        ((milliseconds, _),) = timed([lambda x: [-x]], [[mx.ones(COPIED // 4)]], calls=8)
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
