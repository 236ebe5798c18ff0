"""`flashmoe-bench decode`: tokens per second of a streamed model, and what keeps it from more."""

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step

from ..profile import counters
from ..profile.plot import check_plot, plot
from ..store.store import ExpertStore
from . import figures
from . import model as bench
from .layers import print_layers, profile
from .limit import Limit


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    text = "Decode with a random-weight model of true shape, its experts streamed from disk."
    parser = commands.add_parser("decode", help=text, description=text)
    parser.set_defaults(run=run)
    bench.add_flags(parser)
    parser.add_argument("--tokens", type=int, default=64, help="to decode (default: 64)")
    bench.add_cold(parser)
    parser.add_argument(
        "--forced", action=argparse.BooleanOptionalAction, default=True,
        help="feed random tokens instead of the model's own (default: yes, since random weights "
        "repeat themselves, and then every expert is a hit)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Print the tables, then one JSON line. Returns 0."""
    bench.at_least_one(tokens=args.tokens)
    check_plot(args.plot)
    subject = bench.open_subject(args)
    facts = bench.conditions(subject)
    compute, disk, uses, limit = [], [], [], Limit(subject.layout)
    for number in range(args.runs):
        compute.append(bench.step_seconds(subject))
        disk.append(bench.bandwidth(subject.store))
        limit.measure()
        uses.append(decode(subject.model, subject.store, args, seed=number))
    compute.append(bench.step_seconds(subject))
    disk.append(bench.bandwidth(subject.store))
    settings = {
        "tokens": args.tokens, "cold": args.cold, "forced": args.forced,
        "disk_bytes_per_s": disk, "step_s": compute,
    }  # fmt: skip
    least = args.tokens * statistics.median(compute)
    rows = [figures.result(use, args.tokens, use.floor(disk, least)) for use in uses]
    best = _print_runs(rows, args, disk)
    settings["limit"] = limit.report({"decode": uses})
    settings |= figures.peak()
    layers, seconds = profile(
        subject, lambda started: decode(subject.model, subject.store, args, started=started)
    )
    print_layers(layers, args.tokens, seconds, args.tokens / best["tokens_per_s"])
    others = figures.published(subject.recipe, "tok/s")
    figures.print_published(others, 1e3 / best["tokens_per_s"] / subject.recipe.layers)
    settings["published"] = others
    if args.stock:
        settings["stock_tokens_per_s"] = _stock(subject, args, best)
    detail = [layer.as_dict(args.tokens) for layer in layers]
    plot(args.plot, detail, f"decode, {subject.recipe.name}, {best['tokens_per_s']:.2f} tok/s")
    print(json.dumps({"benchmark": "decode", **facts, **settings, **best, "runs": rows,
                      "per_layer": detail}))  # fmt: skip
    return 0


def decode(
    model: nn.Module,
    store: ExpertStore | None,
    args: argparse.Namespace,
    seed: int = 0,
    started: Callable[[], None] = lambda: None,
) -> counters.Use:
    """Decode once by mlx-lm's own generator, from settled banks and page cache.

    Args:
        model: ours or stock mlx-lm's.
        store: of our model's experts.
        args: `tokens`, `vocabulary`, `forced` and `cold` are used.
        seed: of the random tokens.
        started: called when the steps that count begin.
    """
    prompt = mx.array(bench.random_tokens(args.vocabulary, bench.PROMPT, seed))
    sampler = bench.forced(args.vocabulary, seed + 1) if args.forced else bench.greedy
    steps = bench.WARM_UP + args.tokens + 1
    for index, _ in enumerate(generate_step(prompt, model, max_tokens=steps, sampler=sampler)):
        if index == bench.WARM_UP:
            start = bench.begin(store, args.cold, started)
    return counters.now(store) - start


def _print_runs(
    rows: list[dict[str, Any]], args: argparse.Namespace, disk: list[float]
) -> dict[str, Any]:
    """Print each run and the median one, and return that."""
    low, high = min(disk) / 1e9, max(disk) / 1e9
    print(f"disk, random experts read cold, between runs: {low:.2f} to {high:.2f} GB/s")
    print(f"{args.tokens} tokens a run, page cache {'cold' if args.cold else 'warm'} at the start")
    print(figures.HEADER)
    for number, row in enumerate(rows):
        print(figures.line(row, args.tokens, str(number + 1)))
    best = figures.middle(rows)
    print(figures.line(best, args.tokens, "median"))
    print(figures.LEGEND)
    return best


def _stock(subject: bench.Subject, args: argparse.Namespace, best: dict[str, Any]) -> float:
    """Decode by stock mlx-lm and return its tokens per second."""
    model = bench.stock_model(subject)
    speed = statistics.median(
        args.tokens / decode(model, None, args, seed).seconds for seed in range(args.runs)
    )
    print(f"stock mlx-lm, all resident: {speed:.2f} tok/s; ours: {best['tokens_per_s']:.2f}")
    return speed
