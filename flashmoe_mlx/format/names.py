"""Tensor names: every published spelling of a Qwen3.5 MoE checkpoint, mapped to mlx-lm's.

Checkpoints spell the language model's prefix in three ways (`model.language_model.`,
`language_model.model.`, or plain `model.`), and hold tensors that text generation does not use
(vision tower, multi-token-prediction head).
"""

import re

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
PARTS = ("weight", "scales", "biases")
FIELDS = tuple(f"{projection}.{part}" for projection in PROJECTIONS for part in PARTS)

_STACKED = re.compile(r"\.layers\.(\d+)\.mlp\.switch_mlp\.(\w+)\.(weight|scales|biases)$")
_FUSED = re.compile(r"\.layers\.(\d+)\.mlp\.experts\.(gate_up_proj|down_proj)$")
_SINGLE = re.compile(
    r"\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight$"
)

_SINGLE_QUANTIZED = re.compile(
    r"\.layers\.\d+\.mlp\.experts\.\d+\.(gate_proj|up_proj|down_proj)"
    r"\.(scales|biases|qweight|weight_scale\w*|weight_packed)$"
)


def canonical(name: str) -> str | None:
    """Return mlx-lm's name for a checkpoint tensor, or None if text generation does not need it."""
    if name.startswith(("vision_tower.", "visual.", "model.visual.")) or "mtp." in name:
        return None
    if name.startswith("model.language_model."):
        return "language_model.model." + name.removeprefix("model.language_model.")
    if name.startswith("language_model."):
        return name
    return "language_model." + name


def layer_prefix(layer: int) -> str:
    """Return the canonical prefix of one decoder layer, without the final dot."""
    return f"language_model.model.layers.{layer}"


def stacked_expert(name: str) -> tuple[int, str] | None:
    """Match MLX's stacked experts `[experts, out, in]`: (layer, field such as "up_proj.scales")."""
    match = _STACKED.search(canonical(name) or "")
    return (int(match[1]), f"{match[2]}.{match[3]}") if match else None


def fused_expert(name: str) -> tuple[int, str] | None:
    """Match Hugging Face's fused experts: (layer, "gate_up_proj" or "down_proj")."""
    match = _FUSED.search(canonical(name) or "")
    return (int(match[1]), match[2]) if match else None


def single_expert(name: str) -> tuple[int, int, str] | None:
    """Match Hugging Face's per-expert keys: (layer, expert, projection)."""
    match = _SINGLE.search(canonical(name) or "")
    return (int(match[1]), int(match[2]), match[3]) if match else None


def is_quantized_single(name: str) -> bool:
    """Say whether a tensor belongs to an expert that is quantized under its own keys."""
    return bool(_SINGLE_QUANTIZED.search(canonical(name) or ""))


def is_expert(name: str) -> bool:
    """Say whether a tensor belongs to a routed expert, in any spelling."""
    return any(match(name) for match in (stacked_expert, fused_expert, single_expert))
