"""Train the byte-level BPE tokenizer and write its Hugging Face files.

python tokenizer.py --work DIR --out DIR/tokenizer
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from dialogues import Generator
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

VOCABULARY = 4096
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MARKERS = [
    "<tool_call>",
    "</tool_call>",
    "<think>",
    "</think>",
    "<tool_response>",
    "</tool_response>",
]
HERE = Path(__file__).parent


def rows(work: Path, name: str, split: str) -> Iterator[dict[str, str]]:
    """The rows of one split of a .jsonl file written by corpus.py."""
    with (work / f"{name}.jsonl").open() as file:
        for line in file:
            row = json.loads(line)
            if row["split"] == split:
                yield row


def common_words(work: Path, count: int = 6000) -> list[str]:
    """The most frequent lower-case words of the training text; arguments are made of them."""
    cache = work / "words.json"
    if cache.exists():
        return json.loads(cache.read_text())
    words: Counter[str] = Counter()
    for row in itertools.islice(rows(work, "text", "train"), 20000):
        words.update(re.findall(r"\b[a-z]{3,12}\b", row["text"]))
    chosen = [w for w, _ in words.most_common(count + 150)[150:]]
    cache.write_text(json.dumps(chosen))
    return chosen


def generator(work: Path, seed: int, split: str = "train") -> Generator:
    """A dialogue generator over the words and answers of one split."""
    answers = [(r["question"], r["answer"]) for r in rows(work, "answers", split)]
    return Generator(common_words(work), answers, seed, split == "heldout")


def sample(work: Path) -> Iterator[str]:
    """Text to learn the merges from: mostly English, some dialogues."""
    for row in itertools.islice(rows(work, "text", "train"), 0, None, 5):
        yield row["text"]
    for dialogue in itertools.islice(generator(work, seed=99), 6000):
        for message in dialogue["messages"]:
            yield message["content"]
            for call in message.get("tool_calls", []):
                yield from (
                    f"<parameter={k}>\n{v}\n</parameter>\n</function>\n"
                    for k, v in call["function"]["arguments"].items()
                )
        if dialogue["tools"]:
            yield "\n".join(json.dumps(t, ensure_ascii=False) for t in dialogue["tools"])


def train(work: Path) -> Tokenizer:
    """A byte-level BPE that splits words as Qwen's own tokenizer does."""
    qwen = Qwen3_5Tokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = qwen.normalizer
    tokenizer.pre_tokenizer = qwen.pre_tokenizer
    tokenizer.decoder = qwen.decoder
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL) - len(MARKERS),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(sample(work), trainer)
    return tokenizer


def write(tokenizer: Tokenizer, out: Path) -> None:
    """tokenizer.json, tokenizer_config.json and the chat template."""
    from tokenizers import AddedToken

    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in MARKERS])
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "model_max_length": 4096,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copy(HERE / "chat_template.jinja", out)


def main() -> None:
    """Train, write, and show a few splits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    tokenizer = train(args.work)
    write(tokenizer, args.out)
    for text in ('The quick brown fox paid 1024.50 EUR to "Łucja".', "<tool_call>\n<function=a_b>"):
        encoded = tokenizer.encode(text)
        print(encoded.tokens)
        assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text
    print(tokenizer.get_vocab_size(), "tokens")


if __name__ == "__main__":
    main()
