"""On a CPU, attention and GatedDeltaNet split a long prompt without changing its result."""

import mlx.core as mx
import pytest

from flashmoe_mlx import load
from flashmoe_mlx.custom_kernels import device
from flashmoe_mlx.custom_kernels.cpu import prefill
from flashmoe_mlx.loader import BUNDLED_MODEL
from flashmoe_mlx.models.qwen3_5 import moe

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
    assert max(parts) == tokens


@pytest.mark.parametrize("count", [1, 5, 64])
def test_assignments_are_computed_in_parts(bundled, monkeypatch, count):
    ids = mx.random.randint(0, 500, (1, 40), key=mx.random.key(4))
    whole, sizes, compute = run_one(bundled, ids), [], prefill.mlp

    def counted(x, gate, up, down, slots=None):
        if slots is not None:  # else the shared expert
            sizes.append(len(x))
        return compute(x, gate, up, down, slots)

    monkeypatch.setattr(prefill, "mlp", counted)
    monkeypatch.setattr(moe, "ASSIGNMENTS_AT_ONCE", count)
    assert mx.abs(run_one(bundled, ids) - whole).max().item() < TOLERANCE
    assert max(sizes) == count


def run_one(model, ids):
    return model(ids, cache=model.make_cache())
