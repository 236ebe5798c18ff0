"""The runs that `flashmoe-bench decode`, `prefill` and `batch` time."""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import make_prompt_cache

from ..profile.counters import Use, now
from ..store.store import ExpertStore
from . import model as bench
from .model import PROMPT, WARM_UP, Subject

Begin = Callable[[], Callable[[], Use]]  # starts counting, returns a function that reads counters


@dataclass(frozen=True)
class Workload:
    """One kind of run.

    Attributes:
        size: JSON values that distinguish it from the command's other workloads.
        title: title of its table.
        row: name of a row, with "{state}" for cold or warm and "{run}" for a number or "median".
        tokens: number decoded or read in a run, in all sequences.
        steps: number of model steps in a run; layer times are per step.
        states: initial page cache, True for cold, False for warm.
        run: runs a model with a seed, and calls `Begin` to start counting.
        compute: runs our model without reads, and returns seconds.
    """

    size: dict[str, int]
    title: str
    row: str
    tokens: int
    steps: int
    states: tuple[bool, ...]
    run: Callable[[nn.Module, int, Begin], Use]
    compute: Callable[[], float]


def begin(
    store: ExpertStore | None, cold: bool, started: Callable[[], None] = lambda: None
) -> Callable[[], Use]:
    """Reset our model's banks and the page cache, call `started`, and start counting."""
    if store:
        bench.reset_caches(store, cold)
    started()
    start = now(store)
    return lambda: now(store) - start


def state_name(cold: bool) -> str:
    """Return the name of a page cache's initial state."""
    return "cold" if cold else "warm"


def workloads(subject: Subject, args: argparse.Namespace) -> list[Workload]:
    """Return the workloads that the flags describe: one, or one per length or batch size."""
    if args.what == "prefill":
        return [_prompt(subject, args, tokens) for tokens in args.tokens]
    if args.what == "decode":
        return [_decoding(subject, args, {}, partial(decode, args))]
    return [
        _decoding(subject, args, {"batch": batch}, partial(decode_batch, args, batch))
        for batch in args.batch
    ]


def _decoding(
    subject: Subject,
    args: argparse.Namespace,
    size: dict[str, int],
    run: Callable[[nn.Module, int, Begin], Use],
) -> Workload:
    batch = size.get("batch", 1)

    def compute() -> float:
        return args.tokens * bench.step_seconds(subject, batch)

    title = f"{args.tokens} tokens per sequence; page cache {state_name(args.cold)} at the start"
    row = f"{{run}} of batch {batch}" if size else "{run}"
    return Workload(size, title, row, batch * args.tokens, args.tokens, (args.cold,), run, compute)


def decode(args: argparse.Namespace, model: nn.Module, seed: int, begin: Begin) -> Use:
    """Decode `args.tokens` tokens of one sequence with mlx-lm's generator."""
    prompt = mx.array(bench.random_tokens(args.vocabulary, PROMPT, seed))
    sampler = bench.forced(args.vocabulary, seed + 1) if args.forced else bench.greedy
    steps = WARM_UP + args.tokens + 1
    for index, _ in enumerate(generate_step(prompt, model, max_tokens=steps, sampler=sampler)):
        if index == WARM_UP:
            use = begin()
    return use()


def decode_batch(
    args: argparse.Namespace, batch: int, model: nn.Module, seed: int, begin: Begin
) -> Use:
    """Decode `args.tokens` tokens in each of `batch` sequences with mlx-lm's batch generator."""
    last = WARM_UP + args.tokens
    generator = BatchGenerator(
        model,
        max_tokens=last + 2,  # so that no sequence ends and leaves the batch while it is timed
        sampler=bench.forced(args.vocabulary, seed + 1),
        completion_batch_size=batch,
        prefill_batch_size=batch,
    )
    tokens = bench.random_tokens(args.vocabulary, batch * PROMPT, seed)
    generator.insert([tokens[i::batch] for i in range(batch)])
    for step in range(last + 1):
        generator.next_generated()
        if step == WARM_UP:
            use = begin()
    took = use()
    generator.close()
    return took


def prefill(prompt: list[int], chunk: int, model: nn.Module, seed: int, begin: Begin) -> Use:
    """Prefill a prompt in steps of `chunk` tokens, as mlx-lm does; `seed` has no effect."""
    use, cache = begin(), make_prompt_cache(model)
    for first in range(0, len(prompt), chunk):
        model(mx.array([prompt[first : first + chunk]]), cache=cache)
        mx.eval([c.state for c in cache])
        mx.clear_cache()
    return use()


def _prompt(subject: Subject, args: argparse.Namespace, tokens: int) -> Workload:
    """Return the prefill of one prompt: cold, if the system can drop pages, and warm."""
    run = partial(prefill, bench.random_tokens(args.vocabulary, tokens), args.chunk)

    def compute() -> float:
        with bench.without_reads(subject.store):
            return run(subject.model, 0, partial(begin, None, False)).seconds

    states = (True, False) if hasattr(os, "posix_fadvise") else (False,)
    title = f"prompt of {tokens} tokens, {args.chunk} per step"
    size, row = {"tokens": tokens}, "{state}, {run}"
    return Workload(size, title, row, tokens, steps=1, states=states, run=run, compute=compute)
