"""Tokenise text and dialogues into the arrays that train.py reads.

    python prepare.py --work DIR --out FOLDER [--rows 40000] [--text-tokens 26000000]

Writes FOLDER/data.npz: `text` and `text_heldout` (uint16 streams with <|endoftext|> between
documents), `rows` and `rows_heldout` ([N, ROW] uint16, whole dialogues packed, bit 15 set on the
tokens that the model must predict), and FOLDER/sources.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tokenizer import generator
from tokenizer import rows as read_rows
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

ROW = 1025  # 1024 inputs and their 1024 targets
ANSWER = 0x8000
TECHNICAL = (
    "linux-doc",
    "python3",
    "perl-doc",
    "postgresql",
    "python-",
    "cmake",
    "fp-docs",
    "manpages",
    "vim",
    "git-doc",
    "lilypond",
    "grass",
    "octave",
    "maxima",
    "r-doc",
    "bind9",
    "autoconf",
    "apache2",
    "exim4",
    "c++",
    "wireshark",
    "guile",
)


def encode_dialogue(tokenizer: Any, dialogue: dict[str, Any]) -> list[int]:
    """Token ids of a dialogue, answers marked with bit 15, closed by <|endoftext|>."""
    ids: list[int] = []
    done, messages = "", dialogue["messages"]

    def render(count: int, prompt: bool) -> str:
        return tokenizer.apply_chat_template(
            messages[:count], tools=dialogue["tools"], tokenize=False, add_generation_prompt=prompt
        )

    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(i, True), render(i + 1, False)
        if not (before.startswith(done) and after.startswith(before)):
            raise ValueError(f"chat_template.jinja does not append turns: {before!r} -> {after!r}")
        ids += tokenizer.encode(before[len(done) :], add_special_tokens=False)
        answer = tokenizer.encode(after[len(before) : -1], add_special_tokens=False)
        ids += [token | ANSWER for token in answer]
        ids += tokenizer.encode("\n", add_special_tokens=False)
        done = after
    return [*ids, tokenizer.pad_token_id]


def pack(work: Path, seed: int, count: int, split: str) -> tuple[np.ndarray, Counter[str]]:
    """`count` rows of whole dialogues, first fit into a few open rows."""
    tokenizer = Qwen3_5Tokenizer.from_pretrained(work / "tokenizer")
    made, kinds = np.full((count, ROW), tokenizer.pad_token_id, np.uint16), Counter()
    open_rows: list[list[int]] = []
    done = 0
    for dialogue in generator(work, seed, split):
        ids = encode_dialogue(tokenizer, dialogue)
        if len(ids) > ROW:
            kinds["too long"] += 1
            continue
        kinds[dialogue["kind"]] += 1
        fits = [row for row in open_rows if len(row) + len(ids) <= ROW]
        if fits:
            max(fits, key=len).extend(ids)
            continue
        open_rows.append(ids)
        if len(open_rows) > 16:
            full = max(open_rows, key=len)
            open_rows.remove(full)
            made[done, : len(full)] = full
            done += 1
            if done == count:
                return made, kinds
    raise AssertionError("the generator is endless")


def encode_text(work: Path, split: str, limit: int) -> tuple[np.ndarray, Counter[str]]:
    """One stream of shuffled documents; technical manuals are thinned out to fit the limit."""
    tokenizer = Qwen3_5Tokenizer.from_pretrained(work / "tokenizer")
    documents = [(r["source"], r["text"]) for r in read_rows(work, "text", split)]
    rng = random.Random(5)
    rng.shuffle(documents)
    thin = [d for d in documents if not d[0].startswith(TECHNICAL) or rng.random() < 0.55]
    pieces, sources, total = [], Counter(), 0
    for start in range(0, len(thin), 500):
        batch = thin[start : start + 500]
        encoded = tokenizer([text for _, text in batch], add_special_tokens=False)["input_ids"]
        for (source, _), ids in zip(batch, encoded, strict=True):
            sources[source] += len(ids)
            total += len(ids) + 1
            pieces.append(np.array([*ids, tokenizer.pad_token_id], np.uint16))
        if total > limit:
            break
    return np.concatenate(pieces), sources


def text_arrays(args: argparse.Namespace) -> tuple[dict[str, np.ndarray], Counter[str]]:
    """The text streams, encoded now or taken from an earlier file."""
    if args.text:
        with np.load(args.text) as earlier:
            return {k: earlier[k] for k in ("text", "text_heldout")}, Counter()
    text, sources = encode_text(args.work, "train", args.text_tokens)
    return {"text": text, "text_heldout": encode_text(args.work, "heldout", 200_000)[0]}, sources


def main() -> None:
    """Encode everything and save it compressed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=40000)
    parser.add_argument("--text-tokens", type=int, default=26_000_000)
    parser.add_argument("--text", type=Path, help="an earlier data.npz to take the text from")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--parts", type=int, default=8, help="jobs that the dialogues are cut in")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        jobs = [
            pool.submit(pack, args.work, args.seed + i, args.rows // args.parts, "train")
            for i in range(args.parts)
        ]
        held = pool.submit(pack, args.work, 7, 64, "heldout")
        arrays, sources = text_arrays(args)
        packed = [job.result() for job in jobs]
    arrays.update(rows=np.concatenate([p[0] for p in packed]), rows_heldout=held.result()[0])
    (np.savez if args.text else np.savez_compressed)(args.out / "data.npz", **arrays)
    kinds = sum((p[1] for p in packed), Counter())
    answers = float((arrays["rows"] & ANSWER > 0).mean())
    report = {
        "shapes": {k: v.shape for k, v in arrays.items()},
        "dialogues": kinds,
        "share of answer tokens": round(answers, 4),
        "text tokens by source": dict(sources.most_common()),
    }
    (args.out / "sources.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(dict(itertools.islice(report.items(), 3)), indent=1))
    print((args.out / "data.npz").stat().st_size / 2**20, "MiB")


if __name__ == "__main__":
    main()
