"""Products and factors: right for odd sizes, and independent of what runs beside them."""

import numpy as np
import pytest

from flashmoe_mlx.convert.quant import products

DEVICES = pytest.mark.parametrize("numba", [True, False])


@pytest.fixture(autouse=True)
def device(request, monkeypatch):
    if "numba" in request.fixturenames and not request.getfixturevalue("numba"):
        monkeypatch.setattr(products, "has_numba", lambda: False)


def random(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


@DEVICES
@pytest.mark.parametrize(
    "m, n, columns", [(1, 1, 1), (37, 130, 45), (8, 64, 32), (0, 3, 5), (9, 0, 4)]
)
def test_products(numba, m, n, columns):
    left, right = random(m, n), random(n, columns)
    for found in (products.product(left, right), products.cross(left.T, right)):
        exact = left.astype(np.float64) @ right
        assert found.dtype == np.float32 and found.shape == exact.shape
        assert np.abs(found - exact).max(initial=0) < 1e-4


@DEVICES
@pytest.mark.parametrize("n", [32, 160])
def test_the_factor_and_solutions(numba, n):
    inputs = random(3 * n, n)
    matrix = inputs.T @ inputs / n + np.eye(n, dtype=np.float32)
    factor = products.upper_factor(matrix)
    assert not np.tril(factor, -1).any() and (np.diag(factor) > 0).all()
    assert np.abs(factor @ factor.T - matrix).max() < 1e-5 * np.abs(matrix).max()
    rows = random(5, n)
    assert np.abs(products.solve(rows, factor) @ matrix - rows).max() < 1e-4


@DEVICES
def test_a_matrix_that_is_not_positive_is_refused(numba):
    matrix = np.eye(64, dtype=np.float32)
    matrix[40, 40] = -1
    with pytest.raises(np.linalg.LinAlgError):
        products.upper_factor(matrix)


def test_moments_are_symmetric_to_the_bit():
    inputs = random(50, 96)
    found = products.cross(inputs, inputs)
    assert np.array_equal(found, found.T)
