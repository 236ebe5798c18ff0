"""Conversions of other families: MLX checkpoints, and those of the Hub by mlx-lm's `sanitize`."""

import json
import re
import shutil
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from convert_helpers import Weights, contents, load, read, same
from family_helpers import (
    config_of,
    fp8,
    mark_fp8,
    mlx_checkpoint,
    published,
    stock_weights,
    streamed_logits,
    write,
)
from mlx_lm.convert import convert as stock_convert
from mlx_lm.utils import load_model

from flashmoe_mlx.convert import convert
from flashmoe_mlx.convert.source.foreign import Foreign
from flashmoe_mlx.convert.source.open import open_source
from flashmoe_mlx.convert.verify.repair import repair
from flashmoe_mlx.convert.verify.verify import verify
from flashmoe_mlx.convert.write import execute
from flashmoe_mlx.errors import FlashMoEError

MLX = [("qwen3_moe", 4, 64, "affine"), ("gpt_oss", 4, 32, "mxfp4"), ("mixtral", 8, 32, "mxfp8"),
       ("qwen3_moe", 4, 16, "nvfp4")]  # fmt: skip
PROMPT = [5, 17, 33, 2, 90, 41, 7]
TOKENS = mx.array([PROMPT])


def experts_of(directory: Path) -> Weights:
    """Return a converted directory's experts under mlx-lm's names, stacked."""
    found: Weights = {}
    for layer in read(directory / "model_experts/manifest.json")["layers"]:
        tensors = mx.load(str(directory / "model_experts" / layer["file"]))
        for field in layer["fields"]:
            every = [tensors[f"experts.{e}.{field}"] for e in range(len(layer["records"]))]
            found[f"{layer['module']}.{field}"] = mx.stack(every)
    return found


def same_tensors(stock: Path, converted: Path) -> None:
    whole, mine = load(stock), load(converted) | experts_of(converted)
    assert whole.keys() == mine.keys()
    assert [name for name in whole if not same(whole[name], mine[name])] == []


@pytest.fixture(scope="module", params=MLX, ids=lambda p: f"{p[0]}-{p[3]}")
def checkpoint(request, tmp_path_factory) -> Path:
    return mlx_checkpoint(tmp_path_factory.mktemp("mlx") / "source", *request.param)


def test_an_mlx_checkpoint_is_copied(checkpoint, tmp_path):
    stock = load_model(checkpoint)[0](TOKENS).astype(mx.float32)
    convert(checkpoint, tmp_path / "out")
    convert(checkpoint, tmp_path / "linked", link=True)
    for out in (tmp_path / "out", tmp_path / "linked", checkpoint):
        logits = streamed_logits(out, PROMPT, expert_cache=1 << 18)
        assert np.allclose(logits, stock, rtol=0, atol=1e-4 * float(mx.abs(stock).max()))
    same_tensors(checkpoint, tmp_path / "out")
    assert verify(tmp_path / "out") == []
    trust = {"trust_remote_code": True}
    model, _ = mlx_lm.load(str(tmp_path / "out"), tokenizer_config=trust, **trust)  # by the shim
    with model:
        assert np.allclose(model(TOKENS).astype(mx.float32), logits, rtol=0, atol=1e-4)


