"""This package's kernels in the linear layers and embeddings of any mlx-lm model.

On a CPU everything computes in float32: MLX's own ops take 10 to 100 times as long as the memory
needs, most with bfloat16 activations.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..custom_kernels.device import activation_dtype, kernel_mode
from ..custom_kernels.linear.linear import product


class FastLinear(nn.QuantizedLinear):
    """A quantized linear layer computed by our kernels where they support its format."""

    def __call__(self, x: mx.array) -> mx.array:
        """Map `[..., in]` to `[..., out]`."""
        if (y := product(x, self)) is None:
            return super().__call__(x)
        return y + self["bias"] if "bias" in self else y


class FastEmbedding(nn.Embedding):
    """An embedding; on a CPU its rows are float32, so that everything after it is."""

    def __call__(self, x: mx.array) -> mx.array:
        """Map ids `[...]` to `[..., H]`."""
        y = super().__call__(x)
        return y.astype(activation_dtype(y.dtype))


class FastQuantizedEmbedding(nn.QuantizedEmbedding):
    """A quantized embedding, also as the output head."""

    def __call__(self, x: mx.array) -> mx.array:
        """Map ids `[...]` to `[..., H]`."""
        y = super().__call__(x)
        return y.astype(activation_dtype(y.dtype))

    def as_linear(self, x: mx.array) -> mx.array:
        """Map `[..., H]` to logits `[..., V]`."""
        y = product(x, self)
        return super().as_linear(x) if y is None else y


FASTER: dict[Any, Any] = {
    nn.QuantizedLinear: FastLinear,
    nn.Embedding: FastEmbedding,
    nn.QuantizedEmbedding: FastQuantizedEmbedding,
}


def use_fast_layers(model: nn.Module) -> None:
    """Let a model's layers use our kernels, unless FLASHMOE_KERNELS is stock."""
    if kernel_mode() == "stock":
        return
    for module in model.modules():
        if type(module) in FASTER:
            module.__class__ = FASTER[type(module)]
