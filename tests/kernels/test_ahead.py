"""Children that compile MLX's kernels: once per machine, awaited, and done without if they fail."""

import json
import sys

import mlx.core as mx
import pytest

from flashmoe_mlx.custom_kernels import launch
from flashmoe_mlx.custom_kernels.cuda import ahead
from flashmoe_mlx.custom_kernels.experts import prefill
from flashmoe_mlx.custom_kernels.experts.prefill import TiledCase, compile_ahead

CASE = TiledCase(64, 32, 4, 32, "float32", "float32", 4, slots=2, rows=2)


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """The folder of compiled kernels, with no children left over."""
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", str(tmp_path))
    yield tmp_path
    ahead.wait()


def test_children_run_once(folder, monkeypatch, capfd):
    monkeypatch.setattr(ahead, "_as_json", lambda case: json.dumps("look up"))
    ahead.start([CASE])
    ahead.wait()
    assert len(list(folder.iterdir())) == len(ahead.OPS)
    monkeypatch.setattr(ahead.subprocess, "Popen", lambda *_, **__: pytest.fail("started again"))
    ahead.start([CASE])
    assert capfd.readouterr().out == ""


def test_a_child_that_fails_is_started_again(folder):
    ahead.start([CASE])  # needs a GPU
    ahead.wait()
    assert len(list(folder.iterdir())) == len(ahead.OPS)
    ahead.start([CASE])
    assert len(ahead._awaited) == 1


def test_a_machine_without_processes_compiles_by_itself(folder, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    ahead.start([CASE])
    assert ahead._awaited == []


def test_a_model_names_what_its_prompts_need(monkeypatch):
    started = []
    monkeypatch.setattr(ahead, "start", lambda now, later: started.extend([*now, *later]))
    formats = [(16, 64, 4, 32), (16, 64, 4, 32), (64, 16, 8, 32)]
    compile_ahead(formats, "bfloat16")
    assert started == []
    monkeypatch.setattr(prefill, "is_cuda", lambda: True)
    monkeypatch.setattr(prefill, "on_gpu", lambda x: x.dtype == mx.bfloat16)
    compile_ahead(formats, "bfloat16")
    same = 64, 16, 4, 32, "bfloat16", "bfloat16", 8
    assert started == [TiledCase(*same, slots=2, rows=8), TiledCase(*same, slots=2, rows=64)]
    rows = [prefill._tile_rows(prefill.Routed(c.slots * c.rows, c.slots)) for c in started]
    assert rows == [prefill.FEW_ROWS, prefill.MANY_ROWS] and not launch.available()
