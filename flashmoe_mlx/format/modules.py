"""Where the experts of any mlx-lm model lie on disk, by the paths of its modules.

mlx-lm stacks a layer's experts in one module, such as `model.layers.3.mlp.switch_mlp`, with two or
three projections. A checkpoint holds `MODULE.PROJECTION.PART`, each `[experts, ...]`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FlashMoEError
from .headers import TensorInfo, checkpoint_headers
from .json_file import exists
from .layout import (
    EXPERT_DIR,
    MANIFEST,
    ExpertLayout,
    Field,
    LayerLayout,
    packed_layer,
    read_manifest,
)
from .names import FIELDS, layer_prefix
from .placement import read_placement

PARTS = ("weight", "scales", "biases", "bias", "global_scale")
FLOATS = ("BF16", "F16", "F32")
# MLX's modes with byte scales and no biases, by (bits, group size).
MODES = {(4, 16): "nvfp4", (4, 32): "mxfp4", (8, 32): "mxfp8"}
AFFINE_BITS, AFFINE_GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)


def in_float_mode(config: Mapping[str, Any]) -> bool:
    """Say whether config.json's quantization is one of MODES."""
    entry = config.get("quantization")
    return isinstance(entry, Mapping) and entry.get("mode") in MODES.values()


@dataclass(frozen=True)
class ExpertModule:
    """A module of routed experts.

    Attributes:
        path: in the model, such as "model.layers.3.mlp.switch_mlp".
        shapes: (rows, columns) of each projection's matrix, by its name.
        num_experts: experts in the module.
    """

    path: str
    shapes: Mapping[str, tuple[int, int]]
    num_experts: int

    @property
    def prefixes(self) -> tuple[str, ...]:
        """What the names of its experts' tensors begin with; other children are the trunk's."""
        return tuple(f"{self.path}.{projection}." for projection in self.shapes)


@dataclass(frozen=True)
class Quantization:
    """How a projection's matrices are quantized; `mode` is one of MLX's."""

    bits: int
    group_size: int
    mode: str


def open_modules(directory: Path, modules: Sequence[ExpertModule]) -> ExpertLayout:
    """Find the experts of an MLX checkpoint, or of a directory converted from one.

    Raises:
        FlashMoEError: a tensor is missing, or has another number of experts than the model.
    """
    kind = "stock"
    if exists(directory / EXPERT_DIR):
        manifest = read_manifest(directory / EXPERT_DIR / MANIFEST)
        if "link" not in manifest:
            return _open_packed(directory, manifest, modules)
        directory, kind = Path(str(manifest["link"])), "linked"
    headers = checkpoint_headers(directory)
    layers = [_stacked(directory, headers, n, module) for n, module in enumerate(modules)]
    return ExpertLayout(kind, directory, tuple(layers))


def _open_packed(
    directory: Path, manifest: Mapping[str, Any], modules: Sequence[ExpertModule]
) -> ExpertLayout:
    entries, path = manifest.get("layers"), directory / EXPERT_DIR / MANIFEST
    listed = [e.get("module") if isinstance(e, dict) else None for e in entries or ()]
    qwen = [f"{layer_prefix(n)}.mlp.switch_mlp" for n in range(len(listed))]  # the first version
    if (listed if any(listed) else qwen) != [module.path for module in modules]:
        raise FlashMoEError(
            f"{path}: lists experts of other modules than config.json asks for. Convert the model "
            "again."
        )
    layers, placement = [], read_placement(manifest, path)
    for number, (module, entry) in enumerate(zip(modules, entries or (), strict=True)):
        fields = entry.get("fields", FIELDS)
        if not (isinstance(fields, Sequence) and all(type(name) is str for name in fields)):
            raise FlashMoEError(f"{path}: damaged (fields = {fields!r}). Convert the model again.")
        layers.append(packed_layer(directory, number, module.num_experts, fields, placement))
    return ExpertLayout("packed", directory, tuple(layers), placement)


