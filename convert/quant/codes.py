"""Quantized matrices, and quantization by each group's extremes (min-max)."""

import importlib.util
from typing import NamedTuple

import mlx.core as mx

from ..plan.parts import Quant


class Codes(NamedTuple):
    """Packed codes uint32 `[..., rows, columns * bits / 32]`; the rest `[..., rows, groups]`."""

    codes: mx.array
    scales: mx.array
    biases: mx.array

    def restored(self, quant: Quant) -> mx.array:
        """Return float32 `[..., rows, columns]`, not rounded to the dtype of the scales."""
        wide = self.scales.astype(mx.float32), self.biases.astype(mx.float32)
        return mx.dequantize(self.codes, *wide, quant.group_size, quant.bits)


def quantize(weights: mx.array, quant: Quant) -> Codes:
    """Quantize float `[..., rows, columns]` bit for bit as mlx-lm does.

    Scales and biases have the dtype of the weights.
    """
    if has_numba():
        from . import min_max_cpu

        if min_max_cpu.takes(weights.dtype, quant.bits):
            return Codes(*min_max_cpu.min_max(weights, quant.group_size, quant.bits))
    return Codes(*mx.quantize(weights, quant.group_size, quant.bits))


def has_numba() -> bool:
    """Whether to use numba: on a CPU, where MLX's ops take far longer."""
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    return on_cpu and importlib.util.find_spec("numba") is not None
