"""Count how many greedy tokens are those of stock mlx-lm.

On a GPU both compute in the checkpoint's dtype, on a CPU in float32.

    python tools/greedy_like_stock.py [DIR] [--tokens 64]

Stock chooses each token; both are fed it, so that one difference does not bring on others. For each
difference the gap between stock's two best logits is told: where it is no more than the dtype's
steps, either's rounding decides. DIR must run in stock mlx-lm as well (default: the bundled model).
"""

import argparse
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import load_model

from flashmoe_mlx import load
from flashmoe_mlx.loader import BUNDLED_MODEL
from flashmoe_mlx.profile import machine

TEXTS = (
    "Once upon a time there was a small village by the sea.",
    "The river rises in the mountains and",
    "In the morning the children went to school, and",
    "Water boils at",
    "def add(a, b):",
    "The old man opened the door and",
)
QUESTIONS = (
    "Hello! How are you?",
    "What is the capital of France?",
    "Tell me a story about a cat.",
    "Write a list of three fruits.",
    "How many days are in a week?",
    "What is the weather in Paris?",
    "Give me JSON with a name and an age.",
    "Who are you?",
    "Count from one to five.",
    "Explain why the sky is blue.",
    "Translate 'good morning' into French.",
    "Say goodbye.",
)


def differences(stock: nn.Module, ours: nn.Module, prompt: list[int], tokens: int) -> list[float]:
    """Return, for each token of which ours is another, the gap of stock's two best logits."""
    caches, fed, gaps = [model.make_cache() for model in (stock, ours)], mx.array([prompt]), []
    for _ in range(tokens):
        theirs, mine = (
            model(fed, cache=cache)[0, -1].astype(mx.float32)
            for model, cache in zip((stock, ours), caches, strict=True)
        )
        token = mx.argmax(theirs)
        if token.item() != mx.argmax(mine).item():
            second, best = mx.sort(theirs)[-2:].tolist()
            gaps.append(best - second)
        fed = token[None, None]
    return gaps


def main() -> None:
    """Print a line for each prompt, and a sum."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?", default=BUNDLED_MODEL)
    parser.add_argument("--tokens", type=int, default=64, help="after each prompt (default: 64)")
    args = parser.parse_args()
    ours, tokenizer = load(args.model)
    stock, _ = load_model(args.model, model_config={"model_file": None})
    if not machine.on_gpu():
        stock.set_dtype(mx.float32)
    prompts = [tokenizer.encode(text) for text in TEXTS]
    for question in QUESTIONS:
        message = {"role": "user", "content": question}
        prompts.append(tokenizer.apply_chat_template([message], add_generation_prompt=True))
    different = 0
    for prompt in prompts:
        gaps = differences(stock, ours, prompt, args.tokens)
        different += len(gaps)
        where = f"; gaps where not: {', '.join(f'{gap:.3f}' for gap in gaps)}" if gaps else ""
        same = args.tokens - len(gaps)
        print(f"prompt of {len(prompt)}: {same} of {args.tokens} as stock{where}", flush=True)
    total = len(prompts) * args.tokens
    print(f"in all: {total - different} of {total}")


if __name__ == "__main__":
    main()
