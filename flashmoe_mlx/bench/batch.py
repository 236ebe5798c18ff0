"""`flashmoe-bench batch`: sequences decoded together, by the generator of mlx-lm's server."""

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import mlx.nn as nn
from mlx_lm.generate import BatchGenerator

from ..profile import counters
from ..profile.plot import check_plot, plot
from ..store.store import ExpertStore
from . import figures
from . import model as bench
from .layers import print_layers, profile


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    text = "Decode several sequences together, the experts streamed from disk."
    parser = commands.add_parser("batch", help=text, description=text)
    parser.set_defaults(run=run)
    bench.add_flags(parser)
    parser.add_argument(
        "--batch", nargs="+", type=int, default=[1, 2, 4, 8],
        help="sequences at a time (default: 1 2 4 8)",
    )  # fmt: skip
    parser.add_argument(
        "--tokens", type=int, default=32, help="to decode, of each sequence (default: 32)"
    )
    bench.add_cold(parser)


def run(args: argparse.Namespace) -> int:
    """Print the tables, then one JSON line. Returns 0."""
    bench.at_least_one(tokens=args.tokens, batch=min(args.batch))
    check_plot(args.plot)
    subject = bench.open_subject(args)
    facts = bench.conditions(subject)
    print(f"{args.tokens} tokens of each sequence, page cache {'cold' if args.cold else 'warm'}")
    print(f"{'speedup':>8} {figures.HEADER}")
    rows: list[dict[str, Any]] = []
    for batch in args.batch:
        row = _measure(subject, args, batch)
        first = rows[0] if rows else row
        row["speedup"] = row["tokens_per_s"] / first["tokens_per_s"]
        rows.append(row)
        name = f"median of batch {batch}"
        print(f"{row['speedup']:7.2f}x {figures.line(row, batch * args.tokens, name)}", flush=True)
    print(figures.LEGEND + f"; speedup: over batch {args.batch[0]}")
    facts |= figures.peak()
    usual = args.batch[-1] * args.tokens / rows[-1]["tokens_per_s"]
    layers, seconds = profile(
        subject,
        lambda started: decode(subject.model, subject.store, args, args.batch[-1], started=started),
    )
    print_layers(layers, args.tokens, seconds, usual)
    detail = [layer.as_dict(args.tokens) for layer in layers]
    plot(args.plot, detail, f"batch of {args.batch[-1]}, {subject.recipe.name}")
    settings = {"tokens": args.tokens, "cold": args.cold, "per_layer": detail}
    if args.stock:
        settings["stock"] = _stock(subject, args)
    print(json.dumps({"benchmark": "batch", **facts, **settings, "rows": rows}))
    return 0


def decode(
    model: nn.Module,
    store: ExpertStore | None,
    args: argparse.Namespace,
    batch: int,
    seed: int = 0,
    started: Callable[[], None] = lambda: None,
) -> counters.Use:
    """Decode `batch` sequences together, from settled banks and page cache.

    Args:
        model: ours or stock mlx-lm's.
        store: of our model's experts.
        args: `tokens`, `vocabulary` and `cold` are used.
        batch: sequences.
        seed: of the random tokens.
        started: called when the steps that count begin.
    """
    last = bench.WARM_UP + args.tokens
    generator = BatchGenerator(
        model,
        max_tokens=last + 2,  # so that none ends, and leaves the batch, within the time
        sampler=bench.forced(args.vocabulary, seed + 1),
        completion_batch_size=batch,
        prefill_batch_size=batch,
    )
    tokens = bench.random_tokens(args.vocabulary, batch * bench.PROMPT, seed)
    generator.insert([tokens[i::batch] for i in range(batch)])
    for step in range(last + 1):
        generator.next_generated()
        if step == bench.WARM_UP:
            start = bench.begin(store, args.cold, started)
    use = counters.now(store) - start
    generator.close()
    return use


def _measure(subject: bench.Subject, args: argparse.Namespace, batch: int) -> dict[str, Any]:
    """Return the run of median speed of one batch size."""
    uses, disk, compute = [], [], []
    for number in range(args.runs):
        disk.append(bench.bandwidth(subject.store))
        compute.append(bench.step_seconds(subject, batch))
        uses.append(decode(subject.model, subject.store, args, batch, seed=number))
    disk.append(bench.bandwidth(subject.store))
    least, tokens = args.tokens * statistics.median(compute), batch * args.tokens
    rows = [figures.result(use, tokens, use.floor(disk, least)) for use in uses]
    return {"batch": batch, **figures.middle(rows), "disk_bytes_per_s": disk}


def _stock(subject: bench.Subject, args: argparse.Namespace) -> list[dict[str, float]]:
    """Decode the same batches by stock mlx-lm."""
    model, rows = bench.stock_model(subject), []
    for batch in args.batch:
        uses = [decode(model, None, args, batch, seed) for seed in range(args.runs)]
        speed = batch * args.tokens / statistics.median(use.seconds for use in uses)
        print(f"stock mlx-lm, all resident: batch {batch} at {speed:.2f} tok/s")
        rows.append({"batch": batch, "tokens_per_s": speed})
    return rows
