"""Quantization for given inputs: products are closer than with each weight rounded alone."""

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_mlx.convert.plan.parts import Quant
from flashmoe_mlx.convert.quant import compensate
from flashmoe_mlx.convert.quant.compensate import DAMPING, quantize_for
from flashmoe_mlx.convert.quant.fit import fit
from flashmoe_mlx.convert.quant.products import upper_factor

ROWS, COLUMNS = 40, 128  # more than one block of rows
QUANT = Quant(2, 64)


@pytest.fixture(scope="module")
def case():
    """Weights, and correlated inputs `[samples, columns]`, as in a model."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(ROWS, COLUMNS)).astype(np.float32)
    mixes = rng.normal(size=(24, COLUMNS)) * rng.lognormal(sigma=1, size=(24, 1))
    inputs = rng.normal(size=(500, 24)) @ mixes
    inputs += 0.3 * rng.normal(size=inputs.shape)
    return weights, inputs.astype(np.float32)


def moments(inputs):
    return (inputs.T @ inputs / len(inputs)).astype(np.float32)


def damped(h):
    return h + DAMPING * np.diag(h).mean() * np.eye(len(h), dtype=np.float32)


def row_errors(weights, h, found):
    """D H D^T of each row, in float64."""
    off = (weights - found.restored()).astype(np.float64)
    return ((off @ h) * off).sum(-1)


def restored(found, quant):
    scales, biases = found.scales.astype(mx.float32), found.biases.astype(mx.float32)
    return np.array(mx.dequantize(found.codes, scales, biases, quant.group_size, quant.bits))


@pytest.mark.parametrize("bits, group_size, share", [(2, 64, 0.4), (2, 32, 0.4), (4, 128, 0.45)])
@pytest.mark.parametrize("numba", [True, False])
def test_products_are_closer(case, monkeypatch, bits, group_size, share, numba):
    if not numba:
        monkeypatch.setattr(compensate, "has_numba", lambda: False)
    weights, inputs = case
    quant = Quant(bits, group_size)
    found = quantize_for(weights, moments(inputs), quant, mx.bfloat16)
    assert found.codes.shape == weights.shape
    assert found.scales.shape == found.biases.shape == (ROWS, COLUMNS // group_size)
    packed = found.packed(quant, mx.bfloat16)
    assert packed.scales.dtype == mx.bfloat16
    assert packed.codes.shape == (ROWS, COLUMNS * bits // 32)
    assert np.array_equal(restored(packed, quant), found.restored())  # as it is stored
    assert np.isin(found.codes, np.arange(1 << bits)).all()
    exact = inputs @ weights.T
    alone = restored(fit(mx.array(weights), quant, mx.bfloat16), quant)
    ours, theirs = (((inputs @ x.T - exact) ** 2).sum() for x in (found.restored(), alone))
    assert ours < share * theirs


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_numba_finds_what_mlxs_ops_find(case, dtype):
    weights, inputs = case
    h = damped(moments(inputs))
    factor = upper_factor(h)
    found = [
        compensate.Rounded(*map(np.array, steps(weights, h, factor, QUANT, dtype)))
        for steps in (compensate._on_cpu, compensate.compensated)
    ]
    ours, naive = (row_errors(weights, h, x) for x in found)
    assert (found[0].codes == found[1].codes).mean() > 0.7
    assert ours.sum() == pytest.approx(naive.sum(), rel=0.03)


@pytest.mark.parametrize("steps", [compensate._on_cpu, compensate.compensated])
def test_sweeps_worsen_no_row_and_end_where_no_single_change_improves(case, monkeypatch, steps):
    weights, inputs = case
    h = damped(moments(inputs))
    factor = upper_factor(h)

    def errors(sweeps):
        monkeypatch.setattr(compensate, "SWEEPS", sweeps)
        found = compensate.Rounded(*map(np.array, steps(weights, h, factor, QUANT, mx.float32)))
        return found, row_errors(weights, h, found)

    before, (found, least) = errors(1)[1], errors(12)
    assert (least <= before * 1.00001).all() and least.sum() < 0.99 * before.sum()
    for column in range(0, COLUMNS, 5):
        for code in range(4):
            codes = found.codes.copy()
            codes[:, column] = code
            assert (row_errors(weights, h, found._replace(codes=codes)) >= least * 0.9999).all()
    for name in ("scales", "biases"):
        for factor in (0.999, 1.001):
            part = getattr(found, name).copy()
            part[:, 0] *= factor
            other = row_errors(weights, h, found._replace(**{name: part}))
            assert (other >= least * 0.9999).all(), name


def test_uncorrelated_inputs_leave_nothing_to_compensate(case):
    weights, _ = case
    found = quantize_for(weights, np.eye(COLUMNS, dtype=np.float32), QUANT, mx.bfloat16)
    alone = restored(fit(mx.array(weights), QUANT, mx.bfloat16), QUANT)
    ours, theirs = (((x - weights) ** 2).sum(-1) for x in (found.restored(), alone))
    assert (ours <= theirs * 1.02).all() and ours.sum() <= theirs.sum() * 1.000001
    assert (ours > 0.9 * theirs).all()


def test_products_with_other_inputs_come_close_to_those_wanted(case):
    """W x' shall be close to W x: for x' = x / 2, the weights double."""
    weights, inputs = case
    seen, wanted = inputs / 2, inputs
    plain = quantize_for(weights, moments(seen), Quant(8, 64), mx.float32)
    cross = (wanted.T @ seen / len(seen)).astype(np.float32)
    found = quantize_for(weights, moments(seen), Quant(8, 64), mx.float32, cross)
    exact = wanted @ weights.T
    ours, theirs = (((seen @ x.restored().T - exact) ** 2).mean() for x in (found, plain))
    assert ours < 0.01 * theirs


@pytest.mark.parametrize("seen", ["nothing", "one column"])
def test_inputs_never_seen_do_no_harm(case, seen):
    weights, _ = case
    mine = np.zeros((COLUMNS, COLUMNS), np.float32)
    if seen == "one column":
        mine[5, 5] = 3
    found = quantize_for(weights, mine, QUANT, mx.bfloat16)
    error = ((found.restored() - weights) ** 2).mean()
    alone = restored(fit(mx.array(weights), QUANT, mx.bfloat16), QUANT)
    assert error < 1.3 * ((alone - weights) ** 2).mean()


@pytest.mark.parametrize("numba", [True, False])
def test_a_group_of_equal_weights_does_no_harm(case, monkeypatch, numba):
    if not numba:
        monkeypatch.setattr(compensate, "has_numba", lambda: False)
    weights, inputs = case[0].copy(), case[1]
    weights[:, :64] = 0.5
    found = quantize_for(weights, moments(inputs), QUANT, mx.bfloat16)
    scales, biases = np.ones((ROWS, 2), np.float32), np.zeros((ROWS, 2), np.float32)
    alone = restored(fit(mx.array(weights), QUANT, mx.bfloat16), QUANT)
    h = damped(moments(inputs))
    nearest = row_errors(weights, h, compensate.Rounded(alone, scales, biases))
    assert (row_errors(weights, h, found) < nearest).all()
