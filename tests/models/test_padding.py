"""Padding in a batch: no expert is read for it."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import ArraysCache, BatchKVCache

from flashmoe_mlx import load
from flashmoe_mlx.loader import BUNDLED_MODEL
from flashmoe_mlx.models.qwen3_5.moe import StreamedExperts

LONG, SHORT = [5, 7, 300, 20, 11, 9, 400], [33, 21]


@pytest.fixture(scope="module")
def model():
    model, _ = load(BUNDLED_MODEL, expert_cache="3MiB")
    yield model
    model.close()


@pytest.fixture
def chosen(monkeypatch):
    """Record the experts that each layer requests."""
    asked, mixture = [], StreamedExperts.mixture

    def spy(self, x, indices, scores):
        asked.append(np.unique(np.array(indices)).tolist())
        return mixture(self, x, indices, scores)

    monkeypatch.setattr(StreamedExperts, "mixture", spy)
    return asked


def batch(model, prompts, side):
    """Run prompts together as mlx-lm does, padded on one side; return the logits of each."""
    longest = max(map(len, prompts))
    pads = [longest - len(prompt) for prompt in prompts]
    cache = model.make_cache()
    for number, kind in enumerate(cache):
        left = pads if side == "left" else [0] * len(prompts)
        if isinstance(kind, ArraysCache):
            kind.left_padding = mx.array(left)
        else:
            cache[number] = kind = BatchKVCache(left)
        if side == "right":
            kind.prepare(lengths=[len(prompt) for prompt in prompts], right_padding=pads)
    rows = [
        [0] * p + t if side == "left" else t + [0] * p for p, t in zip(pads, prompts, strict=True)
    ]
    logits = model(mx.array(rows), cache=cache)
    starts = pads if side == "left" else [0] * len(pads)
    return [y[s : s + len(p)] for y, s, p in zip(logits, starts, prompts, strict=True)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("prompts", [[LONG, SHORT], [SHORT, LONG]])
def test_padding_requests_no_expert(model, chosen, side, prompts):
    alone = [model(mx.array([prompt]))[0] for prompt in prompts]
    each = np.array_split(np.array(chosen, dtype=object), 2)
    wanted = [sorted({*a, *b}) for a, b in zip(*each, strict=True)]
    chosen.clear()
    together = batch(model, prompts, side)
    assert chosen == wanted
    for one, other in zip(alone, together, strict=True):
        assert mx.abs(one - other).max().item() < 1e-4


def paddings(caches) -> list:
    return [c.left_padding for c in caches if isinstance(c, ArraysCache)]


def test_left_padding_is_kept_until_all_rows_are_past_it(model):
    pads = [5, 0]
    rows = mx.array([[0] * 5 + SHORT, LONG])
    cache = [
        kind if isinstance(kind, ArraysCache) else BatchKVCache(pads) for kind in model.make_cache()
    ]
    for kind in cache:
        kind.left_padding = mx.array(pads)
    expected = [model(mx.array([prompt]))[0, -1] for prompt in (SHORT, LONG)]
    for start, left in ((0, [3, -2]), (2, [1, -4]), (4, [-1, -6])):
        logits = model(rows[:, start : start + 2], cache=cache)
        assert all(padding.tolist() == left for padding in paddings(cache))
    logits = model(rows[:, 6:], cache=cache)
    assert paddings(cache) == [None] * 3
    assert mx.allclose(logits[:, -1], mx.stack(expected), atol=1e-4)


def test_a_batch_that_grows_keeps_no_graphs_of_past_tokens(model):
    """mlx-lm counts padding down per token in graphs that it never evaluates."""
    generator = BatchGenerator(model, max_tokens=1000)
    generator.insert([LONG, LONG])
    for joining in ([], [SHORT], [LONG], []):
        if joining:
            generator.insert(joining)
        for _ in range(4):
            generator.next()
        assert paddings(generator._generation_batch.prompt_cache) == [None] * 3
    assert len(generator._generation_batch) == 4
