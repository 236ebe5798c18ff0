"""Build the plan: a pure function of headers, config and options."""

from collections.abc import Sequence
from typing import Any

from ...errors import FlashMoEError
from ...format.modules import ExpertModule, projection_fields, projection_quantization
from ...format.placement import Placement
from ..source.checkpoint import Source
from ..source.foreign_code import KEYS, SHIM_NAME, without
from .parts import (
    LEAST_SQUARES,
    MIN_MAX,
    LayerPlan,
    Options,
    Plan,
    Projection,
    Quant,
    Spec,
    TrunkTensor,
)
from .recipes import RECIPES, Target
from .trunk import plan_trunk, split_files

COPIED = ("bias", "global_scale")  # parts of a projection that are not its weights
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
SHARD_BYTES = 5 << 30  # mlx-lm's limit
# The names in config.json of the widths of experts.
WIDTHS = {
    "gate_proj": "hidden_size",
    "up_proj": "hidden_size",
    "down_proj": "moe_intermediate_size",
}


def build_plan(source: Source, options: Options) -> Plan:
    """Plan the conversion. Raises FlashMoEError if options contradict the source or each other."""
    if source.layout and source.layout.placement:
        raise FlashMoEError(
            f"{source.directory}: holds only the experts of {source.layout.placement}. Give the "
            "checkpoint that it was made from."
        )
    target = _target(source.modules, options)
    method = options.method or _best_method(target, options)
    if options.calibrate:
        _check_calibration(source, method)
    if source.is_qwen and source.layout is None and target is None:
        raise FlashMoEError(
            f"{source.name}: the experts are not quantized, and of Qwen3.5 only quantized ones can "
            "be converted. Add -q (and --q-bits 4, or 2)."
        )
    default = None if source.is_quantized or target is None else target.trunk
    dtype = _target_dtype(source, options)
    layers = tuple(
        _layer(source, number, target, dtype, method, options.placement)
        for number in range(len(source.modules))
    )
    _check_dtype(options, layers)
    tensors = plan_trunk(source, default, dtype if default else None)
    entry = _quantization(source, default, tensors, layers)
    # `model_file` goes at any depth: stock mlx-lm would run the source's model code.
    dropped = ("model_file", *(KEYS if options.no_remote_code else ()))
    config = without(source.config, dropped)
    config |= {"model_file": SHIM_NAME, "flashmoe": {"format_version": 1}}
    if entry:
        config |= {"quantization": entry, "quantization_config": entry}
    trunk = split_files(tensors, SHARD_BYTES)
    return Plan(layers, trunk, config, not options.no_remote_code, options.placement)


def _best_method(target: Target | None, options: Options) -> str:
    """Prefer the smaller error below 4 bits, and mlx-lm's own codes from 4 bits on."""
    smaller_error = options.calibrate or (target and target.lowest < 4)
    return LEAST_SQUARES if smaller_error else MIN_MAX


def _check_calibration(source: Source, method: str) -> None:
    if method != LEAST_SQUARES:
        raise FlashMoEError(
            f"--calibrate cannot be combined with --q-method {method}. Drop one of them."
        )
    if not source.is_qwen:
        raise FlashMoEError(
            f"{source.name}: --calibrate knows Qwen3.5 MoE only. Drop it, and give -q alone."
        )
    if source.layout is None:
        raise FlashMoEError(
            f"{source.name}: --calibrate runs the model, and experts that are not quantized cannot "
            "be streamed. Convert to 8 bits first, then convert the result with --calibrate."
        )


def _target(modules: Sequence[ExpertModule], options: Options) -> Target | None:
    if not options.quantize:
        for flag, value in (
            ("--q-bits", options.bits),
            ("--quant-predicate", options.recipe),
            ("--q-group-size", options.group_size),
            ("--q-method", options.method),
            ("--calibrate", options.calibrate),
        ):
            if value is not None:
                raise FlashMoEError(f"{flag} {value} has no effect without -q. Add -q.")
        return None
    if options.recipe is not None:
        if options.recipe not in RECIPES:
            raise FlashMoEError(
                f"--quant-predicate {options.recipe}: unknown recipe. "
                f"Choose one of {', '.join(RECIPES)}."
            )
        if options.bits is not None:
            raise FlashMoEError(
                f"--q-bits {options.bits} and --quant-predicate {options.recipe} both set bits. "
                "Drop one of them."
            )
    if options.bits is not None and options.bits not in BITS:
        raise FlashMoEError(f"--q-bits {options.bits}: expected one of {_list(BITS)}.")
    if options.group_size is not None and options.group_size not in GROUP_SIZES:
        raise FlashMoEError(
            f"--q-group-size {options.group_size}: expected one of {_list(GROUP_SIZES)}."
        )
    group_size = options.group_size or 64
    shapes = {name: shape for module in modules for name, shape in module.shapes.items()}
    widths = {
        WIDTHS.get(name, f"the columns of {name}"): width for name, (_, width) in shapes.items()
    }
    for key, width in widths.items():
        if width % group_size:
            fits = [s for s in GROUP_SIZES if not any(w % s for w in widths.values())]
            raise FlashMoEError(
                f"--q-group-size {group_size} does not divide {key} = {width}. "
                f"Sizes that fit this model: {_list(fits)}."
            )
    bits = None if options.recipe else options.bits or 4
    return Target(len(modules), group_size, bits, options.recipe)


