"""The bytes that flashmoe-convert writes, against slices of the source and stock mlx-lm."""

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from convert_helpers import (
    EXPERTS,
    LAYERS,
    TEXT_CONFIG,
    Weights,
    extras,
    fused,
    layer,
    load,
    make_config,
    make_weights,
    read,
    same,
    save,
    separate,
    spell,
    write_tokenizer,
)  # fmt: skip
from mlx_lm.convert import convert as stock_convert
from mlx_lm.utils import load_model

from flashmoe_mlx.convert import convert
from flashmoe_mlx.convert.plan import plan
from flashmoe_mlx.convert.write import execute
from flashmoe_mlx.convert.write import files as write
from flashmoe_mlx.errors import FlashMoEError
from flashmoe_mlx.format.layout import open_layout
from flashmoe_mlx.format.names import FIELDS, PROJECTIONS

PREFIX = "language_model.model.layers"


def hf_like(directory: Path, config: dict[str, Any] | None = None, **kwargs: Any) -> Path:
    config = config or make_config()
    return save(directory, config, spell(fused(make_weights(config, **kwargs)), "model."))


def stock_like(directory: Path, config: dict[str, Any] | None = None, **kwargs: Any) -> Path:
    """Convert a bfloat16 checkpoint with stock mlx-lm."""
    write_tokenizer(hf_like(directory.with_name("hf-" + directory.name), config))
    source = directory.with_name("hf-" + directory.name)
    stock_convert(str(source), str(directory), quantize=True, **kwargs)
    return directory


def assert_trunk_equal(out: Path, stock: Path) -> None:
    expected = {k: v for k, v in load(stock).items() if "switch_mlp" not in k}
    found = load(out)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not same(found[name], expected[name])] == []


def assert_experts_equal(out: Path, stock: Path, experts: int = EXPERTS) -> None:
    """Every expert tensor of `out` is the slice of the stacked tensor of `stock`."""
    expected = load(stock)
    for number in range(LAYERS):
        found = layer(out, number)
        assert len(found) == experts * len(FIELDS)
        for field in FIELDS:
            stacked = expected[f"{PREFIX}.{number}.mlp.switch_mlp.{field}"]
            for expert in range(experts):
                assert same(found[f"experts.{expert}.{field}"], stacked[expert])


# --- floats to quantized -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "group", "dtype"),
    [(4, 64, None), (8, 32, None), (6, 64, "float16"), (5, 32, "float32")],
)
def test_equals_stock(root, tmp_path, bits, group, dtype):
    options = {"quantize": True, "q_bits": bits, "q_group_size": group, "dtype": dtype}
    stock_convert(str(root / "hf"), str(tmp_path / "stock"), **options)
    convert(str(root / "hf"), tmp_path / "out", **options)
    assert_trunk_equal(tmp_path / "out", tmp_path / "stock")
    assert_experts_equal(tmp_path / "out", tmp_path / "stock")
    ours, stock = (read(tmp_path / name / "config.json") for name in ("out", "stock"))
    assert ours["quantization"] == ours["quantization_config"] == stock["quantization"]
    assert ours["text_config"] == TEXT_CONFIG


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_casts_before_quantizing(tmp_path, dtype):
    source = hf_like(tmp_path / "hf", dtype=dtype)
    write_tokenizer(source)
    stock_convert(str(source), str(tmp_path / "stock"), quantize=True)
    convert(str(source), tmp_path / "out", quantize=True)
    assert_trunk_equal(tmp_path / "out", tmp_path / "stock")
    assert_experts_equal(tmp_path / "out", tmp_path / "stock")


@pytest.mark.parametrize("prefix", ["model.", "model.language_model.", "language_model.model."])
@pytest.mark.parametrize("style", [fused, separate])
@pytest.mark.parametrize("shards", [1, 4])
def test_every_naming_gives_the_same_bytes(root, tmp_path, prefix, style, shards):
    config = make_config()
    if prefix == "model.":  # text-only checkpoints have a flat config
        config = config["text_config"]
    weights = spell(style(make_weights(make_config())), prefix) | extras()
    source = save(tmp_path / "src", config, weights, shards)
    convert(str(source), tmp_path / "out", quantize=True)
    assert_trunk_equal(tmp_path / "out", root / "stock")
    assert_experts_equal(tmp_path / "out", root / "stock")


