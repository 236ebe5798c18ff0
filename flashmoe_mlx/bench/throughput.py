"""`flashmoe-bench decode`, `prefill` and `batch`: tokens per second, and their limit.

A run's *floor* is the least possible time on this machine: the longer of reading the necessary
bytes from disk, at the bandwidth measured around the run, and computing without reads.
"""

import argparse
import statistics
from functools import partial
from typing import Any

from ..cli.published import ROWS
from ..models.qwen3_5.geometry import GEOMETRIES
from ..profile.counters import Use
from ..profile.layers import LayerTime, print_rows, timed_layers
from ..profile.plot import check_plot, plot
from ..progress import bar
from ..store.memory import peak_bytes
from . import model as bench
from .io import Limit
from .model import PROMPT, Subject
from .output import check_json, show, write_json
from .synthetic import Recipe
from .workloads import Workload, begin, prefill, state_name, workloads

HEADER = (
    f"{'tok/s':>9} {'hits':>6} {'MB/token':>9} {'unused':>8} {'disk MB':>9} {'GB/s':>6} "
    f"{'disk ms':>9} {'comp. ms':>9} {'share':>6} {'user ms':>8} {'sys ms':>7}  run"
)
LEGEND = (
    "MB/token: read into the banks; unused: by wrong prefetches; disk MB: read from the disk; "
    "GB/s: while waiting for reads;\n"
    "disk, comp. ms: a token's least time for reading and for computing; share: the longer of both "
    "over the time taken;\nuser, sys ms: on all cores, in the program and in the kernel"
)


def run(args: argparse.Namespace) -> int:
    """Print a table per workload; return 0."""
    settings = {n: vars(args)[n] for n in ("tokens", "chunk", "batch") if n in args}
    bench.check_positive(**settings)
    check_plot(args.plot)
    check_json(args)
    subject = bench.open_subject(args)
    found = {"benchmark": args.what, **bench.conditions(subject), **settings}
    found |= {n: vars(args)[n] for n in ("cold", "forced") if n in args}
    with bar(None, what="compiling"):
        prefill([0] * PROMPT, PROMPT, subject.model, 0, partial(begin, None, False))
    works = workloads(subject, args)
    rows = [row for work in works for row in _report(subject, args, work)]
    print(f"{LEGEND}\npeak resident memory: {peak_bytes() / 2**20:.0f} MiB")
    found |= {"peak_bytes": peak_bytes(), "per_layer": rows[-1]["per_layer"]}
    if args.what == "batch":
        _add_speedup(rows)
    elif args.published:
        unit = "tok/s" if args.what == "decode" else "tok/s prefill"
        speed = rows[-1]["tokens_per_s"]
        found["published"] = print_published(subject.recipe, unit, speed)
    if args.stock:
        found["stock"] = _stock(subject, args.runs, works)
        found["stock_tokens_per_s"] = found["stock"][-1]["tokens_per_s"]
    found |= rows[0] if args.what == "decode" else {"rows": rows}
    title = f"{args.what}, {subject.recipe.name}, {_size(works[-1])}"
    plot(args.plot, found["per_layer"], f"{title}{rows[-1]['tokens_per_s']:.2f} tok/s")
    write_json(args, found)
    return 0


