"""What calibration writes down is what stock mlx-lm's experts see."""

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

import flashmoe_mlx
from flashmoe_mlx import FlashMoEError
from flashmoe_mlx.convert import calibrate
from flashmoe_mlx.convert.calibrate import hidden, mixed, moments, record
from flashmoe_mlx.custom_kernels import reference
from flashmoe_mlx.loader import BUNDLED_MODEL

TOKENS = [(7 * i * i + 11 * i) % 4000 for i in range(70)]
TRUST = {"trust_remote_code": True}


@pytest.fixture(scope="module")
def seen():
    """Per layer, inputs `[tokens, H]` and experts `[tokens, K]` of stock mlx-lm in float32."""
    model, _ = mlx_lm.load(str(BUNDLED_MODEL), tokenizer_config=TRUST)
    model.set_dtype(mx.float32)
    found = []
    for layer in model.language_model.model.layers:
        experts = layer.mlp.switch_mlp
        kind = type(experts)

        class Tap(kind):
            def __call__(self, x, indices):
                found.append((np.array(x)[0], np.array(indices)[0]))
                return super().__call__(x, indices)

        experts.__class__ = Tap
    for start in range(0, len(TOKENS), 40):
        mx.eval(model(mx.array([TOKENS[start : start + 40]])))
    layers = len(model.language_model.model.layers)
    return [
        [np.concatenate(part) for part in zip(*found[i::layers], strict=True)]
        for i in range(layers)
    ]


@pytest.mark.parametrize("expert_cache", ["64MiB", "1MiB"])
def test_inputs_and_experts_are_stocks(seen, tmp_path, monkeypatch, expert_cache):
    monkeypatch.setattr(calibrate, "CHUNK", 40)
    model, _ = flashmoe_mlx.load(BUNDLED_MODEL, expert_cache=expert_cache, tokenizer_config=TRUST)
    model.set_dtype(mx.float32)
    found = record(model.model, TOKENS, tmp_path)
    assert found.tokens == len(TOKENS)
    for layer, (inputs, experts) in enumerate(seen):
        assert np.abs(found.inputs(layer) - inputs).max() < 1e-4 * np.abs(inputs).max()
        assert (np.sort(found.experts(layer)) == np.sort(experts)).all()
        expert = int(experts[3, 0])
        places = [t for t in range(len(TOKENS)) if expert in experts[t]]
        assert np.array_equal(found.rows(layer, expert), found.inputs(layer)[places])
    assert found.rows(0, -1).shape == (0, inputs.shape[-1])
    model.close()


def test_a_text_without_tokens_is_refused(tmp_path):
    with pytest.raises(FlashMoEError, match=r"calibration text has no tokens. Give a file"):
        record(None, [], tmp_path)


def test_moments():
    rows = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    assert np.allclose(moments(rows), sum(np.outer(x, x) for x in rows) / 5)
    assert not moments(rows[:0]).any()
    layer = np.eye(3, dtype=np.float32)
    assert np.array_equal(mixed(rows[:0], layer), layer)
    assert np.allclose(mixed(rows, layer, prior=5), (moments(rows) + layer) / 2)


def test_hidden_is_what_down_projections_see():
    key = mx.random.split(mx.random.key(0), 4)
    x, gate, up = (mx.random.normal((6, 8), key=k) for k in key[:3])
    down = mx.eye(6)
    ours = hidden(np.array(x), gate, up)
    assert np.allclose(ours, np.array(reference.expert_mlp(x, gate, up, down)), atol=1e-5)
