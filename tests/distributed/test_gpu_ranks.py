"""Ranks with GPUs answer as one GPU does, to the bit, with all experts in memory and with few."""

from pathlib import Path

import mlx.core as mx
import pytest
from families import TOP_K, make
from family_answers import token_bytes
from metal_cpu import require_bench
from ranks import run
from shared_folders import text_config

from flashmoe_mlx.bench.synthetic import Recipe, checkpoint
from flashmoe_mlx.format.layout import open_layout

require_bench()
ANSWER = Path(__file__).with_name("gpu_answer.py")
FAMILY, ALL = "qwen3_moe", 1 << 30  # bytes


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Return logits, and the steps in one trace, by ranks, rank, model and cache."""
    folder, found = tmp_path_factory.mktemp("gpus"), {}
    tiny = checkpoint(Recipe("tiny", 4, 512, 4), folder)
    (folder / FAMILY).mkdir()
    stock = make(FAMILY, folder / FAMILY, {"bits": 4, "group_size": 32, "mode": "affine"})
    sizes = text_config(tiny)
    least = open_layout(tiny, sizes["num_hidden_layers"], sizes["num_experts"]).token_bytes
    few = {tiny.name: sizes["num_experts_per_tok"] * least, FAMILY: TOP_K * token_bytes(stock)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASHMOE_KERNELS", "custom")
        patch.setenv("FLASHMOE_SHARDING", "exact")
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        for ranks in (1, 3):
            (out := folder / str(ranks)).mkdir()
            jobs = [f"{folder / m}:{c}" for m, least in few.items() for c in (least, ALL)]
            run(out, ranks, [ANSWER, out, *jobs])
            for path in out.glob("*.safetensors"):
                model, cache, rank, _ = path.name.split(".")
                size = "all" if int(cache) == ALL else "few"
                found[ranks, int(rank), model, size] = mx.load(str(path))
    return tiny.name, found


@pytest.mark.parametrize("cache", ["few", "all"])
@pytest.mark.parametrize("name", ["tiny", FAMILY])
def test_ranks_equal_one_gpu_to_the_bit(ran, name, cache):
    tiny, found = ran
    model = tiny if name == "tiny" else name
    right = found[1, 0, model, cache]["logits"]
    assert mx.isfinite(right).all() and len(right) > 10
    for rank in range(3):
        assert mx.array_equal(found[3, rank, model, cache]["logits"], right), rank


def test_ranks_decode_in_one_trace(ran):
    tiny, found = ran
    assert found[1, 0, tiny, "all"]["whole"] == found[3, 1, tiny, "all"]["whole"] > 0
    assert found[3, 0, tiny, "few"]["whole"] == 0


@pytest.mark.parametrize("name", ["tiny", FAMILY])
def test_one_gpu_answers_alike_with_few_slots(ran, name):
    tiny, found = ran
    few, everything = (found[1, 0, tiny if name == "tiny" else name, c] for c in ("few", "all"))
    assert mx.array_equal(few["logits"], everything["logits"])
