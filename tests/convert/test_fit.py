"""Quantization by least squares: never worse than mx.quantize, and packed as MLX packs."""

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_mlx.convert.plan.parts import Quant
from flashmoe_mlx.convert.quant import fit as module
from flashmoe_mlx.convert.quant.fit import fit, pack
from flashmoe_mlx.loader import BUNDLED_MODEL

FIELD_PARTS = "weight", "scales", "biases"


def random(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def weights(kind: str) -> mx.array:
    w = random(24, 256)
    if kind == "outliers":
        return mx.where(mx.abs(w) > 2.5, 20 * w, w)
    if kind == "constant":
        return mx.full((24, 256), -0.37)
    if kind == "far from zero":
        return w * 1e-3 + 5
    return w if kind == "normal" else w * 1e-30


def restored(codes, scales, biases, quant) -> mx.array:
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(codes, scales, biases, quant.group_size, quant.bits)


def errors(w, found, quant, importance=1.0) -> np.ndarray:
    off = np.array(w, np.float64) - np.array(restored(*found, quant), np.float64)
    return (np.array(importance) * off**2).reshape(-1, quant.group_size).sum(-1)


@pytest.fixture(params=["numba", "mlx"])
def backend(request, monkeypatch):
    """Search by numba, or by MLX's own ops as on a GPU."""
    monkeypatch.setattr(module, "has_numba", lambda: request.param == "numba")


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["normal", "outliers", "constant", "far from zero", "tiny"])
def test_no_group_is_worse_than_by_mlx(kind, bits, dtype):
    w, quant = weights(kind), Quant(bits, 64)
    codes, scales, biases = mx.quantize(w, 64, bits)
    plain = errors(w, (codes, scales.astype(dtype), biases.astype(dtype)), quant)
    found = fit(w, quant, dtype)
    assert found.scales.dtype == dtype and found.codes.shape == codes.shape
    assert (errors(w, found, quant) <= plain).all()


def test_no_group_of_the_bundled_model_is_worse_than_by_mlx():
    """So neither is a row or an expert; at 4 bits, for as many experts as take a second."""
    weights, quant, groups = mx.load(str(BUNDLED_MODEL / "model.safetensors")), Quant(4, 64), 0
    for name in sorted(n for n in weights if "switch_mlp" in n and n.endswith(".weight")):
        codes, scales, biases = (
            weights[name.removesuffix("weight") + part][::25] for part in FIELD_PARTS
        )
        w = restored(codes, scales, biases, Quant(8, 64))
        codes, scales, biases = mx.quantize(w, 64, 4)
        plain = errors(w, (codes, scales.astype(mx.bfloat16), biases.astype(mx.bfloat16)), quant)
        found = errors(w, fit(w, quant, mx.bfloat16), quant)
        assert (found <= plain).all() and found.sum() < 0.9 * plain.sum()
        groups += found.size
    assert groups == 9216


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
@pytest.mark.parametrize("weighted", [False, True])
def test_numba_finds_what_mlx_finds(monkeypatch, dtype, weighted):
    w, quant = weights("normal"), Quant(2, 64)
    importance = mx.abs(random(24, 256, seed=1)) if weighted else None
    found = []
    for numba in (True, False):
        monkeypatch.setattr(module, "has_numba", lambda numba=numba: numba)
        found.append(
            errors(
                w,
                fit(w, quant, dtype, importance),
                quant,
                1.0 if importance is None else importance,
            )
        )
    assert np.abs(found[0] - found[1]).max() < 0.02 * found[1].mean()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("bits, gain", [(2, 0.70), (4, 0.92)])
def test_normal_weights_are_clearly_closer(bits, gain):
    w, quant = weights("normal"), Quant(bits, 64)
    plain = errors(w, mx.quantize(w, 64, bits), quant).sum()
    assert errors(w, fit(w, quant, mx.bfloat16), quant).sum() < gain * plain


@pytest.mark.usefixtures("backend")
def test_important_weights_are_closer():
    w, quant = weights("normal"), Quant(2, 64)
    importance = mx.where(mx.arange(256) % 8 == 0, 20.0, 1.0)
    weighted, flat = fit(w, quant, mx.bfloat16, importance), fit(w, quant, mx.bfloat16)
    errors_of = [errors(w, found, quant, importance).sum() for found in (weighted, flat)]
    assert errors_of[0] < 0.9 * errors_of[1]


@pytest.mark.usefixtures("backend")
def test_chunks_of_rows_give_the_same(monkeypatch):
    w, quant = random(3, 8, 128), Quant(2, 32)
    importance = mx.abs(random(3, 8, 128, seed=1))
    whole = fit(w, quant, mx.bfloat16, importance)
    monkeypatch.setattr(module, "CHUNK", 5 * 32)
    for a, b in zip(whole, fit(w, quant, mx.bfloat16, importance), strict=True):
        assert mx.array_equal(a, b)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_codes_are_packed_as_mlx_packs_them(bits):
    codes = mx.random.randint(0, 1 << bits, (3, 5, 64), key=mx.random.key(bits))
    scales, biases = mx.ones((3, 5, 1)), mx.zeros((3, 5, 1))
    assert mx.array_equal(mx.dequantize(pack(codes, bits), scales, biases, 64, bits), codes)
