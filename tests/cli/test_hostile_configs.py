"""Counts and entries of config.json have bounds, in every command."""

import json
from pathlib import Path

import pytest
from hostile_helpers import CONFIG, copy_bundled, edit, refused

from flashmoe_mlx import FlashMoEError
from flashmoe_mlx.cli import plan
from flashmoe_mlx.convert import cli
from flashmoe_mlx.format.config_entries import MOST
from flashmoe_mlx.models.qwen3_5.args import ModelArgs
from flashmoe_mlx.settings import StreamConfig, parse_size


@pytest.fixture
def model(tmp_path) -> Path:
    return copy_bundled(tmp_path / "model")


@pytest.mark.parametrize("name", MOST)
@pytest.mark.parametrize("factor", [1, 10**30])
def test_every_count_has_a_bound(name, factor):
    """Counts above the bound allocate nothing; the largest known model stays below it."""
    value = MOST[name] * factor + 1
    config = CONFIG | {"text_config": CONFIG["text_config"] | {name: value}}
    message = rf"{name} = {value} is more than {MOST[name]}, above"
    with pytest.raises(FlashMoEError, match=message):
        ModelArgs.from_dict(config)
    assert getattr(plan.named_args("397b"), name) * 16 <= MOST[name]


def test_all_counts_are_known():
    counts = {name for name, kind in ModelArgs.__annotations__.items() if kind is int}
    assert counts == MOST.keys()


@pytest.mark.parametrize(
    "entries",
    [
        {"num_hidden_layers": 10**9, "layer_types": None},
        {"num_attention_heads": 10**9},
        {"vocab_size": 10**30},
        {"num_experts": 10**12},
    ],
)
def test_flashmoe_plan_refuses_at_once(model, entries, capsys):
    """Without a bound, this count takes all memory of the machine."""
    config = CONFIG | {"text_config": CONFIG["text_config"] | entries}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as ended:
        plan.main(["--model", str(model), "--machine", "m3-max-48"])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and f"config.json: {next(iter(entries))} = " in error
    refused(model, rf"{next(iter(entries))} = 10+ is more than")
    assert cli.main(["--hf-path", str(model), "--mlx-path", str(model / "out")]) == 2


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"partial_rotary_factor": 1e-9}, r"= 1e-09 of head_dim = 64 rotates 0 dimensions"),
        ({"partial_rotary_factor": 0.02}, r"= 0\.02 of head_dim = 64 rotates 1 dimensions"),
        ({"partial_rotary_factor": 0.05}, r"rotates 3 dimensions, and RoPE needs an even number"),
        ({"partial_rotary_factor": float("nan")}, r"partial_rotary_factor = nan is not a number"),
        ({"rope_theta": float("inf")}, r"rope_theta = inf is more than"),
        ({"rope_theta": 10**400}, r"rope_theta = 10+ is more than"),
        ({"rope_type": "sideways"}, r"model that cannot be built \(ValueError: Unsupported RoPE"),
        ({"rope_type": "yarn"}, r"a model that cannot be built \(KeyError: 'factor'\)"),
        ({"rope_type": [1]}, r"a model that cannot be built \("),
    ],
)
def test_rope(model, entries, message):
    rope = CONFIG["text_config"]["rope_parameters"] | {"type": None} | entries
    text = CONFIG["text_config"] | {"rope_parameters": rope}
    (model / "config.json").write_text(json.dumps(CONFIG | {"text_config": text}))
    refused(model, message)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"num_key_value_heads": 3}, r"num_attention_heads = 4 is not a multiple of num_key_value"),
        ({"rms_norm_eps": 1e300}, r"rms_norm_eps = 1e\+300 is more than"),
        ({"head_dim": 10**9}, r"head_dim = 1000000000 is more than"),
    ],
)
def test_other_entries(model, entries, message):
    config = CONFIG | {"text_config": CONFIG["text_config"] | entries}
    (model / "config.json").write_text(json.dumps(config))
    refused(model, message)


def test_quantized_activations(model):
    edit(model / "config.json", quantize_activations=True)
    refused(model, r"config\.json: quantize_activations is not supported for streamed models")


@pytest.mark.parametrize("size", ["99999TiB", "9" * 400, "9" * 400 + "GiB", 1 << 51, "1025 TiB"])
def test_more_memory_than_any_machine_has(model, size):
    with pytest.raises(FlashMoEError, match=r"is more memory than any machine has\. Give at most"):
        parse_size(size, "x")
    with pytest.raises(FlashMoEError, match=r"expert_cache = 9?1?2?.* is more memory than any"):
        StreamConfig.resolve({}, expert_cache=size)
    edit(model / "config.json", flashmoe={"expert_cache": size})
    refused(model, r"config.json \"flashmoe\": expert_cache = .* is more memory than any machine")
    assert parse_size("1024TiB", "x") == 1 << 50


@pytest.mark.parametrize(
    "setting", [{"expert_cache": "1KiB"}, {"experts_per_token": 101}, {"io_threads": 0}]
)
def test_settings_that_the_doctor_names(model, setting):
    edit(model / "config.json", flashmoe=setting)
    refused(model, next(iter(setting)))
