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
        """Map ids `[...]` to `[..., H]` float32."""
        if self.mode != "affine":  # these formats' numbers are exact in bfloat16
            return super().__call__(x).astype(mx.float32)
        scales, biases = (self[name][x].astype(mx.float32) for name in ("scales", "biases"))
        return mx.dequantize(self["weight"][x], scales, biases, self.group_size, self.bits)

    def as_linear(self, x: mx.array) -> mx.array:
        """Map `[..., H]` to logits `[..., V]`."""
        y = product_by_cpu(x, self)
        return super().as_linear(x) if y is None else y


MATRICES = nn.Linear, nn.Embedding
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
        elif not isinstance(module, MATRICES) and "scales" not in module:
            _widen(module)


def _widen(module: nn.Module) -> None:
    """Make a module's own small parameters float32: models compute exp(A_log) or 1 + w from them.

    Matrices stay as they are, since each is only multiplied by float32 activations.
    """
    for name, value in list(module.items()):
        if isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating):
            module[name] = value.astype(mx.float32)
