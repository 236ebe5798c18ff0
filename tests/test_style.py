"""ruff and mypy pass."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str, folder: Path = ROOT) -> None:
    result = subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("command", [["check", "."], ["format", "--check", "."]])
def test_ruff(command):
    run("ruff", *command)


def test_mypy(tmp_path):
    """Check the installed layout: in this repository two folders lie beside the package."""
    package = tmp_path / "flashmoe_mlx"
    package.mkdir()
    for entry in (ROOT / "flashmoe_mlx").iterdir():
        (package / entry.name).symlink_to(entry)
    for name in ("custom_kernels", "convert"):
        (package / name).symlink_to(ROOT / name)
    settings = str(ROOT / "pyproject.toml")
    run("mypy", "--config-file", settings, "-p", "flashmoe_mlx", folder=tmp_path)
