"""What `flashmoe-bench decode`, `prefill` and `batch` share: a model of true shape, how it ran.

A run's *floor* is the time that no way of streaming could undercut here: the bytes that had to
come from the disk, at the bandwidth measured in the same run, or the time to compute with nothing
to read, whichever is longer.

To measure with less memory than the machine has, start the command in a cgroup:

    systemd-run --scope -p MemoryMax=2G -p MemorySwapMax=0 flashmoe-bench decode --cold
or, as root where memory has a cgroup hierarchy of its own (version 1):
    g=/sys/fs/cgroup/memory/bench; mkdir $g; echo 2G > $g/memory.limit_in_bytes
    sh -c "echo \\$\\$ > $g/cgroup.procs; exec flashmoe-bench decode --cold"
Give --cold with it: pages that a process outside the group brought into the page cache are free.
"""

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import qwen3_5_moe
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from . import machine
from .config import CachePlan
from .errors import FlashMoEError
from .expert_store import Bank, ExpertStats, ExpertStore
from .geometry import GEOMETRIES
from .layout import ExpertLayout
from .loader import load
from .memory import available_bytes, cgroup_limit, peak_bytes
from .model import Model
from .names import FIELDS, layer_prefix
from .published import ROWS
from .read_speed import expert_ranges, time_reads
from .synthetic import Recipe, checkpoint, default_dir

PROMPT = 16  # tokens before decoding starts
WARM_UP = 3  # steps that are not counted
COMPUTE_STEPS = 11  # of which the first is not counted
Sampler = Callable[[mx.array], mx.array]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that all three commands have."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "To measure with" + (__doc__ or "").split("To measure with")[1]
    add = parser.add_argument
    add("--geometry", choices=GEOMETRIES, default="35b", help="model (default: 35b)")
    add("--layers", type=int, default=8, help="of which so many layers (default: 8)")
    add("--vocabulary", type=int, default=32768, help="token ids (default: 32768)")
    add("--bits", type=int, default=4, help="of expert weights, 4 or 2 (default: 4)")
    add("--top-k", type=int, help="experts per token (default: the geometry's)")
    add("--expert-cache", help="memory for experts: 512MiB, 4GiB or auto (default: auto)")
    add("--io-threads", type=int, help="threads that read from disk (default: 8)")
    add("--runs", type=int, default=3, help="runs of each, of which the median (default: 3)")
    add("--stock", action="store_true", help="also run stock mlx-lm on the same weights")
    where = f"where checkpoints are kept (default: {default_dir()})"
    add("--dir", type=Path, default=default_dir(), help=where)
    add("--plot", type=Path, metavar="FILE.png", help="draw the layers' times and hit rates")


def at_least_one(**values: int) -> None:
    """Refuse counts below one.

    Raises:
        FlashMoEError: naming the flag, its value and the remedy.
    """
    for name, value in values.items():
        if value < 1:
            flag = name.replace("_", "-")
            raise FlashMoEError(f"--{flag} {value} measures nothing. Give at least 1.")


@dataclass(frozen=True)
class Subject:
    """A loaded model with streamed experts, and where it came from."""

    recipe: Recipe
    path: Path
    model: Model
    store: ExpertStore

    @property
    def layout(self) -> ExpertLayout:
        """Where its experts lie."""
        return self.store.layout


def open_subject(args: argparse.Namespace) -> Subject:
    """Make the checkpoint that the flags describe, unless it is there, and load it.

    Raises:
        FlashMoEError: a flag is out of range, or the disk is too full.
    """
    at_least_one(runs=args.runs)
    recipe = Recipe(args.geometry, args.layers, args.vocabulary, args.bits)
    path = checkpoint(recipe, args.dir)
    model, _ = load(
        path,
        expert_cache=args.expert_cache,
        io_threads=args.io_threads,
        experts_per_token=args.top_k,
    )
    assert isinstance(model, Model) and model._store
    return Subject(recipe, path, model, model._store)


