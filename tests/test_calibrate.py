"""Calibration sees what stock mlx-lm's experts see, and quantises for it."""

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

import flashmoe_mlx
from flashmoe_mlx import FlashMoEError
from flashmoe_mlx.convert import calibrate
from flashmoe_mlx.convert.calibrate import Calibration, LayerInputs
from flashmoe_mlx.convert.fit import fit
from flashmoe_mlx.convert.parts import Projection, Quant
from flashmoe_mlx.custom_kernels import reference
from flashmoe_mlx.loader import BUNDLED_MODEL
from flashmoe_mlx.names import PROJECTIONS

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
def test_inputs_and_experts_are_stocks(seen, monkeypatch, expert_cache):
    monkeypatch.setattr(calibrate, "CHUNK", 40)
    model, _ = flashmoe_mlx.load(BUNDLED_MODEL, expert_cache=expert_cache, tokenizer_config=TRUST)
    model.set_dtype(mx.float32)
    text = Calibration(model.model, TOKENS)
    for number, (inputs, experts) in enumerate(seen):
        if number == 1:
            continue  # passed on the way to the next
        found = text.layer(number)
        assert np.abs(found.inputs - inputs).max() < 1e-4 * np.abs(inputs).max()
        assert (np.sort(found.experts) == np.sort(experts)).all()
        expert = int(experts[3, 0])
        places = [t for t in range(len(TOKENS)) if expert in experts[t]]
        assert np.array_equal(found.rows(expert), found.inputs[places])
        assert found.rows(-1).shape == (0, inputs.shape[-1])
    model.close()


def test_a_text_without_tokens_is_refused():
    with pytest.raises(FlashMoEError, match=r"calibration text has no tokens. Give a file"):
        Calibration(None, [])


HIDDEN, INNER = 128, 64
QUANT = Quant(2, 64)


@pytest.fixture
def expert():
    """An expert's matrices, and inputs that vary together, of which it sees every other one."""
    rng = np.random.default_rng(0)
    shapes = (INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)
    matrices = [mx.array(rng.normal(size=s).astype(np.float32) / s[1] ** 0.5) for s in shapes]
    inputs = rng.normal(size=(400, 16)) @ rng.normal(size=(16, HIDDEN)) / 4
    inputs += 0.1 * rng.normal(size=inputs.shape)
    experts = np.stack([np.arange(400) % 2, np.full(400, 2)], axis=1).astype(np.int32)
    return matrices, LayerInputs(inputs.astype(np.float32), experts)


def output_error(seen, matrices, found):
    new = [mx.dequantize(*(x.astype(mx.float32) if i else x for i, x in enumerate(codes)), 64, 2)
           for codes in found]  # fmt: skip
    x = mx.array(seen.rows(1))
    exact, ours = (reference.expert_mlp(x, *three) for three in (matrices, new))
    return ((exact - ours) ** 2).mean().item()


def plans():
    shapes = (INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)
    return [
        Projection(name, *shape, None, QUANT, "BF16")
        for name, shape in zip(PROJECTIONS, shapes, strict=True)
    ]


def test_an_experts_output_comes_out_better(expert):
    matrices, seen = expert
    found = seen.quantize(1, matrices, plans(), [mx.bfloat16] * 3)
    alone = [fit(matrix, QUANT, mx.bfloat16) for matrix in matrices]
    assert output_error(seen, matrices, found) < 0.6 * output_error(seen, matrices, alone)


@pytest.mark.parametrize("layer_sees", ["much", "one token"])
def test_an_expert_that_saw_nothing_is_quantised_for_its_layer(expert, layer_sees):
    matrices, seen = expert
    if layer_sees == "one token":
        seen = LayerInputs(seen.inputs[:1], seen.experts[:1])
    for codes, matrix in zip(
        seen.quantize(7, matrices, plans(), [mx.bfloat16] * 3), matrices, strict=True
    ):
        assert codes.codes.shape == (matrix.shape[0], matrix.shape[1] // 16)
        assert mx.isfinite(codes.scales).all() and mx.isfinite(codes.biases).all()
