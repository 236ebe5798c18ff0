"""Quality of a model by the bits of its experts and the way they were found: the table of README.

    python tools/quality.py [--limit 40] [--cases]

Converts the bundled model (8 bits, the master) and measures, on text and dialogues that neither its
training nor the calibration saw: perplexity, the mean Kullback-Leibler divergence of the next
token's distribution from the master's, and with --cases the shares of right tool calls and JSON
answers. Its calibration text is made here: dialogues as in training, and English from this
project's documents.
"""

import argparse
import json
import random
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "bundled_model"))

from dialogues import Generator  # noqa: E402
from evaluate import evaluate, read_cases  # noqa: E402

from flashmoe_mlx import load  # noqa: E402
from flashmoe_mlx.convert import convert  # noqa: E402
from flashmoe_mlx.loader import BUNDLED_MODEL  # noqa: E402

WINDOW, WINDOWS, CHATS = 512, 8, 40
DIALOGUES, SEED = 150, 77  # of the calibration
DOCUMENTS = "README.md", "docs/experiments.md", "docs/plan.md"
VARIANTS: dict[str, dict[str, Any]] = {
    "8 bits (master)": {},
    "4 bits, min-max": {"q_bits": 4, "q_method": "min-max"},
    "4 bits, least squares": {"q_bits": 4, "q_method": "least-squares"},
    "4 bits, calibrated": {"q_bits": 4, "calibrate": True},
    "2 bits, min-max": {"q_bits": 2, "q_method": "min-max"},
    "2 bits, least squares": {"q_bits": 2, "q_method": "least-squares"},
    "2 bits, calibrated": {"q_bits": 2, "calibrate": True},
}

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Text:
    """What distributions are compared on: windows of text `[windows, tokens]`, and dialogues."""

    windows: list[list[int]]
    chats: list[list[int]]


def calibration_text(tokenizer: Any) -> str:
    """Return dialogues like those of the training, and documents."""
    documents = [(HERE.parent / name).read_text() for name in DOCUMENTS]
    words = sorted(set(re.findall(r"[a-z]{4,9}", " ".join(documents))))
    random.Random(SEED).shuffle(words)
    facts = [(f"What is {a}?", f"{a.capitalize()} is {b}.") for a, b in pairwise(words)]
    chats = []
    for dialogue in Generator(words, facts, SEED, held_out=False):
        options = {"tools": dialogue["tools"], "tokenize": False}
        chats.append(tokenizer.apply_chat_template(dialogue["messages"], **options))
        if len(chats) == DIALOGUES:
            break
    return "\n".join([*chats, *documents])


def held_out(tokenizer: Any) -> Text:
    """Return what to measure on."""
    text = (HERE / "bundled_model" / "heldout.txt").read_text()
    tokens = tokenizer.encode(text, add_special_tokens=False)
    windows = [tokens[i * WINDOW : (i + 1) * WINDOW + 1] for i in range(WINDOWS)]
    cases = read_cases(HERE / "bundled_model" / "heldout.jsonl", None, CHATS // 4)
    chats = []
    for case in cases:
        options = {"tools": case["tools"], "add_generation_prompt": True}
        chats.append(list(tokenizer.apply_chat_template(case["messages"], **options))[:WINDOW])
    return Text(windows, chats)


def distributions(model: Any, text: Text) -> Iterator[Floats]:
    """Yield log-probabilities `[tokens, V]`, window after window, then chat after chat."""
    for tokens in [*(window[:-1] for window in text.windows), *text.chats]:
        logits = model(mx.array([tokens]))[0].astype(mx.float32)
        yield np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def compare(model: Any, text: Text, master: list[Floats]) -> dict[str, float]:
    """Return perplexity, and the divergence on text and on dialogues."""
    losses, divergences = [], []
    for index, found in enumerate(distributions(model, text)):
        if index < len(text.windows):
            following = text.windows[index][1:]
            losses.append(-found[np.arange(len(found)), following].mean())
        truth = master[index]
        divergences.append((np.exp(truth) * (truth - found)).sum(-1).mean())
    return {
        "perplexity": float(np.exp(np.mean(losses))),
        "KL, text": float(np.mean(divergences[: len(text.windows)])),
        "KL, dialogues": float(np.mean(divergences[len(text.windows) :])),
    }


def main() -> None:
    """Print one row per variant, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cases", action="store_true", help="also have it answer the held-out cases"
    )
    parser.add_argument("--limit", type=int, default=1000, help="cases of each kind")
    args = parser.parse_args()
    rows, master = {}, []
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, options) in enumerate(VARIANTS.items()):
            path = Path(scratch) / str(number) if options else BUNDLED_MODEL
            if options.get("calibrate"):
                options = options | {"calibrate": f"{scratch}/text"}
            if options:
                convert(BUNDLED_MODEL, path, quantize=True, **options)
            model, tokenizer = load(path, tokenizer_config={"trust_remote_code": True})
            if not master:
                text = held_out(tokenizer)
                master = list(distributions(model, text))
                Path(scratch, "text").write_text(calibration_text(tokenizer))
            rows[name] = compare(model, text, master)
            size = sum(f.stat().st_size for f in path.glob("*experts/*.safetensors"))
            model.close()
            if args.cases:
                rows[name] |= evaluate(str(path), None, args.limit, 0)
            shown = "  ".join(f"{key} {value:.4g}" for key, value in rows[name].items())
            print(f"{name:<24}{size / 1e6:6.1f} MB  {shown}", flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