def conditions(subject: Subject) -> dict[str, Any]:
    """Print what runs here and what is measured, and return both as JSON values; bytes."""
    facts, limit = machine.facts(), cgroup_limit()
    recipe, args, plan = subject.recipe, subject.model.args, subject.store.plan
    memory = f"{facts['memory'] / 2**30:.1f} GiB"
    memory += f", of which the cgroup allows {limit / 2**30:.2f}" if limit else ""
    print(f"{facts['system']}, {facts['cpu']}, {facts['cores']} cores, {memory}")
    print(", ".join(f"{k} {v}" for k, v in facts["packages"].items() if v))
    print(
        f"{facts['device']}; {recipe.geometry}, {recipe.layers} of "
        f"{GEOMETRIES[recipe.geometry].num_hidden_layers} layers, {recipe.vocabulary} token ids, "
        f"{recipe.bits} bits, top-{args.num_experts_per_tok}; random weights and tokens"
    )
    print(plan, flush=True)
    model = asdict(recipe) | {"top_k": args.num_experts_per_tok, "slots": plan.slots}
    return {**facts, "memory_limit": limit, **model, "expert_cache": plan.nbytes}


def random_tokens(vocabulary: int, count: int, seed: int = 0) -> list[int]:
    """Return token ids, each as likely as any other."""
    return np.random.default_rng(seed).integers(vocabulary, size=count).tolist()


def forced(vocabulary: int, seed: int) -> Sampler:
    """Return a sampler that waits for the logits `[B, V]`, and then gives random token ids.

    Random weights loop under greedy decoding, and then every expert is a hit.
    """
    rng = np.random.default_rng(seed)

    def sample(logits: mx.array) -> mx.array:
        return mx.array(rng.integers(vocabulary, size=logits.shape[0])) + 0 * greedy(logits)

    return sample


def greedy(logits: mx.array) -> mx.array:
    """Return the likeliest token ids of logits `[B, V]`."""
    return mx.argmax(logits, axis=-1)


def settle(store: ExpertStore, cold: bool) -> None:
    """Bring banks and page cache into the state that a run starts from.

    The banks are full, as they are after some tokens: with experts 0, 1, 2, ... of each layer. The
    page cache then holds nothing of the experts (cold), or as much as there is room for.

    Raises:
        FlashMoEError: cold, on a system that cannot drop a file from its page cache.
    """
    for layer, bank in enumerate(store.banks):
        store.fetch(layer, list(range(len(bank))))
    files = {field.file: None for layer in store.layout.layers for field in layer.fields}
    if cold and not hasattr(os, "posix_fadvise"):
        raise FlashMoEError(
            "--cold: this system cannot drop a file from its page cache. Leave --cold out, and "
            "empty the cache before (on macOS: sudo purge)."
        )
    room = available_bytes()
    for path in files:
        with open(path, "rb", buffering=0) as file:
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while room > 0 and (count := len(file.read(8 << 20))):
                    room -= count


def bandwidth(layout: ExpertLayout) -> float:
    """Measure the disk: bytes per second of random experts, read cold."""
    return time_reads(expert_ranges(layout), "experts").bytes_per_s


@dataclass(frozen=True)
class Floor:
    """The least time of a run, in seconds: the disk's share of the work, and the computer's."""

    disk: float
    compute: float

    @property
    def seconds(self) -> float:
        """Return the longer of the two: they can overlap."""
        return max(self.disk, self.compute)


