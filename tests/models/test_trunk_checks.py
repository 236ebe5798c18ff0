"""Every way to open a model compares its trunk with config.json, from headers alone."""

import json
import math
import re
import shutil
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
from convert_helpers import load as load_tensors
from convert_helpers import make_config, make_weights, save

from flashmoe_mlx import FlashMoEError, load
from flashmoe_mlx.cli.doctor_model import examine
from flashmoe_mlx.convert import cli, convert
from flashmoe_mlx.format.headers import ITEM_SIZE, TensorInfo, checkpoint_headers
from flashmoe_mlx.format.model_files import read_config
from flashmoe_mlx.models.qwen3_5.args import ModelArgs
from flashmoe_mlx.models.trunk_checks import check_trunk

EMBEDDING = "language_model.model.embed_tokens"
QUERIES = "language_model.model.layers.3.self_attn.q_proj"
SHARED = "language_model.model.layers.0.mlp.shared_expert.up_proj"
ROUTER = "language_model.model.layers.1.mlp.gate"
CONV = "language_model.model.layers.0.linear_attn.conv1d"
NORM = "language_model.model.norm"


@pytest.fixture(scope="module")
def root(root, tmp_path_factory) -> Path:
    root = shutil.copytree(root, tmp_path_factory.mktemp("trunk"), dirs_exist_ok=True)
    convert(root / "stock", root / "linked", link=True)
    convert(root / "hf", root / "mixed", quantize=True, quant_predicate="mixed_2_2_4")
    convert(root / "hf", root / "f16", quantize=True, q_bits=2, dtype="float16")
    return root


def check(directory: Path) -> None:
    args = ModelArgs.from_dict(read_config(directory))
    check_trunk(directory, checkpoint_headers(directory), args)


def rewrite(path: Path, name: str, change) -> None:
    """Rewrite a file, with `change(entry, bytes)` for one tensor."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header, pieces, end = json.loads(raw[8:start]), [], 0
    for key, entry in sorted(header.items(), key=lambda x: x[1].get("data_offsets", [0])[0]):
        if key != "__metadata__":
            first, last = entry["data_offsets"]
            piece = raw[start + first : start + last]
            if key == name:
                piece = change(entry, piece)
            entry["data_offsets"] = [end, end + len(piece)]
            end += len(piece)
            pieces.append(piece)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(pieces))


def retyped(dtype: str):
    """Change a tensor's dtype, and its size accordingly."""

    def change(entry: dict, piece: bytes) -> bytes:
        entry["dtype"] = dtype
        size = math.prod(entry["shape"]) * ITEM_SIZE[dtype]
        return piece[:size].ljust(size, b"\0")

    return change


def reshaped(*shape: int):
    """Change a tensor's shape, and its size accordingly."""

    def change(entry: dict, piece: bytes) -> bytes:
        entry["shape"] = list(shape)
        size = math.prod(shape) * ITEM_SIZE[entry["dtype"]]
        return piece[:size].ljust(size, b"\0")

    return change


@pytest.mark.parametrize("kind", ["packed", "linked", "stock", "mixed", "f16", "hf"])
def test_intact_checkpoints_pass(root, kind):
    check(root / kind)
    if kind != "hf":  # it has float experts
        assert examine(root / kind).problems == []


@pytest.mark.parametrize("kind", ["packed4", "packed2", "linked", "unmodified"])
def test_the_bundled_model_passes(models, kind):
    check(models[kind])


def test_a_trunk_of_floats_passes(root, tmp_path):
    config = read_config(root / "hf")
    float32 = make_weights(make_config(), mx.float32)
    check(save(tmp_path / "float32", config, float32))
    both = {"quantization": {"group_size": 64, "bits": 4}} | config
    check(save(tmp_path / "floats", both, float32))


