"""Evaluate a Qwen3.5 MoE on the held-out cases with greedy decoding; its experts stream.

    python tools/bundled_model/evaluate.py --model flashmoe_mlx/bundled [--requantize 4 2]

Prints the shares of exact tool calls (parsed by mlx_lm's tool parser), of valid and of exact JSON,
of answers that correctly make no call, and of exact reports of a tool's result; the perplexity per
token; and a few English continuations. --requantize also evaluates copies whose experts
flashmoe-convert requantized; the trunk stays unchanged.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from flashmoe_mlx import generate, load
from flashmoe_mlx.convert import convert

HERE = Path(__file__).parent
PROMPTS = (
    "The king looked at the old man and said",
    "A computer is",
    "In the beginning",
    "The city was founded",
    "If you want to install the package,",
)
QUESTIONS = ("What is a dog?", "What does the program gzip do?", "Define courage.", "Who are you?")
TOKENS = 8192  # of heldout.txt, for perplexity


def read_cases(path: Path, kinds: list[str] | None, limit: int) -> list[dict[str, Any]]:
    """Return the first `limit` cases of each of `kinds`, or of all kinds."""
    count: Counter[str] = Counter()
    cases = []
    for case in map(json.loads, path.read_text().splitlines()):
        count[case["kind"]] += 1
        if count[case["kind"]] <= limit and (not kinds or case["kind"] in kinds):
            cases.append(case)
    return cases


def answer(model: nn.Module, tokenizer: Any, case: dict[str, Any]) -> str:
    """Return the model's answer to one case."""
    prompt = tokenizer.apply_chat_template(
        case["messages"], tools=case["tools"], add_generation_prompt=True
    )
    return generate(model, tokenizer, prompt, max_tokens=400)


def parse_calls(tokenizer: Any, text: str, tools: Any) -> list[dict[str, Any]] | None:
    """Return the calls in an answer, or None if parsing fails."""
    calls = []
    for part in text.split(tokenizer.tool_call_start)[1:]:
        try:
            call = tokenizer.tool_parser(part.split(tokenizer.tool_call_end)[0].strip(), tools)
        except (ValueError, KeyError, SyntaxError):
            return None
        calls += call if isinstance(call, list) else [call]
    return calls


def judge(tokenizer: Any, case: dict[str, Any], text: str) -> dict[str, bool]:
    """Return, by measure, whether an answer is correct."""
    kind = case["kind"]
    if kind == "everyday":
        calls = parse_calls(tokenizer, text, case["tools"]) or []
        right = calls == case["calls"] if "calls" in case else text.strip() == case["text"]
        return {"everyday calls and reports: exact": right}
    if kind == "tool":
        calls = parse_calls(tokenizer, text, case["tools"]) or []
        names = [c["name"] for c in calls] == [c["name"] for c in case["calls"]]
        return {"tool calls: right function": names, "tool calls: exact": calls == case["calls"]}
    if kind == "no_tool":
        return {"no call where none is due": tokenizer.tool_call_start not in text}
    if kind == "result":
        return {"tool result reported exactly": text.strip() == case["text"]}
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return {"JSON: valid": False, "JSON: exact": False}
    return {"JSON: valid": True, "JSON: exact": value == case["json"]}


def perplexity(model: nn.Module, tokenizer: Any, text: str, length: int = 512) -> float:
    """Return exp of the mean loss per token over windows of `length` tokens."""
    tokens = mx.array(tokenizer.encode(text, add_special_tokens=False))
    count = min(TOKENS, len(tokens) - 1) // length
    total = 0.0
    for start in range(0, count, 16):
        index = mx.arange(start, min(start + 16, count))[:, None] * length + mx.arange(length)
        losses = nn.losses.cross_entropy(model(tokens[index]), tokens[index + 1])
        total += losses.sum().item()
    return math.exp(total / (count * length))


def evaluate(path: str, kinds: list[str] | None, limit: int, show: int) -> dict[str, float]:
    """Return all figures of one model."""
    begin = time.monotonic()
    model, tokenizer = load(path)
    verdicts: dict[str, list[bool]] = defaultdict(list)
    for case in read_cases(HERE / "heldout.jsonl", kinds, limit):
        text = answer(model, tokenizer, case)
        judged = judge(tokenizer, case, text)
        for name, right in judged.items():
            verdicts[name].append(right)
        if not all(judged.values()) and show > 0:
            show -= 1
            expected = {k: v for k, v in case.items() if k not in ("messages", "tools")}
            print(f"--- wrong: {json.dumps(expected, ensure_ascii=False)}\n{text}")
    figures = {name: sum(rights) / len(rights) for name, rights in sorted(verdicts.items())}
    figures["perplexity"] = perplexity(model, tokenizer, (HERE / "heldout.txt").read_text())
    for prompt in PROMPTS:
        print(f"{prompt} ...{generate(model, tokenizer, prompt, max_tokens=40)!r}")
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        print(f"{question} -> {generate(model, tokenizer, prompt, max_tokens=60)!r}")
    figures["seconds"] = time.monotonic() - begin
    return figures


def report(name: str, figures: dict[str, float]) -> None:
    """Print the figures of one model."""
    print(f"\n{name}")
    for measure, value in figures.items():
        shown = f"{value:.1%}" if value <= 1 and measure != "seconds" else f"{value:.2f}"
        print(f"  {measure:32} {shown}")
    print(json.dumps({"model": name, **{k: round(v, 4) for k, v in figures.items()}}), flush=True)


def main() -> None:
    """Evaluate the model, then its requantized copies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--requantize", type=int, nargs="*", default=[], metavar="BITS")
    parser.add_argument("--only", nargs="*", help="kinds of cases: tool json no_tool result")
    parser.add_argument("--limit", type=int, default=1000, help="cases of each kind")
    parser.add_argument("--show", type=int, default=0, help="how many wrong answers to print")
    args = parser.parse_args()
    report(args.model, evaluate(args.model, args.only, args.limit, args.show))
    with tempfile.TemporaryDirectory() as scratch:
        for bits in args.requantize:
            made = f"{scratch}/{bits}bit"
            convert(args.model, made, quantize=True, q_bits=bits, q_group_size=64)
            report(f"{bits}-bit experts", evaluate(made, args.only, args.limit, args.show))


if __name__ == "__main__":
    main()
