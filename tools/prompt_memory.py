"""Measure the memory of a prefill, of one prompt or of several that the server would batch.

    python tools/prompt_memory.py DIR --expert-cache 512MiB --prompts 1024 900 300

Prints the peak of resident memory above trunk and expert cache. Linux only. Set
MALLOC_MMAP_THRESHOLD_=131072, or glibc keeps freed arrays.
"""

import argparse
import re
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.generate import PromptProcessingBatch, greedy_sampler

from flashmoe_mlx import load


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a model's directory")
    parser.add_argument("--expert-cache", default="auto", help="memory for experts (default: auto)")
    parser.add_argument("--prompts", type=int, nargs="+", default=[2048], help="tokens of each")
    args = parser.parse_args()
    model, _ = load(args.model, expert_cache=args.expert_cache)
    with model:
        prefill(model, [16])
        kept = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
        kept += model._store.plan.nbytes
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
        states = prefill(model, args.prompts) / 2**20
        status = Path("/proc/self/status").read_text()
        peak = int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024 - kept / 2**20
    sizes = " + ".join(map(str, args.prompts))
    print(f"{sizes} tokens: {peak:.0f} MiB above trunk and expert cache; states {states:.0f} MiB")


def prefill(model, lengths: list[int]) -> int:
    """Prefill prompts together as mlx-lm's server does; return the bytes of their states."""
    batch = PromptProcessingBatch(
        model,
        list(range(len(lengths))),
        [model.make_cache() for _ in lengths],
        fallback_sampler=greedy_sampler,
    )
    ids = mx.random.randint(
        0, model.args.vocab_size, (len(lengths), max(lengths)), key=mx.random.key(0)
    )
    batch.prompt([row[:length] for row, length in zip(ids.tolist(), lengths, strict=True)])
    return sum(cache.nbytes for cache in batch.prompt_cache)


if __name__ == "__main__":
    main()
