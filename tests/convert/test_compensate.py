"""Quantization for given inputs: products are closer than with each weight rounded alone."""

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_mlx.convert.plan.parts import Quant
from flashmoe_mlx.convert.quant.compensate import quantize_for
from flashmoe_mlx.convert.quant.fit import fit

EXPERTS, ROWS, COLUMNS = 3, 16, 128


@pytest.fixture(scope="module")
def case():
    """Weights, and correlated inputs `[experts, samples, columns]`, as in a model."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(EXPERTS, ROWS, COLUMNS)).astype(np.float32)
    mixes = rng.normal(size=(EXPERTS, 24, COLUMNS)) * rng.lognormal(sigma=1, size=(EXPERTS, 24, 1))
    inputs = rng.normal(size=(EXPERTS, 500, 24)) @ mixes
    inputs += 0.3 * rng.normal(size=inputs.shape)
    return weights, inputs.astype(np.float32)


def moments(inputs):
    return np.einsum("enc,end->ecd", inputs, inputs) / inputs.shape[1]


def restored(found, quant):
    scales, biases = found.scales.astype(mx.float32), found.biases.astype(mx.float32)
    return np.array(mx.dequantize(found.codes, scales, biases, quant.group_size, quant.bits))


def product_error(weights, inputs, found, quant):
    exact = inputs @ weights.swapaxes(1, 2)
    return ((inputs @ restored(found, quant).swapaxes(1, 2) - exact) ** 2).sum((1, 2))


@pytest.mark.parametrize("bits, group_size", [(2, 64), (2, 32), (4, 128)])
def test_products_are_closer(case, bits, group_size):
    weights, inputs = case
    quant = Quant(bits, group_size)
    found = quantize_for(weights, moments(inputs), quant, mx.bfloat16)
    assert found.scales.dtype == mx.bfloat16
    assert found.codes.shape == (EXPERTS, ROWS, COLUMNS * bits // 32)
    alone = fit(mx.array(weights), quant, mx.bfloat16)
    better = product_error(weights, inputs, found, quant)
    assert (better < 0.5 * product_error(weights, inputs, alone, quant)).all()


def test_uncorrelated_inputs_leave_nothing_to_compensate(case):
    weights, _ = case
    quant, plain = Quant(2, 64), np.broadcast_to(np.eye(COLUMNS), (EXPERTS, COLUMNS, COLUMNS))
    found = quantize_for(weights, plain.astype(np.float32), quant, mx.bfloat16)
    alone = fit(mx.array(weights), quant, mx.bfloat16)
    ours, theirs = (((restored(x, quant) - weights) ** 2).sum(-1) for x in (found, alone))
    assert (ours <= theirs * 1.000001).all() and (ours > 0.9 * theirs).all()


def test_each_expert_has_its_own_inputs(case):
    weights, inputs = case
    quant, mine = Quant(2, 64), moments(inputs)
    whole = quantize_for(weights, mine, quant, mx.bfloat16)
    for expert in range(EXPERTS):
        one = slice(expert, expert + 1)
        alone = quantize_for(weights[one], mine[one], quant, mx.bfloat16)
        for a, b in zip(alone, whole, strict=True):
            assert mx.array_equal(a, b[one])


@pytest.mark.parametrize("seen", ["nothing", "one column"])
def test_inputs_never_seen_do_no_harm(case, seen):
    weights, _ = case
    quant, mine = Quant(2, 64), np.zeros((EXPERTS, COLUMNS, COLUMNS), np.float32)
    if seen == "one column":
        mine[:, 5, 5] = 3
    found = quantize_for(weights, mine, quant, mx.bfloat16)
    error = ((restored(found, quant) - weights) ** 2).mean()
    alone = ((restored(fit(mx.array(weights), quant, mx.bfloat16), quant) - weights) ** 2).mean()
    assert error < 1.3 * alone
