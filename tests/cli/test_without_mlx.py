"""Commands that need no MLX, or not for --help, in a process that cannot import it."""

import subprocess
import sys
from pathlib import Path

import pytest

CONVERTED = Path(__file__).parents[1] / "fixtures/converted"
MODULES = {
    "flashmoe-convert": "flashmoe_mlx.convert.cli",
    "flashmoe-doctor": "flashmoe_mlx.cli.doctor",
    "flashmoe-plan": "flashmoe_mlx.cli.plan",
}
REFUSE = """
import importlib, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("mlx", "mlx_lm", "transformers"):
            raise ImportError(f"{name} is refused")

sys.meta_path.insert(0, Refuse())
sys.argv = sys.argv[1:]
module = sys.argv.pop(0)
sys.exit(importlib.import_module(module).main())
"""


def run(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", REFUSE, MODULES[name], name, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name", MODULES)
def test_help(name):
    done = run(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: {name}")
    assert ("verify DIR [--repair --hf-path PATH]" in done.stdout) == (name == "flashmoe-convert")


def test_verify():
    done = run("flashmoe-convert", "verify", CONVERTED)
    assert (done.returncode, done.stderr) == (0, "")
    assert "every byte is as it was written" in done.stdout


def test_plan_of_this_machine(tmp_path):
    done = run("flashmoe-plan", "--folder", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "no GPU that MLX computes on" in done.stdout and "Qwen3.5-397B-A17B" in done.stdout


def test_plan():
    done = run("flashmoe-plan", "--model", "122b", "--machine", "m3-max-48")
    assert (done.returncode, done.stderr) == (0, "")
    assert "decode " in done.stdout