def test_one_damaged_expert_is_repaired(checkpoint, tmp_path):
    convert(checkpoint, tmp_path / "out")
    before = contents(tmp_path / "out")
    path = tmp_path / "out/model_experts/layer_01.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-3] ^= 4
    path.write_bytes(damaged)
    problems = verify(tmp_path / "out")
    assert [(p.layer, p.expert is not None) for p in problems] == [(1, True)]
    assert repair(tmp_path / "out", problems, checkpoint) == []
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("family, bits", [
    ("qwen3_moe", 4), ("mixtral", 8), ("mixtral", None), ("deepseek_v3", 4), ("gpt_oss", None),
])  # fmt: skip
def test_a_hub_checkpoint_gives_the_bytes_of_mlx_lm(family, bits, tmp_path):
    config, weights = published(family)
    names = sorted(weights)
    halves = [{n: weights[n] for n in names[k::2]} for k in range(2)]
    source = write(tmp_path / "hub", config, *halves)
    if family == "deepseek_v3":
        for path in source.glob("*.safetensors"):
            mark_fp8(path)
    options = {"quantize": True, "q_bits": bits, "q_group_size": 64} if bits else {}
    method = {"q_method": "min-max"} if bits else {}
    convert(source, tmp_path / "out", **options, **method)
    stock_convert(str(source), str(tmp_path / "stock"), **options)
    same_tensors(tmp_path / "stock", tmp_path / "out")
    assert verify(tmp_path / "out") == []
    stock = load_model(tmp_path / "stock")[0](TOKENS).astype(mx.float32)
    assert (
        mx.abs(streamed_logits(tmp_path / "out", PROMPT) - stock).max() < 0.1 * mx.abs(stock).max()
    )  # bfloat16


@pytest.mark.parametrize("family, pieces", [
    ("mixtral", {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}),
    ("deepseek_v3", {name: name for name in ("gate_proj", "up_proj", "down_proj")}),
    ("gpt_oss", {}),  # gate and up come interleaved
])  # fmt: skip
def test_large_experts_are_converted_a_projection_at_a_time(family, pieces, tmp_path, monkeypatch):
    config, weights = published(family)
    source = write(tmp_path / "hub", config, weights)
    if family == "deepseek_v3":
        mark_fp8(source / "model-00001-of-00001.safetensors")
    assert open_source(source, "hub").foreign.pieces == pieces
    options = {"quantize": True, "q_group_size": 32}
    convert(source, tmp_path / "small", **options)
    monkeypatch.setattr(execute, "BATCH_BYTES", 1)
    convert(source, tmp_path / "large", dry_run=True, **options)  # computes one expert
    convert(source, tmp_path / "large", **options)
    assert contents(tmp_path / "large") == contents(tmp_path / "small")


def test_stacked_floats_with_linear_biases_are_quantized(tmp_path):
    config = config_of("gpt_oss")
    source = write(tmp_path / "source", config, stock_weights(config))
    options = {"quantize": True, "q_bits": 4, "q_group_size": 64}
    convert(source, tmp_path / "out", **options)
    stock_convert(str(source), str(tmp_path / "stock"), **options)
    same_tensors(tmp_path / "stock", tmp_path / "out")


