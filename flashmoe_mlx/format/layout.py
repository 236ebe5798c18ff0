"""Where every expert lies on disk. Standard library only.

Two kinds of directory share one interface:

* **packed**, written by `flashmoe-convert`: `model_experts/layer_NN.safetensors`, in which the
  nine tensors of an expert are contiguous (a *record*), so an expert is one byte range;
* **stock**, an unmodified MLX checkpoint: stacked `switch_mlp` tensors `[experts, out, in]`, in
  which an expert is nine byte ranges.

In both, field f of expert e starts at `offset[f] + e * stride[f]`, which is all that
`LayerLayout` stores. Every header is checked first.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import FlashMoEError
from .headers import TensorInfo, checkpoint_headers, read_header
from .json_file import exists, read_json
from .names import FIELDS, PROJECTIONS, is_quantized_single, stacked_expert
from .placement import Placement, read_placement

EXPERT_DIR = "model_experts"
MANIFEST = "manifest.json"
MANIFEST_FORMAT = "flashmoe-experts"
MANIFEST_VERSION = 1
# Modes other than the affine one, by codes (uint32) per scale.
MODES = {2: "nvfp4", 4: "mxfp4", 8: "mxfp8"}
DATA_ALIGNMENT = 16384


@dataclass(frozen=True)
class Field:
    """One of an expert's nine tensors: the offset for expert 0, and the stride to the next."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    offset: int
    stride: int


@dataclass(frozen=True)
class Span:
    """A contiguous byte range of one expert, covering `fields[first:last]`."""

    file: Path
    offset: int
    first: int
    last: int


@dataclass(frozen=True)
class LayerLayout:
    """The experts of one layer, or a rank's part of them.

    `numbers` are their ids in the model; None for all. Elsewhere experts count from 0.
    """

    layer: int
    num_experts: int
    fields: tuple[Field, ...]
    numbers: range | None = None

    def part(self, numbers: range) -> "LayerLayout":
        """Return the layout of some of its experts, which must be all of the model's."""
        first, step = numbers.start, numbers.step
        fields = (
            replace(f, offset=f.offset + first * f.stride, stride=step * f.stride)
            for f in self.fields
        )
        return LayerLayout(self.layer, len(numbers), tuple(fields), numbers)

    @property
    def record_bytes(self) -> int:
        """Bytes of one expert."""
        return sum(field.nbytes for field in self.fields)

    @property
    def total_bytes(self) -> int:
        """Bytes of all experts."""
        return self.record_bytes * self.num_experts

    def spans(self, expert: int) -> list[Span]:
        """Return the byte ranges of one expert: one if packed, nine if stock."""
        spans: list[Span] = []
        end = None
        for index, field in enumerate(self.fields):
            start = field.offset + expert * field.stride
            if spans and spans[-1].file == field.file and start == end:
                spans[-1] = Span(field.file, spans[-1].offset, spans[-1].first, index + 1)
            else:
                spans.append(Span(field.file, start, index, index + 1))
            end = start + field.nbytes
        return spans


@dataclass(frozen=True)
class ExpertLayout:
    """The experts of a whole model, or a rank's part of them.

    `kind` is "packed", "linked" or "stock"; `placement` is of a part.
    """

    kind: str
    directory: Path
    layers: tuple[LayerLayout, ...]
    placement: Placement | None = None

    def part(self, placement: Placement) -> "ExpertLayout":
        """Return the layout of a rank's experts.

        Raises:
            FlashMoEError: the directory holds other ones.
        """
        if self.placement == placement:
            return self
        if self.placement:
            raise FlashMoEError(
                f"{self.directory}: holds the experts of {self.placement}, but this is "
                f"{placement}. Start it there, or convert the model for this rank."
            )
        layers = tuple(x.part(placement.experts(x.num_experts)) for x in self.layers)
        return replace(self, layers=layers, placement=placement)

    def of_layers(self, places: Sequence[int]) -> "ExpertLayout":
        """Return the layout of some layers."""
        return replace(self, layers=tuple(self.layers[place] for place in places))

    @property
    def num_experts(self) -> int:
        """Experts of the layer that has most."""
        return max(layer.num_experts for layer in self.layers)

    @property
    def record_bytes(self) -> int:
        """Bytes of the largest layer's expert."""
        return max(layer.record_bytes for layer in self.layers)

    @property
    def token_bytes(self) -> int:
        """Bytes of one expert in every layer together."""
        return sum(layer.record_bytes for layer in self.layers)

    @property
    def total_bytes(self) -> int:
        """Bytes of all experts of all layers."""
        return sum(layer.total_bytes for layer in self.layers)


