"""Kernel cases: one op at one shape, for parity checks, autotune and benchmarks."""

from typing import ClassVar, Protocol

import mlx.core as mx

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class KernelCase(Protocol):
    """An op at one shape and dtype. Implementations are frozen dataclasses of plain numbers.

    `custom`, `stock` and `reference` take `inputs()` and return the same outputs: by our kernels on
    the default device, by MLX's own ops, and in float32 by `reference.py`.
    """

    op: ClassVar[str]

    @property
    def nbytes(self) -> int:
        """Bytes that one run must move: weights, states and activations, each once."""

    def inputs(self, seed: int = 0) -> list[mx.array]:
        """Make random inputs, evaluated; each seed gives other arrays of the same shapes."""

    def custom(self, *inputs: mx.array) -> list[mx.array]:
        """Compute by our kernels."""

    def stock(self, *inputs: mx.array) -> list[mx.array]:
        """Compute by MLX's own ops, in the inputs' dtypes."""

    def reference(self, *inputs: mx.array) -> list[mx.array]:
        """Compute the reference in float32."""


def random_quantized(
    key: mx.array, shape: tuple[int, ...], bits: int, group_size: int, dtype: mx.Dtype
) -> list[mx.array]:
    """Make random codes, scales and biases of `[..., rows, columns]` weights.

    Weights have mean 0 and variance 1 / columns, approximately.

    Returns:
        codes `[..., rows, columns * bits / 32]` uint32, scales and biases `[..., rows, groups]`.
    """
    *lead, columns = shape
    keys = mx.random.split(key, 2)
    words = (*lead, columns * bits // 32)
    low, high = (
        mx.random.randint(0, 1 << 16, words, mx.uint32, k) for k in mx.random.split(keys[0])
    )
    levels = (1 << bits) - 1
    # Codes are uniform, so their standard deviation is levels / sqrt(12).
    sigma = (12 / columns) ** 0.5 / levels
    scales = mx.random.uniform(
        0.5 * sigma, 1.5 * sigma, (*lead, columns // group_size), key=keys[1]
    )
    scales = scales.astype(dtype)
    biases = (scales.astype(mx.float32) * (-levels / 2)).astype(dtype)
    return [low | high << 16, scales, biases]
