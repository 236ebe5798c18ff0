"""This machine, measured: each figure, and what stands in for one that cannot be measured."""

import sys
from pathlib import Path

import pytest

from flashmoe_mlx.cli import here
from flashmoe_mlx.cli.published import MACHINES
from flashmoe_mlx.progress import Bar
from flashmoe_mlx.store import memory


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(here, "BLOCK", 1 << 20)


def test_look(tmp_path, monkeypatch):
    monkeypatch.setattr(here, "cgroup_limit", lambda: 10**9)
    found = here.look(tmp_path / "not" / "yet", Bar(), sample=4 << 20)
    assert found.folder == tmp_path / "not" / "yet" and not list(tmp_path.iterdir())
    assert found.memory >= found.available > 0 and found.limit == 10**9 and found.free > 0
    assert (found.gpu, found.gpu_memory) == (None, None)
    assert found.read.reads == 2 and found.copy > 0
    plan = found.machine()
    assert (plan.memory, plan.ssd) == (found.available, found.read.bytes_per_s)
    assert plan.copy_rate == found.copy and plan.bandwidth == found.bandwidth


def test_an_apple_chip_has_its_published_bandwidth(monkeypatch):
    monkeypatch.setattr(here.machine, "cpu_name", lambda: "Apple M3 Max")
    assert here.memory_bandwidth() == (MACHINES["m3-max-48"].bandwidth, "published")
    monkeypatch.setattr(here.machine, "cpu_name", lambda: "Apple M9")
    found, source = here.memory_bandwidth()
    assert found > 0 and source == "measured"


def test_without_mlx_there_is_no_gpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx.core", None)  # its import fails
    assert here.find_gpu() == (None, None)


def test_existing(tmp_path):
    assert here.existing(tmp_path / "a" / "b") == tmp_path
    assert here.existing(Path("a")) == Path.cwd()


def test_installed_memory_without_mlx(monkeypatch):
    """On macOS three quarters of it are available."""
    monkeypatch.setattr(memory.Path, "exists", lambda _: False)
    assert memory.available_bytes() == memory.installed_bytes() * 3 // 4 > 0
