"""Our kernels run where they are correct and measured faster, and nowhere else."""

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import ClassVar

import mlx.core as mx
import numpy as np
import pytest
from metal_cpu import metal_on_cpu, require_bench

from flashmoe_mlx import FlashMoEError
from flashmoe_mlx.custom_kernels import autotune, device, launch
from flashmoe_mlx.custom_kernels.autotune import Verdict, prefers_custom, verdict
from flashmoe_mlx.custom_kernels.cases import cases, label
from flashmoe_mlx.custom_kernels.cpu import block, compile
from flashmoe_mlx.custom_kernels.linear.cases import MatvecCase
from flashmoe_mlx.models.qwen3_5.geometry import GEOMETRIES

SMALL = MatvecCase(24, 128, 4, 64, "float32", "bfloat16")


class FakeClock:
    """Advances only when a fake op says so."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


clock = FakeClock()


@dataclass(frozen=True)
class Doubling:
    """y = 2 x, whose kernel is wrong by `offset` and takes `ms` where stock takes 2."""

    op: ClassVar[str] = "doubling"
    nbytes: ClassVar[int] = 64
    ms: float = 1.0
    offset: float = 0.0
    raises: str = ""
    dtype: str = "float32"
    stock_offset: float = 0.0

    def inputs(self, seed: int = 0) -> list[mx.array]:
        x = mx.random.normal((8,), key=mx.random.key(seed)).astype(getattr(mx, self.dtype))
        mx.eval(x)
        return [x]

    def custom(self, x: mx.array) -> list[mx.array]:
        clock.seconds += self.ms / 1e3
        if self.raises:
            raise RuntimeError(self.raises)
        return [2 * x + self.offset * mx.abs(x).max()]

    def stock(self, x: mx.array) -> list[mx.array]:
        clock.seconds += 2e-3
        return [x + x + self.stock_offset * mx.abs(x).max()]

    def reference(self, x: mx.array) -> list[mx.array]:
        return [2 * x.astype(mx.float32)]


@dataclass(frozen=True)
class SwappedMatvec(MatvecCase):
    """The real kernel, with scales and biases swapped."""

    def custom(self, *inputs: mx.array) -> list[mx.array]:
        x, codes, scales, biases = inputs
        return super().custom(x, codes, biases, scales)


@dataclass(frozen=True)
class ShiftedMatvec(MatvecCase):
    """The real kernel, with output rows shifted by one."""

    def custom(self, *inputs: mx.array) -> list[mx.array]:
        return [mx.roll(super().custom(*inputs)[0], 1, axis=-1)]


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """Use an empty cache directory, no verdicts in memory, and the fake clock."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FLASHMOE_KERNELS", raising=False)
    real = autotune.measure
    monkeypatch.setattr(autotune, "measure", lambda case, timed, _: real(case, timed, clock))
    autotune.forget()
    yield
    autotune.forget()


@pytest.fixture
def bench():
    """Kernels run on the Metal bench."""
    require_bench()
    launch._build.cache_clear()
    with metal_on_cpu():
        yield
    launch._build.cache_clear()


def cache_file(tmp_path):
    (file,) = (tmp_path / "flashmoe-mlx").iterdir()
    return file


def test_a_faster_kernel_is_used_and_a_slower_one_is_not(capsys):
    assert prefers_custom(Doubling(ms=1))
    assert not prefers_custom(Doubling(ms=3))
    assert capsys.readouterr().err == ""


def test_times_are_per_call():
    found = verdict(Doubling(ms=1))
    assert found.ok and found.message == ""
    assert (found.custom_ms, found.stock_ms) == (pytest.approx(1), pytest.approx(2))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Doubling(offset=0.01), "error 5.0e-03, limit 7.6e-06"),
        (Doubling(offset=float("nan")), "returns values that are not finite"),
        (Doubling(offset=float("inf")), "returns values that are not finite"),
        (
            Doubling(raises="no such\n register"),
            "does not run (RuntimeError: no such register)",
        ),
    ],
)
def test_a_failing_kernel_is_reported_once_and_not_used(case, message, capsys):
    assert not prefers_custom(case)
    autotune._preferred.clear()
    assert not prefers_custom(case)
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith(f"[flashmoe] kernel doubling on {autotune.device_name()}: {message}")
    assert "please report it with the output of `flashmoe-doctor --json`" in err