DAMAGE = {
    "U8 for codes": (f"{QUERIES}.weight", retyped("U8"), r"q_proj\.weight is U8\[256, 16\], expec"),
    "F32 for codes": (f"{EMBEDDING}.weight", retyped("F32"), r"is F32\[96, 16\], .* of U32 by con"),
    "I32 for codes": (f"{SHARED}.weight", retyped("I32"), r"is I32\[64, 16\], expected \[64, 16\]"),
    "U64 for codes": (f"{ROUTER}.weight", retyped("U64"), r"mlp\.gate\.weight is U64"),
    "U8 for scales": (f"{QUERIES}.scales", retyped("U8"), r"q_proj.* is not a quantization of 128"),
    "F32 biases": (f"{SHARED}.biases", retyped("F32"), r"biases is F32, expected BF16 as its scal"),
    "U16 biases": (f"{SHARED}.biases", retyped("U16"), r"biases is U16\[64, 2\], expected"),
    "F64 norm": (f"{NORM}.weight", retyped("F64"), r"norm\.weight is F64, which MLX cannot read"),
    "U16 norm": (f"{NORM}.weight", retyped("U16"), r"norm\.weight is U16\[128\], expected \[128\]"),
    "F8 norm": (f"{NORM}.weight", retyped("F8_E4M3"), r"norm\.weight is F8_E4M3\[128\]"),
    "short norm": (f"{NORM}.weight", reshaped(127), r"norm\.weight is BF16\[127\], expected \[128"),
    "fewer codes": (f"{QUERIES}.weight", reshaped(256, 9), r"is U32\[256, 9\], expected"),
    "no groups": (f"{QUERIES}.scales", reshaped(256, 0), r"scales BF16\[256, 0\] is not a quantiz"),
    "other taps": (f"{CONV}.weight", reshaped(320, 3, 1), r"conv1d\.weight is BF16\[320, 3, 1\]"),
    "scalar": (f"{QUERIES}.scales", reshaped(), r"scales BF16\[\] is not a quantization"),
}  # fmt: skip


@pytest.fixture
def copy(root, tmp_path) -> Path:
    """A packed model with a copy of its trunk, and linked experts."""
    model = tmp_path / "model"
    model.mkdir()
    for path in (root / "packed").iterdir():
        if path.name == "model.safetensors":
            (model / path.name).write_bytes(path.read_bytes())
        else:
            (model / path.name).symlink_to(path)
    return model


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_trunk_of_another_dtype_or_shape_is_refused(copy, damage):
    name, change, message = DAMAGE[damage]
    rewrite(copy / "model.safetensors", name, change)
    with pytest.raises(FlashMoEError, match=message) as caught:
        load(copy)
    assert str(copy / "model.safetensors") in str(caught.value)
    assert str(caught.value) in examine(copy).problems


def test_stock_mlx_lm_raises_too(copy):
    """Before its kernels read out of bounds."""
    rewrite(copy / "model.safetensors", f"{QUERIES}.weight", retyped("U8"))
    with pytest.raises(FlashMoEError, match=r"q_proj\.weight is U8"):
        mlx_lm.load(str(copy), trust_remote_code=True)


def edited(model: Path, **entries) -> Path:
    path = model / "config.json"
    config = read_config(model)
    path.unlink()
    text = config["text_config"] | entries
    path.write_text(json.dumps(config | {"text_config": text}))
    return model


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"head_dim": 16}, r"self_attn.k_norm.weight is BF16\[32\], expected \[16\] of BF16"),
        ({"linear_conv_kernel_dim": 5}, r"conv1d.weight is BF16\[320, 4, 1\], expected \[320, 5"),
        ({"vocab_size": 97}, r"biases is BF16\[96, 2\], expected \[97, 2\] of BF16"),
        ({"attention_bias": True}, r"no tensor .*self_attn.*_proj.bias, which config.json asks"),
        ({"tie_word_embeddings": True}, None),  # the head is ignored
        ({"full_attention_interval": 2}, r"is not in the model that config.json describes"),
        ({"num_attention_heads": 2}, r"self_attn.*_proj.* is U?B?F?[0-9]+\[.*expected"),
        ({"shared_expert_intermediate_size": 128}, r"shared_expert.* expected"),
    ],
)  # fmt: skip
def test_a_config_of_another_model_is_refused(copy, entries, message):
    edited(copy, **entries)
    problems = "\n".join(examine(copy).problems)
    if message is None:
        assert problems == ""
        return
    with pytest.raises(FlashMoEError, match=message):
        load(copy)
    assert problems


