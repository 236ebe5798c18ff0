"""The model that `flashmoe-bench decode`, `prefill` and `batch` measure, and how a run starts.

To measure with less memory than the machine has, start the command in a cgroup:

    systemd-run --scope -p MemoryMax=2G -p MemorySwapMax=0 flashmoe-bench decode --cold
or, as root where memory has a cgroup hierarchy of its own (version 1):
    g=/sys/fs/cgroup/memory/bench; mkdir $g; echo 2G > $g/memory.limit_in_bytes
    sh -c "echo \\$\\$ > $g/cgroup.procs; exec flashmoe-bench decode --cold"
Give --cold too: the group is not charged for pages that another process read into the page cache.
"""

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import qwen3_5_moe
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from ..errors import FlashMoEError
from ..format.layout import ExpertLayout
from ..format.names import FIELDS, layer_prefix
from ..loader import load
from ..models.qwen3_5.geometry import GEOMETRIES
from ..models.qwen3_5.model import Model
from ..profile import machine
from ..profile.read_speed import expert_ranges, time_reads
from ..settings import LOOKAHEAD
from ..store.memory import available_bytes, cgroup_limit
from ..store.sizing import CachePlan
from ..store.slots import SlotBank
from ..store.store import ExpertStore
from .synthetic import Recipe, checkpoint, default_dir

PROMPT = 16  # tokens before decoding starts
WARM_UP = 3  # steps that are not counted
COMPUTE_STEPS = 11  # of which the first is not counted
COLD = "drop the experts from the page cache before each run"  # help of --cold
Sampler = Callable[[mx.array], mx.array]


def add_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    text: str,
    run: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:
    """Add a subcommand with the flags that all three have, and return its parser."""
    parser = commands.add_parser(
        name, help=text, description=text, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="To measure with" + (__doc__ or "").split("To measure with")[1],
    )  # fmt: skip
    parser.set_defaults(run=run, what=name)
    add = parser.add_argument
    add("--geometry", choices=GEOMETRIES, default="35b", help="model (default: 35b)")
    add("--layers", type=int, default=8, help="of which so many layers (default: 8)")
    add("--vocabulary", type=int, default=32768, help="token ids (default: 32768)")
    add("--bits", type=int, default=4, help="of expert weights, 4 or 2 (default: 4)")
    add("--top-k", type=int, help="experts per token (default: the geometry's)")
    add("--expert-cache", help="memory for experts: 512MiB, 4GiB or auto (default: auto)")
    add("--io-threads", type=int, help="threads that read from disk (default: 8)")
    text = "prefetch experts before the router picks them (default: off)"
    add("--lookahead", choices=LOOKAHEAD, default="off", help=text)
    add("--runs", type=int, default=3, help="runs of each, of which the median (default: 3)")
    add("--stock", action="store_true", help="also run stock mlx-lm on the same weights")
    where = f"where checkpoints are kept (default: {default_dir()})"
    add("--dir", type=Path, default=default_dir(), help=where)
    add("--plot", type=Path, metavar="FILE.png", help="draw the layers' times and hit rates")
    return parser


def at_least_one(**values: int | list[int]) -> None:
    """Refuse counts below one.

    Raises:
        FlashMoEError: naming the flag, its value and the remedy.
    """
    for name, given in values.items():
        for value in given if isinstance(given, list) else [given]:
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


def open_subject(args: argparse.Namespace) -> Subject:
    """Load the checkpoint that the flags describe, which is made first if it does not exist.

    Raises:
        FlashMoEError: a flag is out of range, or the disk is too full.
    """
    at_least_one(runs=args.runs)
    recipe = Recipe(args.geometry, args.layers, args.vocabulary, args.bits)
    path = checkpoint(recipe, args.dir)
    model, _ = load(
        path, expert_cache=args.expert_cache, io_threads=args.io_threads,
        lookahead=args.lookahead, experts_per_token=args.top_k,
    )  # fmt: skip
    assert isinstance(model, Model) and model._store
    return Subject(recipe, path, model, model._store)


def conditions(subject: Subject) -> dict[str, Any]:
    """Print what runs here and what is measured, and return both as JSON values; bytes."""
    facts, limit = machine.facts(), cgroup_limit()
    recipe, args, plan = subject.recipe, subject.model.args, subject.store.plan
    allowed = f", of which the cgroup allows {limit / 2**30:.2f}" if limit else ""
    print(machine.describe(facts, f"{facts['memory'] / 2**30:.1f} GiB{allowed}"))
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
    """Put banks and page cache into the state that a run starts from.

    Each bank is full, as after some tokens, and holds experts 0, 1, 2, ... of its layer. The page
    cache holds none of the experts (cold), or as many as fit.

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


def bandwidth(store: ExpertStore) -> float:
    """Measure the disk: bytes per second of random experts, read cold, as a store reads them."""
    ranges = expert_ranges(store.layout)
    return time_reads(ranges, "experts", direct=store.plan.io.direct).bytes_per_s


def step_seconds(subject: Subject, batch: int = 1) -> float:
    """Return the median time of a decoding step with nothing to read.

    The same step is repeated from the same cache, so all but the first find their experts in the
    banks, as far as they fit.
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
    try:
        with store.reads_answered_by(lambda file, rows, offset: sum(map(len, rows))):
            yield
    finally:
        for layer, bank in enumerate(store.banks):
            _read_anew(store, layer, bank)


def _read_anew(store: ExpertStore, layer: int, bank: SlotBank) -> None:
    """Drop all that a bank holds, by asking for as much that it does not hold."""
    experts, fetched = range(bank.layout.num_experts), 0
    while fetched < len(bank) < len(experts):
        resident = set(bank.resident(experts))
        missing = [expert for expert in experts if expert not in resident][: len(bank)]
        store.fetch(layer, missing)
        fetched += len(missing)


def stock_model(subject: Subject) -> nn.Module:
    """Load stock mlx-lm's model of the same weights, every expert resident.

    On a CPU its activations are float32, as ours are: bfloat16 is several times slower there.

    Raises:
        FlashMoEError: it does not fit in memory.
    """
    layout = subject.store.layout
    needed, free = layout.total_bytes, available_bytes()
    if needed > 0.8 * free:
        raise FlashMoEError(
            f"--stock: {needed / 1e9:.2f} GB of experts do not fit in the {free / 1e9:.2f} GB of "
            "memory that are available. Leave --stock out, or give fewer --layers."
        )
    experts = _all_experts(layout)

    class WithExperts(qwen3_5_moe.Model):
        """Stock mlx-lm's model, whose experts come from our files."""

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


def _all_experts(layout: ExpertLayout) -> dict[str, mx.array]:
    """Read every expert into banks, and return these under the names that stock mlx-lm knows."""
    slots = layout.layers[0].num_experts
    plan = CachePlan(slots, layout.total_bytes, "stock mlx-lm keeps all experts")
    with closing(ExpertStore(layout, plan)) as store:
        settle(store, cold=False)
        return {
            f"{layer_prefix(number)}.mlp.switch_mlp.{field}": array
            for number, bank in enumerate(store.banks)
            for field, array in zip(FIELDS, bank.arrays, strict=True)
        }
