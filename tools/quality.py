"""Quality of a model by the bits of its experts: the table of docs/guides/quantize.md.

    python tools/quality.py [--only "2 bits"] [--top-k 4 2] [--cases 100]

Converts the bundled model and measures, on held-out text and dialogues: perplexity, the mean
Kullback-Leibler divergence of the next token's distribution from the reference's, and with --cases
the shares of greedy answers with valid JSON and with the exact tool calls. The reference is the
bundled model, with 8 bits and top-4, because its bfloat16 weights do not exist any more.

The calibration text consists of dialogues like those of the training, English from this project's
documents, and docstrings of Python's standard library. tools/bundled_model has the dialogues, and
the held-out text and cases: documents of Debian packages and names that occur neither in training
nor in calibration.
"""

import argparse
import ast
import json
import random
import re
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

HERE = Path(__file__).parent
DATA = HERE / "bundled_model"
sys.path.insert(0, str(DATA))

from evaluate import judge, read_cases  # noqa: E402

from flashmoe_mlx import batch_generate, load  # noqa: E402
from flashmoe_mlx.convert import convert  # noqa: E402
from flashmoe_mlx.format.layout import open_layout  # noqa: E402
from flashmoe_mlx.loader import BUNDLED_MODEL  # noqa: E402

HELD_OUT = DATA / "heldout.txt"
WINDOW, WINDOWS, CHATS = 512, 8, 40
SEED = 77  # of the calibration
MOST_TOKENS = 400  # per answer
DOCUMENTS = "README.md", "dev/LOG.md", "docs/reference/plan.md"
CHARACTERS = 150_000  # of docstrings
VARIANTS: dict[str, dict[str, Any]] = {
    "8 bits (master)": {},
    "4 bits, min-max": {"q_bits": 4, "q_method": "min-max"},
    "4 bits, least squares": {"q_bits": 4, "q_method": "least-squares"},
    "4 bits, calibrated": {"q_bits": 4, "calibrate": True},
    "2 bits, min-max": {"q_bits": 2, "q_method": "min-max"},
    "2 bits, least squares": {"q_bits": 2, "q_method": "least-squares"},
    "2 bits, calibrated": {"q_bits": 2, "calibrate": True},
    "2/2/4 bits, least squares": {"quant_predicate": "mixed_2_2_4"},
    "2/2/4 bits, calibrated": {"quant_predicate": "mixed_2_2_4", "calibrate": True},
}

TRUST = {"trust_remote_code": True}
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Text:
    """The held-out tokens: windows of text `[windows, tokens]`, and dialogues."""

    windows: list[list[int]]
    chats: list[list[int]]


def runs(text: str) -> set[tuple[str, ...]]:
    """Return all sequences of twelve words."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return set(zip(*(words[i:] for i in range(12)), strict=False))


def docstrings() -> Iterator[str]:
    """Yield docstrings of Python's standard library that the held-out text does not quote."""
    quoted = runs(HELD_OUT.read_text())
    found = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                found.append(ast.get_docstring(node) or "")
    found = [text for text in found if len(text) > 200]
    random.Random(SEED).shuffle(found)
    left = CHARACTERS
    for text in found:
        if len(text) <= left and not runs(text) & quoted:
            left -= len(text)
            yield text


def calibration_text(tokenizer: Any) -> str:
    """Return the dialogues and the English text."""
    documents = [(HERE.parent / name).read_text() for name in DOCUMENTS]
    dialogues = map(json.loads, (DATA / "calibration.jsonl").read_text().splitlines())
    chats = [
        tokenizer.apply_chat_template(chat["messages"], tools=chat["tools"], tokenize=False)
        for chat in dialogues
    ]
    return "\n".join([*chats, *documents, *docstrings()])


