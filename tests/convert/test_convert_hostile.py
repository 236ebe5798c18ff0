"""Hostile checkpoints: each is refused in one sentence, before it can do harm."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from convert_helpers import (
    EXPERTS,
    LAYERS,
    load,
    make_config,
    make_weights,
    read,
    save,
    separate,
)  # fmt: skip

from flashmoe_mlx.convert import convert
from flashmoe_mlx.convert.source.read import check_finite
from flashmoe_mlx.errors import FlashMoEError
from flashmoe_mlx.format.headers import MAX_HEADER, read_header
from flashmoe_mlx.format.layout import open_layout

INDEX = "model.safetensors.index.json"


@pytest.fixture
def hf(root: Path, tmp_path: Path) -> Path:
    return shutil.copytree(root / "hf", tmp_path / "hf")


def refused(source: Path, match: str, quantize: bool = True) -> None:
    """A conversion is refused, and leaves no manifest."""
    out = source.with_name("out")
    with pytest.raises(FlashMoEError, match=match) as error:
        convert(source, out, quantize=quantize)
    assert len(str(error.value)) < 2000
    assert not (out / "model_experts/manifest.json").exists()


# --- headers -------------------------------------------------------------------------------------


def write_tensors(path: Path, header: object, data: int = 16, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + text + bytes(data))
    return path


def tensor(begin: Any, end: Any, dtype: Any = "U8", shape: Any = None) -> dict[str, Any]:
    shape = [end - begin] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HEADERS = {
    "overlap": ({"a": tensor(0, 16), "b": tensor(8, 16)}, "'b' at byte .* overlaps the tensor"),
    "same place": ({"a": tensor(0, 16), "b": tensor(0, 16)}, "'b' at byte .* overlaps"),
    "gap": ({"a": tensor(0, 4), "b": tensor(8, 16)}, "'b' at byte .* follows a gap"),
    "gap at the start": ({"a": tensor(4, 16)}, "'a' at byte .* follows a gap"),
    "beyond the file": ({"a": tensor(0, 1 << 60)}, "its header describes 1152921504606"),
    "before the file": ({"a": tensor(-8, 8)}, "'a' of 16 bytes has offsets -8..8"),
    "backwards": ({"a": tensor(8, 0, shape=[8])}, "'a' of 8 bytes has offsets 8..0"),
    "too few bytes": ({"a": tensor(0, 16, shape=[17])}, "'a' of 17 bytes has offsets 0..16"),
    "product of negatives": ({"a": tensor(0, 16, shape=[-4, -4])}, "'a' of 16 bytes has"),
    "fractions": ({"a": tensor(0, 16, shape=[16.0])}, "'a' has a shape or offsets that are not"),
    "truth for one": ({"a": tensor(0, 16, shape=[16, True])}, "'a' has a shape or offsets that"),
    "text": ({"a": tensor(0, 16, shape=["16"])}, "'a' has a shape or offsets that are not whole"),
    "infinity": ({"a": tensor(0, float("inf"), shape=[16])}, "'a' has a shape or offsets"),
    "thousands of digits": ({"a": tensor(10**4000, 16, shape=[16])}, "numbers below 2.63"),
    "dtype": ({"a": tensor(0, 16, "X7")}, "'a' has the unknown dtype 'X7'"),
    "dtype of another type": ({"a": tensor(0, 16, [])}, "damaged safetensors header"),
    "long name": ({"layers." + "9" * 5000: tensor(0, 16)}, "has a name of 5007 characters"),
    "long number": (b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b"]}}", "damaged"),
    "duplicate": (b'{"a":{"dtype":"U8"},"a":{"dtype":"U8"}}', "'a' occurs more than once"),
    "duplicate key": (b'{"a":{"dtype":"U8","dtype":"U8"}}', "'dtype' occurs more than once"),
    "deep": (b"[" * 200_000, "damaged safetensors header"),
    "no object": (b"[1]", "damaged safetensors header"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers(tmp_path, name):
    header, match = HEADERS[name]
    path = write_tensors(tmp_path / "model.safetensors", header)
    with pytest.raises(FlashMoEError, match=match) as error:
        read_header(path)
    assert str(error.value).startswith(f"{path}: ")
    assert str(error.value).endswith("Download or convert it again.")


@pytest.mark.parametrize("length", [1 << 60, (1 << 64) - 1, 1 << 63, MAX_HEADER + 1])
def test_header_lengths(tmp_path, length):
    path = write_tensors(tmp_path / "model.safetensors", {}, length=length)
    os.truncate(path, 2 * MAX_HEADER)  # a hole
    with pytest.raises(FlashMoEError, match=rf"200000000 bytes, header of {length}\)"):
        read_header(path)


def test_tensors_without_bytes_are_fine(tmp_path):
    header = {"a": tensor(0, 0, shape=[0, 4]), "b": tensor(0, 16), "c": tensor(16, 16, shape=[0])}
    found = read_header(write_tensors(tmp_path / "model.safetensors", header))
    assert [info.nbytes for info in found.values()] == [0, 16, 0]


def test_only_regular_files_are_opened(root, hf):
    """Opening a named pipe would block forever."""
    path = hf / "model-00002-of-00003.safetensors"
    path.unlink()
    os.mkfifo(path)
    refused(hf, r"model-00002-of-00003.safetensors: not a regular file")
    path.unlink()
    shutil.copy(root / "hf" / path.name, path)
    for name, match in (
        (INDEX, r"index.json: not a regular file"),
        ("config.json", r"config.json: not a regular file"),
    ):
        (hf / name).unlink()
        os.mkfifo(hf / name)
        refused(hf, match)
    manifest = shutil.copytree(root / "stock", hf / "mlx") / "model_experts/manifest.json"
    manifest.parent.mkdir()
    os.mkfifo(manifest)
    refused(hf / "mlx", r"manifest.json: not a regular file", quantize=False)


# --- which tensors -------------------------------------------------------------------------------


def test_two_files_with_the_same_tensor(hf):
    shutil.copy(hf / "model-00001-of-00003.safetensors", hf / "model-evil.safetensors")
    refused(hf, r"model-evil.safetensors: \S+ is in model-00001-of-00003.safetensors too. Remove")


def test_two_spellings_of_the_same_tensor(root, tmp_path):
    weights = load(root / "stock")
    name = "language_model.model.layers.1.mlp.switch_mlp.up_proj.scales"
    evil = {"model.layers.1.mlp.switch_mlp.up_proj.scales": weights[name] * 2}
    source = shutil.copytree(root / "stock", tmp_path / "mlx")
    mx.save_safetensors(str(source / "model-evil.safetensors"), evil)
    refused(source, r"is a second tensor for layer 1 up_proj.scales", quantize=False)
    with pytest.raises(FlashMoEError, match=r"is a second tensor for layer 1 up_proj.scales"):
        open_layout(source, LAYERS, EXPERTS)


@pytest.mark.parametrize("file", ["../../x", "/etc/passwd", "a/../../b", "..", "..\\x", 7, None])
def test_index_that_leads_elsewhere(hf, file):
    index = read(hf / INDEX)
    index["weight_map"]["lm_head.weight"] = file
    (hf / INDEX).write_text(json.dumps(index))
    refused(hf, r"index.json: damaged \(lm_head.weight is in .*Download it again")


def test_long_names_and_values_are_abbreviated(hf):
    """An error is one sentence, even if it quotes a long value."""
    index, config = read(hf / INDEX), read(hf / "config.json")
    layer = "model.language_model.layers." + "9" * 5000
    for change, match in (
        (
            {layer: "model.safetensors"},
            r"damaged \('model.language_model.lay.*of 5028 characters\)",
        ),
        (
            {"lm_head.weight": "../" * 5000},
            r"is in '\.\./.*\.\.\. \(15002 characters\), not a file name",
        ),
        ({"lm_head.weight.scales": "x" * 5000}, r"promises lm_head.weight.scales in x{300}, which"),
    ):
        (hf / INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | change}))
        refused(hf, match)
    (hf / "config.json").write_text(json.dumps(config | {"model_type": "a" * 5000}))
    refused(hf, r"model_type = 'a{79}\.\.\. \(5002 characters\) is not a model of")


@pytest.mark.parametrize("text", ["[" * 200_000, "[]", '{"weight_map": []}', "{"])
def test_invalid_index(hf, text):
    (hf / INDEX).write_text(text)
    refused(hf, r"index.json: (damaged|not )")


# --- dtypes and values ---------------------------------------------------------------------------


def retyped(source: Path, name: str, change: Callable[[mx.array], mx.array]) -> None:
    """Rewrite one tensor of a checkpoint of one file."""
    weights = mx.load(str(source / "model.safetensors"))
    weights[name] = change(weights[name])
    mx.save_safetensors(str(source / "model.safetensors"), weights)


def single(tmp_path: Path) -> Path:
    return save(tmp_path / "src", make_config(), separate(make_weights(make_config())))


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("layers.1.mlp.experts.3.up_proj.weight", r"up_proj.weight is I32\[64, 128\], expected"),
        ("layers.1.mlp.gate.weight", r"mlp.gate.weight is I32, expected one of BF16, F16, F32"),
        ("layers.1.input_layernorm.weight", r"input_layernorm.weight is I32, expected one of"),
    ],
)
def test_wrong_dtypes(tmp_path, name, match):
    source = single(tmp_path)
    retyped(source, f"language_model.model.{name}", lambda value: value.astype(mx.int32))
    refused(source, match)


def test_wrong_dtypes_of_a_quantized_source(root, tmp_path):
    source = shutil.copytree(root / "stock", tmp_path / "mlx")
    name = "language_model.model.layers.2.mlp.switch_mlp.down_proj"
    retyped(source, f"{name}.weight", lambda value: value.view(mx.int32))
    refused(source, r"layer 2 down_proj: weight I32\[128, 8\].* in a format of MLX", quantize=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("layers.1.mlp.experts.3.up_proj.weight", r"safetensors: layer 1 expert 3 up_proj holds"),
        ("embed_tokens.weight", r"language_model.model.embed_tokens.weight holds NaN or infinity"),
        ("norm.weight", r"model.norm.weight holds NaN or infinity \(BF16\). Download"),
    ],
)
def test_weights_with_nan_or_infinity(tmp_path, value, name, match):
    """`mx.quantize` would silently turn NaN into finite codes, scales and biases."""

    def spoil(weights: mx.array) -> mx.array:
        weights[..., -1] = value
        return weights

    source = single(tmp_path)
    retyped(source, f"language_model.model.{name}", spoil)
    refused(source, match)


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("part", ["scales", "biases"])
def test_scales_with_nan_or_infinity(root, tmp_path, quantize, part):
    def spoil(values: mx.array) -> mx.array:
        values[5, 7, 0] = float("nan")
        return values

    source = shutil.copytree(root / "stock", tmp_path / "mlx")
    retyped(source, f"language_model.model.layers.2.mlp.switch_mlp.down_proj.{part}", spoil)
    refused(source, rf"layer 2 expert 5 down_proj.{part} holds NaN or infinity", quantize)


@pytest.mark.parametrize(
    ("dtype", "kind"), [("F16", mx.float16), ("BF16", mx.bfloat16), ("F32", mx.float32)]
)
def test_the_largest_finite_numbers_are_accepted(dtype, kind):
    info = mx.finfo(kind)
    values = mx.array([0.0, -0.0, info.max, info.min, 1e-7]).astype(kind)
    check_finite(np.frombuffer(memoryview(values).cast("B"), np.uint8), dtype, "x")
    for bad in (float("nan"), -float("nan"), float("inf"), -float("inf")):
        data = np.frombuffer(memoryview(mx.array([1, bad, 2]).astype(kind)).cast("B"), np.uint8)
        with pytest.raises(FlashMoEError, match=rf"x holds NaN or infinity \({dtype}\)"):
            check_finite(data, dtype, "x")
    check_finite(np.full(8, 255, np.uint8), "U32", "x")  # codes may be anything
    check_finite(np.empty(0, np.uint8), dtype, "x")


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize(
    ("name", "shape", "match"),
    [
        ("layers.0.linear_attn.conv1d.weight", (), r"has shape \[\], expected \[channels, 1, kern"),
        ("embed_tokens.weight", (0, 128), r"has shape \[0, 128\], so it has no elements. Download"),
        ("layers.1.input_layernorm.weight", (0,), r"has shape \[0\], so it has no elements"),
        ("norm.weight", (128, 0), r"has shape \[128, 0\], so it has no elements"),
    ],
)
def test_tensors_without_elements_or_dimensions(root, tmp_path, quantize, name, shape, match):
    name = f"language_model.model.{name}"
    source = shutil.copytree(root / "stock", tmp_path / "mlx") if not quantize else single(tmp_path)
    retyped(source, name, lambda value: mx.zeros(shape, mx.bfloat16))
    refused(source, match, quantize)


# --- config and links ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[" * 200_000, r"config.json: not JSON \(nested more than 100 levels deep\)"),
        ("[]", r"config.json: not a JSON object"),
        ('{"model_type": "qwen3_5_moe", "text_config": [1]}', r"config.json: text_config is \[1\]"),
    ],
)
def test_invalid_config(hf, text, match):
    (hf / "config.json").write_text(text)
    refused(hf, match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"quantization": "evil"}, r"config.json: quantization is 'evil', expected an object"),
        ({"torch_dtype": {"a": 1}}, r"torch_dtype = \{'a': 1\} is not the name of a dtype"),
        (
            {"dtype": ["bfloat16"]},
            r"config.json: dtype = \['bfloat16'\] is not the name of a dtype",
        ),
        ({"quantization_config": [1]}, r"quantization_config is \[1\], expected an object"),
    ],
)
def test_config_of_the_wrong_shape(hf, change, match):
    (hf / "config.json").write_text(json.dumps(read(hf / "config.json") | change))
    refused(hf, match)


@pytest.mark.parametrize("value", [True, 1e3, 10**30, "4", [4]])
@pytest.mark.parametrize("key", ["num_experts", "num_hidden_layers", "hidden_size"])
def test_sizes_of_the_wrong_kind(hf, key, value):
    config = read(hf / "config.json")
    config["text_config"][key] = value
    (hf / "config.json").write_text(json.dumps(config))
    refused(hf, rf"{key} is .*, expected a positive integer|expected \[|: no tensor|_size = ")


def test_symlinks_out_of_the_checkpoint(hf, tmp_path):
    """Publishing the result would publish another file of this machine."""
    (tmp_path / "secret").write_text("key")
    os.symlink(tmp_path / "secret", hf / "vocab.txt")
    refused(hf, r"vocab.txt: a symlink out of the checkpoint, to \S+secret. Delete it, or repl")
    (hf / "vocab.txt").unlink()
    os.symlink("tokenizer.json", hf / "vocab.txt")  # within it
    convert(hf, tmp_path / "out", quantize=True)
    assert (tmp_path / "out/vocab.txt").read_bytes() == (hf / "tokenizer.json").read_bytes()
    assert not (tmp_path / "out/vocab.txt").is_symlink()


def test_symlinks_of_the_hubs_cache(hf, tmp_path):
    snapshot = tmp_path / "models--a--b/snapshots/0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b/blobs").mkdir()
    for path in list(hf.iterdir()):
        path.rename(tmp_path / "models--a--b/blobs" / path.name)
        os.symlink(f"../../blobs/{path.name}", snapshot / path.name)
    convert(snapshot, tmp_path / "out", quantize=True)
    (tmp_path / "secret").write_text("key")
    os.symlink("../../../secret", snapshot / "vocab.txt")
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(FlashMoEError, match=r"vocab.txt: a symlink out of the checkpoint"):
        convert(snapshot, tmp_path / "out", quantize=True)


@pytest.mark.parametrize("change", [{"layers": 5}, {"layers": None}, {"link": 7}, {"link": None}])
def test_manifest_of_the_wrong_shape(root, tmp_path, change):
    out = tmp_path / "out"
    convert(root / "stock", out)
    path = out / "model_experts/manifest.json"
    path.write_text(json.dumps(read(path) | change))
    with pytest.raises(FlashMoEError, match=r"manifest.json: (lists 0 layers|links to)"):
        open_layout(out, LAYERS, EXPERTS)
