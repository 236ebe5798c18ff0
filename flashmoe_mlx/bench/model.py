"""The model that `flashmoe-bench decode`, `prefill` and `batch` measure, and its initial state."""

import argparse
import copy
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from ..cli import stock
from ..errors import FlashMoEError
from ..loader import load
from ..models.qwen3_5.geometry import GEOMETRIES
from ..models.qwen3_5.model import Model
from ..profile import machine
from ..profile.read_speed import expert_ranges, time_reads
from ..store.memory import available_bytes, cgroup_limit
from ..store.slots import SlotBank
from ..store.store import ExpertStore
from .synthetic import Recipe, checkpoint

PROMPT = 16  # tokens before decoding starts
WARM_UP = 3  # steps before counting starts
COMPUTE_STEPS = 11  # timed without reads; the median ignores the first
Sampler = Callable[[mx.array], mx.array]


def check_positive(**values: int | list[int]) -> None:
    """Raise FlashMoEError if a flag's value is below 1."""
    for name, given in values.items():
        for value in given if isinstance(given, list) else [given]:
            if value < 1:
                flag = name.replace("_", "-")
                raise FlashMoEError(f"--{flag} must be at least 1, got {value}")


@dataclass(frozen=True)
class Subject:
    """A loaded model with streamed experts, and its origin."""

    recipe: Recipe
    path: Path
    model: Model
    store: ExpertStore


def open_subject(args: argparse.Namespace) -> Subject:
    """Load the checkpoint that the flags describe; write it first if necessary.

    Raises:
        FlashMoEError: a flag is out of range, or the disk has too little space.
    """
    check_positive(runs=args.runs)
    recipe = Recipe(args.geometry, args.layers, args.vocabulary, args.bits)
    path = checkpoint(recipe, args.dir)
    model, _ = load(
        path, expert_cache=args.expert_cache, io_threads=args.io_threads,
        lookahead=args.lookahead, experts_per_token=args.top_k,
    )  # fmt: skip
    assert isinstance(model, Model) and model._store
    if getattr(args, "cold", False):
        _check_misses(model._store)
    return Subject(recipe, path, model, model._store)


def _check_misses(store: ExpertStore) -> None:
    """Refuse --cold if all experts stay in memory: nothing would be read."""
    half, experts = store.layout.total_bytes // 2, store.layout.layers[0].num_experts
    if store.plan.slots >= experts:
        size = f"{half >> 20}MiB" if half >= 4 << 20 else f"{half >> 10}KiB"
        raise FlashMoEError(
            f"--cold: all {experts} experts of each layer fit in the expert cache, so that nothing "
            f"is read. Give less, such as --expert-cache {size} for half of them."
        )


def conditions(subject: Subject) -> dict[str, Any]:
    """Print machine and model, and return both as JSON values; sizes in bytes."""
    facts, limit = machine.facts(), cgroup_limit()
    recipe, args, plan = subject.recipe, subject.model.args, subject.store.plan
    allowed = f", cgroup limit {limit / 2**30:.2f} GiB" if limit else ""
    print(machine.describe(facts, f"{facts['memory'] / 2**30:.1f} GiB{allowed}"))
    print(
        f"{facts['device']}; {recipe.geometry}, {recipe.layers} of "
        f"{GEOMETRIES[recipe.geometry].num_hidden_layers} layers, {recipe.vocabulary} token ids, "
        f"{recipe.bits} bits, top-{args.num_experts_per_tok}; random weights and tokens"
    )
    print(f"{plan}\ncheckpoint: {subject.path} (delete it: rm -r {shlex.quote(str(subject.path))})")
    sys.stdout.flush()
    model = asdict(recipe) | {"top_k": args.num_experts_per_tok, "slots": plan.slots}
    return {**facts, "memory_limit": limit, **model, "expert_cache": plan.nbytes}


def random_tokens(vocabulary: int, count: int, seed: int = 0) -> list[int]:
    """Return uniformly random token ids."""
    return np.random.default_rng(seed).integers(vocabulary, size=count).tolist()


