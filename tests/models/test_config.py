"""Settings: their sources, valid values, and the size of the cache."""

import pytest
from model_helpers import CONFIG

from flashmoe_mlx.errors import FlashMoEError
from flashmoe_mlx.format.layout import ExpertLayout, Field, LayerLayout
from flashmoe_mlx.format.names import (
    canonical,
    fused_expert,
    is_expert,
    single_expert,
    stacked_expert,
)
from flashmoe_mlx.models.qwen3_5.args import ModelArgs
from flashmoe_mlx.settings import StreamConfig, parse_size
from flashmoe_mlx.store.sizing import IoPlan, plan_cache


def layout_of(experts: int, record: int, layers: int = 2) -> ExpertLayout:
    field = Field("gate_proj.weight", "U32", (1,), record, None, 0, record)
    return ExpertLayout(
        "packed", None, tuple(LayerLayout(i, experts, (field,)) for i in range(layers))
    )


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        (123, 123),
        ("123", 123),
        ("2k", 2048),
        ("2KiB", 2048),
        ("2kB", 2000),
        ("512MiB", 512 * 2**20),
        ("1.5g", 3 * 2**29),
        ("4 GiB", 4 * 2**30),
        ("1TB", 10**12),
        ("auto", "auto"),
    ],
)
def test_sizes(text, nbytes):
    assert parse_size(text, "x") == nbytes


@pytest.mark.parametrize("text", ["", "big", "-1", 0, -5, "4 GiBs", "1e9", "GiB", True, None, 1.5])
def test_bad_sizes(text):
    with pytest.raises(FlashMoEError, match=r"--cache = .* is not a size\. Write bytes or a unit"):
        parse_size(text, "--cache")


def test_explicit_settings_beat_variables_beat_config(monkeypatch):
    config = {"expert_cache": "1GiB", "io_threads": 3, "experts_per_token": 2}
    assert StreamConfig.resolve(config) == StreamConfig(2**30, 3, 2)
    monkeypatch.setenv("FLASHMOE_EXPERT_CACHE", "2GiB")
    monkeypatch.setenv("FLASHMOE_IO_THREADS", "5")
    monkeypatch.setenv("FLASHMOE_STATS", "1")
    assert StreamConfig.resolve(config) == StreamConfig(2**31, 5, 2, stats=True)
    explicit = {"expert_cache": 7, "io_threads": "9", "experts_per_token": None}
    assert StreamConfig.resolve(config, **explicit) == StreamConfig(7, 9, 2, stats=True)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("FLASHMOE_EXPERT_CACHE", "lots", "FLASHMOE_EXPERT_CACHE = 'lots' is not a size"),
        ("FLASHMOE_IO_THREADS", "0", "FLASHMOE_IO_THREADS = '0' is not a whole number"),
        ("FLASHMOE_IO_THREADS", "two", "FLASHMOE_IO_THREADS = 'two' is not a whole number"),
        ("FLASHMOE_EXPERTS_PER_TOKEN", "-1", "FLASHMOE_EXPERTS_PER_TOKEN = '-1' is not"),
        ("FLASHMOE_STATS", "perhaps", "FLASHMOE_STATS = 'perhaps' must be 1 or 0"),
    ],
)
def test_bad_variables_are_named(monkeypatch, variable, value, message):
    monkeypatch.setenv(variable, value)
    with pytest.raises(FlashMoEError, match=message):
        StreamConfig.resolve({})


def test_cache_of_a_given_size():
    plan = plan_cache(2 * 10 * 5 + 7, layout_of(8, 10), 3, 0, 10**9)
    assert (plan.slots, plan.nbytes) == (5, 100)
    assert plan_cache(10**9, layout_of(8, 10), 3, 0, 10**9).slots == 8


def test_cache_above_the_memory_is_refused():
    for available in (159, 10**9 - 1):  # also if all experts fit
        with pytest.raises(FlashMoEError, match=rf"more than the {available} bytes of memory"):
            plan_cache(10**9, layout_of(8, 10), 3, 0, available)


def test_a_cache_larger_than_the_model_holds_all_experts():
    plan = plan_cache(500, layout_of(8, 10), 3, 0, 1000)
    assert (plan.slots, plan.nbytes, plan.reason) == (8, 160, "all experts fit in memory")
    assert plan_cache(159, layout_of(8, 10), 3, 0, 1000).reason == "as asked"


def test_cache_below_one_tokens_experts_is_refused():
    with pytest.raises(FlashMoEError, match=r"= 59 bytes holds 2 .* uses 3\. Give at least 60 "):
        plan_cache(59, layout_of(8, 10), 3, 0, 10**9)


