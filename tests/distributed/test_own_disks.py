"""Ranks with a directory each, of their own experts only, answer as one machine with all."""

import os
import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from distributed.ranks import run

from flashmoe_mlx import load
from flashmoe_mlx.convert import convert
from flashmoe_mlx.format.layout import EXPERT_DIR
from flashmoe_mlx.format.placement import Placement
from flashmoe_mlx.loader import BUNDLED_MODEL

SCRIPT = Path(__file__).with_name("own_disk.py")
SETTINGS = {"FLASHMOE_SHARDING": "exact", "FLASHMOE_LOOKAHEAD": "off", "FLASHMOE_VERIFY": "1"}


def answer(folder: Path, directory: str, rank: int) -> mx.array:
    return mx.load(str(folder / f"{directory}.{rank}.safetensors"))["logits"]


def asked(printed: str) -> list[int]:
    """Return how many experts each model asked its store for."""
    return [int(number) for number in re.findall(r"asked (\d+)", printed)]


def expert_bytes(directory: Path) -> int:
    """Return the size of a directory's experts on disk."""
    return sum(file.stat().st_size for file in (directory / EXPERT_DIR).iterdir())


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (1, 1, 1, 1)])
def test_a_rank_allocates_memory_for_its_own_experts_only(weights):
    """With room for all experts."""
    with load(BUNDLED_MODEL, expert_cache="1GiB")[0] as model:
        layout, sizes = model._experts.layout, []
        for rank in range(len(weights)):
            store = model._experts.start(layout.part(Placement(rank, weights)), len(weights))
            sizes.append(sum(array.nbytes for bank in store.banks for array in bank.arrays))
            store.close()
    whole = len(layout.layers) * layout.layers[0].total_bytes
    expected = np.array(weights) / sum(weights) * whole
    np.testing.assert_allclose(sizes, expected, rtol=0.01)


def test_two_disks_answer_as_one(tmp_path):
    """To the bit, with experts dealt in turn and by weights."""
    convert(BUNDLED_MODEL, tmp_path / "whole")
    command = [sys.executable, SCRIPT, tmp_path, tmp_path / "whole"]
    (everything,) = asked(subprocess.check_output(command, env=os.environ | SETTINGS, text=True))
    convert(BUNDLED_MODEL, tmp_path / "equal", split=2)
    convert(BUNDLED_MODEL, tmp_path / "weighted", split=2, rank_weights="2,1")
    own = [f"{tmp_path}/{name}-rank{{rank}}" for name in ("equal", "weighted")]
    shares = np.array(
        [asked(text) for text in run(tmp_path, 2, [SCRIPT, tmp_path, *own], **SETTINGS)]
    )
    expected = answer(tmp_path, "whole", 0)
    for rank in range(2):
        for name in ("equal", "weighted"):
            assert mx.array_equal(answer(tmp_path, f"{name}-rank{rank}", rank), expected)
    whole = expert_bytes(tmp_path / "whole")
    for rank in range(2):
        assert expert_bytes(tmp_path / f"equal-rank{rank}") == pytest.approx(whole / 2, rel=0.01)
    assert shares.sum(0).tolist() == [everything] * 2
    assert shares[0, 1] > shares[1, 1] > 0 and shares[:, 0].min() > everything / 3