def test_a_failing_verdict_is_plain_json():
    found = verdict(Doubling(offset=float("nan")))
    assert found.error is None and found.custom_ms is None
    assert Verdict.from_dict(json.loads(json.dumps(found.as_dict(), allow_nan=False))) == found


@pytest.mark.parametrize(
    ("offset", "stock_offset", "dtype", "ok"),
    [
        (1e-5, 0, "float32", True),  # another order of summation
        (1e-4, 0, "float32", False),
        (1e-4, 1e-4, "float32", True),  # as far off as stock
        (2e-3, 0, "float16", True),
        (6e-3, 0, "float16", False),
        (2e-2, 0, "bfloat16", True),
        (6e-2, 0, "bfloat16", False),
        (1, 1, "bfloat16", False),  # a wrong stock op does not raise the limit
    ],
)
def test_the_limit_follows_stock_between_a_floor_and_a_ceiling(offset, stock_offset, dtype, ok):
    case = Doubling(offset=offset, stock_offset=stock_offset, dtype=dtype)
    assert verdict(case, timed=False).ok == ok


def test_shapes_are_compared():
    @dataclass(frozen=True)
    class Long(Doubling):
        def custom(self, x: mx.array) -> list[mx.array]:
            return [mx.zeros((9,))]

    assert verdict(Long()).message == "returns shapes [(9,)]"


@pytest.mark.parametrize(
    ("setting", "chosen"),
    [("stock", [False] * 3), ("auto", [True, False, False]), ("custom", [True, True, False])],
)
def test_the_variable(setting, chosen, monkeypatch, tmp_path):
    monkeypatch.setenv("FLASHMOE_KERNELS", setting)
    cases = Doubling(ms=1), Doubling(ms=3), Doubling(offset=1)
    assert [prefers_custom(case) for case in cases] == chosen
    if setting == "stock":
        assert not list(tmp_path.iterdir())
    else:
        timed = json.loads(cache_file(tmp_path).read_text())["verdicts"][str(cases[0])]
        assert (timed["custom_ms"] is None) == (setting == "custom")


def test_auto_times_what_custom_only_checked(monkeypatch):
    monkeypatch.setenv("FLASHMOE_KERNELS", "custom")
    assert prefers_custom(Doubling(ms=3))
    autotune.forget()
    monkeypatch.setenv("FLASHMOE_KERNELS", "auto")
    assert not prefers_custom(Doubling(ms=3))


def test_a_wrong_variable_is_named(monkeypatch):
    monkeypatch.setenv("FLASHMOE_KERNELS", "fast")
    with pytest.raises(FlashMoEError, match="FLASHMOE_KERNELS = 'fast' is not valid"):
        prefers_custom(SMALL)


# ---- memory --------------------------------------------------------------------------------------


def test_measured_once_in_a_process(monkeypatch):
    assert prefers_custom(Doubling())
    monkeypatch.setattr(autotune, "_decide", lambda case: pytest.fail("asked twice"))
    assert prefers_custom(Doubling())


SCRIPT = f"""
import sys
sys.path[:0] = {sys.path!r}
from test_autotune import Doubling, autotune
autotune.measure = lambda *a: print("measured") or autotune.Verdict(True, 0.0, 1.0, 1.0, 2.0)
print(autotune.prefers_custom(Doubling()))
"""


