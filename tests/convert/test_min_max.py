"""Quantization by extremes on all cores gives the bits of `mx.quantize`."""

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_mlx.convert.quant.min_max_cpu import BITS, min_max, takes


def awkward(dtype: mx.Dtype) -> mx.array:
    """Rows whose groups have one sign, one value, zeros, ties, and very large or small numbers."""
    mx.random.seed(0)
    w = mx.random.normal((70, 384))
    w[1] = 0
    w[2, ::2], w[2, 1::2] = 0.0, -0.0
    w[3], w[4] = mx.abs(w[3]), -mx.abs(w[4])
    w[5], w[6], w[7] = 1.5, -3.0, w[7] * 1e-9
    w[8], w[9] = w[9] * 1e30, w[9] * 1e-38
    w[10:40] = mx.round(w[10:40] * 4) / 4  # quotients that lie halfway
    w[40, 5] = 1000.0
    return w.astype(dtype)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_equals_mlx_to_the_bit(dtype, bits, group_size):
    weights = awkward(dtype)
    for shaped in (weights, weights.reshape(2, 35, 384)):
        expected = mx.quantize(shaped, group_size, bits)
        for ours, theirs in zip(min_max(shaped, group_size, bits), expected, strict=True):
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
            word = mx.uint16 if theirs.itemsize == 2 else mx.uint32
            np.testing.assert_array_equal(np.array(ours.view(word)), np.array(theirs.view(word)))


def test_the_rest_is_left_to_mlx():
    assert not takes(mx.float16, 4) and not takes(mx.bfloat16, 3) and takes(mx.bfloat16, 4)
