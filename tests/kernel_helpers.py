"""Mistakes in the kernels' source, and whether a check detects them."""

from collections.abc import Callable

import pytest
from metal_cpu import BenchError

from flashmoe_mlx.custom_kernels import launch


def plant(monkeypatch: pytest.MonkeyPatch, file: str, old: str, new: str) -> None:
    """Replace a string that occurs once in a kernel file."""
    read, text = launch.read_text, launch.read_text(file)
    assert text.count(old) == 1, text.count(old)
    wrong = text.replace(old, new)
    monkeypatch.setattr(launch, "read_text", lambda name: wrong if name == file else read(name))


def complains(check: Callable[[], None]) -> bool:
    """Return whether a check finds a wrong result, or the bench another error."""
    try:
        check()
    except (AssertionError, BenchError):
        return True
    return False