def _list(values: Sequence[int]) -> str:
    return ", ".join(map(str, values)) or "none"


def _target_dtype(source: Source, options: Options) -> str:
    text = source.config.get("text_config") or {}
    for entry in (source.config, text):
        for key in ("torch_dtype", "dtype"):
            if not isinstance(name := entry.get(key, ""), str | None):
                raise FlashMoEError(
                    f"config.json: {key} = {name!r} is not the name of a dtype. "
                    "Restore the checkpoint's own config.json."
                )
            if options.dtype is None and name in DTYPES:
                return DTYPES[name]
    return DTYPES[options.dtype or "bfloat16"]


def _check_dtype(options: Options, layers: tuple[LayerPlan, ...]) -> None:
    for layer in layers:
        for projection in layer.projections:
            if options.dtype and DTYPES[options.dtype] != projection.dtype:
                raise FlashMoEError(
                    f"--dtype {options.dtype}: the source keeps its {projection.dtype} "
                    f"{'scales' if projection.before else 'weights'} (layer {layer.layer} "
                    f"{projection.name}). Drop --dtype."
                )


def _layer(
    source: Source,
    number: int,
    target: Target | None,
    dtype: str,
    method: str,
    placement: Placement | None,
) -> LayerPlan:
    """Plan one layer; `dtype` is that of scales that the source does not have."""
    projections, module = [], source.modules[number]
    for name, shape in module.shapes.items():
        before, kind, extras = None, dtype, tuple[Spec, ...]()
        if layout := source.fields(number):
            if found := projection_quantization(layout, name, shape):
                before = Quant(found.bits, found.group_size, found.mode)
            parts = {p: layout.fields[i] for p, i in projection_fields(layout, name).items()}
            extras = tuple(Spec(f.name, f.dtype, f.shape) for p, f in parts.items() if p in COPIED)
            if found or target is None:
                kind = parts["scales" if found else "weight"].dtype
            else:
                extras = tuple(spec._replace(dtype=dtype) for spec in extras)
        after = target.experts(number, name) if target else before
        if (
            before and after and before.mode != after.mode
        ):  # affine scales are floats, and of any size
            kind = dtype
            extras = tuple(spec for spec in extras if not spec.name.endswith("global_scale"))
        projections.append(Projection(name, *shape, before, after, kind, method, extras))
    count = module.num_experts
    numbers = placement.experts(count) if placement else range(count)
    return LayerPlan(number, numbers, tuple(projections), module.path)


def _quantization(
    source: Source,
    default: Quant | None,
    tensors: list[TrunkTensor],
    layers: tuple[LayerPlan, ...],
) -> dict[str, Any]:
    """Return config["quantization"] as in mlx-lm: a default, and the paths that differ.

    With `default` None, it is the source's, with the experts' entries updated; empty if nothing
    is quantized.
    """
    entry: dict[str, Any]
    if default:
        entry = _entry(default)
        for tensor in tensors:
            path = tensor.outputs[0].name.removesuffix(".weight")
            if tensor.quant and tensor.quant != default:
                entry[path] = {"group_size": tensor.quant.group_size, "bits": tensor.quant.bits}
    else:
        every = (quant for p in layers[0].projections for quant in (p.before, p.after))
        if (first := next(filter(None, every), None)) is None and not source.default_quantization:
            return {}
        entry = (_entry(first) if first else {}) | source.default_quantization
        default = Quant(entry["bits"], entry["group_size"], entry.get("mode", "affine"))
    for layer in layers:
        for projection in layer.projections:
            path = f"{layer.module}.{projection.name}"
            entry.pop(path, None)
            if projection.after not in (default, None):
                entry[path] = _entry(projection.after)
    return entry


def _entry(quant: Quant) -> dict[str, Any]:
    return {"group_size": quant.group_size, "bits": quant.bits, "mode": quant.mode}