@dataclass(frozen=True)
class Use:
    """What a stretch of work took.

    Attributes:
        seconds: by the clock.
        stats: the store's counters.
        from_disk: bytes that the disk delivered, where the system counts them.
        user: seconds of all cores in the program.
        system: seconds of all cores in the system's kernel, which copies and finds pages.
    """

    seconds: float
    stats: ExpertStats
    from_disk: int | None
    user: float
    system: float

    @property
    def needed(self) -> int:
        """Bytes that had to come from the disk: missed by the banks, and by the page cache."""
        missed = self.stats.bytes_read
        return missed if self.from_disk is None else min(missed, self.from_disk)

    def floor(self, bandwidths: list[float], compute: float) -> Floor:
        """Return the run's floor.

        Args:
            bandwidths: of the disk, measured about the run; it counts at their median, or at what
                the run itself got while it waited if that is more.
            compute: seconds of computing.
        """
        waited = self.stats.seconds_waited
        reached = self.needed / waited if waited else 0.0
        return Floor(self.needed / max(statistics.median(bandwidths), reached), compute)

    def __sub__(self, before: "Use") -> "Use":
        """Return what came after `before`."""
        mine, theirs = asdict(self.stats), asdict(before.stats)
        stats = ExpertStats(**{name: mine[name] - theirs[name] for name in mine})
        disk = None if self.from_disk is None else self.from_disk - (before.from_disk or 0)
        return Use(
            self.seconds - before.seconds,
            stats,
            disk,
            self.user - before.user,
            self.system - before.system,
        )


def now(store: ExpertStore | None) -> Use:
    """Return the counters as they stand; subtract two of these."""
    stats = replace(store.stats) if store else ExpertStats()
    cpu = os.times()
    return Use(time.perf_counter(), stats, _disk_counter(), cpu.user, cpu.system)


def begin(store: ExpertStore | None, cold: bool, started: Callable[[], None]) -> Use:
    """Settle our model's banks and page cache, call `started`, and return the counters."""
    if store:
        settle(store, cold)
    started()
    return now(store)


def _disk_counter() -> int | None:
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def step_seconds(subject: Subject, batch: int = 1) -> float:
    """Return the median time of a decoding step with nothing to read.

    It is one step taken again and again from the same cache, so all but the first find their
    experts in the banks, as far as these hold so many.
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
    with nothing_read(subject.store):
        for _ in range(COMPUTE_STEPS):
            step()
    return statistics.median(seconds[2:])


@contextmanager
def nothing_read(store: ExpertStore) -> Iterator[None]:
    """Answer reads at once while the block runs, so that only computing takes time.

    Slots then hold the bytes of other experts, as random as the right ones. Afterwards each is
    read again.
    """
    real = os.preadv
    os.preadv = lambda file, buffers, offset: sum(map(len, buffers))  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        os.preadv = real
        for layer, bank in enumerate(store.banks):
            _read_anew(store, layer, bank)


def _read_anew(store: ExpertStore, layer: int, bank: Bank) -> None:
    """Drop all that a bank holds, by asking for as much that it does not hold."""
    experts, fetched = range(bank.layout.num_experts), 0
    while fetched < len(bank) < len(experts):
        resident = set(bank.resident(experts))
        missing = [expert for expert in experts if expert not in resident][: len(bank)]
        store.fetch(layer, missing)
        fetched += len(missing)


def result(use: Use, tokens: int, floor: Floor) -> dict[str, Any]:
    """Return one run's figures as JSON values."""
    stats = use.stats
    return {
        "tokens_per_s": tokens / use.seconds,
        "hit_rate": stats.hit_rate,
        "bytes_per_token": stats.bytes_read / tokens,
        "disk_bytes_per_token": None if use.from_disk is None else use.from_disk / tokens,
        "read_bytes_per_s": stats.bytes_read / stats.seconds_waited if stats.reads else None,
        "cpu_user_s": use.user,
        "cpu_system_s": use.system,
        "floor_disk_s": floor.disk,
        "floor_compute_s": floor.compute,
        "share_of_floor": floor.seconds / use.seconds,
    }


HEADER = (
    f"{'tok/s':>9} {'hits':>6} {'MB/token':>9} {'disk MB':>9} {'GB/s':>6} "
    f"{'disk ms':>9} {'comp. ms':>9} {'share':>6} {'user ms':>8} {'sys ms':>7}  run"
)
LEGEND = (
    "MB/token: read into the banks; disk MB: of which the disk delivered; GB/s: while waiting for "
    "reads;\ndisk, comp. ms: a token's least time by the disk and by computing; share: of the "
    "longer in the time taken;\nuser, sys ms: of all cores, in the program and in the kernel"
)


