"""Open the checkpoint to convert: check its files and locate every tensor."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import FlashMoEError, shown
from ...format import names
from ...format.config_entries import MOST
from ...format.headers import ITEM_SIZE, MAX_NAME, TensorInfo, checkpoint_headers
from ...format.json_file import exists, read_object
from ...format.layout import (
    EXPERT_DIR,
    ExpertLayout,
    LayerLayout,
    open_layout,
    refuse_single_quantized,
)
from ...format.modules import ExpertModule

MODEL_TYPES = ("qwen3_5_moe", "qwen3_5_moe_text")
FLOAT_DTYPES = ("BF16", "F16", "F32")
INDEX = "model.safetensors.index.json"

Place = tuple[Path, TensorInfo]
TrunkQuant = Callable[[int, int], dict[str, tuple[int, int]]]


@dataclass(frozen=True)
class Dims:
    """The sizes from the text part of config.json."""

    layers: int
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    tied: bool

    def columns(self, projection: str) -> int:
        """Return the input width of one expert projection."""
        return self.intermediate if projection == "down_proj" else self.hidden

    def rows(self, projection: str) -> int:
        """Return the output width of one expert projection."""
        return self.hidden if projection == "down_proj" else self.intermediate


@dataclass(frozen=True)
class Matrix:
    """One expert's float matrix `[rows, columns]`, row-contiguous at `offset` of `file`."""

    file: Path
    offset: int
    dtype: str
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.shape[0] * self.shape[1] * ITEM_SIZE[self.dtype]


@dataclass(frozen=True)
class Source:
    """A checked checkpoint directory.

    Attributes:
        directory: its files.
        name: the user's name for it: a path, or a name on the Hub.
        revision: the commit on the Hub, if it came from there.
        config: config.json, unchanged.
        top_k: experts per token.
        modules: the model's modules of experts, one per layer that has any.
        trunk: every text-generation tensor except experts, by the model's name.
        layout: the experts in MLX's format; None if the experts are floats of Qwen3.5.
        matrices: float experts of Qwen3.5 by (layer, expert, projection).
        trunk_quant: for mlx-lm's own models: (group size, bits) to the (bits, group size) of each
            layer of the trunk that mlx-lm would quantize.
        may_cast: whether a tensor of the trunk may change its dtype.
        foreign: a `foreign.Foreign` if the checkpoint is not in MLX's format; then there are
            neither layout nor matrices.
    """

    directory: Path
    name: str
    revision: str | None
    config: dict[str, Any]
    top_k: int
    modules: tuple[ExpertModule, ...]
    trunk: dict[str, Place]
    layout: ExpertLayout | None
    matrices: dict[tuple[int, int, str], Matrix] = field(repr=False)
    trunk_quant: TrunkQuant | None = None
    may_cast: Callable[[str], bool] = field(default=lambda name: True, repr=False)
    foreign: Any = None

    @property
    def is_qwen(self) -> bool:
        """Whether this package's model code runs it once it is quantized."""
        return self.trunk_quant is None

    def fields(self, layer: int) -> LayerLayout | None:
        """Return the fields of a layer's experts, of a foreign checkpoint as they will be."""
        layouts = self.foreign.layouts if self.foreign else self.layout and self.layout.layers
        return layouts[layer] if layouts else None

    def places(self, layer: int, expert: int) -> Iterator[tuple[Path, int, int]]:
        """Yield (file, offset, bytes) of what an expert is made from."""
        if self.foreign:
            raws = self.foreign.raws(layer, expert)
            yield from ((raw.file, raw.offset, raw.nbytes) for raw in raws)
        elif self.layout:
            for f in self.layout.layers[layer].fields:
                yield f.file, f.offset + expert * f.stride, f.nbytes
        else:
            for name in self.modules[layer].shapes:
                matrix = self.matrices[layer, expert, name]
                yield matrix.file, matrix.offset, matrix.nbytes

    @property
    def is_quantized(self) -> bool:
        """Whether it is in MLX's format, and quantized, so that the trunk stays as it is."""
        experts = self.layout.layers[0].fields if self.layout else ()
        tensors = (*self.trunk, *(field.name for field in experts))
        return self.layout is not None and any(name.endswith(".scales") for name in tensors)

    @property
    def most_experts(self) -> int:
        """Experts of the layer that has most."""
        return max(module.num_experts for module in self.modules)

    @property
    def default_quantization(self) -> dict[str, Any]:
        """The config's "quantization" entry, under either of its names; empty if it has none."""
        return self.config.get("quantization") or self.config.get("quantization_config") or {}


