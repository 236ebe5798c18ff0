"""Compare logits of streamed experts with those of resident ones, bit by bit, on this device.

    python tools/streamed_equals_resident.py DIR [--share 0.25] [--lengths 1 8 20 60 300]

Prompts of random tokens, then a few single ones, twice each, before and after a text is generated
in mlx-lm's own stream. Where a GPU rounds by the number of rows that it multiplies at once, a
difference need not be a fault: the same model streamed with other banks then differs as well.
Exit code 1 if anything differs.
"""

import argparse
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np

from flashmoe_mlx import load
from flashmoe_mlx.models.qwen3_5.model import Model

SINGLE = 5  # tokens after each prompt


def logits(model: Model, tokens: list[int], prompt: int) -> np.ndarray:
    """Return the last logits of a prompt, and those of the tokens behind it: `[1 + SINGLE, V]`."""
    cache, rows = model.make_cache(), []
    for part in [tokens[:prompt], *([token] for token in tokens[prompt : prompt + SINGLE])]:
        y = model(mx.array([part]), cache=cache)[:, -1].astype(mx.float32)
        mx.eval(y)
        rows.append(np.array(y))
    return np.concatenate(rows)


def compare(streamed: Model, resident: Model, lengths: list[int]) -> int:
    """Print what each length gives, and return how many runs differ."""
    rng, wrong = np.random.default_rng(0), 0
    for prompt in lengths:
        tokens = rng.integers(streamed.args.vocab_size, size=prompt + SINGLE).tolist()
        expected = logits(resident, tokens, prompt)
        for run in (1, 2):
            found = logits(streamed, tokens, prompt)
            rows = np.flatnonzero((found != expected).any(axis=1)).tolist()
            wrong += bool(rows)
            said = f"rows {rows} differ, by {np.abs(found - expected).max():.4g} at most"
            print(f"prompt of {prompt}, run {run}: {said if rows else 'equal'}", flush=True)
    return wrong


def main() -> int:
    """Load both, and compare before and after a text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a directory that streams")
    parser.add_argument("--share", type=float, default=0.25, help="of the experts (default: 0.25)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 8, 20, 60, 300])
    args = parser.parse_args()
    resident, tokenizer = load(args.model)
    store = resident._store
    assert store, "a model without a store"
    size = int(args.share * store.layout.total_bytes)
    streamed, _ = load(args.model, expert_cache=size)
    print(store.plan, f"streamed: {streamed._store and streamed._store.plan}", sep="\n")
    wrong = compare(streamed, resident, args.lengths)
    mlx_lm.generate(streamed, tokenizer, "Hello", max_tokens=16)
    print("after a text:")
    wrong += compare(streamed, resident, args.lengths)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
