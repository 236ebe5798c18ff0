"""flashmoe-bench: a table, JSON on request, and no figures for a wrong kernel."""

import json
import subprocess
import sys
from dataclasses import dataclass

import mlx.core as mx
import pytest
from metal_cpu import metal_on_cpu, require_bench

from flashmoe_mlx.bench import arguments, kernels
from flashmoe_mlx.bench.main import main
from flashmoe_mlx.custom_kernels import launch, timing
from flashmoe_mlx.custom_kernels.case import DTYPES
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
        main([*args, "--json"])
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


def test_without_a_gpu_only_kernels_of_cpus_are_listed(capsys):
    ops = ["--op", "router", "expert_mlp", "dequant_matvec", "--bits", "4", "--top-k", "4"]
    code, table, result = run([*QUICK, *ops], capsys)
    assert code == 0
    assert {row["op"] for row in result["rows"]} == {"dequant_matvec"}
    assert all(row["message"] == "" for row in result["rows"])
    assert result["need_gpu"] == ["router", "expert_mlp"]
    assert table[-1] == "not listed, because their kernels need a GPU: router, expert_mlp"
    assert "stock" in table[4] and not [line for line in table[5:-1] if "router" in line]


def test_a_call_as_short_as_its_link_has_an_upper_bound(monkeypatch):
    monkeypatch.setattr(kernels, "_time", lambda *_: [(0.5, 0.75), (0.0005, 0.0305)])
    monkeypatch.setattr(launch, "available", lambda: False)
    row = kernels.measure_row(MATVEC, 1, 1, 1e9)
    assert (row["custom_ms"], row["stock_ms"], row["stock_below_ms"]) == (0.5, None, 0.0305)
    assert row["gain_over_stock"] is None and "custom_below_ms" not in row
    assert kernels.line(row).split()[:3] == ["0.5000", "-", "<0.0305"]


def test_a_linked_calls_time_is_given_with_and_without_the_link():
    now = [0.0]

    def op(x):
        return [x]

    def clock():
        now[0] += 0.008
        return now[0]

    sets = [[mx.ones(4)]]
    assert timing.timed([op], sets, 2, 1, clock) == [(0.0, pytest.approx(4.0))]


@pytest.mark.parametrize("command", ["", "decode", "io", "kernels"])
def test_help_imports_neither_numpy_nor_models(command):
    code = (
        "import sys, flashmoe_mlx.bench.main as m\n"
        f"try: m.main({[*command.split(), '--help']!r})\n"
        "except SystemExit: pass\n"
        "print(sorted({'numpy', 'mlx.nn', 'mlx_lm', 'numba', 'tqdm'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "[]", result.stderr
    if command in ("", "decode"):
        told = " ".join(result.stdout.split())
        assert f"To delete them: rm -r {arguments.default_dir()}" in told


def test_dtypes_are_those_of_kernel_cases():
    assert tuple(DTYPES) == arguments.DTYPES


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
