"""On a CPU: float32 activations and this package's kernels, in any mlx-lm model.

MLX's own CPU ops take 10 to 100 times as long as the memory needs, most with bfloat16 activations.
GPUs keep mlx-lm's layers: calls of ours from its untraced Python cost more than they save.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..custom_kernels.device import computes_at_once
from ..custom_kernels.linear.linear import product_by_cpu


class FastLinear(nn.QuantizedLinear):
    """A quantized linear layer computed by the CPU kernels where they support its format."""

    def __call__(self, x: mx.array) -> mx.array:
        """Map `[..., in]` to `[..., out]`."""
        if (y := product_by_cpu(x, self)) is None:
            return super().__call__(x)
        return y + self["bias"] if "bias" in self else y


class FastEmbedding(nn.Embedding):
    """An embedding whose rows are float32, so that everything after it is."""

    def __call__(self, x: mx.array) -> mx.array:
        """Map ids `[...]` to `[..., H]`."""
        return super().__call__(x).astype(mx.float32)


class FastQuantizedEmbedding(nn.QuantizedEmbedding):
    """A quantized embedding, also as the output head."""

    def __call__(self, x: mx.array) -> mx.array:
        """Map ids `[...]` to `[..., H]`."""
        return super().__call__(x).astype(mx.float32)

    def as_linear(self, x: mx.array) -> mx.array:
        """Map `[..., H]` to logits `[..., V]`."""
        y = product_by_cpu(x, self)
        return super().as_linear(x) if y is None else y


FASTER: dict[Any, Any] = {
    nn.QuantizedLinear: FastLinear,
    nn.Embedding: FastEmbedding,
    nn.QuantizedEmbedding: FastQuantizedEmbedding,
}


def use_fast_layers(model: nn.Module) -> None:
    """Let a model compute in float32 by the CPU kernels; does nothing on a GPU."""
    if not computes_at_once():
        return
    for module in model.modules():
        if type(module) in FASTER:
            module.__class__ = FASTER[type(module)]
