"""Calibration gets the inputs of stock mlx-lm's experts, and quantizes for them."""

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

import flashmoe_mlx
from flashmoe_mlx import FlashMoEError
from flashmoe_mlx.bench.synthetic import Recipe, checkpoint
from flashmoe_mlx.convert import convert
from flashmoe_mlx.convert.plan.parts import Projection, Quant
from flashmoe_mlx.convert.quant import calibrate
from flashmoe_mlx.convert.quant.calibrate import Calibration, LayerInputs
from flashmoe_mlx.convert.quant.fit import fit
from flashmoe_mlx.convert.verify.repair import repair
from flashmoe_mlx.convert.verify.verify import verify
from flashmoe_mlx.convert.write import output
from flashmoe_mlx.custom_kernels import reference
from flashmoe_mlx.format.names import PROJECTIONS
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
def test_inputs_and_experts_are_stocks(seen, monkeypatch, expert_cache):
    monkeypatch.setattr(calibrate, "CHUNK", 40)
    model, _ = flashmoe_mlx.load(BUNDLED_MODEL, expert_cache=expert_cache, tokenizer_config=TRUST)
    model.set_dtype(mx.float32)
    text = Calibration(model.model, TOKENS)
    for number, (inputs, experts) in enumerate(seen):
        if number == 1:
            continue  # skipped: the next call runs through it
        found = text.layer(number)
        assert np.abs(found.inputs - inputs).max() < 1e-4 * np.abs(inputs).max()
        assert (np.sort(found.experts) == np.sort(experts)).all()
        expert = int(experts[3, 0])
        places = [t for t in range(len(TOKENS)) if expert in experts[t]]
        rows, scores = found.rows(expert)
        assert np.array_equal(rows, found.inputs[places])
        assert scores[0] == found.scores[places[0]][found.experts[places[0]] == expert]
        assert found.rows(-1)[0].shape == (0, inputs.shape[-1])
        gate = model.layers[number].mlp.gate
        logits = np.array(gate(mx.array(found.inputs)))
        odds = np.exp(np.take_along_axis(logits, found.experts, 1).astype(np.float64))
        assert np.allclose(found.scores, odds / odds.sum(1, keepdims=True), rtol=1e-3)
    model.close()


def test_a_text_without_tokens_is_refused():
    with pytest.raises(FlashMoEError, match=r"calibration text has no tokens. Give a file"):
        Calibration(None, [])


HIDDEN, INNER = 128, 64
QUANT = Quant(2, 64)


@pytest.fixture
def expert():
    """An expert's matrices, and correlated inputs; every other one is routed to it."""
    rng = np.random.default_rng(0)
    shapes = (INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)
    matrices = [mx.array(rng.normal(size=s).astype(np.float32) / s[1] ** 0.5) for s in shapes]
    inputs = rng.normal(size=(400, 16)) @ rng.normal(size=(16, HIDDEN)) / 4
    inputs += 0.1 * rng.normal(size=inputs.shape)
    experts = np.stack([np.arange(400) % 2, np.full(400, 2)], axis=1).astype(np.int32)
    scores = rng.uniform(0.2, 0.8, size=experts.shape).astype(np.float32)
    return matrices, LayerInputs(inputs.astype(np.float32), experts, scores)


def output_error(seen, matrices, found):
    new = [mx.dequantize(*(x.astype(mx.float32) if i else x for i, x in enumerate(codes)), 64, 2)
           for codes in found]  # fmt: skip
    x, scores = map(mx.array, seen.rows(1))
    exact, ours = (reference.expert_mlp(x, *three) for three in (matrices, new))
    return ((scores[:, None] * (exact - ours)) ** 2).mean().item()


def plans():
    shapes = (INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)
    return [
        Projection(name, *shape, None, QUANT, "BF16")
        for name, shape in zip(PROJECTIONS, shapes, strict=True)
    ]


def test_an_experts_output_is_closer(expert):
    matrices, seen = expert
    found = seen.quantize(1, matrices, plans())
    alone = [fit(matrix, QUANT, mx.bfloat16) for matrix in matrices]
    assert output_error(seen, matrices, found) < 0.6 * output_error(seen, matrices, alone)


@pytest.mark.parametrize("layer_sees", ["much", "one token"])
def test_an_expert_without_inputs_is_quantized_for_its_layer(expert, layer_sees):
    matrices, seen = expert
    if layer_sees == "one token":
        seen = LayerInputs(seen.inputs[:1], seen.experts[:1], seen.scores[:1])
    for codes, matrix in zip(seen.quantize(7, matrices, plans()), matrices, strict=True):
        assert codes.codes.shape == (matrix.shape[0], matrix.shape[1] // 16)
        assert mx.isfinite(codes.scales).all() and mx.isfinite(codes.biases).all()


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A small quantized model with a tokenizer."""
    return checkpoint(Recipe("tiny", 2, 512, 4), tmp_path_factory.mktemp("source"))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The king looked at the old man and said: what is a library? " * 3)
    return path


def two_bits(source, out, text, **options):
    convert(source, out, quantize=True, q_bits=2, calibrate=text, **options)


def files(directory):
    return {p.name: p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_an_interrupted_calibration_resumes_to_the_same_bytes(source, text, tmp_path, monkeypatch):
    two_bits(source, tmp_path / "whole", text)
    write, calls = output.write_weights, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(output, "write_weights", interrupted)
        two_bits(source, tmp_path / "out", text)
    two_bits(source, tmp_path / "out", text)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    convert(source, tmp_path / "blind", quantize=True, q_bits=2)
    assert (
        files(tmp_path / "blind")["layer_01.safetensors"]
        != files(tmp_path / "out")["layer_01.safetensors"]
    )
    model, tokenizer = flashmoe_mlx.load(tmp_path / "out")
    logits = model(mx.array([tokenizer.encode("The king")]))
    assert mx.isfinite(logits).all()
    model.close()
    with pytest.raises(FlashMoEError, match=r"made with --calibrate .*text.txt, .*Convert again"):
        damaged = tmp_path / "out" / "model_experts" / "layer_01.safetensors"
        data = bytearray(damaged.read_bytes())
        data[-1] ^= 1
        damaged.write_bytes(data)
        repair(tmp_path / "out", verify(tmp_path / "out"), source)


def test_another_text_cannot_resume_a_conversion(source, text, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(output, "write_weights", interrupted)
        two_bits(source, tmp_path / "out", text)
    text.write_text("something else")
    with pytest.raises(FlashMoEError, match=r"text"):
        two_bits(source, tmp_path / "out", text)


@pytest.mark.parametrize("options, message", [
    ({"q_method": "min-max"}, "--calibrate cannot be combined with --q-method min-max. Drop"),
    ({"quantize": False, "q_bits": None}, "--calibrate .*text.txt has no effect without -q."),
    ({"calibrate": "/nowhere.txt"}, "/nowhere.txt: cannot be read as a text .*UTF-8 file"),
])  # fmt: skip
def test_what_calibration_refuses(source, text, tmp_path, options, message):
    given = {"quantize": True, "q_bits": 2, "calibrate": text} | options
    with pytest.raises(FlashMoEError, match=message):
        convert(source, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()