def open_layout(model_dir: Path | str, num_layers: int, num_experts: int) -> ExpertLayout:
    """Find the experts of a packed, linked or stock model directory.

    Args:
        model_dir: the model's directory.
        num_layers: decoder layers, from config.json.
        num_experts: routed experts per layer, from config.json.

    Raises:
        FlashMoEError: experts are missing, incomplete, unquantized or damaged.
    """
    model_dir = Path(model_dir)
    experts_dir = model_dir / EXPERT_DIR
    if not exists(experts_dir):
        if exists(model_dir / "flashmoe_model.py"):
            raise FlashMoEError(
                f"{model_dir}: the folder {EXPERT_DIR}/ is missing, so the conversion is "
                "unfinished or was copied in part. Run flashmoe-convert again."
            )
        return _open_stock("stock", model_dir, num_layers, num_experts)
    manifest = read_manifest(experts_dir / MANIFEST)
    if "link" in manifest:
        source = Path(str(manifest["link"]))
        if not (exists(source) and source.is_dir()):
            raise FlashMoEError(
                f"{experts_dir / MANIFEST}: links to {source}, which is not a directory. Put the "
                "checkpoint back there, or convert again with flashmoe-convert --link."
            )
        return _open_stock("linked", source, num_layers, num_experts)
    return _open_packed(model_dir, manifest, num_layers, num_experts)


def read_manifest(path: Path) -> dict[str, Any]:
    """Read `model_experts/manifest.json`.

    Raises:
        FlashMoEError: it is missing (the conversion did not finish), damaged, or too new.
    """
    try:
        manifest = read_json(path, "Run flashmoe-convert again.")
    except FileNotFoundError:
        if not path.parent.exists():
            raise FlashMoEError(
                f"{path.parent.parent}: not written by flashmoe-convert (no {path.parent.name}). "
                "Convert it first."
            ) from None
        raise FlashMoEError(
            f"{path.parent.parent}: unfinished conversion ({path.name} is written last and is "
            "missing). Run flashmoe-convert again."
        ) from None
    if not isinstance(manifest, dict) or manifest.get("format") != MANIFEST_FORMAT:
        raise FlashMoEError(f"{path}: not a {MANIFEST_FORMAT} manifest. Convert the model again.")
    if manifest.get("version") != MANIFEST_VERSION:
        raise FlashMoEError(
            f"{path}: format version {manifest.get('version')!r}, but this flashmoe-mlx reads "
            f"version {MANIFEST_VERSION}. Update flashmoe-mlx, or convert the model again."
        )
    return manifest


def record_checksums(manifest: dict[str, Any]) -> list[list[int]]:
    """Return the CRC-32 (`zlib.crc32`) of every record, by layer and expert.

    Raises:
        FlashMoEError: the manifest lacks them, or has another kind.
    """
    try:
        if manifest["checksum"] != "crc32":
            raise ValueError(f"checksum {manifest['checksum']!r}, expected 'crc32'")
        return [[int(text, 16) for text in layer["records"]] for layer in manifest["layers"]]
    except (KeyError, TypeError, ValueError) as error:
        raise FlashMoEError(
            f"{EXPERT_DIR}/{MANIFEST}: no checksum for every expert ({error!r}). Convert the model "
            "again with flashmoe-convert."
        ) from error


def layer_file(layer: int) -> str:
    """Return the name of one layer's expert file in a packed directory."""
    return f"layer_{layer:02d}.safetensors"


def _open_packed(
    model_dir: Path, manifest: dict[str, Any], num_layers: int, num_experts: int
) -> ExpertLayout:
    entries = manifest.get("layers")
    if (listed := len(entries) if isinstance(entries, list) else 0) != num_layers:
        raise FlashMoEError(
            f"{model_dir / EXPERT_DIR / MANIFEST}: lists {listed} layers, but config.json has "
            f"num_hidden_layers = {num_layers}. Convert the model again."
        )
    placement = read_placement(manifest, model_dir / EXPERT_DIR / MANIFEST)
    layers = tuple(
        packed_layer(model_dir, layer, num_experts, placement=placement)
        for layer in range(num_layers)
    )
    return ExpertLayout("packed", model_dir, layers, placement)


