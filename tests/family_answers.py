"""What tiny models of `families` answer, and how close two answers are."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from families import EXPERTS, VOCABULARY
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache

from flashmoe_mlx.models.patch import switches

TOLERANCE = 1e-4  # of the largest logit


def token_bytes(stock: nn.Module) -> int:
    """Return the bytes of one expert in every layer together."""
    found = [module for path, module in switches(stock).items()]
    return sum(a.nbytes for m in found for _, a in nn.utils.tree_flatten(m.parameters())) // EXPERTS


def tokens(length: int) -> list[int]:
    return mx.random.randint(0, VOCABULARY, (length,), key=mx.random.key(length)).tolist()


def prompt_logits(model: Any, length: int) -> mx.array:
    return model(mx.array([tokens(length)]), cache=make_prompt_cache(model))[0]


def batch_logits(model: Any) -> mx.array | str:
    """Return two steps' log-probabilities of a padded batch, or why its cache takes none."""
    generator = BatchGenerator(model, max_tokens=2)
    generator.insert([tokens(length) for length in (3, 9, 17)])
    rows: dict[int, list[mx.array]] = {}
    try:
        while responses := generator.next_generated():
            for response in responses:
                rows.setdefault(response.uid, []).append(response.logprobs)
    except (ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return mx.stack([row for uid in sorted(rows) for row in rows[uid]])


def distance(a: mx.array, b: mx.array) -> float:
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    return (mx.abs(a - b).max() / mx.abs(b).max()).item()


def close(a: mx.array, b: mx.array) -> bool:
    return distance(a, b) <= TOLERANCE
