"""The model without files: every dtype, single and batched, as in mlx-lm's own tests."""

import copy

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3_5_moe as stock
from mlx_lm.models.cache import make_prompt_cache
from model_helpers import CONFIG, make_model, tokens

from flashmoe_mlx import Model
from flashmoe_mlx.errors import FlashMoEError


def make_stock(weights: dict, **change) -> stock.Model:
    model = stock.Model(stock.ModelArgs.from_dict(CONFIG | change))
    model.load_weights(list(weights.items()), strict=True)
    model.eval()
    return model


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_shapes_dtypes_and_cache(dtype):
    """The assertions of mlx-lm's model_test_runner."""
    model = make_model(dtype)
    if dtype != mx.float32:  # MLX's CPU gather_mm supports float32 only, gather_qmm all
        nn.quantize(model, group_size=32, bits=4)
    assert len(model.layers) == 4
    assert model.model_type == "qwen3_5_moe_text"
    logits = model(tokens(1, 2))
    assert (logits.shape, logits.dtype) == ((1, 2, 100), dtype)
    cache = make_prompt_cache(model)
    logits = model(tokens(1, 2), cache=cache)
    assert (logits.shape, logits.dtype) == ((1, 2, 100), dtype)
    logits = model(mx.argmax(logits[0, -1:, :], keepdims=True), cache=cache)
    assert (logits.shape, logits.dtype) == ((1, 1, 100), dtype)
    copy.deepcopy(model)


def test_parameter_names_are_stock_ones():
    ours = dict(tree_flatten(make_model().parameters()))
    theirs = stock.Model(stock.ModelArgs.from_dict(CONFIG)).parameters()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in tree_flatten(theirs)}


@pytest.mark.parametrize("change", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}])
def test_equals_stock_on_random_weights(change):
    model = make_model(**change)
    reference = make_stock(dict(tree_flatten(model.parameters())), **change)
    for shape in ((1, 1), (2, 9), (1, 70)):
        ours, theirs = model(tokens(*shape)), reference(tokens(*shape))
        assert mx.abs(ours - theirs).max() <= 1e-5 * mx.abs(theirs).max()


def test_steps_equal_one_call():
    model, prompt = make_model(), tokens(1, 23)
    whole = model(prompt)
    cache = model.make_cache()
    parts = [model(prompt[:, :9], cache=cache), model(prompt[:, 9:16], cache=cache)]
    parts += [model(prompt[:, i : i + 1], cache=cache) for i in range(16, 23)]
    assert mx.abs(mx.concatenate(parts, axis=1) - whole).max().item() <= 1e-5


def test_embeddings_in_place_of_tokens():
    model, prompt = make_model(), tokens(1, 5)
    embedded = model(None, input_embeddings=model.model.embed_tokens(prompt))
    assert mx.array_equal(embedded, model(prompt))


def hf_weights(model: Model) -> dict[str, mx.array]:
    """Return the weights as transformers writes them, experts fused, vision and MTP added."""
    weights = {}
    for name, value in tree_flatten(model.parameters()):
        name = name.removeprefix("language_model.")
        if name.endswith("conv1d.weight"):
            value = value.moveaxis(1, 2)
        elif name.endswith(("layernorm.weight", "model.norm.weight", "_norm.weight")):
            value = value - 1
        weights[name] = value
    for layer in range(4):
        prefix = f"model.layers.{layer}.mlp"
        gate, up, down = (
            weights.pop(f"{prefix}.switch_mlp.{p}_proj.weight") for p in ("gate", "up", "down")
        )
        weights[f"{prefix}.experts.gate_up_proj"] = mx.concatenate([gate, up], axis=1)
        weights[f"{prefix}.experts.down_proj"] = down
    return weights


def per_expert(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Split fused experts into one key per expert and projection."""
    split = {}
    for name, value in weights.items():
        base = name.rpartition(".")[0]
        if name.endswith("experts.gate_up_proj"):
            for e, (gate, up) in enumerate(zip(*mx.split(value, 2, axis=1), strict=True)):
                split[f"{base}.{e}.gate_proj.weight"] = gate
                split[f"{base}.{e}.up_proj.weight"] = up
        elif name.endswith("experts.down_proj"):
            split |= {f"{base}.{e}.down_proj.weight": down for e, down in enumerate(value)}
        else:
            split[name] = value
    return split


def prefixed(weights: dict[str, mx.array], new: str) -> dict[str, mx.array]:
    """Rename `model.` to another prefix."""
    return {
        new + n.removeprefix("model.") if n.startswith("model.") else n: v
        for n, v in weights.items()
    }


LAYOUTS = {
    "text-only": lambda w: w,
    "vision-language": lambda w: (
        prefixed(w, "model.language_model.")
        | {"model.visual.blocks.0.attn.qkv.weight": mx.ones((3, 3))}
        | {"mtp.layers.0.mlp.experts.0.up_proj.weight": mx.ones((3, 3))}
    ),
    "language_model": lambda w: {f"language_model.{n}": v for n, v in w.items()},
    "per-expert": per_expert,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_key_layout_loads(layout):
    original = make_model()
    weights = original.sanitize(LAYOUTS[layout](hf_weights(original)))
    model = make_model()
    model.load_weights(list(weights.items()), strict=True)
    # Norms took -1 and +1, which rounds.
    assert mx.abs(model(tokens(1, 8)) - original(tokens(1, 8))).max().item() <= 1e-4


def test_missing_expert_is_named():
    model = make_model()
    weights = per_expert(hf_weights(model))
    del weights["model.layers.2.mlp.experts.5.up_proj.weight"]
    with pytest.raises(FlashMoEError, match=r"layer 2 up_proj has no expert 5 \(1 of 8 missing"):
        model.sanitize(weights)


def test_a_resident_model_has_no_stream_statistics():
    model = make_model()
    assert model.expert_stats().asked == 0
    assert "resident" in model.expert_cache()
    model.close()
