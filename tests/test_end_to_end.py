"""Checkpoints of every published kind, in three streamed forms, against stock mlx-lm."""

import mlx.core as mx
import mlx_lm
import pytest
from convert_helpers import (
    EXPERTS,
    extras,
    fused,
    make_config,
    make_weights,
    save,
    separate,
    spell,
    write_tokenizer,
)

from flashmoe_mlx import load
from flashmoe_mlx.convert import convert
from flashmoe_mlx.format.layout import open_layout

pytestmark = pytest.mark.usefixtures("unsynced")

WIDE = {"moe_intermediate_size": 128, "shared_expert_intermediate_size": 128}
TOKENS = mx.array([[5, 17, 3, 90, 41, 8, 8, 60, 2, 33, 71]])
PREFIXES = {
    "text-only": "model.",
    "vision-language": "model.language_model.",
    "prefixed": "language_model.model.",
}


def quantized(weights: dict, bits: int, group: int, router_bits: int) -> tuple[dict, dict]:
    """Quantize as mlx_lm.convert does, routers to `router_bits`; return weights and config."""
    result, config = {}, {"group_size": group, "bits": bits, "mode": "affine"}
    for name, value in weights.items():
        path, _, kind = name.rpartition(".")
        if "conv1d" in name:  # MLX's checkpoints have [C, 4, 1], Hugging Face's [C, 1, 4]
            value = value.moveaxis(2, 1)
        if kind != "weight" or value.ndim < 2 or value.shape[-1] % group or "conv1d" in name:
            result[name] = value
            continue
        at = bits
        if path.endswith(("mlp.gate", "shared_expert_gate")):
            at = router_bits
            config[path] = {"group_size": group, "bits": at}
        parts = mx.quantize(value, group, at)
        result |= zip([name, f"{path}.scales", f"{path}.biases"], parts, strict=True)
    return result, config


def logits_of_stock(directory) -> mx.array:
    model, _ = mlx_lm.load(str(directory))
    model.set_dtype(mx.float32)
    return model(TOKENS)


def logits_of_ours(directory) -> mx.array:
    """Stream with the smallest bank, so that every expert is a miss at first."""
    token = open_layout(directory, 4, EXPERTS).token_bytes
    model, _ = load(directory, expert_cache=2 * token)
    logits = model(TOKENS)
    assert model.expert_stats().bytes_read > 0
    return logits


@pytest.mark.parametrize(
    ("bits", "group", "router_bits", "dtype", "spelling"),
    [
        (4, 64, 8, mx.bfloat16, "text-only"),
        (4, 64, 4, mx.bfloat16, "vision-language"),
        (4, 32, 8, mx.float16, "prefixed"),
        (4, 128, 8, mx.bfloat16, "prefixed"),
        (2, 64, 4, mx.float16, "text-only"),
        (2, 128, 8, mx.bfloat16, "vision-language"),
        (8, 32, 8, mx.bfloat16, "text-only"),
        (6, 64, 8, mx.bfloat16, "text-only"),
        (3, 32, 8, mx.float32, "prefixed"),
    ],
)
def test_mlx_checkpoints(bits, group, router_bits, dtype, spelling, tmp_path):
    config = make_config(**WIDE)
    weights, entry = quantized(make_weights(config, dtype), bits, group, router_bits)
    weights = spell(weights, PREFIXES[spelling])
    if spelling == "vision-language":
        weights |= extras()
    source = save(tmp_path / "source", config | {"quantization": entry}, weights, shards=2)
    write_tokenizer(source)
    convert(source, tmp_path / "packed")
    convert(source, tmp_path / "linked", link=True)
    expected = logits_of_stock(source)
    for directory in (source, tmp_path / "packed", tmp_path / "linked"):
        assert mx.abs(logits_of_ours(directory) - expected).max() <= 1e-4


@pytest.fixture(scope="module")
def of_stock(tmp_path_factory) -> tuple[dict, dict, mx.array]:
    """Return a config, weights, and logits of stock's own conversion of these."""
    base = tmp_path_factory.mktemp("stock")
    config = make_config()
    weights = make_weights(config)
    save(base / "hub", config, spell(fused(weights), "model.language_model."))
    write_tokenizer(base / "hub")
    mlx_lm.convert(str(base / "hub"), str(base / "stock"), quantize=True, q_bits=4)
    return config, weights, logits_of_stock(base / "stock")


@pytest.mark.parametrize("spelling", PREFIXES)
@pytest.mark.parametrize("style", [fused, separate])
def test_hugging_face_checkpoints(of_stock, style, spelling, tmp_path):
    """The packed model equals stock's own conversion of the same weights."""
    config, weights, expected = of_stock
    source = save(tmp_path / "source", config, spell(style(weights), PREFIXES[spelling]) | extras())
    write_tokenizer(source)
    convert(source, tmp_path / "packed", quantize=True, q_bits=4, q_group_size=64)
    assert mx.abs(logits_of_ours(tmp_path / "packed") - expected).max() <= 1e-4
