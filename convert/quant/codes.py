"""Quantized matrices, and quantization by each group's smallest and largest weight."""

import importlib.util
from typing import NamedTuple

import mlx.core as mx

from ..plan.parts import Quant


class Codes(NamedTuple):
    """A quantized matrix: packed uint32 `[..., rows, columns * bits / 32]`, and one per group."""

    codes: mx.array
    scales: mx.array
    biases: mx.array

    def restored(self, quant: Quant) -> mx.array:
        """Return float32 `[..., rows, columns]`, not rounded to the dtype of the scales."""
        wide = self.scales.astype(mx.float32), self.biases.astype(mx.float32)
        return mx.dequantize(self.codes, *wide, quant.group_size, quant.bits)


def quantize(weights: mx.array, quant: Quant) -> Codes:
    """Quantize float `[..., rows, columns]` by each group's extremes, to the bit as mlx-lm does.

    Returns:
        Packed codes uint32 `[..., rows, columns * bits / 32]`; scales and biases
        `[..., rows, columns / group]` in the dtype of the weights.
    """
    if has_numba():
        from . import min_max_cpu

        if min_max_cpu.takes(weights.dtype, quant.bits):
            return Codes(*min_max_cpu.min_max(weights, quant.group_size, quant.bits))
    return Codes(*mx.quantize(weights, quant.group_size, quant.bits))


def has_numba() -> bool:
    """Say whether to compute by numba: on a processor, where MLX's own ops take far longer."""
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    return on_cpu and importlib.util.find_spec("numba") is not None
