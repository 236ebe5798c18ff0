"""The model against transformers: logits and greedy tokens of tests/fixtures/transformers."""

import json
import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_mlx.models.qwen3_5.model import Model, ModelArgs

FIXTURE = Path(__file__).parents[1] / "fixtures" / "transformers"
TOLERANCE = 2e-4

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # read at the first matmul; its 10 bits are too few


def fuse(weights: dict[str, mx.array], layers: int, experts: int) -> dict[str, mx.array]:
    """Fuse per-expert tensors as in the Hub's checkpoints, with their prefix."""
    fused = {name: w for name, w in weights.items() if ".experts." not in name}
    for layer in range(layers):
        prefix = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            mx.stack([weights[f"{prefix}.{e}.{projection}.weight"] for e in range(experts)])
            for projection in ("gate_proj", "up_proj", "down_proj")
        )
        fused[f"{prefix}.gate_up_proj"] = mx.concatenate([gate, up], axis=1)
        fused[f"{prefix}.down_proj"] = down
    return {
        "model.language_model." + name.removeprefix("model.")
        if name != "lm_head.weight"
        else name: w
        for name, w in fused.items()
    }


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with np.load(FIXTURE / "expected.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module", params=["per-expert", "fused"])
def model(request) -> Model:
    config = json.loads((FIXTURE / "config.json").read_text())
    # In float32: rounding a norm's 1 + w to bfloat16 changes the model.
    weights = {
        name: w.astype(mx.float32)
        for name, w in mx.load(str(FIXTURE / "model.safetensors")).items()
    }
    if request.param == "fused":
        weights = fuse(weights, config["num_hidden_layers"], config["num_experts"])
        config = {"model_type": "qwen3_5_moe", "text_config": config}
    model = Model(ModelArgs.from_dict(config))
    model.load_weights(list(model.sanitize(weights).items()), strict=True)
    model.set_dtype(mx.float32)
    model.eval()
    return model


@pytest.mark.parametrize("name", ["one", "short", "long", "batch"])
@pytest.mark.parametrize("chunk", [0, 1, 7], ids=["whole", "token by token", "in sevens"])
def test_logits(model, expected, name, chunk):
    prompt, want = mx.array(expected[f"{name}_prompt"]), expected[f"{name}_logits"]
    cache = model.make_cache() if chunk else None
    step = chunk or prompt.shape[1]
    parts = [
        model(prompt[:, start : start + step], cache=cache)
        for start in range(0, prompt.shape[1], step)
    ]
    got = np.array(mx.concatenate(parts, axis=1))[:, -want.shape[1] :]
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)


def test_greedy(model, expected):
    cache = model.make_cache()
    token = mx.array(expected["short_prompt"])
    tokens = []
    for _ in range(expected["greedy"].shape[1]):
        token = model(token, cache=cache)[:, -1:].argmax(-1)
        tokens.append(token.item())
    assert tokens == expected["greedy"][0].tolist()
