"""Ranks that share a model answer as one process does, and each reads only its own experts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from answer import answers
from families import TOP_K, make
from family_answers import close, distance, token_bytes
from family_helpers import streamed
from ranks import FAMILIES, run

from flashmoe_mlx.custom_kernels import device
from flashmoe_mlx.loader import BUNDLED_MODEL

ANSWER = Path(__file__).with_name("answer.py")
SPLIT_BY_MLX = "deepseek_v3", "gpt_oss", "qwen3_5_moe"
STAGED_BY_MLX = "deepseek_v3", "qwen3_next", "qwen3_5_moe"
ANSWERS = "1", "17", "300", "batch"


def loaded(folder: Path, name: str, way: str, rank: int) -> dict[str, mx.array]:
    return mx.load(str(folder / f"{name}.{way}.{rank}.safetensors"))


def facts(folder: Path, name: str, way: str, rank: int) -> dict[str, int]:
    return json.loads((folder / f"{name}.{way}.{rank}.json").read_text())


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Run all families in two ranks; return the folder, and what one process answers."""
    folder, alone = tmp_path_factory.mktemp("ranks"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASHMOE_KERNELS", "stock")  # bit-equal to mlx-lm
        patch.setenv("FLASHMOE_MODEL", "generic")
        device._cpu_module.cache_clear()
        for name in FAMILIES:
            (folder / name).mkdir()
            stock = make(name, folder / name, {})
            with streamed(folder / name, expert_cache=TOP_K * token_bytes(stock)) as model:
                asked = alone[name, "asked"] = {}
                alone[name] = answers(model, "exact")
                asked.update(asked=model.expert_stats().asked)
        ways = {"exact": FAMILIES, "tensor,stock-tensor": SPLIT_BY_MLX}
        ways["pipeline,stock-pipeline"] = STAGED_BY_MLX
        jobs = (f"{way}:{folder / name}" for way, names in ways.items() for name in names)
        run(folder, 2, [ANSWER, folder, *jobs])
    device._cpu_module.cache_clear()
    return folder, alone


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", FAMILIES)
def test_exact_equals_one_process_to_the_bit(ran, name, rank):
    folder, alone = ran
    found = loaded(folder, name, "exact", rank)
    for key in ANSWERS:
        assert mx.array_equal(found[key], alone[name][key]), key


@pytest.mark.parametrize("name", FAMILIES)
def test_each_rank_has_and_reads_its_own_experts(ran, name):
    folder, alone = ran
    each = [facts(folder, name, "exact", rank) for rank in (0, 1)]
    assert sum(rank["asked"] for rank in each) == alone[name, "asked"]["asked"]
    assert all(rank["asked"] > 0 and rank["read"] > 0 for rank in each)


@pytest.mark.parametrize("way, name", [
    *(("tensor", name) for name in SPLIT_BY_MLX), *(("pipeline", name) for name in STAGED_BY_MLX)
])  # fmt: skip
def test_tensor_and_pipeline_equal_mlx_lms_own(ran, way, name):
    folder, _ = ran
    for rank in (0, 1):
        found, stock = (loaded(folder, name, w, rank) for w in (way, f"stock-{way}"))
        for key in ANSWERS:
            assert close(found[key], stock[key]), (key, distance(found[key], stock[key]))


def agree(found: dict, alone: dict, equal: Callable[[mx.array, mx.array], bool]) -> bool:
    """Compare answers; some ways take fewer steps after the longest prompt."""
    longest = alone["300"][:, : found["300"].shape[1]]
    return all(equal(found[key], longest if key == "300" else alone[key]) for key in ANSWERS)


def test_the_bundled_model(tmp_path):
    """Our own model code and kernels: exact in three unequal ranks, prompts summed early."""
    bundled = shutil.copytree(BUNDLED_MODEL, tmp_path / "bundled")
    # In a process of its own: code that was compiled here may round otherwise than cached code.
    run(tmp_path, 1, [ANSWER, tmp_path, f"alone:{bundled}"])
    alone = loaded(tmp_path, "bundled", "alone", 0)
    run(tmp_path, 3, [ANSWER, tmp_path, f"exact:{bundled}"])
    for rank in range(3):
        found = loaded(tmp_path, "bundled", "exact", rank)
        assert agree(found, alone, mx.array_equal)
        assert facts(tmp_path, "bundled", "exact", rank)["asked"] > 0
    command = [ANSWER, tmp_path, f"exact,auto,pipeline:{bundled}"]
    run(tmp_path, 2, command, FLASHMOE_RANK_WEIGHTS="2,1")
    for rank in range(2):
        for way in "exact", "pipeline":
            found = loaded(tmp_path, "bundled", way, rank)
            assert agree(found, alone, mx.array_equal)
        found = loaded(tmp_path, "bundled", "auto", rank)
        assert agree(found, alone, close)
    first, second = (facts(tmp_path, "bundled", "exact", rank)["asked"] for rank in (0, 1))
    assert 1.6 < first / second < 2.4