def test_float_mlx_source_is_not_sanitised_twice(root, tmp_path):
    shutil.copytree(root / "hf", tmp_path / "hf")
    stock_convert(str(tmp_path / "hf"), str(tmp_path / "mlx"))
    convert(str(tmp_path / "mlx"), tmp_path / "out", quantize=True)
    assert_trunk_equal(tmp_path / "out", root / "stock")
    assert_experts_equal(tmp_path / "out", root / "stock")


PARTS = "weight", "scales", "biases"


def restored(codes, scales, biases, group_size, bits):
    """Dequantize to float32."""
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(codes, scales, biases, group_size, bits)


def test_two_bits_keep_a_four_bit_trunk(root, tmp_path):
    options = {"quantize": True, "q_bits": 2, "q_method": "min-max"}
    convert(str(root / "hf"), tmp_path / "out", **options)
    assert_trunk_equal(tmp_path / "out", root / "stock")
    source = load(root / "hf")
    for number in range(LAYERS):
        stem = f"model.language_model.layers.{number}.mlp.experts."
        gate, up = mx.split(source[stem + "gate_up_proj"], 2, axis=1)
        found = layer(tmp_path / "out", number)
        for name, stacked in zip(PROJECTIONS, (gate, up, source[stem + "down_proj"]), strict=True):
            for expert in range(EXPERTS):
                expected = mx.quantize(stacked[expert], 64, 2)
                for part, value in zip(("weight", "scales", "biases"), expected, strict=True):
                    assert same(found[f"experts.{expert}.{name}.{part}"], value)
    entry = read(tmp_path / "out" / "config.json")["quantization"]
    assert (entry["bits"], entry["group_size"], entry["mode"]) == (4, 64, "affine")
    two = {"group_size": 64, "bits": 2, "mode": "affine"}
    assert entry[f"{PREFIX}.3.mlp.switch_mlp.down_proj"] == two
    assert entry[f"{PREFIX}.3.mlp.gate"] == {"group_size": 64, "bits": 8}


def test_stock_mlx_lm_understands_the_config(root, tmp_path):
    """Stock mlx-lm loads a 2-bit conversion with experts stacked again, from its config alone."""
    convert(str(root / "hf"), tmp_path / "out", quantize=True, q_bits=2)
    weights = load(tmp_path / "out")
    for number in range(LAYERS):
        found = layer(tmp_path / "out", number)
        for field in FIELDS:
            stacked = mx.stack([found[f"experts.{e}.{field}"] for e in range(EXPERTS)])
            weights[f"{PREFIX}.{number}.mlp.switch_mlp.{field}"] = stacked
    config = read(tmp_path / "out" / "config.json")
    assert config.pop("model_file") == "flashmoe_model.py"
    model, _ = load_model(save(tmp_path / "stacked", config, weights))
    assert mx.all(mx.isfinite(model(mx.array([[1, 2, 3]])))).item()


def test_tied_embeddings_drop_the_head(tmp_path):
    config = make_config(tie_word_embeddings=True)
    weights = spell(fused(make_weights(config)), "model.")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    source = save(tmp_path / "hf", config, weights)
    convert(str(source), tmp_path / "out", quantize=True)
    assert not [name for name in load(tmp_path / "out") if "lm_head" in name]


def test_a_log_keeps_its_precision(root, tmp_path):
    convert(str(root / "hf"), tmp_path / "out", quantize=True, dtype="float16")
    found = load(tmp_path / "out")
    assert found[f"{PREFIX}.0.linear_attn.A_log"].dtype == mx.float32
    assert found[f"{PREFIX}.0.linear_attn.dt_bias"].dtype == mx.float16


