"""Ranks with a directory each, of their own experts only, answer as one machine with all."""

import os
import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from distributed.ranks import run

from flashmoe_mlx.convert import convert
from flashmoe_mlx.loader import BUNDLED_MODEL

SCRIPT = Path(__file__).with_name("own_disk.py")
SETTINGS = {"FLASHMOE_SHARDING": "exact", "FLASHMOE_LOOKAHEAD": "off"}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> tuple[mx.array, int]:
    """Logits `[13, 1, V]` of one machine with the whole model, and the experts it asked for."""
    folder = tmp_path_factory.mktemp("alone")
    convert(BUNDLED_MODEL, folder / "whole")
    command = [sys.executable, SCRIPT, folder, folder / "whole"]
    printed = subprocess.check_output(command, env=os.environ | SETTINGS, text=True)
    return answer(folder, 0), asked(printed)


def answer(folder: Path, rank: int) -> mx.array:
    return mx.load(str(folder / f"{rank}.safetensors"))["logits"]


def asked(printed: str) -> int:
    return int(re.search(r"asked (\d+)", printed)[1])


@pytest.mark.parametrize("weights", [None, "2,1"])
def test_two_disks_answer_as_one(alone, tmp_path, weights):
    convert(BUNDLED_MODEL, tmp_path / "model", split=2, rank_weights=weights)
    settings = SETTINGS | ({"FLASHMOE_RANK_WEIGHTS": weights} if weights else {})
    printed = run(tmp_path, 2, [SCRIPT, tmp_path, f"{tmp_path}/model-rank{{rank}}"], **settings)
    expected, everything = alone
    for rank in range(2):
        assert mx.array_equal(answer(tmp_path, rank), expected)
    shares = [asked(text) / everything for text in printed]
    assert sum(shares) == 1 and all(share < 0.9 for share in shares)
