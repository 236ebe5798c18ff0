"""Check from headers alone that a checkpoint's trunk matches config.json.

The model is built as mlx-lm builds it, which takes no memory because MLX is lazy. Then every
parameter's name, shape and dtype are compared with the headers.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import FlashMoEError, named
from ..format.config_entries import BITS, GROUP_SIZES
from ..format.headers import TensorInfo
from ..format.modules import FLOATS, MODES
from ..format.names import canonical, is_expert
from .qwen3_5.args import ModelArgs
from .qwen3_5.model import Model

Place = tuple[Path, TensorInfo]
UNREAD = ("F8_E5M2", "F64")
REMEDY = "Restore the checkpoint's own files"


def check_trunk(directory: Path, headers: Mapping[str, Place], args: ModelArgs) -> None:
    """Compare the tensors of a checkpoint that are not experts with the model's parameters.

    Args:
        directory: named in errors about missing tensors.
        headers: file and place of each tensor, by its name in the checkpoint.
        args: the architecture.

    Raises:
        FlashMoEError: a tensor is missing, unknown, or has another shape or dtype.
    """
    check_readable(headers)
    trunk = _trunk(headers, args)
    with named("config.json", "a model that cannot be built", REMEDY), _random_state_kept():
        expected = _parameters(trunk, args)
    for name, (file, found) in trunk.items():
        if name not in expected:
            raise FlashMoEError(
                f"{file}: {name} is not in the model that config.json describes. {REMEDY}."
            )
        _compare(file, name, found, expected[name])
    for name in expected:
        if name not in trunk:
            raise FlashMoEError(
                f"{directory}: no tensor {name}, which config.json asks for. {REMEDY}."
            )
    _check_scale_dtypes(trunk)


def check_readable(headers: Mapping[str, Place]) -> None:
    """Refuse a checkpoint with a dtype that MLX cannot read, even of an unused tensor.

    Raises:
        FlashMoEError: naming the tensor.
    """
    for name, (file, info) in headers.items():
        if info.dtype in UNREAD:
            raise FlashMoEError(f"{file}: {name} is {info.dtype}, which MLX cannot read. {REMEDY}.")


def _trunk(headers: Mapping[str, Place], args: ModelArgs) -> dict[str, Place]:
    """Return the tensors that `sanitize` keeps, under the model's names."""
    trunk: dict[str, Place] = {}
    for key, place in headers.items():
        name = canonical(key)
        unused = args.tie_word_embeddings and str(name).startswith("language_model.lm_head.")
        if name is None or is_expert(key) or unused:
            continue
        if name in trunk:
            raise FlashMoEError(
                f"{place[0]}: {key} is a second tensor for {name}. Remove the files that do not "
                "belong to the checkpoint."
            )
        trunk[name] = place
    return trunk


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Restore MLX's random state, which building a model advances."""
    random: Any = mx.random  # its stubs do not know that the state is a list
    state = random.state[0]
    try:
        yield
    finally:
        random.state[0][:] = state


def _parameters(trunk: Mapping[str, Place], args: ModelArgs) -> dict[str, mx.array]:
    """Return the unevaluated parameters of the model that config.json describes.

    Layers are quantized as in mlx-lm: by their own entry, or, if the checkpoint has scales for
    them, by their shapes.
    """
    model, entry = Model(args), args.quantization

    def quantized(path: str, module: nn.Module) -> Any:
        if is_expert(f"{path}.weight"):
            return False
        if path in entry:
            _check_width(path, module, entry[path] or {})
            return entry[path]
        if not hasattr(module, "to_quantized") or f"{path}.scales" not in trunk:
            return False
        return _inferred(path, module, trunk)

    if entry:
        mode = entry.get("mode", "affine")
        nn.quantize(model, entry["group_size"], entry["bits"], mode=mode, class_predicate=quantized)
    parameters = dict(tree_flatten(model.parameters()))
    return {name: array for name, array in parameters.items() if not is_expert(name)}


def _check_width(path: str, module: nn.Module, entry: Any) -> None:
    columns = module["weight"].shape[-1] if "weight" in module else 0
    group = (entry.get("group_size") if isinstance(entry, dict) else None) or 1
    if columns % group:
        raise FlashMoEError(
            f"config.json: quantization[{path!r}]: group_size = {group} does not divide the "
            f"{columns} columns. {REMEDY}."
        )


def _inferred(path: str, module: nn.Module, trunk: Mapping[str, Place]) -> dict[str, Any]:
    """Infer a layer's quantization from the shapes of its codes and scales."""
    columns = module["weight"].shape[-1]
    file, scales = trunk[f"{path}.scales"]
    weight = trunk[f"{path}.weight"][1] if f"{path}.weight" in trunk else scales
    groups, packed = (info.shape[-1] if info.shape else 0 for info in (scales, weight))
    bits, group = 32 * packed // columns, columns // max(groups, 1)
    mode = MODES.get((bits, group)) if scales.dtype == "U8" else "affine"
    if mode and bits in BITS and group in GROUP_SIZES and group * groups == columns:
        return {"group_size": group, "bits": bits, "mode": mode}
    raise FlashMoEError(
        f"{file}: {path}: weight {weight.dtype}{list(weight.shape)} with scales "
        f"{scales.dtype}{list(scales.shape)} is not a quantization of {columns} columns. {REMEDY}."
    )


def _compare(file: Path, name: str, found: TensorInfo, expected: mx.array) -> None:
    shape = found.shape
    if name.endswith("conv1d.weight") and len(shape) == 3 and shape[-1] != 1:
        shape = (shape[0], shape[2], shape[1])  # Hugging Face's [C, 1, 4]
    dtypes = {mx.uint32: ("U32",), mx.uint8: ("U8",)}.get(expected.dtype, FLOATS)
    if shape != expected.shape or found.dtype not in dtypes:
        raise FlashMoEError(
            f"{file}: {name} is {found.dtype}{list(found.shape)}, expected {list(expected.shape)} "
            f"of {' or '.join(dtypes)} by config.json. {REMEDY}."
        )


def _check_scale_dtypes(trunk: Mapping[str, Place]) -> None:
    """Refuse biases with another dtype than their scales: kernels read both as one dtype."""
    for name, (file, biases) in trunk.items():
        scales = trunk.get(name.removesuffix(".biases") + ".scales")
        if name.endswith(".biases") and scales and scales[1].dtype != biases.dtype:
            raise FlashMoEError(
                f"{file}: {name} is {biases.dtype}, expected {scales[1].dtype} as its scales. "
                f"{REMEDY}."
            )
