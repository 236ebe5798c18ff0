"""Where experts lie; every damaged or foreign directory is an error that names it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from convert_helpers import EXPERTS, HIDDEN, INTERMEDIATE, LAYERS

from flashmoe_mlx.convert import convert
from flashmoe_mlx.errors import FlashMoEError
from flashmoe_mlx.format.headers import read_header
from flashmoe_mlx.format.layout import (
    DATA_ALIGNMENT,
    ExpertLayout,
    open_layout,
    read_manifest,
)
from flashmoe_mlx.format.modules import Quantization, projection_quantization
from flashmoe_mlx.format.names import FIELDS

LAYER = "model_experts/layer_01.safetensors"
MANIFEST = "model_experts/manifest.json"


@pytest.fixture
def packed(root: Path, tmp_path: Path) -> Path:
    shutil.copytree(root / "packed", tmp_path / "packed")
    return tmp_path / "packed"


def opened(directory: Path, layers: int = LAYERS, experts: int = EXPERTS) -> ExpertLayout:
    return open_layout(directory, layers, experts)


def edit_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a file's header in place, keeping its length."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    assert len(text) == length
    path.write_bytes(data[:8] + text + data[8 + length :])


def edit_manifest(directory: Path, **changes: Any) -> None:
    path = directory / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def expert_bytes(layout: ExpertLayout, layer: int, expert: int) -> bytes:
    result = b""
    fields = layout.layers[layer].fields
    for span in layout.layers[layer].spans(expert):
        size = sum(field.nbytes for field in fields[span.first : span.last])
        with open(span.file, "rb") as file:
            file.seek(span.offset)
            result += file.read(size)
    return result


def test_packed_and_stock_give_the_same_bytes(root):
    packed, stock = opened(root / "packed"), opened(root / "stock")
    assert (packed.kind, stock.kind) == ("packed", "stock")
    assert packed.record_bytes == stock.record_bytes == 13824
    assert packed.token_bytes == LAYERS * 13824
    assert packed.total_bytes == stock.total_bytes == EXPERTS * LAYERS * 13824
    for layer in range(LAYERS):
        assert [f.name for f in packed.layers[layer].fields] == list(FIELDS)
        found = projection_quantization(packed.layers[layer], "down_proj", (HIDDEN, INTERMEDIATE))
        assert found == Quantization(4, 64, "affine")
        for expert in range(EXPERTS):
            assert len(packed.layers[layer].spans(expert)) == 1
            assert len(stock.layers[layer].spans(expert)) == 9
            assert expert_bytes(packed, layer, expert) == expert_bytes(stock, layer, expert)


def test_records_start_on_the_alignment(root):
    layer = opened(root / "packed").layers[0]
    assert layer.fields[0].offset == DATA_ALIGNMENT
    assert [span.offset for e in range(3) for span in layer.spans(e)] == [
        DATA_ALIGNMENT + e * layer.record_bytes for e in range(3)
    ]


@pytest.mark.parametrize("cut", [1, 13824, 110_000])
def test_truncated_layer(packed, cut):
    path = packed / LAYER
    size = path.stat().st_size
    os.truncate(path, size - cut)
    with pytest.raises(FlashMoEError) as error:
        opened(packed)
    assert str(error.value) == (
        f"{path}: truncated or altered: {size - cut} bytes long, but its header describes {size}. "
        "Download or convert it again."
    )


@pytest.mark.parametrize("size", [0, 7, 8, 5000])
def test_layer_cut_within_its_header(packed, size):
    os.truncate(packed / LAYER, size)
    with pytest.raises(FlashMoEError, match=rf"not a whole safetensors file \({size} bytes"):
        opened(packed)


def test_trailing_bytes(packed):
    with open(packed / LAYER, "ab") as file:
        file.write(b"\0")
    with pytest.raises(FlashMoEError, match=r"layer_01.safetensors: truncated or altered"):
        opened(packed)


def test_missing_layer_file(packed):
    (packed / LAYER).unlink()
    with pytest.raises(FlashMoEError, match=r"layer_01.safetensors: missing, so layer 1 has no"):
        opened(packed)


def test_missing_manifest(packed):
    (packed / MANIFEST).unlink()
    with pytest.raises(FlashMoEError, match=r"packed: unfinished conversion \(manifest.json"):
        opened(packed)


def test_missing_folder(packed):
    shutil.rmtree(packed / "model_experts")
    with pytest.raises(FlashMoEError, match=r"the folder model_experts/ is missing"):
        opened(packed)


def swap_experts(header: dict[str, Any]) -> None:
    first, second = "experts.2.up_proj.weight", "experts.3.up_proj.weight"
    header[first], header[second] = header[second], header[first]


def swap_parts(header: dict[str, Any]) -> None:
    first, second = "experts.2.up_proj.scales", "experts.2.up_proj.biases"
    header[first], header[second] = header[second], header[first]


def reshape(header: dict[str, Any]) -> None:
    header["experts.5.up_proj.weight"]["shape"] = [32, 32]


def retype(header: dict[str, Any]) -> None:
    header["experts.5.up_proj.scales"]["dtype"] = "F16"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap_experts, r"experts.2.up_proj.weight is U32\[64, 16\] at byte \d+, expected U32"),
        (swap_parts, r"experts.2.up_proj.scales is BF16\[64, 2\] at byte \d+, expected"),
        (reshape, r"experts.5.up_proj.weight is U32\[32, 32\] at byte"),
        (retype, r"experts.5.up_proj.scales is F16\[64, 2\]"),
    ],
)
def test_edited_header(packed, change, message):
    edit_header(packed / LAYER, change)
    with pytest.raises(FlashMoEError, match=message):
        opened(packed)


@pytest.mark.parametrize("offsets", [[-4, 4092], [0, 4000], [5, 1]])
def test_offsets_that_do_not_fit(packed, offsets):
    def change(header: dict[str, Any]) -> None:
        header["experts.0.gate_proj.weight"]["data_offsets"] = offsets

    edit_header(packed / LAYER, change)
    with pytest.raises(FlashMoEError, match=r"damaged safetensors header \(tensor 'experts.0.gate"):
        opened(packed)


@pytest.mark.parametrize("text", [b"[]", b'{"a":1}', b'{"a":{"dtype":"U32"}}', b"{", b"\xff\xff"])
def test_a_header_that_is_not_one(tmp_path, text):
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(FlashMoEError, match=r"x.safetensors: damaged safetensors header"):
        read_header(path)


def test_wrong_expert_count(root, packed):
    with pytest.raises(FlashMoEError, match=r"no tensor experts.8.gate_proj.weight; .* 9 experts"):
        opened(packed, experts=9)
    with pytest.raises(FlashMoEError, match=r"holds 72 tensors, expected 63, .* 7 experts"):
        opened(packed, experts=7)
    with pytest.raises(FlashMoEError, match=r"has shape \[8, 64, 16\], expected 9 experts"):
        opened(root / "stock", experts=9)


def test_wrong_layer_count(root, packed):
    with pytest.raises(FlashMoEError, match=r"lists 4 layers, .* num_hidden_layers = 5"):
        opened(packed, layers=5)
    with pytest.raises(FlashMoEError, match=r"layer 4: no experts found"):
        opened(root / "stock", layers=5)


def test_manifest_of_the_future(packed):
    edit_manifest(packed, version=2)
    with pytest.raises(FlashMoEError, match=r"format version 2, but .* reads version 1. Update"):
        opened(packed)


def test_manifest_of_another_format(packed):
    edit_manifest(packed, format="other")
    with pytest.raises(FlashMoEError, match=r"not a flashmoe-experts manifest"):
        opened(packed)
    (packed / MANIFEST).write_text("{")
    with pytest.raises(FlashMoEError, match=r"manifest.json: not JSON \("):
        read_manifest(packed / MANIFEST)


def test_broken_link(root, tmp_path):
    shutil.copytree(root / "stock", tmp_path / "stock")
    convert(tmp_path / "stock", tmp_path / "out", link=True)
    assert opened(tmp_path / "out").kind == "linked"
    (tmp_path / "stock").rename(tmp_path / "moved")
    with pytest.raises(FlashMoEError, match=r"links to .*stock, which is not a directory. Put"):
        opened(tmp_path / "out")


def test_float_experts_cannot_be_streamed(root, tmp_path):
    with pytest.raises(FlashMoEError, match=r"hf: layer 0: no experts found"):
        opened(root / "hf")
    with pytest.raises(FlashMoEError, match=r"no model\*.safetensors found"):
        opened(tmp_path)


def test_quantization_that_is_not_affine(root):
    layer = opened(root / "stock").layers[0]
    with pytest.raises(FlashMoEError, match=r"is not a matrix of \d+ x 96, as config.json has it"):
        projection_quantization(layer, "up_proj", (INTERMEDIATE, 96))


def requantized(root: Path, directory: Path, change: Callable[[str, mx.array], dict]) -> Path:
    """Copy the bfloat16 checkpoint with its experts changed, each to the tensors returned."""
    shutil.copytree(root / "hf", directory)
    for path in directory.glob("*.safetensors"):
        tensors: dict[str, mx.array] = {}
        for name, array in mx.load(str(path)).items():
            own = ".mlp.experts." in name and "mtp" not in name
            tensors |= change(name, array) if own else {name: array}
        path.unlink()
        mx.save_safetensors(str(path), tensors)
    (directory / "model.safetensors.index.json").unlink(missing_ok=True)
    return directory


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_experts_of_other_modes_are_refused_by_name(mode, root, tmp_path):
    def change(name: str, array: mx.array) -> dict[str, mx.array]:
        if array.ndim != 3:
            return {name: array}
        prefix = name.replace("experts.gate_up_proj", "switch_mlp.gate_proj")
        prefix = prefix.replace("experts.down_proj", "switch_mlp.down_proj")
        codes, scales = mx.quantize(array, mode=mode)
        return {f"{prefix}.weight": codes, f"{prefix}.scales": scales}

    directory = requantized(root, tmp_path / mode, change)
    message = f"layer 0: the experts are quantized in mode {mode}, but config.json does not"
    with pytest.raises(FlashMoEError, match=message):
        opened(directory)
    with pytest.raises(FlashMoEError, match=message):
        convert(directory, tmp_path / "out")


def test_experts_that_are_quantized_one_by_one_are_refused(root, tmp_path):
    def change(name: str, array: mx.array) -> dict[str, mx.array]:
        if array.ndim != 3 or "down" not in name:
            return {}
        found = {}
        for expert, matrix in enumerate(array):
            parts = zip(("weight", "scales", "biases"), mx.quantize(matrix), strict=True)
            prefix = name.replace("down_proj", f"{expert}.down_proj")
            found |= {f"{prefix}.{part}": tensor for part, tensor in parts}
        return found

    directory = requantized(root, tmp_path / "single", change)
    message = r"experts\.\d+\.down_proj\.\w+: each expert is quantized under its own keys, which"
    with pytest.raises(FlashMoEError, match=message):
        opened(directory)
    with pytest.raises(FlashMoEError, match=message):
        convert(directory, tmp_path / "out", quantize=True)