def packed_layer(
    model_dir: Path,
    layer: int,
    num_experts: int,
    names: Sequence[str] = FIELDS,
    placement: Placement | None = None,
) -> LayerLayout:
    """Read and check the header of one layer's expert file.

    Args:
        model_dir: the model's directory.
        layer: number of the file.
        num_experts: experts of the model's layer.
        names: an expert's tensors, in the order of their bytes.
        placement: the rank whose experts alone the file must hold; None for all.

    Raises:
        FlashMoEError: the file does not hold exactly these experts.
    """
    path = model_dir / EXPERT_DIR / layer_file(layer)
    if not exists(path):
        raise FlashMoEError(
            f"{path}: missing, so layer {layer} has no experts. Run flashmoe-convert again."
        )
    numbers = _numbers(path, num_experts, placement)
    wanted = f"config.json asks for {num_experts} experts"
    if placement:
        wanted += f", {len(numbers)} of them on {placement}"
    tensors = read_header(path)
    first = [tensors.get(f"experts.{numbers[0]}.{name}") for name in names]
    stride = sum(t.nbytes for t in first if t)
    for place, expert in enumerate(numbers):
        for name, zero in zip(names, first, strict=True):
            tensor = tensors.get(f"experts.{expert}.{name}")
            if tensor is None or zero is None:
                raise FlashMoEError(
                    f"{path}: no tensor experts.{expert}.{name}; {wanted}. Convert the model again."
                )
            expected = (zero.dtype, zero.shape, zero.offset + place * stride)
            if (tensor.dtype, tensor.shape, tensor.offset) != expected:
                raise FlashMoEError(
                    f"{path}: experts.{expert}.{name} is {tensor.dtype}{list(tensor.shape)} at "
                    f"byte {tensor.offset}, expected {expected[0]}{list(expected[1])} at "
                    f"{expected[2]}. Convert the model again."
                )
    if len(tensors) != len(numbers) * len(names):
        raise FlashMoEError(
            f"{path}: holds {len(tensors)} tensors, expected {len(numbers) * len(names)}, since "
            f"{wanted}. Restore the config.json that belongs to this model."
        )
    fields = tuple(
        Field(name, t.dtype, t.shape, t.nbytes, path, t.offset, stride)
        for name, t in zip(names, first, strict=True)
        if t
    )
    return LayerLayout(layer, len(numbers), fields, numbers if placement else None)


def _numbers(path: Path, count: int, placement: Placement | None) -> range:
    """Return the ids of the experts that a file must hold."""
    try:
        return placement.experts(count) if placement else range(count)
    except FlashMoEError as error:
        raise FlashMoEError(f"{path}: {error}") from error


def _open_stock(kind: str, directory: Path, num_layers: int, num_experts: int) -> ExpertLayout:
    found: dict[int, dict[str, tuple[Path, TensorInfo]]] = {}
    headers = checkpoint_headers(directory)
    refuse_single_quantized(headers)
    for name, place in headers.items():
        if key := stacked_expert(name):
            layer = found.setdefault(key[0], {})
            if key[1] in layer:
                raise FlashMoEError(
                    f"{place[0]}: {name} is a second tensor for layer {key[0]} {key[1]}. Remove "
                    "the files that do not belong to the checkpoint."
                )
            layer[key[1]] = place
    layers = [
        _stock_layer(directory, layer, num_experts, found.get(layer, {}))
        for layer in range(num_layers)
    ]
    return ExpertLayout(kind, directory, tuple(layers))


def _stock_layer(
    directory: Path, layer: int, num_experts: int, found: dict[str, tuple[Path, TensorInfo]]
) -> LayerLayout:
    fields = []
    for name in FIELDS:
        if name not in found:
            _refuse_other_modes(directory, layer, found)
            state = "experts are not quantized" if "up_proj.weight" in found else "no experts found"
            raise FlashMoEError(
                f"{directory}: layer {layer}: {state} (no switch_mlp.{name}). Repack it first: "
                f"flashmoe-convert --hf-path {shlex.quote(str(directory))} --mlx-path OUT -q"
            )
        file, tensor = found[name]
        if len(tensor.shape) != 3 or tensor.shape[0] != num_experts:
            raise FlashMoEError(
                f"{file}: layer {layer} switch_mlp.{name} has shape {list(tensor.shape)}, "
                f"expected {num_experts} experts x rows x columns. Check num_experts."
            )
        step = tensor.nbytes // num_experts
        fields.append(Field(name, tensor.dtype, tensor.shape[1:], step, file, tensor.offset, step))
    return LayerLayout(layer, num_experts, tuple(fields))


def refuse_single_quantized(headers: dict[str, tuple[Path, TensorInfo]]) -> None:
    """Refuse a checkpoint whose experts are quantized one by one.

    Raises:
        FlashMoEError: naming the first such tensor.
    """
    if name := next(filter(is_quantized_single, headers), None):
        raise FlashMoEError(
            f"{headers[name][0]}: {name}: each expert is quantized under its own keys, "
            "which flashmoe-mlx neither streams nor converts. Choose a checkpoint in MLX's format, "
            "or convert the bfloat16 one with flashmoe-convert -q."
        )


def _refuse_other_modes(
    directory: Path, layer: int, found: dict[str, tuple[Path, TensorInfo]]
) -> None:
    """Refuse experts that have scales of one byte, as all modes but the affine one."""
    for projection in PROJECTIONS:
        codes, scales = (found.get(f"{projection}.{part}") for part in ("weight", "scales"))
        if codes and scales and scales[1].dtype == "U8":
            mode = MODES.get(codes[1].nbytes // 4 // max(1, scales[1].nbytes), "unknown")
            raise FlashMoEError(
                f"{directory}: layer {layer}: the experts are quantized in mode {mode}, but "
                "config.json does not say so. Restore the config.json that belongs to them."
            )