def forced(vocabulary: int, seed: int) -> Sampler:
    """Return a sampler that waits for the logits `[B, V]` and returns random token ids.

    Random weights loop under greedy decoding, so that every expert becomes a hit.
    """
    rng = np.random.default_rng(seed)

    def sample(logits: mx.array) -> mx.array:
        return mx.array(rng.integers(vocabulary, size=logits.shape[0])) + 0 * greedy(logits)

    return sample


def greedy(logits: mx.array) -> mx.array:
    """Return the most likely token ids for logits `[B, V]`."""
    return mx.argmax(logits, axis=-1)


def reset_caches(store: ExpertStore, cold: bool) -> None:
    """Bring banks and page cache into the starting state of a run.

    Each bank is full and holds experts 0, 1, 2, ... of its layer. The page cache holds none of the
    experts (cold), or as many as fit.

    Raises:
        FlashMoEError: cold, and this system cannot drop a file from its page cache.
    """
    for layer, bank in enumerate(store.banks):
        store.fetch(layer, list(range(len(bank))))
    files = {field.file: None for layer in store.layout.layers for field in layer.fields}
    if cold and not hasattr(os, "posix_fadvise"):
        raise FlashMoEError(
            "--cold: this system cannot drop a file from its page cache. Leave --cold out and "
            "empty the cache first (on macOS: sudo purge)."
        )
    room = available_bytes()
    for path in files:
        with open(path, "rb", buffering=0) as file:
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while room > 0 and (count := len(file.read(8 << 20))):
                    room -= count


def bandwidth(store: ExpertStore) -> float:
    """Return the disk's bytes per second when reading random experts, cold, as the store does."""
    ranges = expert_ranges(store.layout)
    return time_reads(ranges, "experts", direct=store.plan.io.direct).bytes_per_s


def step_seconds(subject: Subject, batch: int = 1) -> float:
    """Return the median time of a decoding step without reads.

    Each step repeats the same token from the same cache, so all but the first find their experts
    in the banks, as far as these hold them.
    """
    model, vocabulary = subject.model, subject.recipe.vocabulary
    prompt = np.reshape(random_tokens(vocabulary, batch * PROMPT), (batch, PROMPT))
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array(prompt), cache=cache), [c.state for c in cache])
    last, seconds = mx.array(prompt[:, -1:]), []

    def step() -> None:
        again = copy.deepcopy(cache)
        start = time.perf_counter()
        mx.eval(greedy(model(last, cache=again)))
        seconds.append(time.perf_counter() - start)

    step()
    with without_reads(subject.store):
        for _ in range(COMPUTE_STEPS):
            step()
    return statistics.median(seconds[2:])


@contextmanager
def without_reads(store: ExpertStore) -> Iterator[None]:
    """Skip all reads while the block runs, so that only computing takes time.

    Slots then hold the bytes of other experts, equally random. Afterwards the banks are reloaded.
    """
    try:
        with store.reads_answered_by(lambda file, rows, offset: sum(map(len, rows))):
            yield
    finally:
        for layer, bank in enumerate(store.banks):
            _reload(store, layer, bank)


def _reload(store: ExpertStore, layer: int, bank: SlotBank) -> None:
    """Replace the content of a bank, by fetching experts that it does not hold."""
    experts, fetched = range(bank.layout.num_experts), 0
    while fetched < len(bank) < len(experts):
        resident = set(bank.resident(experts))
        missing = [expert for expert in experts if expert not in resident][: len(bank)]
        store.fetch(layer, missing)
        fetched += len(missing)


def stock_model(subject: Subject) -> nn.Module:
    """Load stock mlx-lm's model with the same weights, all experts in memory.

    Raises:
        FlashMoEError: the experts do not fit in memory.
    """
    layout = subject.store.layout
    needed, free = layout.total_bytes, available_bytes()
    if needed > 0.8 * free:
        raise FlashMoEError(
            f"--stock: {needed / 1e9:.2f} GB of experts do not fit in {free / 1e9:.2f} GB of "
            "available memory. Leave --stock out, or give fewer --layers."
        )
    recipe, top_k = subject.recipe, subject.model.args.num_experts_per_tok
    config = recipe.config()["text_config"] | {"num_experts_per_tok": top_k}
    experts = stock.stacked_experts(subject.path, recipe.layers, layout.layers[0].num_experts)
    model = stock.stock_model(subject.path, experts, text_config=config)
    mx.eval(model.parameters())
    return model