def held_out(tokenizer: Any) -> Text:
    """Return the held-out text and dialogues."""
    text = HELD_OUT.read_text()
    tokens = tokenizer.encode(text, add_special_tokens=False)
    windows = [tokens[i * WINDOW : (i + 1) * WINDOW + 1] for i in range(WINDOWS)]
    cases = read_cases(DATA / "heldout.jsonl", None, CHATS // 4)
    chats = []
    for case in cases:
        options = {"tools": case["tools"], "add_generation_prompt": True}
        chats.append(list(tokenizer.apply_chat_template(case["messages"], **options))[:WINDOW])
    return Text(windows, chats)


def distributions(model: Any, text: Text) -> Iterator[Floats]:
    """Yield log-probabilities `[tokens, V]` for each window, then for each chat."""
    for tokens in [*(window[:-1] for window in text.windows), *text.chats]:
        logits = model(mx.array([tokens]))[0].astype(mx.float32)
        yield np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def compare(model: Any, text: Text, reference: list[Floats]) -> dict[str, float]:
    """Return perplexity, and the divergence from the reference on text and on dialogues."""
    losses, divergences = [], []
    for index, found in enumerate(distributions(model, text)):
        if index < len(text.windows):
            following = text.windows[index][1:]
            losses.append(-found[np.arange(len(found)), following].mean())
        expected = reference[index]
        divergences.append((np.exp(expected) * (expected - found)).sum(-1).mean())
    return {
        "perplexity": float(np.exp(np.mean(losses))),
        "KL, text": float(np.mean(divergences[: len(text.windows)])),
        "KL, dialogues": float(np.mean(divergences[len(text.windows) :])),
    }


def shares(model: Any, tokenizer: Any, limit: int) -> dict[str, float]:
    """Return the shares of correct answers to the first `limit` held-out cases of each kind."""
    cases = read_cases(DATA / "heldout.jsonl", ["tool", "json"], limit)
    prompts = [
        tokenizer.apply_chat_template(c["messages"], tools=c["tools"], add_generation_prompt=True)
        for c in cases
    ]
    texts = batch_generate(model, tokenizer, prompts, max_tokens=MOST_TOKENS).texts
    verdicts: dict[str, list[bool]] = {}
    for case, text in zip(cases, texts, strict=True):
        for name, right in judge(tokenizer, case, text).items():
            verdicts.setdefault(name, []).append(right)
    return {name: sum(rights) / len(rights) for name, rights in verdicts.items()}


def variant(options: dict[str, Any], scratch: Path) -> Path:
    """Return the directory of a variant; write it first if it does not exist."""
    if not options:
        return BUNDLED_MODEL
    path = scratch / "_".join(map(str, options.values())).replace("-", "_")
    if not path.exists():
        if options.get("calibrate"):
            options = options | {"calibrate": scratch / "text"}
        convert(BUNDLED_MODEL, path, quantize=True, **options)
    return path


def measure(
    path: Path, top_k: int, text: Text, reference: list[Floats], cases: int
) -> dict[str, float]:
    """Return all figures of one directory at one K; MB counts the experts."""
    model, tokenizer = load(path, experts_per_token=top_k, tokenizer_config=TRUST)
    layout = open_layout(path, model.args.num_hidden_layers, model.args.num_experts)
    figures = {"K": top_k, "MB": layout.total_bytes / 1e6} | compare(model, text, reference)
    if cases:
        figures |= shares(model, tokenizer, cases)
    model.close()
    return figures


def main() -> None:
    """Print one row per variant and K, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--cases", type=int, default=0, help="held-out cases of each kind to answer (default: 0)")
    add("--top-k", type=int, nargs="+", default=[4], help="experts per token (default: 4)")
    add("--only", default="", help="variants whose names contain this")
    args = parser.parse_args()
    rows: dict[str, list[dict[str, float]]] = {}
    model, tokenizer = load(BUNDLED_MODEL, tokenizer_config=TRUST)
    text = held_out(tokenizer)
    reference = list(distributions(model, text))
    model.close()
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "text").write_text(calibration_text(tokenizer))
        for name in [name for name in VARIANTS if args.only in name]:
            path = variant(VARIANTS[name], Path(scratch))
            rows[name] = []
            for top_k in args.top_k:
                rows[name].append(measure(path, top_k, text, reference, args.cases))
                shown = "  ".join(f"{key} {value:.4g}" for key, value in rows[name][-1].items())
                print(f"{name:<26}{shown}", flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