def open_qwen(directory: Path, name: str, revision: str | None, config: dict[str, Any]) -> Source:
    """Open a Qwen3.5 MoE checkpoint; see `open.open_source`.

    Raises:
        FlashMoEError: it is not a complete one.
    """
    dims = _dims(directory / "config.json", config)
    _check_quantization(directory / "config.json", config)
    headers = checkpoint_headers(directory)
    _check_index(directory, headers)
    refuse_single_quantized(headers)
    layout, matrices = None, {}
    if _has_quantized_experts(directory, headers):
        layout = open_layout(directory, dims.layers, dims.experts)
    else:
        matrices = _find_matrices(directory, dims, headers)
    trunk = _trunk(directory, dims, headers)
    modules = qwen_modules(dims)
    return Source(directory, name, revision, config, dims.top_k, modules, trunk, layout, matrices)


def qwen_modules(dims: Dims) -> tuple[ExpertModule, ...]:
    """Return the expert modules of a Qwen3.5 MoE."""
    shapes = {name: (dims.rows(name), dims.columns(name)) for name in names.PROJECTIONS}
    return tuple(
        ExpertModule(f"{names.layer_prefix(layer)}.mlp.switch_mlp", shapes, dims.experts)
        for layer in range(dims.layers)
    )


def read_config(directory: Path) -> dict[str, Any]:
    """Read config.json.

    Raises:
        FlashMoEError: it is missing, damaged, or contradicts itself.
    """
    path = directory / "config.json"
    try:
        config = read_object(path, "Download it again.")
    except FileNotFoundError:
        raise FlashMoEError(
            f"{path}: missing. Give the directory of a complete checkpoint."
        ) from None
    text = config.get("text_config") or config
    if not isinstance(text, dict):
        raise FlashMoEError(
            f"{path}: text_config is {shown(text)}, expected an object. Download it again."
        )
    types = [part.get("model_type") for part in (config, text)]
    if any(model_type in MODEL_TYPES for model_type in types) and types[1] not in MODEL_TYPES:
        raise FlashMoEError(
            f"{path}: the model is {shown(types[0])}, but its text_config {shown(types[1])}. "
            "Restore the checkpoint's own file."
        )
    return config


def _dims(path: Path, config: dict[str, Any]) -> Dims:
    text = config.get("text_config") or config
    keys = (
        "num_hidden_layers", "num_experts", "num_experts_per_tok", "hidden_size",
        "moe_intermediate_size",
    )  # fmt: skip
    for key in keys:
        if type(text.get(key)) is not int or not 1 <= text[key] <= MOST[key]:
            raise FlashMoEError(
                f"{path}: {key} is {shown(text.get(key))}, expected a positive integer up to "
                f"{MOST[key]}. Restore the config.json that belongs to this checkpoint."
            )
    layers, experts, top_k, hidden, intermediate = (int(text[key]) for key in keys)
    tied = bool(text.get("tie_word_embeddings", False))
    dims = Dims(layers, experts, top_k, hidden, intermediate, tied)
    if dims.top_k > dims.experts:
        raise FlashMoEError(
            f"{path}: num_experts_per_tok = {dims.top_k} is more than num_experts = "
            f"{dims.experts}. Restore the config.json that belongs to this checkpoint."
        )
    return dims


def _check_quantization(path: Path, config: dict[str, Any]) -> None:
    """Refuse quantization schemes other than MLX's affine one."""
    text = config.get("text_config") or config
    for entry in (config, text):
        for key in ("quantization", "quantization_config"):
            if not isinstance(entry.get(key) or {}, dict):
                raise FlashMoEError(
                    f"{path}: {key} is {shown(entry[key])}, expected an object. "
                    "Restore the config.json that belongs to this checkpoint."
                )
        method = (entry.get("quantization_config") or {}).get("quant_method")
        if method and "quantization" not in config:
            raise FlashMoEError(
                f"{path}: the checkpoint is quantized with {shown(method)}, which cannot be "
                "converted. Start from the bfloat16 checkpoint, or from an MLX one."
            )
    mode = (config.get("quantization") or {}).get("mode", "affine")
    if mode != "affine":
        raise FlashMoEError(
            f"{path}: quantization mode {shown(mode)} is not one of MLX's. "
            "Start from the bfloat16 checkpoint, or from an affine MLX one."
        )