@pytest.mark.parametrize(
    ("available", "slots", "reason"),
    [
        (1000, 8, "all experts fit"),
        (400, 8, "all experts fit"),  # 160 + 100 of 400 is 65 %
        (370, 3, "one token's experts"),  # a quarter of 270 holds 3 per layer
        (50, 3, "memory is short"),
    ],
)
def test_automatic_cache(available, slots, reason):
    plan = plan_cache("auto", layout_of(8, 10), 3, 100, available)
    assert plan.slots == slots
    assert reason in plan.reason


def test_automatic_cache_takes_a_quarter():
    plan = plan_cache("auto", layout_of(100, 10), 3, 100, 1300)
    assert (plan.slots, plan.nbytes) == (15, 300)
    assert "15 experts per layer (a quarter" in str(plan)


def test_config_flat_and_nested():
    flat = ModelArgs.from_dict(CONFIG)
    nested = {"model_type": "qwen3_5_moe", "text_config": CONFIG, "tie_word_embeddings": True}
    args = ModelArgs.from_dict(nested | {"flashmoe": {"io_threads": 2}})
    assert (flat.num_experts_per_tok, flat.head_dim) == (3, 16)
    assert args.flashmoe == {"io_threads": 2}
    assert args.tie_word_embeddings


def test_older_configs_have_flat_rope_keys():
    old = {k: v for k, v in CONFIG.items() if k != "rope_parameters"}
    args = ModelArgs.from_dict(old | {"rope_theta": 5.0, "partial_rotary_factor": 0.5})
    assert args.rope_parameters["rope_theta"] == 5.0
    assert args.rope_parameters["partial_rotary_factor"] == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, r"model_type 'llama' cannot be streamed; supported are"),
        ({"num_experts_per_tok": 9}, r"num_experts_per_tok = 9, but the model has 8 experts"),
        ({"num_experts": None}, r"config\.json: no num_experts\."),
        ({"rope_parameters": None}, r"config\.json: no rope_theta"),
        ({"linear_num_value_heads": 3}, r"= 3 is not a multiple of linear_num_key_heads = 2"),
        ({"layer_types": ["full_attention"]}, r"layer_types\[0\] = 'full_attention' contradicts"),
    ],
)
def test_bad_configs(change, message):
    config = {k: v for k, v in (CONFIG | change).items() if v is not None}
    with pytest.raises(FlashMoEError, match=message):
        ModelArgs.from_dict(config)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.mlp.gate.weight", "language_model.model.layers.3.mlp.gate.weight"),
        ("model.language_model.norm.weight", "language_model.model.norm.weight"),
        ("language_model.lm_head.weight", "language_model.lm_head.weight"),
        ("lm_head.weight", "language_model.lm_head.weight"),
        ("model.visual.blocks.0.attn.qkv.weight", None),
        ("vision_tower.patch_embed.weight", None),
        ("mtp.layers.0.mlp.experts.3.up_proj.weight", None),
        ("language_model.mtp.norm.weight", None),
    ],
)
def test_names(name, expected):
    assert canonical(name) == expected


def test_expert_names():
    stacked = "language_model.model.layers.12.mlp.switch_mlp.up_proj.scales"
    assert stacked_expert(stacked) == (12, "up_proj.scales")
    assert fused_expert("model.layers.2.mlp.experts.gate_up_proj") == (2, "gate_up_proj")
    single = "model.language_model.layers.1.mlp.experts.255.down_proj.weight"
    assert single_expert(single) == (1, 255, "down_proj")
    assert all(map(is_expert, (stacked, single)))
    assert not is_expert("model.layers.0.mlp.shared_expert.up_proj.weight")
    assert not is_expert("mtp.layers.0.mlp.experts.0.up_proj.weight")


def test_direct_reads_leave_room_for_a_chunk_of_a_prompt():
    """Slots then take the rest of 70 % of memory, unless activations need more."""
    direct = IoPlan(True, "as asked")
    experts = layout_of(100, 10), 3, 100  # 20 bytes for a slot in each layer
    assert plan_cache("auto", *experts, 1300, direct).slots == (0.7 * 1300 - 100) // 20
    on_a_card = plan_cache("auto", *experts, 1300, apart=True)
    assert on_a_card.slots == (0.7 * 1300 - 100) // 20 and not on_a_card.io.direct
    tight = plan_cache("auto", *experts, 1300, direct, activations=800)
    assert (tight.slots, tight.reason) == (20, "what trunk and activations leave")
    assert plan_cache("auto", *experts, 1300, direct, activations=2000).slots == 3
