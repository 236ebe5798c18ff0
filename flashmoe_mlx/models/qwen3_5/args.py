"""`ModelArgs`: the architecture by config.json."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from ...errors import FlashMoEError
from ...format.config_entries import (
    RESTORE,
    check_entry,
    check_layer_types,
    check_quantization,
    object_in,
)
from ...format.modules import ExpertModule, in_float_mode
from ...format.names import PROJECTIONS, layer_prefix

PREFILL_CHUNK = 2048  # tokens per forward pass of mlx-lm's prefill
MODEL_TYPES = ("qwen3_5_moe", "qwen3_5_moe_text")


def is_own(config: Mapping[str, Any]) -> bool:
    """Say whether this package's model code takes a config.json: Qwen3.5 in affine modes."""
    quantized = bool(config.get("quantization")) and not in_float_mode(config)
    return config.get("model_type") in MODEL_TYPES and quantized


@dataclass
class ModelArgs:
    """The architecture, named as in config.json (its text_config)."""

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    linear_num_value_heads: int
    linear_num_key_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int = 4
    full_attention_interval: int = 4
    head_dim: int = 0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 262144
    norm_topk_prob: bool = True
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    rope_parameters: dict[str, Any] = field(
        default_factory=lambda: {"rope_theta": 1e7, "partial_rotary_factor": 0.25}
    )
    layer_types: list[str] | None = None
    quantization: dict[str, Any] = field(default_factory=dict)
    flashmoe: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, params: Mapping[str, Any]) -> Self:
        """Build from config.json, flat or with the language model under `text_config`.

        Raises:
            FlashMoEError: unsupported model type, missing key, or contradictory sizes.
        """
        if (model_type := params.get("model_type")) not in MODEL_TYPES:
            raise FlashMoEError(
                f"config.json: model_type {model_type!r} cannot be streamed; supported are "
                f"{', '.join(MODEL_TYPES)} (Qwen3.5 and Qwen3.6 MoE). Use stock mlx-lm for others."
            )
        own = {name: params.get(name) or {} for name in ("flashmoe", "quantization")}
        if params.get("quantize_activations"):
            raise FlashMoEError(
                "config.json: quantize_activations is not supported for streamed models. Remove "
                "it, or use stock mlx-lm."
            )
        text = params.get("text_config", params)
        if not isinstance(text, Mapping):
            raise FlashMoEError(
                f"config.json: text_config = {text!r} is not a JSON object. {RESTORE}"
            )
        values = {**text, **own}
        # A vision-language export may state tied embeddings at the top level only.
        values.setdefault("tie_word_embeddings", params.get("tie_word_embeddings"))
        values["rope_parameters"] = _rope(values)
        known = {f.name for f in fields(cls)}
        try:
            return cls(**{k: v for k, v in values.items() if k in known and v is not None})
        except TypeError as error:
            missing = [
                name
                for name, p in inspect.signature(cls).parameters.items()
                if p.default is p.empty and name not in values
            ]
            raise FlashMoEError(f"config.json: no {', '.join(missing)}. {RESTORE}") from error

    def __post_init__(self) -> None:
        """Derive sizes and refuse contradictions."""
        for entry in fields(self):
            check_entry(entry.name, entry.type, getattr(self, entry.name))
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        check_top_k(self.num_experts_per_tok, self.num_experts, "config.json: num_experts_per_tok")
        _check_multiple(self, "num_attention_heads", "num_key_value_heads")
        _check_multiple(self, "linear_num_value_heads", "linear_num_key_heads")
        _check_rotated(self.head_dim, self.rope_parameters)
        if self.layer_types:
            check_layer_types(
                self.layer_types, self.num_hidden_layers, self.full_attention_interval
            )
        check_quantization(self.quantization)

    @property
    def activation_bytes(self) -> int:
        """Estimated bytes of activations for a prompt chunk."""
        return activation_bytes(self.num_experts_per_tok, self.hidden_size)

    def is_linear(self, layer: int) -> bool:
        """Say whether a layer is GatedDeltaNet (else full attention)."""
        return (layer + 1) % self.full_attention_interval != 0

    def expert_shape(self, projection: str) -> tuple[int, int]:
        """Return (rows, columns) of one of a routed expert's three matrices."""
        hidden, inner = self.hidden_size, self.moe_intermediate_size
        return (hidden, inner) if projection == "down_proj" else (inner, hidden)

    def expert_modules(self) -> list[ExpertModule]:
        """Return the routed experts of each layer."""
        shapes = {projection: self.expert_shape(projection) for projection in PROJECTIONS}
        return [
            ExpertModule(f"{layer_prefix(layer)}.mlp.switch_mlp", shapes, self.num_experts)
            for layer in range(self.num_hidden_layers)
        ]


def activation_bytes(top_k: int, hidden_size: int) -> int:
    """Estimate the bytes of activations for PREFILL_CHUNK tokens.

    Four times the experts' outputs in float32, which dominate. Not a bound.
    """
    return 4 * 4 * PREFILL_CHUNK * top_k * hidden_size


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """Read RoPE settings from `rope_parameters`, or from the flat keys of older configs."""
    rope = {
        "rope_type": "default",
        "partial_rotary_factor": values.get("partial_rotary_factor", 0.25),
        "rope_theta": values.get("rope_theta"),
        **object_in(values, "rope_parameters"),
    }
    if rope["rope_theta"] is None:
        raise FlashMoEError(
            f"config.json: no rope_theta, in rope_parameters or beside it. {RESTORE}"
        )
    check_entry("rope_theta", float, rope["rope_theta"])
    check_entry("partial_rotary_factor", float, rope["partial_rotary_factor"])
    if rope["partial_rotary_factor"] > 1:
        raise FlashMoEError(
            f"config.json: partial_rotary_factor = {rope['partial_rotary_factor']} is more than "
            f"the whole head. {RESTORE}"
        )
    return rope


def _check_rotated(head_dim: int, rope: Mapping[str, Any]) -> None:
    """Refuse a rotated part of the head that MLX cannot rotate: odd, or below 2 dimensions."""
    factor = rope["partial_rotary_factor"]
    rotated = int(head_dim * factor)
    if rotated < 2 or rotated % 2:
        raise FlashMoEError(
            f"config.json: partial_rotary_factor = {factor} of head_dim = {head_dim} rotates "
            f"{rotated} dimensions, and RoPE needs an even number of at least 2. {RESTORE}"
        )


def _check_multiple(args: ModelArgs, many: str, few: str) -> None:
    if getattr(args, many) % getattr(args, few):
        raise FlashMoEError(
            f"config.json: {many} = {getattr(args, many)} is not a multiple of {few} = "
            f"{getattr(args, few)}. {RESTORE}"
        )


def check_top_k(top_k: int, num_experts: int, name: str) -> None:
    """Refuse a top-k outside 1 to `num_experts`."""
    if not 1 <= top_k <= num_experts:
        raise FlashMoEError(
            f"{name} = {top_k}, but the model has {num_experts} experts per layer. "
            f"Choose 1 to {num_experts}."
        )