@pytest.mark.parametrize("change", ["missing", "added", "twice"])
def test_missing_and_unknown_tensors(copy, change):
    path = copy / "model.safetensors"
    tensors = load_tensors(copy)
    if change == "missing":
        del tensors[f"{NORM}.weight"]
    elif change == "added":
        tensors["language_model.model.extra.weight"] = mx.zeros(3)
    else:
        tensors["model.norm.weight"] = tensors[f"{NORM}.weight"]
    mx.save_safetensors(str(path), tensors)
    message = {
        "missing": r"model: no tensor language_model\.model\.norm\.weight, which config\.json asks",
        "added": r"model\.extra\.weight is not in the model that config\.json describes",
        "twice": r"is a second tensor for language_model\.model\.norm\.weight",
    }[change]
    with pytest.raises(FlashMoEError, match=message):
        load(copy)
    assert len(examine(copy).problems) == 1


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"group_size": 64, "bits": 7}, r"quantization: bits = 7 is not one of 2, 3, 4, 5, 6, 8"),
        ({"group_size": 10**9, "bits": 4}, r"quantization: group_size = 1000000000 is not one of"),
        ({"bits": 4}, r"quantization lacks bits or group_size"),
        (
            {"group_size": 64, "bits": 4, QUERIES: {"group_size": 64, "bits": 8}},
            r"q_proj\.weight is U32\[256, 16\], expected \[256, 32\] of U32",
        ),
        (
            {"group_size": 64, "bits": 4, QUERIES: {"group_size": 32, "bits": 4}},
            r"q_proj\.\w+ is BF16\[256, 2\], expected \[256, 4\]",
        ),
        ({"group_size": 64, "bits": 4, QUERIES: False}, r"q_proj.* is "),
        ({"group_size": 64, "bits": 4, QUERIES: {"bits": "4"}}, r"q_proj'\]: bits = '4' is not"),
        ({"group_size": 64, "bits": 4, QUERIES: {"x": 4}}, r"a model that cannot be built \(TypeE"),
    ],
)
def test_quantization_that_contradicts_the_shapes(copy, entry, message):
    path = copy / "config.json"
    config = read_config(copy)
    path.unlink()
    path.write_text(json.dumps(config | {"quantization": entry}))
    with pytest.raises(FlashMoEError, match=message):
        load(copy)
    assert examine(copy).problems


def test_the_largest_model_takes_no_memory(root):
    """Parameters stay unevaluated, so a terabyte of them takes no memory."""
    config = read_config(root / "packed")
    config["text_config"] |= {
        "vocab_size": 1 << 24, "num_experts": 1 << 16, "moe_intermediate_size": 1 << 18,
        "linear_num_value_heads": 4096,
    }  # fmt: skip
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    with pytest.raises(FlashMoEError, match=r"expected \[|not a quantization of"):
        args = ModelArgs.from_dict(config)
        check_trunk(root, checkpoint_headers(root / "packed"), args)
    assert mx.get_peak_memory() - before < 1 << 20


def test_the_random_state_is_unchanged(root):
    """Building the model for the comparison does not advance the user's random state."""
    mx.random.seed(5)
    expected = mx.random.uniform(shape=(4,)).tolist()
    mx.random.seed(5)
    check(root / "packed")
    assert mx.random.uniform(shape=(4,)).tolist() == expected


def test_the_first_fault_in_the_file_is_named(root):
    """With its file, and the shape in the file, even if loading transposes it."""
    args = ModelArgs.from_dict(read_config(root / "hf"))
    headers = checkpoint_headers(root / "hf")
    name = "model.language_model.layers.0.linear_attn.conv1d.weight"
    file, found = headers[name]
    headers[name] = file, TensorInfo("BF16", (320, 1, 9), found.offset, found.nbytes)
    with pytest.raises(FlashMoEError, match=r"weight is BF16\[320, 1, 9\], expected \[320, 4"):
        check_trunk(root / "hf", headers, args)


# ---- conversions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: edited(m, head_dim=64), r"layers.3.self_attn.* is .*, expected \["),
        (lambda m: edited(m, linear_conv_kernel_dim=3), r"conv1d.weight .* expected \[320, 3, 1\]"),
        (lambda m: edited(m, num_attention_heads=10**9), r"num_attention_heads = 10{9} is more"),
        (lambda m: edited(m, vocab_size=10**30), r"vocab_size = 10{30} is more than 16777216"),
        (lambda m: (m / "tokenizer.json").unlink(), r"model: no tokenizer \(none of tok"),
        (lambda m: (m / "tokenizer.json").write_text("{"), r"its tokenizer cannot be loaded \(J"),
        (lambda m: (m / "tokenizer.json").write_bytes(b"\xff"), r"its tokenizer cannot be loaded"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["hf", "stock"])
def test_a_conversion_that_would_not_load_is_refused(root, tmp_path, kind, spoil, message, capsys):
    source, out = tmp_path / "model", tmp_path / "out"
    source.mkdir()
    for path in (root / kind).iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    spoil(source)
    quantize = ["-q"] if kind == "hf" else []
    assert cli.main(["--hf-path", str(source), "--mlx-path", str(out), *quantize]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(message, error)
    assert not out.exists()


def test_written_files_are_checked_before_the_manifest(root, tmp_path, monkeypatch):
    """As if a disk returns other bytes than were written."""
    from flashmoe_mlx.convert.write import files

    real = files.write_file

    def write(path: Path, content: bytes) -> object:
        if path.name == "README.md":  # the last file before the manifest
            (path.parent / "tokenizer.json").write_text("{}")
        return real(path, content)

    monkeypatch.setattr(files, "write_file", write)
    with pytest.raises(FlashMoEError, match=r"out: its tokenizer cannot be loaded .*delete .*out"):
        convert(root / "stock", tmp_path / "out")
    assert not (tmp_path / "out/model_experts/manifest.json").exists()
