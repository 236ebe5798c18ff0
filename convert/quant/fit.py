"""Least-squares quantization, never worse than min-max.

A group of weights w shares a scale s and a bias b; the model computes with s q + b, q its codes.
From several clipped ranges, two steps alternate: the nearest codes for s and b, then the
least-squares s and b for these codes. s and b are rounded to the stored dtype before codes are
chosen, which matters most at 2 bits. The best result is kept, `mx.quantize`'s among them.
"""

import mlx.core as mx
import numpy as np

from ..plan.parts import Quant
from .codes import Codes, has_numba, quantize

STARTS = (1.0, 0.9, 0.8, 0.7, 0.6)  # shares of the group's range
STEPS = 8  # per start
CHUNK = 1 << 22  # weights per batch; uses about 30 bytes per weight


def fit(
    weights: mx.array, quant: Quant, dtype: mx.Dtype, importance: mx.array | None = None
) -> Codes:
    """Quantize with the least squared error found.

    Args:
        weights: float `[..., rows, columns]`.
        quant: bits and group size, which divides columns.
        dtype: of scales and biases.
        importance: weight of each squared error, at least 0, `[columns]` or of weights' shape;
            equal by default.
    """
    rows = weights.reshape(-1, quant.group_size).astype(mx.float32)
    if importance is None:
        counts = mx.ones((1, quant.group_size))
    else:
        counts = mx.broadcast_to(importance.astype(mx.float32), weights.shape)
        counts = counts.reshape(rows.shape)
    size = max(1, CHUNK // quant.group_size)
    fit_rows = _fit_on_cpu if has_numba() else _fit_rows
    parts = []
    for first in range(0, len(rows), size):
        some = counts if len(counts) == 1 else counts[first : first + size]
        part = fit_rows(rows[first : first + size], some, quant, dtype)
        mx.eval(part)
        parts.append(part)
    codes, scales, biases = (mx.concatenate(list(p)) for p in zip(*parts, strict=True))
    *lead, columns = weights.shape
    groups = *lead, columns // quant.group_size
    packed = pack(codes.reshape(weights.shape), quant.bits)
    return Codes(packed, scales.reshape(groups), biases.reshape(groups))


def _fit_on_cpu(
    rows: mx.array, counts: mx.array, quant: Quant, dtype: mx.Dtype
) -> tuple[mx.array, mx.array, mx.array]:
    """The numba version of `_fit_rows`."""
    from .fit_cpu import KINDS, fit_groups

    _, scales, biases = quantize(rows, quant)
    start = [np.array(x.astype(dtype).astype(mx.float32))[:, 0] for x in (scales, biases)]
    codes = np.empty(rows.shape, np.uint8)
    shares = np.array(STARTS, np.float32)
    found = np.array(rows), np.array(counts), quant.bits, KINDS[dtype], shares, STEPS
    fit_groups(*found, codes, *start)
    scales, biases = (mx.array(x)[:, None].astype(dtype) for x in start)
    return mx.array(codes), scales, biases


def _fit_rows(
    rows: mx.array, counts: mx.array, quant: Quant, dtype: mx.Dtype
) -> tuple[mx.array, mx.array, mx.array]:
    """Return codes uint8, scale and bias of each row `[group size]`."""
    most = (1 << quant.bits) - 1
    weight = counts / mx.maximum(counts.sum(-1, keepdims=True), 1e-30)
    mean = (weight * rows).sum(-1, keepdims=True)
    low, high = rows.min(-1, keepdims=True), rows.max(-1, keepdims=True)

    def stored(x: mx.array) -> mx.array:
        return x.astype(dtype).astype(mx.float32)

    def nearest(scales: mx.array, biases: mx.array) -> mx.array:
        steps = (rows - biases) / mx.where(scales == 0, 1.0, scales)
        return mx.clip(mx.round(mx.where(scales == 0, 0.0, steps)), 0, most)

    def with_error(codes: mx.array, scales: mx.array, biases: mx.array) -> list[mx.array]:
        off = rows - (codes * scales + biases)
        return [codes, scales, biases, (weight * off * off).sum(-1, keepdims=True)]

    _, scales, biases = quantize(rows, quant)
    scales, biases = stored(scales), stored(biases)
    best = with_error(nearest(scales, biases), scales, biases)
    for share in STARTS:
        half = (high - low) / 2 * share
        scales, biases = stored(2 * half / most), stored((low + high) / 2 - half)
        for _ in range(STEPS):
            codes = nearest(scales, biases)
            new = with_error(codes, scales, biases)
            less = new[3] < best[3]
            best = [mx.where(less, a, b) for a, b in zip(new, best, strict=True)]
            middle = (weight * codes).sum(-1, keepdims=True)
            spread = (weight * (codes - middle) ** 2).sum(-1, keepdims=True)
            slope = (weight * (codes - middle) * (rows - mean)).sum(-1, keepdims=True)
            scales = stored(mx.where(spread > 0, slope / mx.where(spread > 0, spread, 1), scales))
            biases = stored(mean - scales * middle)
        mx.eval(best)
    codes, scales, biases, _ = best
    return codes.astype(mx.uint8), scales.astype(dtype), biases.astype(dtype)


def pack(codes: mx.array, bits: int) -> mx.array:
    """Pack codes as MLX does, lowest bits first, to uint32 `[..., columns * bits / 32]`."""
    *lead, columns = codes.shape
    wide = codes.astype(mx.uint32)
    if 32 % bits == 0:
        words = wide.reshape(*lead, -1, 32 // bits) << mx.arange(0, 32, bits, dtype=mx.uint32)
        return words.sum(-1)
    stream = wide[..., None] >> mx.arange(bits, dtype=mx.uint32) & 1
    words = stream.reshape(*lead, columns * bits // 32, 32) << mx.arange(32, dtype=mx.uint32)
    return words.sum(-1)
