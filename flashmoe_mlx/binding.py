"""The classes from which mlx-lm builds a model, this package's or its own, with an expert store."""

import atexit
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .custom_kernels.cpu.compile import check_cpu_kernels, prepare
from .custom_kernels.device import computes_at_once
from .errors import FlashMoEError
from .format.headers import TensorInfo, checkpoint_headers
from .format.layout import ExpertLayout, open_layout
from .format.modules import ExpertModule, open_modules, quantizations
from .format.names import is_expert
from .models.patch import patched_classes, top_k
from .models.qwen3_5.args import ModelArgs, activation_bytes, check_top_k, is_own
from .models.qwen3_5.model import Model
from .models.streamed import Experts
from .models.trunk_checks import check_trunk
from .settings import StreamConfig
from .store.checks import RecordChecks
from .store.devices import choose
from .store.io_mode import plan_io, plan_load
from .store.memory import available_bytes
from .store.sizing import plan_cache, requested_slots
from .store.slots import DTYPES
from .store.store import ExpertStore

Format = tuple[int, int, str]


def bound_classes(
    directory: Path, config: Mapping[str, Any], **settings: Any
) -> tuple[type[nn.Module], Any]:
    """Return (model class, arguments class) whose experts stream from `directory`.

    Args:
        directory: the model's directory.
        config: its config.json.
        settings: `StreamConfig` fields; None means not given.
    """
    if not has_fast_path(config) or splits_trunk(config, settings):
        return generic_classes(directory, config, settings)

    class BoundModel(Model):
        """A `Model` with an expert store on one directory."""

        def __init__(self, args: ModelArgs) -> None:
            """Open the store, then build the model."""
            stream = StreamConfig.resolve(args.flashmoe, **settings)
            if stream.experts_per_token is not None:
                check_top_k(stream.experts_per_token, args.num_experts, "experts_per_token")
                args = replace(args, num_experts_per_tok=stream.experts_per_token)
            super().__init__(args, find_experts(directory, args, stream))

    return BoundModel, ModelArgs


def has_fast_path(config: Mapping[str, Any]) -> bool:
    """Say whether this package has its own model code for a config.json.

    Raises:
        FlashMoEError: FLASHMOE_MODEL is neither auto nor generic.
    """
    mode = os.environ.get("FLASHMOE_MODEL") or "auto"
    if mode not in ("auto", "generic"):
        raise FlashMoEError(f"FLASHMOE_MODEL = {mode!r} is not valid. Set it to auto or generic.")
    return mode == "auto" and is_own(config)


