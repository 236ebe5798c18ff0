"""Refining improves products, worsens no row, and finds the optimal scales."""

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_mlx.convert.plan.parts import Quant
from flashmoe_mlx.convert.quant.compensate import refine
from flashmoe_mlx.convert.quant.fit import fit

QUANT = Quant(2, 64)
ROWS, COLUMNS = 6, 128
SHIFTS = mx.arange(0, 32, 2, dtype=mx.uint32)


@pytest.fixture(scope="module")
def case():
    """Weights of two experts, moments of correlated inputs, and the nearest codes."""
    rng = np.random.default_rng(3)
    weights = rng.normal(size=(2, ROWS, COLUMNS)).astype(np.float32)
    inputs = rng.normal(size=(2, 300, 20)) @ rng.normal(size=(2, 20, COLUMNS))
    inputs += 0.3 * rng.normal(size=inputs.shape)
    moments = (inputs.swapaxes(1, 2) @ inputs / 300).astype(np.float32)
    codes, scales, biases = fit(mx.array(weights), QUANT, mx.bfloat16)
    codes = ((codes[..., None] >> SHIFTS) & 3).reshape(weights.shape)
    return weights, moments, tuple(np.array(x.astype(mx.float32)) for x in (codes, scales, biases))


def error(weights, moments, found):
    """D H D^T of each row, in float64 and weight by weight."""
    codes, scales, biases = (part.astype(np.float64) for part in found)
    off = weights - (codes * scales.repeat(64, -1) + biases.repeat(64, -1))
    return np.einsum("erc,ecd,erd->er", off, moments.astype(np.float64), off)


def test_every_round_is_better_and_no_row_is_worse(case):
    weights, moments, found = case
    before = error(weights, moments, found)
    for rounds, share in ((1, 0.5), (3, 0.4)):
        new = refine(weights, moments, found, QUANT, mx.bfloat16, rounds)
        after = error(weights, moments, new)
        assert (after <= before * 1.00001).all() and after.sum() < share * before.sum()
        codes, scales, biases = new
        assert np.isin(codes, (0, 1, 2, 3)).all()
        for part in (scales, biases):  # as they are stored
            assert (np.array(mx.array(part).astype(mx.bfloat16).astype(mx.float32)) == part).all()


def test_no_change_of_a_single_code_or_scale_improves(case):
    weights, moments, found = case
    new = refine(weights, moments, found, QUANT, mx.float32, rounds=60)
    least = error(weights, moments, new)
    codes, scales, biases = new
    for column in range(0, COLUMNS, 5):
        for code in range(4):
            other = codes.copy()
            other[..., column] = code
            assert (error(weights, moments, (other, scales, biases)) >= least * 0.9999).all()
    for part, name in ((1, "scale"), (2, "bias")):
        for factor in (0.999, 1.001):
            other = [codes, scales.copy(), biases.copy()]
            other[part][..., 0] *= factor
            assert (error(weights, moments, other) >= least * 0.9999).all(), name


def test_a_group_of_equal_weights_stays_as_it_is(case):
    weights, moments, found = (part for part in case)
    weights = weights.copy()
    weights[:, :, :64] = 0.5
    codes, scales, biases = (part.copy() for part in found)
    codes[..., :64], scales[..., 0], biases[..., 0] = 0, 0, 0.5
    new = refine(weights, moments, (codes, scales, biases), QUANT, mx.bfloat16)
    assert all(np.isfinite(part).all() for part in new)
    before = error(weights, moments, (codes, scales, biases))
    assert (error(weights, moments, new) <= before * 1.00001).all()
