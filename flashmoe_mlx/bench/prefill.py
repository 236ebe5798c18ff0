"""`flashmoe-bench prefill`: prompt tokens per second of a streamed model, cold and warm."""

import argparse
import json
import os
import statistics
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from ..models.qwen3_5.args import PREFILL_CHUNK
from ..profile import counters
from ..profile.layers import LayerTime
from ..profile.plot import check_plot, plot
from ..store.store import ExpertStore
from . import figures
from . import model as bench
from .layers import print_layers, profile
from .limit import Limit


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    text = "Read prompts with a random-weight model of true shape, its experts streamed from disk."
    parser = commands.add_parser("prefill", help=text, description=text)
    parser.set_defaults(run=run)
    bench.add_flags(parser)
    parser.add_argument(
        "--tokens",
        nargs="+",
        type=int,
        default=[1024, 4096],
        help="of prompts (default: 1024 4096)",
    )
    parser.add_argument(
        "--chunk", type=int, default=PREFILL_CHUNK,
        help=f"tokens at a time: mlx-lm's --prefill-step-size (default: {PREFILL_CHUNK})",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Print the tables, then one JSON line. Returns 0."""
    bench.at_least_one(tokens=min(args.tokens), chunk=args.chunk)
    check_plot(args.plot)
    subject = bench.open_subject(args)
    facts = bench.conditions(subject)
    rows = []
    for tokens in args.tokens:
        rows += _measure(subject, args, tokens)
    facts |= figures.peak() | {"published": figures.published(subject.recipe, "tok/s prefill")}
    slowest = 1e3 / rows[-1]["tokens_per_s"] / subject.recipe.layers
    figures.print_published(facts["published"], slowest)
    if args.stock:
        facts["stock"] = _stock(subject, args)
    title = f"prefill, {subject.recipe.name}, {args.tokens[-1]} tokens"
    plot(args.plot, rows[-1]["per_layer"], title)
    print(json.dumps({"benchmark": "prefill", **facts, "chunk": args.chunk, "rows": rows}))
    return 0


def prefill(
    model: nn.Module,
    store: ExpertStore | None,
    prompt: list[int],
    chunk: int,
    cold: bool = False,
    started: Callable[[], None] = lambda: None,
) -> counters.Use:
    """Read a prompt once as mlx-lm's generators do, from settled banks and page cache.

    Args:
        model: ours or stock mlx-lm's.
        store: of our model's experts.
        prompt: token ids.
        chunk: tokens at a time.
        cold: whether the page cache holds no experts at the start.
        started: called when the counting begins.
    """
    start = bench.begin(store, cold, started)
    _read(model, prompt, chunk)
    return counters.now(store) - start


def _read(model: nn.Module, prompt: list[int], chunk: int) -> None:
    cache = make_prompt_cache(model)
    for first in range(0, len(prompt), chunk):
        model(mx.array([prompt[first : first + chunk]]), cache=cache)
        mx.eval([c.state for c in cache])
        mx.clear_cache()


def compute_seconds(subject: bench.Subject, prompt: list[int], chunk: int) -> float:
    """Return the time of reading a prompt when no expert has to come from anywhere."""
    with bench.nothing_read(subject.store):
        return prefill(subject.model, None, prompt, chunk).seconds


def _measure(subject: bench.Subject, args: argparse.Namespace, tokens: int) -> list[dict[str, Any]]:
    """Measure one length, print it, and return its rows: cold (where that can be had), warm."""
    model, store, chunk = subject.model, subject.store, args.chunk
    prompt = bench.random_tokens(args.vocabulary, tokens)
    _read(model, prompt[: bench.PROMPT], chunk)
    states = (True, False) if hasattr(os, "posix_fadvise") else (False,)
    compute, disk = [], [bench.bandwidth(subject.store)]
    uses: dict[bool, list[counters.Use]] = {cold: [] for cold in states}
    limit = Limit(subject.layout)
    for _ in range(args.runs):
        limit.measure()
        for cold in states:
            uses[cold].append(prefill(model, store, prompt, chunk, cold))
        compute.append(compute_seconds(subject, prompt, chunk))
        disk.append(bench.bandwidth(subject.store))
    layers, seconds = profile(
        subject,
        lambda started: prefill(model, store, prompt, chunk, states[0], started),
    )
    print(f"prompt of {tokens} tokens, {chunk} at a time")
    print(figures.HEADER)
    rows = []
    for cold in states:
        least = statistics.median(compute)
        runs = [figures.result(use, tokens, use.floor(disk, least)) for use in uses[cold]]
        middle = figures.middle(runs)
        print(figures.line(middle, tokens, f"{'cold' if cold else 'warm'}, median"))
        theory = _theory(subject, layers)
        row = {"tokens": tokens, "cold": cold, **middle, **theory, "disk_bytes_per_s": disk}
        rows.append(row | {"per_layer": [layer.as_dict(1) for layer in layers]})
    print(figures.LEGEND)
    reached = limit.report({"cold" if cold else "warm": uses[cold] for cold in states})
    rows = [row | {"limit": reached} for row in rows]
    print(
        f"experts that a layer and chunk asked for: {theory['distinct']}, of which "
        f"{theory['distinct'] - theory['missing']} were resident; "
        f"bytes read: {theory['read_over_theory']:.3f} of what the others have"
    )
    print_layers(layers, 1, seconds, tokens / rows[0]["tokens_per_s"])
    return rows


def _theory(subject: bench.Subject, layers: list[LayerTime]) -> dict[str, Any]:
    """Compare the experts read with those that had to be, each once per layer and chunk."""
    distinct = sum(layer.distinct for layer in layers)
    asked, hits = sum(layer.asked for layer in layers), sum(layer.hits for layer in layers)
    missing = distinct - hits
    sizes = [layer.record_bytes for layer in subject.layout.layers]
    return {
        "distinct": distinct,
        "missing": missing,
        "theory_bytes": sum(
            (layer.distinct - layer.hits) * size for layer, size in zip(layers, sizes, strict=True)
        ),
        "read_over_theory": (asked - hits) / missing if missing else 1.0,
    }


def _stock(subject: bench.Subject, args: argparse.Namespace) -> list[dict[str, float]]:
    """Read the same prompts by stock mlx-lm."""
    model, rows = bench.stock_model(subject), []
    for tokens in args.tokens:
        prompt = bench.random_tokens(args.vocabulary, tokens)
        uses = [prefill(model, None, prompt, args.chunk) for _ in range(args.runs)]
        speed = tokens / statistics.median(use.seconds for use in uses)
        print(f"stock mlx-lm, all resident: {tokens} tokens at {speed:.2f} tok/s")
        rows.append({"tokens": tokens, "tokens_per_s": speed})
    return rows