def test_measured_once_on_a_machine(tmp_path):
    def run() -> str:
        return subprocess.run(
            [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
        ).stdout

    assert run() == "measured\nTrue\n"
    assert run() == "True\n"


@pytest.mark.parametrize("change", ["device", "mlx", "kernels"])
def test_measured_again_where_something_changed(change, monkeypatch):
    assert prefers_custom(Doubling())
    autotune.forget()
    if change == "device":
        monkeypatch.setattr(autotune, "device_name", lambda: "another")
    else:
        versions = autotune._versions() | {change: "another"}
        monkeypatch.setattr(autotune, "_versions", lambda: versions)
    assert autotune._recall(Doubling(), timed=True) is None


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", '{"verdicts": 1}', '{"verdicts": {"CASE": {"ok": 1}}}', "\0\xff",
        "\0" * 500, "[" * 100_000, '{"verdicts": ["CASE"]}', '{"verdicts": {"CASE": [1]}}',
        '{"verdicts": {"CASE": {"ok": true, "custom_ms": "1", "stock_ms": 2}}}',
        '{"verdicts": {"CASE": {"ok": true, "custom_ms": 1, "stock_ms": [2]}}}',
        '{"verdicts": {"CASE": {"ok": false, "error": "large"}}}',
    ],
)  # fmt: skip
def test_a_damaged_file_is_replaced(text, tmp_path):
    assert prefers_custom(Doubling())
    autotune.forget()
    cache_file(tmp_path).write_text(text.replace("CASE", str(Doubling())))
    assert prefers_custom(Doubling())
    assert autotune._recall(Doubling(), timed=True).ok
    assert cache_file(tmp_path).suffix == ".json"


def test_a_home_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert prefers_custom(Doubling())
    assert autotune._recall(Doubling(), timed=True) is None
    assert capsys.readouterr().err == ""


def test_a_fresh_verdict_replaces_the_old_one():
    autotune._remember(Doubling(), Verdict(False, message="old"))
    assert verdict(Doubling()).message == "old"
    assert verdict(Doubling(), fresh=True).ok
    assert verdict(Doubling()).ok


# ---- the real kernel -----------------------------------------------------------------------------


def test_a_model_has_each_case_once():
    for geometry in GEOMETRIES.values():
        found = cases(geometry, 2, "float16", 3)
        assert len(set(found)) == len(found)
        assert all(case.nbytes > 0 for case in found)
        others = {case.op: case.dtype for case in found if case.dtype != "float16"}
        assert others == {"router": "float32"}
    assert label(SMALL) == "rows=24 columns=128 bits=4 group_size=64"


def test_without_a_gpu_its_kernels_are_not_used_and_nothing_is_reported(capsys):
    if launch.available():
        pytest.skip("there is a GPU")
    case = replace(SMALL, dtype="bfloat16")  # the CPU's kernels take float32
    assert not prefers_custom(case)
    assert verdict(case).message == autotune.NEEDS_GPU
    assert capsys.readouterr().err == ""


def test_the_real_kernel_passes(bench):
    found = verdict(SMALL, timed=False)
    assert found.ok, found
    assert found.error <= found.limit < 1e-5


@pytest.mark.parametrize("case", cases(GEOMETRIES["tiny"], 4, "float32"), ids=label)
def test_every_case_passes(case, bench):
    found = autotune.check(case)
    assert found.ok, found


@pytest.mark.parametrize("kind", [SwappedMatvec, ShiftedMatvec])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_planted_error_is_caught(kind, dtype, bench, capsys, monkeypatch):
    monkeypatch.setenv("FLASHMOE_KERNELS", "custom")
    case = kind(24, 128, 4, 64, dtype, "bfloat16")
    assert not prefers_custom(case)
    assert "kernel dequant_matvec" in capsys.readouterr().err
    found = verdict(case)
    assert found.error > 5 * found.limit


@pytest.fixture
def cpu_kernels_again():
    yield
    device._rejected.clear()
    device._cpu_module.cache_clear()


def test_wrong_cpu_kernels_are_found_at_load_and_not_used(monkeypatch, capsys, cpu_kernels_again):
    formats = {(4, 64, "bfloat16"), (8, 32, "float32"), (3, 64, "bfloat16")}
    compile.check_cpu_kernels(formats)
    assert device.cpu_kernels(mx.zeros(1)) is not None
    right = block.project
    monkeypatch.setattr(block, "project", lambda *a: [np.roll(y, 1, 1) for y in right(*a)])
    autotune.forget()
    monkeypatch.setattr(autotune, "_recall", lambda *_: None)  # the texts are unchanged
    compile.check_cpu_kernels(formats)
    assert device.cpu_kernels(mx.zeros(1)) is None
    error = capsys.readouterr().err
    assert error.count("kernel dequant_matvec") == 1
    assert "please report it" in error
