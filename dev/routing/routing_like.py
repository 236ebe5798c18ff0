"""Make up routing traces whose locality is like that of large models, as far as it is published.

    python dev/routing/routing_like.py OUT flash-moe-397b|qwen3-30b|qwen3-next-512

A router's score for an expert is a sum of four normal variables: the expert's popularity in this
text, a topic that drifts slowly, one that drifts fast, and noise. Shares of the variance and times
of drift came from a random search for the published figures; popularity is drawn anew for each
text, which is the hard case for a policy that counts uses.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from replay_routing import Trace

LAYERS, TEXTS, PROMPT, DECODED = 2, 6, 300, 400


@dataclass(frozen=True)
class Likeness:
    """A router, and what its figures were fitted to.

    Attributes:
        experts: per layer.
        k: experts per token.
        record_bytes: of one expert at 4 bits.
        shares: of popularity, slow topic, fast topic and noise in the variance; the sum is 1.
        tokens: in which the slow and the fast topic fall to 1 / e.
        published: the figures, and whose they are.
    """

    experts: int
    k: int
    record_bytes: int
    shares: tuple[float, float, float, float]
    tokens: tuple[float, float]
    published: str


LIKE = {
    "flash-moe-397b": Likeness(
        512, 4, 7_077_888, (0.161, 0.252, 0.449, 0.138), (192.5, 2.8),
        "danveloper/flash-moe: 37 and 52 % hits with 500 and 2581 of 30720 experts, 71 % in 35 GB "
        "of page cache, 25 % repeated by the next token",
    ),
    "qwen3-30b": Likeness(
        128, 8, 2_654_208, (0.555, 0.067, 0.313, 0.066), (20.3, 1.2),
        "kekzl/imp pull 1359: 45 % repeated by the next token, 80 % within eight, LRU of 40 % "
        "hits 90 to 95 %",
    ),
    "qwen3-next-512": Likeness(
        512, 10, 7_077_888, (0.0, 0.246, 0.319, 0.435), (40.5, 1.8),
        "kekzl/imp pull 2061: LRU hits 43.5, 62.0, 72.0, 78.9 % with 93, 186, 279, 372 slots; "
        "keeping the most popular experts for good is 1 to 3 points worse",
    ),
}  # fmt: skip


def make(like: Likeness, name: str, rng: np.random.Generator) -> Trace:
    """Return one text's routing: a prompt, then single tokens."""
    shape, tokens = (LAYERS, like.experts), PROMPT - 1 + DECODED
    popular, slow, fast, noise = np.sqrt(like.shares)
    keep = np.exp(-1 / np.array(like.tokens))[:, None, None]
    popularity, topics = rng.standard_normal(shape), rng.standard_normal((2, *shape))
    ids = np.empty((tokens, LAYERS, like.k), np.int16)
    for token in range(tokens):
        topics = keep * topics + np.sqrt(1 - keep**2) * rng.standard_normal((2, *shape))
        score = popular * popularity + slow * topics[0] + fast * topics[1]
        score += noise * rng.standard_normal(shape)
        ids[token] = np.argpartition(-score, like.k, axis=-1)[:, : like.k]
    lengths = np.array([PROMPT - 1] + [1] * DECODED)
    return Trace(name, like.experts, like.record_bytes, lengths, ids)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="A directory to make.")
    parser.add_argument("like", choices=LIKE)
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(TEXTS):
        make(LIKE[args.like], f"{number:02}", rng).save(args.out)
    print(f"{TEXTS} texts, fitted to {LIKE[args.like].published}")


if __name__ == "__main__":
    main()
