"""What the checkpoint says (`ModelArgs`) and what the user asks for (`StreamConfig`)."""

import inspect
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

from .config_entries import (
    RESTORE,
    check_entry,
    check_layer_types,
    check_quantization,
    object_in,
)
from .errors import FlashMoEError
from .layout import ExpertLayout
from .lookahead import MODES as LOOKAHEAD

PREFILL_CHUNK = 2048  # tokens that mlx-lm puts through the model at a time
MODEL_TYPES = ("qwen3_5_moe", "qwen3_5_moe_text")
MOST_CACHE = 1 << 50  # bytes; no machine has as much memory
MOST_THREADS = 1024  # that read; disks are at their best with a few
IO_MODES = ("auto", "buffered", "direct")
UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    UNITS |= {_letter: 1024**_power, f"{_letter}b": 1000**_power, f"{_letter}ib": 1024**_power}


@dataclass
class ModelArgs:
    """The architecture, in the names of the checkpoint's config.json (its text_config)."""

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
            FlashMoEError: another model type, a missing key, or sizes that contradict.
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
                f"config.json: text_config = {text!r} is not a JSON object. "
                "Restore the checkpoint's own config.json."
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
            raise FlashMoEError(
                f"config.json: no {', '.join(missing)}. Restore the checkpoint's own config.json."
            ) from error

    def __post_init__(self) -> None:
        """Fill in derived sizes and refuse contradictions."""
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
        """Bytes that a chunk of PREFILL_CHUNK tokens takes, over all: mostly experts' outputs.

        Counted as four times the experts' outputs in float32: an estimate, not a bound.
        """
        return 4 * 4 * PREFILL_CHUNK * self.num_experts_per_tok * self.hidden_size

    def is_linear(self, layer: int) -> bool:
        """Say whether a layer is GatedDeltaNet (else full attention)."""
        return (layer + 1) % self.full_attention_interval != 0

    def expert_shape(self, projection: str) -> tuple[int, int]:
        """Return (rows, columns) of one of a routed expert's three matrices."""
        hidden, inner = self.hidden_size, self.moe_intermediate_size
        return (hidden, inner) if projection == "down_proj" else (inner, hidden)


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """Collect RoPE settings from `rope_parameters`, or from the flat keys of older configs."""
    rope = {
        "rope_type": "default",
        "partial_rotary_factor": values.get("partial_rotary_factor", 0.25),
        "rope_theta": values.get("rope_theta"),
        **object_in(values, "rope_parameters"),
    }
    if rope["rope_theta"] is None:
        raise FlashMoEError(
            "config.json: no rope_theta, in rope_parameters or beside it. "
            "Restore the checkpoint's own config.json."
        )
    check_entry("rope_theta", float, rope["rope_theta"])
    check_entry("partial_rotary_factor", float, rope["partial_rotary_factor"])
    if rope["partial_rotary_factor"] > 1:
        raise FlashMoEError(
            f"config.json: partial_rotary_factor = {rope['partial_rotary_factor']} is more than "
            "the whole head. Restore the checkpoint's own config.json."
        )
    return rope


def _check_rotated(head_dim: int, rope: Mapping[str, Any]) -> None:
    """Refuse a share of the head that MLX cannot rotate: none of it, or an odd number."""
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
    """Refuse a number of experts per token that the model does not have."""
    if not 1 <= top_k <= num_experts:
        raise FlashMoEError(
            f"{name} = {top_k}, but the model has {num_experts} experts per layer. "
            f"Choose 1 to {num_experts}."
        )


def parse_size(value: int | str, name: str) -> int | str:
    """Read a number of bytes: 536870912, "512MiB", "4GB", "1.5g", or "auto".

    Raises:
        FlashMoEError: anything else; `name` says which setting it came from.
    """
    if value == "auto":
        return value
    size: float = 0
    if isinstance(value, str):
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)", value.strip().lower())
        if match and match[2] in UNITS:
            size = float(match[1]) * UNITS[match[2]]
    elif isinstance(value, int) and not isinstance(value, bool):
        size = value
    if size > MOST_CACHE:
        raise FlashMoEError(
            f"{name} = {str(value)[:80]} is more memory than any machine has. Give at most "
            f"{MOST_CACHE >> 40}TiB, or auto."
        )
    if size <= 0:
        raise FlashMoEError(
            f"{name} = {value!r} is not a size. Write bytes or a unit, such as 512MiB, 4GiB, or "
            "auto."
        )
    return int(size)


@dataclass(frozen=True)
class StreamConfig:
    """How experts are streamed.

    Attributes:
        expert_cache: bytes for the slot banks of all layers together, or "auto".
        io_threads: threads that read from disk.
        io_mode: "buffered" reads through the page cache, "direct" reads past it, or "auto".
        experts_per_token: top-k to use instead of the checkpoint's own, or None.
        stats: print the counters at exit.
        verify: compare every expert with its checksum when it has been read.
        lookahead: "on" reads experts early, on a guess, "off" does not; "auto" times both.
    """

    expert_cache: int | str = "auto"
    io_threads: int = 8
    experts_per_token: int | None = None
    stats: bool = False
    io_mode: str = "auto"
    verify: bool = False
    lookahead: str = "auto"

    @classmethod
    def resolve(cls, from_config: Mapping[str, Any], **explicit: Any) -> Self:
        """Merge settings: explicit arguments, then FLASHMOE_* variables, then config.json.

        Args:
            from_config: the "flashmoe" entry of config.json.
            explicit: values that were given by the caller; None means not given.

        Raises:
            FlashMoEError: a value is out of range; the message names where it came from.
        """
        settings: dict[str, Any] = {}
        names = [f.name for f in fields(cls)]
        if unknown := from_config.keys() - {*names, "format_version"}:
            raise FlashMoEError(
                f'config.json "flashmoe": no setting is called {", ".join(sorted(unknown))}. '
                f"Choose among {', '.join(names)}."
            )
        for f in fields(cls):
            variable = f"FLASHMOE_{f.name.upper()}"
            if explicit.get(f.name) is not None:
                source, value = f.name, explicit[f.name]
            elif os.environ.get(variable):
                source, value = variable, os.environ[variable]
            elif from_config.get(f.name) is not None:
                source, value = f'config.json "flashmoe": {f.name}', from_config[f.name]
            else:
                continue
            settings[f.name] = _read_setting(f.name, value, source)
        return cls(**settings)


