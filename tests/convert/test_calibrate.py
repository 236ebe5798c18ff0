"""Calibration gets the inputs of stock mlx-lm's experts, and quantizes for them."""

import io
import json
import logging
import shutil
import sys
from contextlib import contextmanager
from dataclasses import replace

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
from flashmoe_mlx.convert.write import execute, output
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
    matrices = [rng.normal(size=s).astype(np.float32) / s[1] ** 0.5 for s in shapes]
    inputs = rng.normal(size=(400, 16)) @ rng.normal(size=(16, HIDDEN)) / 4
    inputs += 0.1 * rng.normal(size=inputs.shape)
    experts = np.stack([np.arange(400) % 2, np.full(400, 2)], axis=1).astype(np.int32)
    scores = rng.uniform(0.2, 0.8, size=experts.shape).astype(np.float32)
    return matrices, LayerInputs(inputs.astype(np.float32), experts, scores)


def output_error(seen, matrices, found):
    x, scores = map(mx.array, seen.rows(1))
    exact, ours = (reference.expert_mlp(x, *map(mx.array, three)) for three in (matrices, found))
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
    found = [rounded.restored() for rounded in found]
    alone = [fit(mx.array(x), QUANT, mx.bfloat16).restored(QUANT) for x in matrices]
    assert output_error(seen, matrices, found) < 0.6 * output_error(seen, matrices, alone)


@pytest.mark.parametrize("layer_sees", ["much", "one token"])
def test_an_expert_without_inputs_is_quantized_for_its_layer(expert, layer_sees):
    matrices, seen = expert
    if layer_sees == "one token":
        seen = LayerInputs(seen.inputs[:1], seen.experts[:1], seen.scores[:1])
    for found, matrix in zip(seen.quantize(7, matrices, plans()), matrices, strict=True):
        assert found.codes.shape == matrix.shape
        assert np.isfinite(found.restored()).all()


def test_a_copied_projection_is_not_quantized(expert):
    matrices, seen = expert
    gate, up, down = plans()
    copied = replace(down, before=QUANT)
    found = seen.quantize(1, matrices, [gate, up, copied])
    assert found[2] is None
    for ours, theirs in zip(found, seen.quantize(1, matrices, [gate, up, down]), strict=False):
        if ours:
            assert np.array_equal(ours.codes, theirs.codes)


def test_an_expert_with_many_inputs_uses_some_of_all(expert, monkeypatch):
    monkeypatch.setattr(calibrate, "MOST_ROWS", 5)
    _, seen = expert
    rows, scores = seen.rows(1)
    tokens = [1, 99, 199, 299, 399]
    assert np.array_equal(rows, seen.inputs[tokens])
    assert np.array_equal(scores, seen.scores[tokens, 0])


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


def test_the_number_of_threads_does_not_change_the_bytes(source, text, tmp_path, monkeypatch):
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(execute, "calibration_threads", lambda count=threads: count)
        two_bits(source, tmp_path / str(threads), text)
        found.append(files(tmp_path / str(threads)))
    assert found[0] == found[1]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_counts_experts(source, text, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", shown := Terminal())
    two_bits(source, tmp_path / "out", text)
    total = 2 * json.loads((source / "config.json").read_text())["text_config"]["num_experts"]
    assert f"| {total}/{total} [" in shown.getvalue() and "expert/s" in shown.getvalue()


def test_a_text_longer_than_the_models_context_gives_no_warning(source, text, tmp_path, caplog):
    short = shutil.copytree(source, tmp_path / "short")
    settings = json.loads((short / "tokenizer_config.json").read_text())
    settings["model_max_length"] = 16
    (short / "tokenizer_config.json").write_text(json.dumps(settings))
    with caplog.at_level("WARNING"), warnings_of_transformers(caplog):
        mlx_lm.utils.load_tokenizer(short).encode(text.read_text())
        assert "longer than the specified maximum" in caplog.text
        caplog.clear()
        two_bits(short, tmp_path / "out", text)
        assert "longer than" not in caplog.text


@contextmanager
def warnings_of_transformers(caplog):
    """Its loggers do not propagate."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        yield
    finally:
        logger.removeHandler(caplog.handler)


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
