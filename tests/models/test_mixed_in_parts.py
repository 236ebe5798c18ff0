"""A long prompt, or a batch of prompts, runs in parts without changing the result."""

import mlx.core as mx
import pytest
from mlx_lm.generate import PromptProcessingBatch, greedy_sampler

from flashmoe_mlx import load
from flashmoe_mlx.custom_kernels import device
from flashmoe_mlx.custom_kernels.cpu import prefill
from flashmoe_mlx.loader import BUNDLED_MODEL
from flashmoe_mlx.models import switch
from flashmoe_mlx.models.qwen3_5 import model, moe

TOLERANCE = 1e-4  # of logits up to 25, in float32


@pytest.fixture(scope="module")
def bundled():
    model, _ = load(BUNDLED_MODEL)
    yield model
    model.close()


def run(model, chunks):
    """Return the logits of all tokens, and of one more step."""
    cache, logits = model.make_cache(), []
    for chunk in (*chunks, mx.array([[7], [9]])):
        logits.append(model(chunk, cache=cache))
    return mx.concatenate(logits, axis=1)


@pytest.mark.parametrize("tokens", [1, 7, 33, 50])
def test_parts_of_a_prompt_equal_the_whole(bundled, monkeypatch, tokens):
    ids = mx.random.randint(0, 500, (2, 101), key=mx.random.key(3))
    chunks = [ids[:, :60], ids[:, 60:]]
    parts, mixer = [], type(bundled.layers[0].linear_attn)
    whole = run(bundled, chunks)
    call = mixer.__call__

    def counted(self, h, *others):
        parts.append(h.shape[1])
        return call(self, h, *others)

    monkeypatch.setattr(mixer, "__call__", counted)
    monkeypatch.setattr(device, "PROMPT_CHUNK", tokens)
    assert mx.abs(run(bundled, chunks) - whole).max().item() < TOLERANCE
    assert max(parts) == max(1, tokens // 2)  # of each of two rows


def prefilled(bundled, lengths):
    """Prefill prompts as the server does; return the logits after each, and the caches."""
    ids = mx.random.randint(0, 500, (len(lengths), max(lengths)), key=mx.random.key(5)).tolist()
    batch = PromptProcessingBatch(
        bundled,
        list(range(len(lengths))),
        [bundled.make_cache() for _ in lengths],
        fallback_sampler=greedy_sampler,
    )
    for _ in range(2):  # the second time the rows have unequal pasts
        batch.prompt([row[:count] for row, count in zip(ids, lengths, strict=True)])
    return bundled(mx.array([[7]] * len(lengths)), cache=batch.prompt_cache)


@pytest.mark.parametrize("lengths", [(150, 150, 150), (150, 3, 77), (1, 129, 150)])
def test_a_batch_of_prompts_in_parts_is_bit_equal(bundled, monkeypatch, lengths):
    whole, sizes = prefilled(bundled, lengths), {"mixer": [], "moe": []}
    for kind, name in (
        (type(bundled.layers[0].linear_attn), "mixer"),
        (type(bundled.layers[3].self_attn), "mixer"),
        (moe.SparseMoeBlock, "moe"),
    ):
        monkeypatch.setattr(kind, "__call__", counted_rows(kind.__call__, sizes[name]))
    monkeypatch.setattr(device, "PROMPT_CHUNK", 3 * 64)
    monkeypatch.setattr(model, "PREFILL_CHUNK", 3 * 100)
    assert mx.array_equal(prefilled(bundled, lengths), whole)
    assert max(sizes["mixer"]) == 3 * 64
    assert max(sizes["moe"]) == 3 * 64


def counted_rows(call, sizes):
    def counted(self, h, *others):
        sizes.append(h.shape[0] * h.shape[1])
        return call(self, h, *others)

    return counted


@pytest.mark.parametrize("count", [1, 5, 64])
def test_assignments_are_computed_in_parts(bundled, monkeypatch, count):
    ids = mx.random.randint(0, 500, (1, 40), key=mx.random.key(4))
    whole, sizes, compute = run_one(bundled, ids), [], prefill.mlp

    def counted(x, gate, up, down, slots=None):
        if slots is not None:  # else the shared expert
            sizes.append(len(x))
        return compute(x, gate, up, down, slots)

    monkeypatch.setattr(prefill, "mlp", counted)
    monkeypatch.setattr(switch, "ASSIGNMENTS_AT_ONCE", count)
    assert mx.abs(run_one(bundled, ids) - whole).max().item() < TOLERANCE
    assert max(sizes) == count


def run_one(model, ids):
    return model(ids, cache=model.make_cache())
