"""A model's kernel cases: every op that has a kernel, at that model's shapes."""

from dataclasses import fields
from typing import Any

from .attention.step import AttentionStepCase
from .case import KernelCase
from .experts.cases import ExpertDownCase, ExpertGateUpCase, ExpertOutputsCase, ExpertsCase
from .experts.prefill import TiledCase
from .experts.router import RouterCase
from .experts.tiles import CombineCase
from .gated_delta.cases import (
    GatedDeltaNormCase,
    GatedDeltaPrepareCase,
    GatedDeltaScanCase,
    GatedDeltaStepCase,
)
from .linear.cases import MatvecCase

GROUP_SIZE = 64
ROUTER_BITS = 8
TOKENS = 64  # of a prompt


def cases(sizes: Any, bits: int, dtype: str, top_k: int | None = None) -> list[KernelCase]:
    """List the kernel cases of one model, without duplicates.

    Args:
        sizes: an object with config.json's sizes: a `Geometry`, `ModelArgs`, or a `Family`, of
            which only the experts run by kernels on every device.
        bits: of experts and projections, in groups of 64; routers have 8.
        dtype: of activations: "bfloat16", "float16" or "float32".
        top_k: experts per token; the model's if None.
    """
    top_k = top_k or sizes.num_experts_per_tok
    scales = "float16" if dtype == "float16" else "bfloat16"
    # One slot more than experts used, so that ignoring the slots gives wrong results.
    slots = min(top_k + 1, sizes.num_experts)
    experts = sizes.hidden_size, sizes.moe_intermediate_size, slots, top_k, bits, GROUP_SIZE
    tiles = TiledCase(*experts[:2], bits, GROUP_SIZE, dtype, scales, bits, slots=8, rows=8)
    outputs = ExpertOutputsCase(*experts, dtype, scales)
    if not hasattr(sizes, "linear_num_key_heads"):
        return [outputs, tiles]
    matvecs = [
        MatvecCase(rows, columns, width, GROUP_SIZE, dtype, scales)
        for rows, columns, width in _matrices(sizes, bits)
    ]
    return [
        *dict.fromkeys(matvecs),
        RouterCase(sizes.num_experts, top_k, "float32"),
        ExpertGateUpCase(*experts, dtype, scales),
        ExpertDownCase(*experts, dtype, scales),
        ExpertsCase(*experts, dtype, scales),
        outputs,
        tiles,
        CombineCase(sizes.hidden_size, top_k, dtype, dtype, tokens=TOKENS),
        AttentionStepCase(*_attention(sizes), dtype),
        GatedDeltaStepCase(*_heads(sizes), dtype, scales),
        GatedDeltaPrepareCase(*_heads(sizes), dtype, scales, tokens=TOKENS),
        GatedDeltaScanCase(*_heads(sizes), dtype, scales, tokens=TOKENS),
        GatedDeltaNormCase(*_heads(sizes), dtype, scales, tokens=TOKENS),
    ]


def _attention(sizes: Any) -> tuple[int, int, int, int]:
    rope = getattr(sizes, "rope_parameters", {"partial_rotary_factor": 0.25})
    turned = int(sizes.head_dim * rope["partial_rotary_factor"])
    return sizes.num_attention_heads, sizes.num_key_value_heads, sizes.head_dim, turned


def _heads(sizes: Any) -> tuple[int, int, int, int]:
    keys, values = sizes.linear_num_key_heads, sizes.linear_num_value_heads
    return keys, values, sizes.linear_key_head_dim, sizes.linear_value_head_dim


def label(case: KernelCase) -> str:
    """Describe a case's shape: its fields, without dtypes and default values."""
    values: Any = case  # a dataclass, which a protocol cannot say
    shown = [
        f"{f.name}={getattr(case, f.name)}"
        for f in fields(values)
        if "dtype" not in f.name and getattr(case, f.name) != f.default
    ]
    return " ".join(shown)


def _matrices(sizes: Any, bits: int) -> list[tuple[int, int, int]]:
    """Return (rows, columns, bits) of the trunk's projections.

    The output head is left out: checking it takes gigabytes and adds nothing to large projections.
    """
    hidden = sizes.hidden_size
    heads, kv_heads = sizes.num_attention_heads, sizes.num_key_value_heads
    values = sizes.linear_num_value_heads * sizes.linear_value_head_dim
    keys = sizes.linear_num_key_heads * sizes.linear_key_head_dim
    return [
        (2 * heads * sizes.head_dim, hidden, bits),  # queries and their gate
        (kv_heads * sizes.head_dim, hidden, bits),
        (hidden, heads * sizes.head_dim, bits),
        (2 * keys + values, hidden, bits),  # GatedDeltaNet
        (values, hidden, bits),
        (sizes.linear_num_value_heads, hidden, bits),
        (hidden, values, bits),
        (sizes.num_experts, hidden, ROUTER_BITS),
    ]