def splits_trunk(config: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Say whether several ranks split the trunk too, which needs mlx-lm's own model code."""
    if mx.distributed.init().size() == 1:
        return False
    return StreamConfig.resolve(config.get("flashmoe") or {}, **settings).sharding == "tensor"


def generic_classes(
    directory: Path, config: Mapping[str, Any], settings: Mapping[str, Any]
) -> tuple[type[nn.Module], Any]:
    """Return mlx-lm's own classes with streamed experts: see `patched_classes`."""
    stream = StreamConfig.resolve(config.get("flashmoe") or {}, **settings)
    if stream.lookahead == "on":
        raise FlashMoEError(
            f"lookahead = 'on': no prefetch for model_type {config.get('model_type')!r}. Choose "
            "auto, or off."
        )

    def find(args: Any, modules: Sequence[ExpertModule]) -> Experts:
        layout = open_modules(directory, modules)
        if stream.verify and layout.kind == "stock":
            raise FlashMoEError(
                f"verify = true: {directory} is not a converted model, so its experts have no "
                "checksums. Leave verify out."
            )
        found = quantizations(layout, modules)
        formats = {(q.bits, q.group_size, dtype) for q, dtype in found if q.mode == "affine"}
        name = "config.json: top-k" if stream.experts_per_token is None else "experts_per_token"
        check_top_k(top_k(args), min(m.num_experts for m in modules), name)
        experts = tuple(prefix for module in modules for prefix in module.prefixes)
        headers = checkpoint_headers(directory)
        trunk = {k: info for k, (_, info) in headers.items() if not k.startswith(experts)}
        formats |= entry_formats(config.get("quantization") or {}, trunk)
        widest = max(max(shape) for module in modules for shape in module.shapes.values())
        size = Size(top_k(args), trunk_bytes(trunk), activation_bytes(top_k(args), widest))
        return on_disk(layout, size, named_dtypes(formats), replace(stream, lookahead="off"))

    return patched_classes(config, find, stream.experts_per_token)


@dataclass(frozen=True)
class Size:
    """What the size of the expert cache depends on, besides the experts.

    Attributes:
        top_k: experts per token.
        trunk: bytes of resident weights.
        activations: bytes of a prompt chunk's activations.
    """

    top_k: int
    trunk: int
    activations: int


def find_experts(directory: Path, args: ModelArgs, stream: StreamConfig) -> Experts:
    """Find a directory's experts.

    Raises:
        FlashMoEError: experts are missing or damaged.
    """
    layout = open_layout(directory, args.num_hidden_layers, args.num_experts)
    headers = checkpoint_headers(directory)
    check_trunk(directory, headers, args)
    if not computes_at_once():
        if stream.lookahead == "on":
            raise FlashMoEError(
                "lookahead = 'on': prefetch needs this package's CPU kernels, which are not used "
                "here. Choose auto, or off."
            )
        stream = replace(stream, lookahead="off")
    trunk = without_experts(headers)
    size = Size(args.num_experts_per_tok, trunk_bytes(trunk), args.activation_bytes)
    return on_disk(layout, size, kernel_formats(trunk, args, layout), stream)


def on_disk(
    layout: ExpertLayout, size: Size, formats: set[Format], stream: StreamConfig
) -> Experts:
    """Describe experts on disk whose store can be opened: see `start_store`."""
    most = min(size.top_k, layout.num_experts)
    requested_slots(stream.expert_cache, layout, most)  # raises early

    def start(part: ExpertLayout, sharers: int) -> ExpertStore:
        return start_store(part, size, formats, stream, sharers)

    weights = stream.rank_weights
    if weights is None and (part := layout.placement) and len(set(part.weights)) > 1:
        weights = part.weights
    ways = stream.sharding, weights, stream.collective_timeout
    return Experts(layout, start, *ways, size.top_k)


def start_store(
    layout: ExpertLayout, size: Size, formats: set[Format], stream: StreamConfig, sharers: int
) -> ExpertStore:
    """Open a layout's experts: plan the cache, compile the kernels, preload if all fit.

    Args:
        layout: where the experts lie.
        size: of the rest of the model.
        formats: of the matrices that the CPU kernels compute.
        stream: settings.
        sharers: ranks that share this machine's memory.

    Raises:
        FlashMoEError: the cache is smaller than one token needs.
    """
    top_k = min(size.top_k, layout.num_experts)
    if layout.placement:
        stream = replace(stream, lookahead="off")  # its trials would differ between ranks
    backend = choose()
    checks = RecordChecks(layout, backend) if stream.verify else None
    requested_slots(stream.expert_cache, layout, top_k)  # raises early
    prepare(formats)
    check_cpu_kernels(formats)
    available = available_bytes() // sharers  # after the kernels, which take memory
    io = plan_io(stream.io_mode, layout, available - size.trunk)
    own = backend.free_bytes
    plan = plan_cache(
        stream.expert_cache,
        layout,
        top_k,
        size.trunk,
        available if own is None else own,
        io,
        size.activations,
        apart=own is not None,
    )
    if plan.slots == layout.num_experts:  # nothing is read after loading
        plan = replace(plan, io=plan_load(stream.io_mode, layout, io))
        stream = replace(stream, lookahead="off")
    store = ExpertStore(layout, plan, stream.io_threads, True, checks, stream.lookahead, backend)
    if stream.stats:
        print(f"[flashmoe] {plan}", file=sys.stderr)
        if store.stats.bytes_preloaded:
            print(f"[flashmoe] Experts: {store.stats.preloaded}", file=sys.stderr)
        atexit.register(
            lambda: print(
                f"[flashmoe] {store.stats}; lookahead: {store.lookahead}", file=sys.stderr
            )
        )
    return store


def trunk_bytes(trunk: Mapping[str, TensorInfo]) -> int:
    """Return the bytes of resident tensors."""
    return sum(info.nbytes for info in trunk.values())


def kernel_formats(
    trunk: dict[str, TensorInfo], args: ModelArgs, layout: ExpertLayout
) -> set[Format]:
    """Return (bits, group size, dtype of the scales) of all matrices."""
    found = quantizations(layout, args.expert_modules())
    formats = {(q.bits, q.group_size, dtype) for q, dtype in found}
    return named_dtypes(formats | entry_formats(args.quantization, trunk))


def entry_formats(
    entry: Mapping[str, Any], trunk: Mapping[str, TensorInfo]
) -> set[tuple[int, int, str]]:
    """Return the formats of the trunk's matrices by config.json's "quantization"."""
    dtypes = {info.dtype for name, info in trunk.items() if name.endswith(".scales")}
    return {
        (found["bits"] or 4, found["group_size"] or 64, dtype)  # null stands for the default
        for found in (entry, *entry.values())
        if isinstance(found, Mapping) and {"bits", "group_size"} <= found.keys()
        for dtype in dtypes & {"BF16", "F16", "F32"}
    }


def named_dtypes(formats: set[tuple[int, int, str]]) -> set[Format]:
    """Return formats with MLX's names of dtypes."""
    return {(b, g, str(DTYPES[d]).split(".")[-1]) for b, g, d in formats}


def without_experts(headers: dict[str, tuple[Path, TensorInfo]]) -> dict[str, TensorInfo]:
    """Return the resident tensors among those of the headers."""
    return {name: info for name, (_, info) in headers.items() if not is_expert(name)}
