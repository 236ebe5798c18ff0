"""Ranks with a directory each, of their own experts only, answer as one machine with all."""

import os
import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from distributed.ranks import run

from flashmoe_mlx.convert import convert
from flashmoe_mlx.loader import BUNDLED_MODEL

SCRIPT = Path(__file__).with_name("own_disk.py")
SETTINGS = {"FLASHMOE_SHARDING": "exact", "FLASHMOE_LOOKAHEAD": "off", "FLASHMOE_VERIFY": "1"}


def answer(folder: Path, directory: str, rank: int) -> mx.array:
    return mx.load(str(folder / f"{directory}.{rank}.safetensors"))["logits"]


def asked(printed: str) -> list[int]:
    """Return how many experts each model asked its store for."""
    return [int(number) for number in re.findall(r"asked (\d+)", printed)]


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
    assert shares.sum(0).tolist() == [everything] * 2
    assert shares[0, 1] > shares[1, 1] > 0 and shares[:, 0].min() > everything / 3
