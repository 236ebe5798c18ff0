"""Plan the trunk as mlx-lm's `sanitize` and quantization predicate do, from headers alone."""

from ...errors import FlashMoEError
from ..source.checkpoint import FLOAT_DTYPES, Place, Source
from .parts import Quant, Spec, TrunkFile, TrunkTensor, quantized

# Hugging Face stores these as w and applies 1 + w; MLX checkpoints hold the sum.
_SHIFTED_NORMS = (
    ".input_layernorm.weight", ".post_attention_layernorm.weight", "model.norm.weight",
    ".q_norm.weight", ".k_norm.weight",
)  # fmt: skip
ROUTERS = ("mlp.gate", "shared_expert_gate")
ROUTER_QUANT = Quant(8, 64)


def plan_trunk(source: Source, default: Quant | None, dtype: str | None) -> list[TrunkTensor]:
    """Plan the trunk; if `default` is None, tensors keep dtype and quantization."""
    if source.trunk_quant is not None:
        return _plan_generic(source, default, dtype)
    # mlx-lm's test for a Hugging Face checkpoint: its conv1d is [C, 1, 4].
    raw = any("conv1d.weight" in n and t.shape[-1:] != (1,) for n, (_, t) in source.trunk.items())
    ordered = sorted(source.trunk.items(), key=lambda item: (item[1][0], item[1][1].offset))
    return [_trunk_tensor(name, place, raw, default, dtype) for name, place in ordered]


def _plan_generic(source: Source, default: Quant | None, dtype: str | None) -> list[TrunkTensor]:
    """Plan the trunk of any mlx-lm model, whose tensors have their final names and shapes."""
    assert source.trunk_quant is not None
    chosen = source.trunk_quant(default.group_size, default.bits) if default else {}
    tensors = []
    for name, (file, info) in sorted(source.trunk.items(), key=lambda t: (t[1][0], t[1][1].offset)):
        path, cast = name.removesuffix(".weight"), dtype is not None and info.dtype in FLOAT_DTYPES
        target = dtype if cast and dtype and source.may_cast(name) else info.dtype
        quant = Quant(*chosen[path]) if path in chosen and name.endswith(".weight") else None
        outputs: tuple[Spec, ...] = (Spec(name, target, info.shape),)
        if quant:
            outputs = quantized(path, info.shape, quant, target)
        needs = source.foreign.needs.get(name, frozenset()) if source.foreign else frozenset()
        tensors.append(TrunkTensor((file, info), target, False, quant, outputs, needs, name))
    return tensors


def _trunk_tensor(
    name: str, place: Place, raw: bool, default: Quant | None, dtype: str | None
) -> TrunkTensor:
    info = place[1]
    shift = raw and len(info.shape) == 1 and name.endswith(_SHIFTED_NORMS)
    if (default or shift) and info.dtype not in FLOAT_DTYPES:
        raise FlashMoEError(
            f"{place[0]}: {name} is {info.dtype}, expected one of {', '.join(FLOAT_DTYPES)}. "
            "Start from the bfloat16 checkpoint, or from an MLX one."
        )
    shape: tuple[int, ...] = info.shape
    if 0 in shape:
        raise FlashMoEError(
            f"{place[0]}: {name} has shape {list(shape)}, so it has no elements. "
            "Download the checkpoint again."
        )
    if "conv1d.weight" in name and shape[-1:] != (1,):
        if len(shape) != 3 or shape[1] != 1:
            raise FlashMoEError(
                f"{place[0]}: {name} has shape {list(shape)}, expected [channels, 1, kernel]. "
                "Download the checkpoint again."
            )
        shape = (shape[0], shape[2], 1)
    # A_log keeps the checkpoint's precision, as in mlx-lm.
    target = info.dtype if dtype is None or name.endswith("A_log") else dtype
    quant = _tensor_quant(name, shape, default) if default else None
    if quant:
        path = name.removesuffix(".weight")
        outputs: tuple[Spec, ...] = quantized(path, shape, quant, target)
    else:
        outputs = (Spec(name, target, shape),)
    return TrunkTensor(place, target, shift, quant, outputs)


def _tensor_quant(name: str, shape: tuple[int, ...], default: Quant) -> Quant | None:
    """Apply mlx-lm's predicate: linears and embeddings that the group size divides."""
    if not name.endswith(".weight") or len(shape) != 2 or shape[1] % default.group_size:
        return None
    if not name.removesuffix(".weight").endswith(ROUTERS):
        return default
    return None if shape[1] % ROUTER_QUANT.group_size else ROUTER_QUANT


def split_files(tensors: list[TrunkTensor], limit: int) -> tuple[TrunkFile, ...]:
    """Split tensors into files of at most `limit` bytes, named as in mlx-lm."""
    shards: list[list[TrunkTensor]] = []
    size = 0
    for tensor in tensors:
        nbytes = sum(spec.nbytes for spec in tensor.outputs)
        if not shards or size + nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += nbytes
    if len(shards) == 1:
        return (TrunkFile("model.safetensors", tuple(shards[0])),)
    return tuple(
        TrunkFile(f"model-{number:05d}-of-{len(shards):05d}.safetensors", tuple(shard))
        for number, shard in enumerate(shards, 1)
    )
