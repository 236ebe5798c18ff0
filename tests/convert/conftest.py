"""A conversion that a test may change; and no waiting for the disk."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="module", autouse=True)
def unsynced(unsynced):
    return unsynced


@pytest.fixture
def out(root: Path, tmp_path: Path) -> Path:
    return shutil.copytree(root / "whole", tmp_path / "out")
