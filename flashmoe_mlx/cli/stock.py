"""Stock mlx-lm's model of a directory, all experts in memory, to compare with ours."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3_5_moe
from mlx_lm.utils import load_model

from ..format.layout import EXPERT_DIR, layer_file
from ..format.names import FIELDS, layer_prefix
from ..models.patch import stock_classes
from ..models.qwen3_5.args import MODEL_TYPES
from ..profile import machine


def stock_model(directory: Path, experts: dict[str, mx.array], **config: Any) -> nn.Module:
    """Load stock mlx-lm's model; its activations are float32 on a CPU, as ours are.

    Args:
        directory: the checkpoint.
        experts: weights that the directory's own files lack, from `stacked_experts`.
        config: entries that replace those of config.json.
    """

    class WithExperts(qwen3_5_moe.Model):
        """The stock model, with `experts` added to the trunk."""

        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            """Add the experts."""
            return super().sanitize(weights | experts)

    def classes(config: dict[str, Any]) -> tuple[type[nn.Module], Any]:
        own = config["model_type"] in MODEL_TYPES
        return (WithExperts, qwen3_5_moe.ModelArgs) if own else stock_classes(config)

    model, _ = load_model(
        directory,
        model_config={"model_file": None, **config},
        get_model_classes=classes,
    )
    if not machine.on_gpu():
        model.set_dtype(mx.float32)
    return model


def stacked_experts(directory: Path, layers: int, experts: int) -> dict[str, mx.array]:
    """Return a packed directory's experts under the names of stock mlx-lm."""
    found = {}
    for layer in range(layers):
        tensors: Any = mx.load(str(directory / EXPERT_DIR / layer_file(layer)))
        for field in FIELDS:
            parts = [tensors[f"experts.{expert}.{field}"] for expert in range(experts)]
            stacked = mx.stack(parts)
            mx.eval(stacked)  # now, so that memory never holds all parts beside the stacks
            found[f"{layer_prefix(layer)}.mlp.switch_mlp.{field}"] = stacked
    return found