def _check_index(directory: Path, headers: dict[str, Place]) -> None:
    """Check that every needed tensor of the index exists: a download may lack a shard."""
    path = directory / INDEX
    try:
        index = read_object(path, "Download it again.")["weight_map"]
        for name, file in index.items():
            if len(name) > MAX_NAME:
                raise ValueError(f"{name[:40]!r}... is a name of {len(name)} characters")
            if not isinstance(file, str) or "/" in file or "\\" in file or file == "..":
                raise ValueError(f"{name} is in {shown(file)}, not a file name")
        wanted = {name: str(file) for name, file in index.items() if names.canonical(name)}
    except FileNotFoundError:
        return
    except FlashMoEError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FlashMoEError(f"{path}: damaged ({error}). Download it again.") from error
    for name, file in wanted.items():
        if name not in headers:
            raise FlashMoEError(
                f"{directory}: {INDEX} promises {name} in {file[:300]}, which is missing. "
                f"Download {file[:300]} again."
            )


def _has_quantized_experts(directory: Path, headers: dict[str, Place]) -> bool:
    if exists(directory / EXPERT_DIR):
        return True
    stacked = (names.stacked_expert(name) for name in headers)
    return any(match and match[1].endswith(".scales") for match in stacked)


def _trunk(directory: Path, dims: Dims, headers: dict[str, Place]) -> dict[str, Place]:
    trunk: dict[str, Place] = {}
    for name, place in headers.items():
        full = names.canonical(name)
        if full is None or names.is_expert(name):
            continue
        if dims.tied and full.startswith("language_model.lm_head."):
            continue
        if full in trunk:
            raise FlashMoEError(
                f"{place[0]}: {name} is a second tensor for {full}. Remove the files that are not "
                "part of the checkpoint."
            )
        trunk[full] = place
    routers = [f"language_model.model.layers.{n}.mlp.gate.weight" for n in range(dims.layers)]
    for name in ("language_model.model.embed_tokens.weight", *routers):
        if name not in trunk:
            raise FlashMoEError(
                f"{directory}: tensor {name} is missing. Download the checkpoint again."
            )
    return trunk


def _find_matrices(
    directory: Path, dims: Dims, headers: dict[str, Place]
) -> dict[tuple[int, int, str], Matrix]:
    matrices: dict[tuple[int, int, str], Matrix] = {}
    for name, (file, info) in headers.items():
        for key, matrix in _matrices_of(name, file, info, dims).items():
            if key in matrices or key[0] >= dims.layers or key[1] >= dims.experts:
                raise FlashMoEError(
                    f"{file}: {name} holds expert {key[1]} of layer {key[0]}, which another tensor "
                    f"holds, or config.json ({dims.layers} layers, {dims.experts} experts) does "
                    "not have. Restore the config.json that belongs to this checkpoint."
                )
            matrices[key] = matrix
    keys = itertools.product(range(dims.layers), range(dims.experts), names.PROJECTIONS)
    for layer, expert, projection in keys:
        if (layer, expert, projection) not in matrices:
            raise FlashMoEError(
                f"{directory}: layer {layer} expert {expert} {projection} is missing. "
                "Download the checkpoint's missing files."
            )
    return matrices


def _matrices_of(
    name: str, file: Path, info: TensorInfo, dims: Dims
) -> dict[tuple[int, int, str], Matrix]:
    """Return the expert matrices in one tensor; none if it is not an expert's."""
    projections: tuple[str, ...]
    if single := names.single_expert(name):
        layer, first, projections = single[0], single[1], (single[2],)
    elif fused := names.fused_expert(name):
        layer, first = fused[0], 0
        projections = ("gate_proj", "up_proj") if fused[1] == "gate_up_proj" else (fused[1],)
    elif stacked := names.stacked_expert(name):
        layer, first, projections = stacked[0], 0, (stacked[1].removesuffix(".weight"),)
    else:
        return {}
    rows, columns = dims.rows(projections[0]), dims.columns(projections[0])
    shape = (len(projections) * rows, columns)
    count = 1 if single else dims.experts
    expected = shape if single else (count, *shape)
    if info.shape != expected or info.dtype not in FLOAT_DTYPES:
        raise FlashMoEError(
            f"{file}: {name} is {info.dtype}{list(info.shape)}, expected {list(expected)} of "
            f"{', '.join(FLOAT_DTYPES)} by config.json. Start from the bfloat16 checkpoint, with "
            "the config.json that belongs to it."
        )
    step = info.nbytes // (count * len(projections))
    return {
        (layer, first + index // len(projections), projections[index % len(projections)]): Matrix(
            file, info.offset + index * step, info.dtype, (rows, columns)
        )
        for index in range(count * len(projections))
    }
