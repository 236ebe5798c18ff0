"""Directories that several tests, of either worker, share: each is made once, at first use."""

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path

CONVERSIONS = {
    "packed4": {"quantize": True, "q_bits": 4, "q_group_size": 64},
    "packed2": {"quantize": True, "q_bits": 2, "q_group_size": 64},
    "linked": {"link": True},
}
FORMATS = (*CONVERSIONS, "unmodified")
# Families that mlx-lm's own code computes: plain, bfloat16 and sliding windows, latent attention.
PATCHED = ("qwen3_moe", "gpt_oss", "deepseek_v3")


def text_config(model: Path) -> dict:
    config = json.loads((model / "config.json").read_text())
    return config.get("text_config", config)


def made_once(tmp_path_factory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a directory that one worker writes for all workers; tests must not write to it."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with open(base / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (base / name).exists():
            (base / f"{name}.tmp").mkdir()
            make(base / f"{name}.tmp")
            (base / f"{name}.tmp").rename(base / name)
    return base / name


class Directories(dict[str, Path]):
    """Directories by format, each made when a test first asks for it."""

    def __init__(self, make: Callable[[str], Path]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, name: str) -> Path:
        self[name] = self._make(name)
        return self[name]