def _stacked(
    directory: Path,
    headers: Mapping[str, tuple[Path, TensorInfo]],
    layer: int,
    module: ExpertModule,
) -> LayerLayout:
    fields = []
    for projection in module.shapes:
        if f"{module.path}.{projection}.weight" not in headers:
            raise FlashMoEError(
                f"{directory}: no tensor {module.path}.{projection}.weight, so it is not in MLX's "
                "own format. Convert it first: mlx_lm.convert."
            )
        for part in PARTS:
            name = f"{module.path}.{projection}.{part}"
            if name not in headers:
                continue
            file, info = headers[name]
            if not info.shape or info.shape[0] != module.num_experts:
                raise FlashMoEError(
                    f"{file}: {name} has shape {list(info.shape)}, but config.json asks for "
                    f"{module.num_experts} experts. Restore the checkpoint's own files."
                )
            step = info.nbytes // module.num_experts
            field = f"{projection}.{part}"
            fields.append(Field(field, info.dtype, info.shape[1:], step, file, info.offset, step))
    return LayerLayout(layer, module.num_experts, tuple(fields))


def quantizations(
    layout: ExpertLayout, modules: Sequence[ExpertModule]
) -> list[tuple[Quantization, str]]:
    """Return (format, dtype of the scales) of every quantized projection.

    Raises:
        FlashMoEError: a tensor has another shape or dtype than the model asks for.
    """
    found = []
    for layer, module in zip(layout.layers, modules, strict=True):
        for name, shape in module.shapes.items():
            if quantization := projection_quantization(layer, name, shape):
                scales = layer.fields[projection_fields(layer, name)["scales"]]
                found.append((quantization, scales.dtype))
    return found


def projection_fields(layer: LayerLayout, projection: str) -> dict[str, int]:
    """Return the places of a projection's fields in `layer.fields`, by part."""
    return {
        field.name.removeprefix(f"{projection}."): place
        for place, field in enumerate(layer.fields)
        if field.name.startswith(f"{projection}.")
    }


def projection_quantization(
    layer: LayerLayout, projection: str, shape: tuple[int, int]
) -> Quantization | None:
    """Return how a projection is quantized, by its shapes and dtypes; None if it is not.

    Args:
        layer: a layer's experts.
        projection: its name.
        shape: rows and columns of the model's matrix.

    Raises:
        FlashMoEError: the fields match no format of MLX for this matrix.
    """
    rows, columns = shape
    fields = {p: layer.fields[i] for p, i in projection_fields(layer, projection).items()}
    if "weight" not in fields:
        raise FlashMoEError(
            f"{layer.fields[0].file}: layer {layer.layer} has no {projection}.weight. Convert the "
            "model again."
        )
    weight, scales = fields["weight"], fields.get("scales")
    found, fits = None, True
    if scales is None:
        fits = weight.shape == shape and weight.dtype in FLOATS and "biases" not in fields
    else:
        found = _by_shapes(weight, scales, columns)
        fits = (
            found is not None
            and weight.dtype == "U32"
            and weight.shape == (rows, columns * found.bits // 32)
            and scales.shape == (rows, columns // found.group_size)
            and ("biases" in fields) == (found.mode == "affine")
        )
    if biases := fields.get("biases"):
        fits = fits and scales is not None
        fits = fits and (biases.shape, biases.dtype) == (scales.shape, scales.dtype)  # type: ignore[union-attr]
    if bias := fields.get("bias"):
        fits = fits and bias.shape == (rows,) and bias.dtype in FLOATS
    if whole := fields.get("global_scale"):
        mode = found.mode if found else None
        fits = fits and (whole.shape, whole.dtype, mode) == ((), "F32", "nvfp4")
    if not fits:
        listed = ", ".join(f"{p} {f.dtype}{list(f.shape)}" for p, f in fields.items())
        raise FlashMoEError(
            f"{weight.file}: layer {layer.layer} {projection}: {listed} is not a matrix of {rows} "
            f"x {columns}, as config.json has it, in a format of MLX. Restore the checkpoint's own "
            "files."
        )
    return found


def _by_shapes(weight: Field, scales: Field, columns: int) -> Quantization | None:
    """Infer bits, group size and mode."""
    if len(weight.shape) != 2 or len(scales.shape) != 2 or not scales.shape[1]:
        return None
    bits, group = 32 * weight.shape[1] // columns, columns // scales.shape[1]
    if bits * columns != 32 * weight.shape[1] or group * scales.shape[1] != columns:
        return None
    if scales.dtype == "U8":
        mode = MODES.get((bits, group))
        return Quantization(bits, group, mode) if mode else None
    if scales.dtype in FLOATS and bits in AFFINE_BITS and group in AFFINE_GROUPS:
        return Quantization(bits, group, "affine")
    return None
