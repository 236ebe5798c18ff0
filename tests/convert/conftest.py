"""A conversion that a test may change; and no waiting for the disk."""

import os
import shutil
from pathlib import Path

import pytest


@pytest.fixture
def out(root: Path, tmp_path: Path) -> Path:
    return shutil.copytree(root / "whole", tmp_path / "out")


@pytest.fixture(scope="module", autouse=True)
def unsynced():
    """Leave out fsync in this process: only a power loss would tell the difference."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield
