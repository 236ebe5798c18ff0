"""flashmoe-bench: a table, a final JSON line, and no figures for a wrong kernel."""

import json
from dataclasses import dataclass

import mlx.core as mx
import pytest
from metal_cpu import metal_on_cpu, require_bench

from flashmoe_mlx.bench import kernels
from flashmoe_mlx.bench.main import main
from flashmoe_mlx.custom_kernels import launch
from flashmoe_mlx.custom_kernels.autotune import NEEDS_GPU
from flashmoe_mlx.custom_kernels.linear.cases import MatvecCase
from flashmoe_mlx.profile import machine

QUICK = ["kernels", "--geometry", "tiny", "--calls", "1", "--runs", "1", "--dtype", "float32"]
MATVEC = MatvecCase(24, 128, 4, 64, "float32", "bfloat16")


@dataclass(frozen=True)
class ShiftedMatvec(MatvecCase):
    """The real kernel, with its rows shifted by one."""

    def custom(self, *inputs: mx.array) -> list[mx.array]:
        return [mx.roll(super().custom(*inputs)[0], 1, axis=-1)]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Shorten chains and copies."""
    monkeypatch.setattr(machine, "cache_bytes", lambda: 1)
    monkeypatch.setattr(kernels, "COPIED", 1 << 20)


@pytest.fixture
def metal():
    """Run kernels on the Metal bench."""
    require_bench()
    launch._build.cache_clear()
    with metal_on_cpu():
        yield
    launch._build.cache_clear()


def run(args, capsys) -> tuple[int, list[str], dict]:
    with pytest.raises(SystemExit) as exit_:
        main(args)
    *table, last = capsys.readouterr().out.splitlines()
    return exit_.value.code, table, json.loads(last)


def test_right_kernels_are_timed(metal, capsys):
    code, table, result = run([*QUICK, "--bits", "4", "--op", "dequant_matvec", "router"], capsys)
    assert code == 0
    assert {row["op"] for row in result["rows"]} == {"dequant_matvec", "router"}
    for row in result["rows"]:
        assert row["error"] <= row["limit"] and row["message"] == ""
        assert row["floor_ms"] > 0 and row["stock_ms"] is not None
        assert row["custom_ms"] is not None
        assert (row["naive_ms"] is None) == (row["op"] == "router")
    assert result["copy_bytes_per_s"] > 0 and result["packages"]["mlx"]
    assert len(table) == 5 + len(result["rows"])
    assert "rows=256 columns=128 bits=4" in "\n".join(table)


def test_without_a_gpu_stock_is_timed_alone(capsys):
    if launch.available():
        pytest.skip("there is a GPU")
    ops = ["--op", "router", "expert_mlp", "--bits", "4", "--top-k", "4", "8", "4"]
    code, _, result = run([*QUICK, *ops], capsys)
    assert code == 0
    assert [row["op"] for row in result["rows"]] == ["router", "expert_mlp"] * 2
    for row in result["rows"]:
        assert row["message"] == NEEDS_GPU
        assert row["custom_ms"] is None and row["stock_ms"] is not None


def test_a_wrong_kernel_is_not_timed(metal, capsys, monkeypatch):
    wrong = ShiftedMatvec(24, 128, 4, 64, "float32", "bfloat16")
    monkeypatch.setattr(kernels, "cases", lambda *a: [wrong, MATVEC])
    code, table, result = run(QUICK, capsys)
    assert code == 1
    red, green = result["rows"]
    assert red["message"].startswith("error ") and red["error"] > red["limit"]
    assert red["custom_ms"] is red["stock_ms"] is red["naive_ms"] is None
    assert green["message"] == "" and green["stock_ms"] is not None
    assert red["message"] in table[-2]


def test_inputs_outgrow_the_cache(monkeypatch):
    monkeypatch.setattr(machine, "cache_bytes", lambda: 20 * MATVEC.nbytes)
    assert kernels._chain_length(MATVEC, 8) == (30, 30)
    assert kernels._chain_length(MATVEC, 64) == (64, 30)
    monkeypatch.setattr(machine, "cache_bytes", lambda: 1 << 40)
    assert kernels._chain_length(MATVEC, 8) == (64, 64)


def test_columns_stand_under_their_titles():
    times = {"custom_ms": 2.0, "naive_ms": None, "stock_ms": 5.0, "floor_ms": 1.0}
    row = times | {"op": "op", "trial": "a=1", "message": ""}
    row |= {"share_of_floor": 0.5, "gain_over_stock": 2.5}
    assert kernels.line(row) == "   2.0000         -    5.0000    1.0000    50%  2.50x  op a=1"
    assert kernels.HEADER == "     ours     naive     stock     floor  share   gain  op and shape"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--bits", "5"], "--bits must be one of 2, 4, 8, got 5"),
        (["--top-k", "0"], "--top-k must be from 1 to 32, got 0"),
        (["--calls", "0"], "--calls must be from 1 to 999999, got 0"),
        (["--op", "conv"], "--op must be one of dequant_matvec, router"),
    ],
)
def test_bad_input(args, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["kernels", *args])
    err = capsys.readouterr().err
    assert exit_.value.code == 2
    assert err.startswith(f"flashmoe-bench: error: {message}") and err.count("\n") == 1


@pytest.mark.parametrize("args", [[], ["kernels", "--geometry", "9b"], ["speed"]])
def test_bad_usage(args, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(args)
    assert exit_.value.code == 2
    assert "usage: flashmoe-bench" in capsys.readouterr().err