def _report(subject: Subject, args: argparse.Namespace, work: Workload) -> list[dict[str, Any]]:
    """Measure a workload, print its tables, and return JSON values for each state."""
    limit = Limit(subject.store.layout)
    print(f"{work.title}\n{HEADER}", flush=True)
    uses, disk, compute = _measure(subject, args.runs, work, limit)
    rows, least = [], statistics.median(compute)
    for cold, found in uses.items():
        figures = [result(use, work.tokens, use.disk_floor(disk), least) for use in found]
        best = median_run(figures)
        show(line(best, work.tokens, work.row.format(state=state_name(cold), run="median")))
        rows.append({**work.size, "cold": cold, **best, "runs": figures})
    low, high = min(disk) / 1e9, max(disk) / 1e9
    show(f"disk, cold reads of random experts, between runs: {low:.2f} to {high:.2f} GB/s")
    layers, seconds = profile(subject, work)
    by_name = {
        state_name(c) if args.what == "prefill" else args.what: use for c, use in uses.items()
    }
    shared = {
        "disk_bytes_per_s": disk,
        "step_s": [seconds / work.steps for seconds in compute],
        "limit": limit.report(by_name),
        **_compare_reads(subject, layers),
        "per_layer": [layer.as_dict(work.steps) for layer in layers],
    }
    _print_layers(layers, work.steps, seconds, work.tokens / rows[0]["tokens_per_s"])
    return [row | shared for row in rows]


def _measure(
    subject: Subject, runs: int, work: Workload, limit: Limit
) -> tuple[dict[bool, list[Use]], list[float], list[float]]:
    """Return the runs in each state, and the disk's bytes/s and seconds of computing in between.

    Prints each run, with floors by what was measured so far.
    """
    uses: dict[bool, list[Use]] = {cold: [] for cold in work.states}
    with bar(runs * (len(work.states) + 3) + 2, " parts") as progress:

        def done(what: str, value: Any) -> Any:
            progress.set_description(f"measured {what}")
            progress.update()
            return value

        disk = [done("the disk", bench.bandwidth(subject.store))]
        compute = [done("computing", work.compute())]
        for seed in range(runs):
            limit.measure()
            done("raw reads", None)
            for cold in work.states:
                use = work.run(subject.model, seed, partial(begin, subject.store, cold))
                uses[cold].append(done(f"run {seed + 1}", use))
                least = statistics.median(compute)
                figures = result(use, work.tokens, use.disk_floor(disk), least)
                name = work.row.format(state=state_name(cold), run=seed + 1)
                show(line(figures, work.tokens, name))
            compute.append(done("computing", work.compute()))
            disk.append(done("the disk", bench.bandwidth(subject.store)))
    return uses, disk, compute


def profile(subject: Subject, work: Workload) -> tuple[list[LayerTime], float]:
    """Run once and time every part of every layer; return the layers and the run's seconds."""
    with timed_layers(subject.model, subject.store) as layers:

        def started() -> None:
            for layer in layers:
                layer.clear()

        use = work.run(subject.model, 0, partial(begin, subject.store, work.states[0], started))
    return layers, use.seconds


def _compare_reads(subject: Subject, layers: list[LayerTime]) -> dict[str, Any]:
    """Compare the bytes read with the minimum, one read per missing expert, layer and step."""
    asked, hits = sum(layer.asked for layer in layers), sum(layer.hits for layer in layers)
    distinct = sum(layer.distinct for layer in layers)
    missing = distinct - hits
    sizes = [layer.record_bytes for layer in subject.store.layout.layers]
    nbytes = sum((x.distinct - x.hits) * size for x, size in zip(layers, sizes, strict=True))
    over = (asked - hits) / missing if missing else 1.0
    print(
        f"distinct experts, summed over layers and steps: {distinct}, of which {hits} resident; "
        f"bytes read: {over:.3f} times those of the others"
    )
    return {"distinct": distinct, "missing": missing, "theory_bytes": nbytes,
            "read_over_theory": over}  # fmt: skip


def _stock(subject: Subject, runs: int, works: list[Workload]) -> list[dict[str, float]]:
    """Run the workloads with stock mlx-lm, and return their median tokens per second."""
    model, rows = bench.stock_model(subject), []
    for work in works:
        uses = [work.run(model, seed, partial(begin, None, False)) for seed in range(runs)]
        speed = work.tokens / statistics.median(use.seconds for use in uses)
        print(f"stock mlx-lm, all resident: {_size(work)}{speed:.2f} tok/s")
        rows.append({**work.size, "tokens_per_s": speed})
    return rows