def line(row: dict[str, Any], tokens: int, name: str) -> str:
    """Return a `result` as one line under HEADER."""
    disk, speed = row["disk_bytes_per_token"], row["read_bytes_per_s"]
    return " ".join((
        f"{row['tokens_per_s']:9.2f} {row['hit_rate']:6.1%} {row['bytes_per_token'] / 1e6:9.2f}",
        f"{'-' if disk is None else f'{disk / 1e6:.2f}':>9}",
        f"{'-' if speed is None else f'{speed / 1e9:.2f}':>6}",
        f"{row['floor_disk_s'] / tokens * 1e3:9.2f} {row['floor_compute_s'] / tokens * 1e3:9.2f}",
        f"{row['share_of_floor']:6.0%} {row['cpu_user_s'] / tokens * 1e3:8.2f}",
        f"{row['cpu_system_s'] / tokens * 1e3:7.2f}  {name}",
    ))  # fmt: skip


def middle(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the row of median speed."""
    speed = statistics.median_low(row["tokens_per_s"] for row in rows)
    return next(row for row in rows if row["tokens_per_s"] == speed)


def stock_model(subject: Subject) -> nn.Module:
    """Load stock mlx-lm's model of the same weights, every expert resident.

    On a CPU its activations are float32, as ours are: bfloat16 is several times slower there.

    Raises:
        FlashMoEError: it does not fit in memory.
    """
    layout = subject.layout
    needed, free = layout.total_bytes, available_bytes()
    if needed > 0.8 * free:
        raise FlashMoEError(
            f"--stock: {needed / 1e9:.2f} GB of experts do not fit in the {free / 1e9:.2f} GB of "
            "memory that are available. Leave --stock out, or give fewer --layers."
        )
    slots = layout.layers[0].num_experts
    store = ExpertStore(layout, CachePlan(slots, needed, "stock mlx-lm keeps all experts"))
    settle(store, cold=False)
    experts = {
        f"{layer_prefix(number)}.mlp.switch_mlp.{field}": array
        for number, bank in enumerate(store.banks)
        for field, array in zip(FIELDS, bank.arrays, strict=True)
    }
    store.close()

    class WithExperts(qwen3_5_moe.Model):
        """Stock mlx-lm's model, whose experts come from the banks above."""

        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            """Add the experts to the trunk."""
            return super().sanitize(weights | experts)

    text = {"num_experts_per_tok": subject.model.args.num_experts_per_tok}
    config = subject.recipe.config()["text_config"] | text
    model, _ = load_model(
        subject.path,
        model_config={"model_file": None, "text_config": config},
        get_model_classes=lambda config: (WithExperts, qwen3_5_moe.ModelArgs),
    )
    if not machine.on_gpu():
        model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return model


def published(recipe: Recipe, unit: str) -> list[dict[str, Any]]:
    """Return what others published for whole models of this geometry and width, in `unit`."""
    layers = GEOMETRIES[recipe.geometry].num_hidden_layers
    return [
        {
            "name": f"{row.setup.name}, {row.name}, K={row.top_k}",
            "tokens_per_s": row.published,
            "ms_per_layer": 1e3 / row.published / layers,
            "source": row.setup.source,
        }
        for row in ROWS
        if (row.setup.model, row.bits, row.unit) == (recipe.geometry, recipe.bits, unit)
    ]


def print_published(rows: list[dict[str, Any]], ours: float) -> None:
    """Print published figures beside ours, which is milliseconds per token and layer."""
    if rows:
        print(f"ms per token and layer: {ours:.3f} here; published, of whole models elsewhere:")
    for row in rows:
        print(f"{row['ms_per_layer']:9.3f}  {row['tokens_per_s']} tok/s: {row['name']}")


def peak() -> dict[str, int]:
    """Print and return this process's peak memory, in bytes."""
    print(f"peak resident memory: {peak_bytes() / 2**20:.0f} MiB")
    return {"peak_bytes": peak_bytes()}