def test_small_blocks_and_files_change_nothing(root, tmp_path, monkeypatch):
    monkeypatch.setattr(execute, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(execute, "BATCH_BYTES", 1)
    monkeypatch.setattr(plan, "SHARD_BYTES", 100_000)
    monkeypatch.setattr(write, "SYNC_BYTES", 5000)
    convert(str(root / "hf"), tmp_path / "out", quantize=True)
    assert_trunk_equal(tmp_path / "out", root / "stock")
    assert_experts_equal(tmp_path / "out", root / "stock")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 2
    index = read(tmp_path / "out" / "model.safetensors.index.json")
    assert set(index["weight_map"].values()) == set(files)
    assert index["weight_map"].keys() == load(tmp_path / "out").keys()
    nbytes = sum(v.nbytes for v in load(tmp_path / "out").values())
    assert index["metadata"]["total_size"] == nbytes


# --- quantized to quantized ----------------------------------------------------------------------


def router_bits(bits: int):
    def predicate(path: str, module: Any) -> bool | dict[str, int]:
        return {"group_size": 64, "bits": bits} if path.endswith("mlp.gate") else True

    return predicate


@pytest.mark.parametrize(
    ("bits", "group", "dtype", "router"),
    [
        (4, 64, None, 8),
        (8, 32, None, 8),
        (4, 128, "float16", 8),
        (4, 64, None, 4),
        (3, 64, None, 8),
    ],
)
def test_repack_copies_every_byte(tmp_path, bits, group, dtype, router):
    source = stock_like(
        tmp_path / "mlx", make_config(moe_intermediate_size=128), q_bits=bits, q_group_size=group,
        dtype=dtype, quant_predicate=router_bits(router),
    )  # fmt: skip
    convert(str(source), tmp_path / "out")
    assert_trunk_equal(tmp_path / "out", source)
    before, after = (open_layout(path, LAYERS, EXPERTS) for path in (source, tmp_path / "out"))
    assert (before.kind, after.kind) == ("stock", "packed")
    for old, new in zip(before.layers, after.layers, strict=True):
        for expert in range(EXPERTS):
            (span,) = new.spans(expert)
            record = span.file.read_bytes()[span.offset : span.offset + new.record_bytes]
            pieces = b""
            for field in old.fields:
                start = field.offset + expert * field.stride
                pieces += field.file.read_bytes()[start : start + field.nbytes]
            assert record == pieces
    entries = [read(path / "config.json")["quantization"] for path in (source, tmp_path / "out")]
    assert entries[0] == entries[1]


def test_equal_bits_are_not_requantized(root, tmp_path):
    convert(str(root / "stock"), tmp_path / "plain")
    convert(str(root / "stock"), tmp_path / "asked", quantize=True, q_bits=4, q_group_size=64)
    convert(str(root / "hf"), tmp_path / "direct", quantize=True)
    for number in range(LAYERS):
        name = f"model_experts/layer_{number:02d}.safetensors"
        plain = (tmp_path / "plain" / name).read_bytes()
        assert plain == (tmp_path / "asked" / name).read_bytes()
        assert plain == (tmp_path / "direct" / name).read_bytes()


def requantized(weights: Weights, path: str, before: tuple[int, int], after: tuple[int, int]):
    codes, *others = (weights[f"{path}.{part}"] for part in ("weight", "scales", "biases"))
    floats = mx.dequantize(codes, *(x.astype(mx.float32) for x in others), *before)
    codes, *new = mx.quantize(floats, *after)
    return [codes, *(x.astype(others[0].dtype) for x in new)]


def test_requantizes_from_float32(tmp_path):
    source = stock_like(tmp_path / "mlx", q_bits=8, q_group_size=32)
    options = {"quantize": True, "q_bits": 2, "q_group_size": 64, "q_method": "min-max"}
    convert(str(source), tmp_path / "out", **options)
    assert_trunk_equal(tmp_path / "out", source)
    weights = load(source)
    for number in range(LAYERS):
        found = layer(tmp_path / "out", number)
        for name in PROJECTIONS:
            path = f"{PREFIX}.{number}.mlp.switch_mlp.{name}"
            new = requantized(weights, path, (32, 8), (64, 2))
            for part, stacked in zip(("weight", "scales", "biases"), new, strict=True):
                for expert in range(EXPERTS):
                    assert same(found[f"experts.{expert}.{name}.{part}"], stacked[expert])
    entry = read(tmp_path / "out" / "config.json")["quantization"]
    assert entry["bits"] == 8
    assert entry[f"{PREFIX}.0.mlp.switch_mlp.up_proj"]["bits"] == 2


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("bits, method, better", [
    (2, None, True), (2, "least-squares", True), (2, "min-max", False),
    (4, None, False), (4, "least-squares", True),
])  # fmt: skip
def test_least_squares_come_closer(root, tmp_path, quantized, bits, method, better):
    """From floats and from 8-bit codes; only if requested, or below 4 bits."""
    source = stock_like(tmp_path / "mlx", q_bits=8, q_group_size=32) if quantized else root / "hf"
    errors = []
    for name, chosen in (("out", method), ("plain", "min-max")):
        options = {"quantize": True, "q_bits": bits, "q_group_size": 64, "q_method": chosen}
        convert(str(source), tmp_path / name, **options)
        experts = layer(tmp_path / name, 0)
        if quantized:
            path = f"{PREFIX}.0.mlp.switch_mlp.down_proj"
            expected = restored(*(load(source)[f"{path}.{p}"][1] for p in PARTS), 32, 8)
        else:
            stem = "model.language_model.layers.0.mlp.experts."
            expected = load(source)[stem + "down_proj"][1].astype(mx.float32)
        found = restored(*(experts[f"experts.1.down_proj.{p}"] for p in PARTS), 64, bits)
        errors.append(((found - expected) ** 2).sum().item())
    assert errors[0] < 0.95 * errors[1] if better else errors[0] == errors[1]


def test_an_unknown_method_is_refused(root, tmp_path):
    with pytest.raises(
        FlashMoEError, match="q_method = 'best': expected one of min-max, least-squares"
    ):
        convert(str(root / "hf"), tmp_path / "out", quantize=True, q_method="best")


def test_mixed_source_copies_matrices_with_the_target_bits(tmp_path):
    def predicate(path: str, module: Any) -> bool | dict[str, int]:
        return {"group_size": 64, "bits": 6} if "switch_mlp.down_proj" in path else True

    source = stock_like(tmp_path / "mlx", quant_predicate=predicate)
    convert(str(source), tmp_path / "out", quantize=True, q_bits=4)
    weights, found = load(source), layer(tmp_path / "out", 1)
    path = f"{PREFIX}.1.mlp.switch_mlp"
    assert same(found["experts.5.up_proj.weight"], weights[f"{path}.up_proj.weight"][5])
    down = requantized(weights, f"{path}.down_proj", (64, 6), (64, 4))
    assert same(found["experts.5.down_proj.weight"], down[0][5])
    # The source named the projection's 6 bits; 4 are the default.
    assert f"{path}.down_proj" not in read(tmp_path / "out" / "config.json")["quantization"]


def test_packed_directory_is_a_source_too(root, tmp_path):
    convert(str(root / "stock"), tmp_path / "packed")
    convert(str(root / "stock"), tmp_path / "linked", link=True)
    convert(str(root / "stock"), tmp_path / "two", quantize=True, q_bits=2)
    for name in ("packed", "linked"):
        convert(str(tmp_path / name), tmp_path / f"{name}2", quantize=True, q_bits=2)
        assert_trunk_equal(tmp_path / f"{name}2", root / "stock")
        for number in range(LAYERS):
            file = f"model_experts/layer_{number:02d}.safetensors"
            assert (tmp_path / f"{name}2" / file).read_bytes() == (
                tmp_path / "two" / file
            ).read_bytes()
