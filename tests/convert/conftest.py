"""A conversion that a test may change."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def out(root: Path, tmp_path: Path) -> Path:
    return shutil.copytree(root / "whole", tmp_path / "out")