def result(use: Use, tokens: int, disk_s: float, compute_s: float) -> dict[str, Any]:
    """Return a run's figures as JSON values; the floor is the longer of `disk_s`, `compute_s`."""
    stats = use.stats
    return {
        "tokens_per_s": tokens / use.seconds,
        "hit_rate": stats.hit_rate,
        "bytes_per_token": stats.bytes_read / tokens,
        "useless_bytes_per_token": stats.bytes_useless / tokens,
        "disk_bytes_per_token": None if use.from_disk is None else use.from_disk / tokens,
        "read_bytes_per_s": stats.bytes_read / stats.seconds_waited
        if stats.reads and stats.seconds_waited
        else None,
        "cpu_user_s": use.user,
        "cpu_system_s": use.system,
        "floor_disk_s": disk_s,
        "floor_compute_s": compute_s,
        "share_of_floor": max(disk_s, compute_s) / use.seconds,
    }


def median_run(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the row with the median speed."""
    return sorted(rows, key=lambda row: row["tokens_per_s"])[(len(rows) - 1) // 2]


def line(row: dict[str, Any], tokens: int, name: str) -> str:
    """Format a `result` as one line under HEADER."""
    disk, speed = row["disk_bytes_per_token"], row["read_bytes_per_s"]
    return " ".join((
        f"{row['tokens_per_s']:9.2f} {row['hit_rate']:6.1%} {row['bytes_per_token'] / 1e6:9.2f}",
        f"{row['useless_bytes_per_token'] / 1e6:8.2f}",
        f"{'-' if disk is None else f'{disk / 1e6:.2f}':>9}",
        f"{'-' if speed is None else f'{speed / 1e9:.2f}':>6}",
        f"{row['floor_disk_s'] / tokens * 1e3:9.2f} {row['floor_compute_s'] / tokens * 1e3:9.2f}",
        f"{row['share_of_floor']:6.0%} {row['cpu_user_s'] / tokens * 1e3:8.2f}",
        f"{row['cpu_system_s'] / tokens * 1e3:7.2f}  {name}",
    ))  # fmt: skip


def _size(work: Workload) -> str:
    return "".join(f"{name} {value}, " for name, value in work.size.items())


def _add_speedup(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        row["speedup"] = row["tokens_per_s"] / rows[0]["tokens_per_s"]
        print(f"speedup: {row['speedup']:.2f}x, batch {row['batch']} over {rows[0]['batch']}")


def _print_layers(layers: list[LayerTime], steps: int, seconds: float, usual: float) -> None:
    """Print ms per step of a profiled run that took `seconds`; an unprofiled one takes `usual`."""
    print(
        "layers, in a profiled run that waits for each part "
        f"({seconds / usual:.2f} times an ordinary run's time); milliseconds per step"
    )
    rest = (seconds - print_rows(layers, steps).seconds) / steps * 1e3
    print(f"embedding, head, sampling and other: {rest:.3f} ms", flush=True)


def print_published(recipe: Recipe, unit: str, speed: float) -> list[dict[str, Any]]:
    """Print published figures, in `unit`, for whole models of this geometry and bits.

    `speed` is ours, in tokens per second. Return JSON values.
    """
    layers = GEOMETRIES[recipe.geometry].num_hidden_layers
    rows = [
        {
            "name": f"{row.setup.name}, {row.name}, K={row.top_k}",
            "tokens_per_s": row.published,
            "ms_per_layer": 1e3 / row.published / layers,
            "source": row.setup.source,
        }
        for row in ROWS
        if (row.setup.model, row.bits, row.unit) == (recipe.geometry, recipe.bits, unit)
    ]
    if rows:
        ours = 1e3 / speed / recipe.layers
        print(f"ms per token and layer: {ours:.3f} here; published, of whole models:")
    for found in rows:
        print(f"{found['ms_per_layer']:9.3f}  {found['tokens_per_s']} tok/s: {found['name']}")
    return rows