def of_fp8(codes: mx.array, scales: mx.array) -> np.ndarray:
    """Return block-FP8 in float32, by the definition of E4M3 and a scale per 128 x 128."""
    bits = np.array(codes).astype(np.int32)
    exponents, mantissas = bits >> 3 & 15, (bits & 7) / 8
    sizes = np.where(exponents, (1 + mantissas) * 2.0 ** (exponents - 7), mantissas * 2.0**-6)
    rows, columns = (np.arange(n) // 128 for n in codes.shape)
    return np.where(bits >> 7, -sizes, sizes) * np.array(scales)[rows[:, None], columns]


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_block_fp8_is_dequantized(family, tmp_path):
    """Experts and trunk, to bfloat16, by a dequantization of this test's own.

    mlx-lm itself dequantizes deepseek_v3, but not qwen3_moe.
    """
    config, weights = published(family)
    if family == "qwen3_moe":
        weights = fp8(weights)
    source = write(tmp_path / "hub", config, weights)
    mark_fp8(next(source.glob("*.safetensors")))
    convert(source, tmp_path / "out")
    fields, trunk = experts_of(tmp_path / "out"), load(tmp_path / "out")
    names = [name for name in weights if f"{name}_scale_inv" in weights]
    compared = 0
    for name in names:
        truth = mx.array(of_fp8(weights[name], weights[f"{name}_scale_inv"])).astype(mx.bfloat16)
        if found := re.match(r"(.*)\.experts\.(\d+)\.(.*)$", name):
            assert same(fields[f"{found[1]}.switch_mlp.{found[3]}"][int(found[2])], truth), name
        elif "kv_b_proj" in name:  # mlx-lm splits it in two
            continue
        else:
            assert same(trunk[name], truth), name
        compared += 1
    split = sum("kv_b_proj" in name for name in names)
    assert compared == len(names) - split > 0


def test_an_interrupted_conversion_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    config, weights = published("qwen3_moe")
    source = write(tmp_path / "hub", config, weights)
    convert(source, tmp_path / "whole", quantize=True)
    real, count = Foreign.expert, []

    def stop(*arguments):
        count.append(arguments)
        if len(count) == 12:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(Foreign, "expert", stop)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", quantize=True)
    assert not (tmp_path / "out/model_experts/manifest.json").exists()
    convert(source, tmp_path / "out", quantize=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_requantized_from_mxfp4(tmp_path):
    """Codes of another mode become affine; linear biases stay."""
    source = mlx_checkpoint(tmp_path / "source", "gpt_oss", 4, 32, "mxfp4")
    convert(source, tmp_path / "out", quantize=True, q_bits=8, q_group_size=32)
    before, after = load(source), experts_of(tmp_path / "out")
    path = "model.layers.1.mlp.experts.down_proj"
    old = mx.dequantize(before[f"{path}.weight"], before[f"{path}.scales"], None, 32, 4, "mxfp4")
    parts = (after[f"{path}.{part}"] for part in ("weight", "scales", "biases"))
    new = mx.dequantize(*parts, group_size=32, bits=8)
    assert mx.abs(new - old).max() < mx.abs(old).max() / 64  # 8 bits, and bfloat16 scales
    assert same(before[f"{path}.bias"], after[f"{path}.bias"])
    entry = read(tmp_path / "out/config.json")["quantization"][path]
    assert entry == {"group_size": 32, "bits": 8, "mode": "affine"}


def refused(source: Path, out: Path, **options) -> str:
    with pytest.raises(FlashMoEError) as caught:
        convert(source, out, **options)
    assert not (out / "model_experts/manifest.json").exists()
    return str(caught.value)


def test_what_cannot_be_converted_is_named(tmp_path):
    config, weights = published("qwen3_moe")
    gone = {k: v for k, v in weights.items() if ".experts.3." not in k}
    source = write(tmp_path / "gone", config, gone)
    message = refused(source, tmp_path / "a", quantize=True)
    assert "model.layers.0.mlp.switch_mlp: no tensor of expert 3 found" in message
    source = write(tmp_path / "floats", config, weights)
    message = refused(source, tmp_path / "b", dtype="float16")
    assert "--dtype float16: the source keeps its F32 weights (layer 0 gate_proj)" in message
    more = weights | {"model.layers.0.mlp.experts.8.up_proj.weight": mx.zeros((64, 128))}
    source = write(tmp_path / "more", config, more)
    message = refused(source, tmp_path / "f", quantize=True)
    assert "experts.8.up_proj.weight is of expert 8, but config.json asks for 8 experts" in message
    key = "model.layers.0.mlp.experts.1.up_proj.weight"
    source = write(tmp_path / "wide", config, weights | {key: mx.zeros((65, 128))})
    message = refused(source, tmp_path / "g", quantize=True)
    assert "switch_mlp.up_proj.weight: an expert has ((65, 128), 'F32'), but the first" in message
    weights[key] = mx.full(weights[key].shape, float("nan"))
    source = write(tmp_path / "nan", config, weights)
    assert "NaN or infinity" in refused(source, tmp_path / "c", quantize=True)
    dense = config_of("qwen3_moe", mlp_only_layers=[0, 1, 2])
    source = write(tmp_path / "dense", dense, stock_weights(dense))
    assert "has no routed experts" in refused(source, tmp_path / "d", quantize=True)
    shutil.copytree(tmp_path / "floats", tmp_path / "unknown")
    (tmp_path / "unknown/config.json").write_text(json.dumps(config | {"model_type": "no_such"}))
    message = refused(tmp_path / "unknown", tmp_path / "e", quantize=True)
    assert "'no_such' is not a model of the installed mlx-lm" in message
