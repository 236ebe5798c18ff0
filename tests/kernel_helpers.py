"""Mistakes put into the kernels' text, and whether somebody notices."""

from collections.abc import Callable

import pytest
from metal_cpu import BenchError

from flashmoe_mlx.custom_kernels import launch


def plant(monkeypatch: pytest.MonkeyPatch, file: str, old: str, new: str) -> None:
    """Replace what stands once in a kernel file's text."""
    read, text = launch.read_text, launch.read_text(file)
    assert text.count(old) == 1, text.count(old)
    wrong = text.replace(old, new)
    monkeypatch.setattr(launch, "read_text", lambda name: wrong if name == file else read(name))


def complains(check: Callable[[], None]) -> bool:
    """Say whether a check finds a wrong result, or the bench something else."""
    try:
        check()
    except (AssertionError, BenchError):
        return True
    return False