def _read_setting(setting: str, value: Any, source: str) -> Any:
    if setting == "expert_cache":
        return parse_size(value, source)
    if choices := {"io_mode": IO_MODES, "lookahead": LOOKAHEAD}.get(setting):
        if value in choices:
            return value
        raise FlashMoEError(f"{source} = {value!r} is not one of {', '.join(choices)}.")
    if setting in ("stats", "verify"):
        if str(value).lower() in ("0", "false", "1", "true"):
            return str(value).lower() in ("1", "true")
        raise FlashMoEError(f"{source} = {value!r} is not a switch. Write 1 or 0.")
    if re.fullmatch(r"[0-9]{1,9}", str(value)) and int(value) >= 1:
        if setting == "io_threads" and int(value) > MOST_THREADS:
            raise FlashMoEError(f"{source} = {value} is too many. Give at most {MOST_THREADS}.")
        return int(value)
    raise FlashMoEError(f"{source} = {value!r} is not a whole number of at least 1.")


@dataclass(frozen=True)
class IoPlan:
    """Whether reads go past the page cache (direct) or through it, and why."""

    direct: bool
    reason: str

    def __str__(self) -> str:
        """A few words for people."""
        return f"{'direct' if self.direct else 'buffered'} reads ({self.reason})"


BUFFERED = IoPlan(False, "the default")


@dataclass(frozen=True)
class CachePlan:
    """The chosen size of the slot banks, and why; and how they are filled."""

    slots: int
    nbytes: int
    reason: str
    io: IoPlan = BUFFERED

    def __str__(self) -> str:
        """One line for people."""
        return (
            f"Expert cache: {self.nbytes / 2**20:.0f} MiB, "
            f"{self.slots} experts per layer ({self.reason}); {self.io}"
        )


def asked_slots(expert_cache: int | str, layout: ExpertLayout, top_k: int) -> int | None:
    """Return the slots per layer that a size in bytes gives, None for "auto".

    Raises:
        FlashMoEError: the size holds less than one token's working set.
    """
    if expert_cache == "auto":
        return None
    slots = min(int(expert_cache) // layout.token_bytes, layout.layers[0].num_experts)
    if slots < top_k:
        raise FlashMoEError(
            f"expert_cache = {expert_cache} bytes holds {slots} experts per layer, but each "
            f"token uses {top_k}. Give at least {top_k * layout.token_bytes} bytes, or auto."
        )
    return slots


def plan_cache(
    expert_cache: int | str,
    layout: ExpertLayout,
    top_k: int,
    trunk_bytes: int,
    available: int,
    io: IoPlan = BUFFERED,
    activations: int = 0,
    apart: bool = False,
) -> CachePlan:
    """Choose how many slots each layer's bank gets.

    `auto` keeps every expert resident if experts and trunk fit in 70 % of the available memory.
    Otherwise the banks take a quarter of what the trunk leaves, because the page cache holds
    experts as well as the banks do and gives way under pressure. Direct reads leave nothing in the
    page cache, so with them the banks take what is left of the 70 %, or less if a chunk of a prompt
    needs more room.

    Args:
        expert_cache: bytes for all layers together, or "auto".
        layout: where the experts lie.
        top_k: experts per token; a bank is never smaller.
        trunk_bytes: resident weights.
        available: bytes that may still be used.
        io: how the banks will be filled.
        activations: bytes that computing a chunk of a prompt takes.
        apart: the banks lie in a GPU's own memory, which the page cache has no use for.

    Raises:
        FlashMoEError: the size given holds less than one token's working set, or does not fit.
    """
    experts = layout.layers[0].num_experts
    per_slot = layout.token_bytes
    smallest = CachePlan(top_k, top_k * per_slot, "the smallest bank, one token's experts", io)
    whole = CachePlan(experts, experts * per_slot, "all experts fit in memory", io)
    slots = asked_slots(expert_cache, layout, top_k)
    if slots is not None:
        if slots * per_slot > available:
            raise FlashMoEError(
                f"expert_cache = {expert_cache} bytes takes {slots * per_slot} bytes of memory, "
                f"but {available} are available. Give less, or auto."
            )
        return CachePlan(slots, slots * per_slot, "as asked", io)
    comfort = 0.7 * available - trunk_bytes
    if whole.nbytes <= comfort:
        return whole
    share, why = (available - trunk_bytes) * 0.25, "a quarter of the memory that the trunk leaves"
    if io.direct or apart:
        share, why = comfort, "70 % of the memory, less the trunk"
        if (rest := available - trunk_bytes - activations) < share:
            share, why = rest, "what trunk and activations leave"
    slots = int(share // per_slot)
    if slots <= top_k:
        return replace(smallest, reason="memory is short: " + smallest.reason)
    slots = min(slots, experts)
    return CachePlan(slots, slots * per_slot, why, io)
