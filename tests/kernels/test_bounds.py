"""The FLASHMOE_DEBUG_BOUNDS mode finds every wrong index and address.

The suite runs in that mode (conftest.py); `test_kernels_without_checks` repeats some tests without.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from block_cases import (
    F32,
    HIDDEN,
    PAST,
    STATE,
    at_once,
    delta_block,
    matrix,
    moe_block,
)
from numba import prange, types

from flashmoe_mlx.custom_kernels.cpu import arrays, bounds, prefill
from flashmoe_mlx.custom_kernels.cpu import decode as cpu_decode
from flashmoe_mlx.custom_kernels.cpu import records as cpu_records
from flashmoe_mlx.custom_kernels.cpu.call import FunctionByAddress, caller
from flashmoe_mlx.custom_kernels.cpu.decode import Group, project
from flashmoe_mlx.errors import FlashMoEError

# Also run without these checks, as for users: each kernel, and a whole model.
WITHOUT_CHECKS = (
    "kernels/test_cpu_decode.py",
    "kernels/test_cpu_kernels.py::test_gated_delta",
    "models/test_exactness.py::test_tokens_and_logits_equal_stock[unmodified-half]",
)


@arrays.compiled
def _too_far(x: arrays.Array, out: arrays.Array) -> None:
    for i in prange(x.size + 1):
        out[i // 2] = x[i]


@arrays.serial
def _inner(x: arrays.Array, i: int) -> float:
    return x[i + 3]


@arrays.compiled
def _by_another(x: arrays.Array, out: arrays.Array) -> None:
    for i in prange(out.size):
        out[i] = _inner(x, i)


@arrays.compiled
def _too_low(x: arrays.Array, out: arrays.Array) -> None:
    for i in prange(out.shape[0]):
        out[i, 0] = x[i - x.size - 1]


@arrays.serial
def _too_wide(x: arrays.Array, out: arrays.Array) -> None:
    arrays.copy(x, out)


@arrays.serial
def _addressed(x: arrays.Array, first: int, count: int) -> int:
    bounds.within("activations", first, count, x.size)
    return cpu_records.start_of(x) + 4 * first


def _unit(unit: int, x: arrays.Array) -> None:
    x[unit] = 1


_KIND = types.void(types.int64, types.float32[::1])
_APART, _call = FunctionByAddress(_KIND, _unit, **arrays.FAST), caller(_KIND)


@arrays.compiled
def _by_address(run: int, x: arrays.Array) -> None:
    for unit in prange(x.size + 2):
        _call(run, (unit, x))


EIGHT = np.zeros(8, F32)


@pytest.mark.parametrize(("mistake", "where", "numbers"), [
    (lambda: _too_far(EIGHT, EIGHT), r"_too_far .*, out\[i // 2\] = x\[i\]\): index out", (8, 8)),
    (lambda: _by_another(EIGHT, EIGHT.copy()), r"_inner .*, return x\[i \+ 3\]\): index", (8, 8)),
    (lambda: _too_low(EIGHT, EIGHT[:, None].copy()), r"_too_low .*, .* = x\[i - x", (-1, 8)),
    (lambda: _too_wide(EIGHT[:5].copy(), EIGHT.copy()), r"copy .*source\[i\]\): index", (5, 5)),
    (lambda: _by_address(_APART.address, EIGHT.copy()), r"_unit .*, x\[unit\] = 1\)", (8, 8)),
    (lambda: _addressed(EIGHT, 2, 7), r"_addressed .*: activations: first, count", (2, 7, 8)),
    (lambda: _addressed(EIGHT, -1, 2), "_addressed .*: activations: first, count", (-1, 2, 8)),
    (lambda: _addressed(EIGHT, 3, -1), "_addressed .*: activations: first, count", (3, -1, 8)),
])  # fmt: skip
def test_a_mistake_in_a_kernel_is_named(mistake, where, numbers):
    assert bounds.CHECKED
    with pytest.raises(IndexError, match=where) as error:
        mistake()
    assert error.value.args[1:] == numbers


@arrays.compiled
def _run_jobs(
    run: int, units: int, jobs: arrays.Array, matrices: arrays.Array, records: arrays.Array,
    sources: arrays.Array, targets: arrays.Array, out: arrays.Array,
) -> None:  # fmt: skip
    for unit in prange(units):
        cpu_decode.run_unit(run, (unit, jobs, matrices, records, sources, targets, out))


def run_jobs(places=2, records=2, wide=0, out=0, **wrong: int) -> None:
    """Run a job: multiply two records by the second of three matrices `[40, HIDDEN]`."""
    group = Group(matrix(3, 40, HIDDEN))
    jobs = np.zeros((2, cpu_decode.UNITS + 1), np.int64)
    jobs[0, cpu_decode.SECOND], jobs[0, cpu_decode.SLOT], jobs[0, cpu_decode.ROWS] = -1, 1, 2
    jobs[1, cpu_decode.UNITS] = 2
    for name, value in wrong.items():
        jobs[0, getattr(cpu_decode, name)] = value
    size = cpu_records.record_size(group.numbers, group.forms)
    rows = np.zeros((records, size + wide), F32)
    arrays = rows, np.arange(2), np.arange(2)[:places], np.zeros(80 + out, F32)
    _run_jobs(cpu_decode.UNIT_OF_WORK.address, 2, jobs, group.numbers, *arrays)


@pytest.mark.parametrize(("wrong", "what"), [
    ({"SLOT": 3}, "product .*: slots: first, count, size"),
    ({"SLOT": -1}, "product .*: slots: first, count, size"),
    ({"RECORD": 1}, "_find .*: records: first, count, size"),
    ({"RECORD": -1}, "_find .*: records: first, count, size"),
    ({"records": 1}, "_find .*: records: first, count, size"),
    ({"wide": -1}, "_unit .*: numbers of a record: first, count, size"),
    ({"START": 1}, "_unit .*: sources: first, count, size"),
    ({"ROWS": 3}, "_unit .*: sources: first, count, size"),
    ({"PLACE": 1}, "_unit .*: outputs: first, count, size"),
    ({"PLACE": -1}, "_unit .*: outputs: first, count, size"),
    ({"out": -1}, "_unit .*: outputs: first, count, size"),
    ({"places": 1}, r"_unit .* targets\[row \+ r\] .*: index"),
    ({"FIRST": 1}, r"_unit .*: index out of bounds of axis 0"),
    ({"SECOND": 1}, r"_unit .*: index out of bounds of axis 0"),
])  # fmt: skip
def test_a_wrong_entry_of_a_job_table_is_named(wrong, what):
    run_jobs()
    with pytest.raises(IndexError, match=what):
        run_jobs(**wrong)


def test_a_short_activation_row_or_record_is_named():
    (numbers,) = Group(matrix(8, HIDDEN)).numbers
    size = cpu_records.record_size(numbers[None], np.zeros(1, np.int64))
    cpu_records.write_record(np.zeros(HIDDEN, F32), numbers, np.zeros(size, F32))
    for columns, room, what in ((96, size, "activations"), (HIDDEN, size - 1, "a record")):
        with pytest.raises(IndexError, match=f"write_record .*: {what}: first, count, size"):
            cpu_records.write_record(np.zeros(columns, F32), numbers, np.zeros(room, F32))


@pytest.mark.parametrize(("field", "change"), [
    ("CODES", 64), ("CODES", -1), ("SCALES", 4), ("BIASES", 1 << 20), ("SLOTS", 3), ("HEIGHT", 1),
    ("COLUMNS", 32),
])  # fmt: skip
def test_an_address_outside_the_matrix_is_named(field, change):
    group, block = Group(matrix(2, 8, HIDDEN)), moe_block()
    group.numbers[0, getattr(cpu_records, field)] += change
    with pytest.raises(IndexError, match=r"matrix 0: bytes .* of an array of"):
        project(np.zeros((1, HIDDEN), F32), group)
    block._all.numbers[3, getattr(cpu_records, field)] += change
    with pytest.raises(IndexError, match=r"matrix 3: bytes .* of an array of"):
        block(np.zeros((1, HIDDEN), F32), at_once)
    delta = delta_block()
    delta._all.numbers[4, getattr(cpu_records, field)] += change
    new = [np.zeros(shape, F32) for shape in (PAST, STATE)]
    with pytest.raises(IndexError, match=r"matrix 4: bytes .* of an array of"):
        delta(np.zeros((2, HIDDEN), F32), *new, *new)


@pytest.mark.parametrize(("number", "change", "what"), [
    (1, 8, "a matrix: bytes 8 to"),
    (3, -4, "a matrix: bytes -4 to"),
    (7, -2, "unit .*: slots: first, count, size"),
    (5, -16, "unit .*: codes of a row: first, count, size"),
    (6, 1, "unit .*: codes of a row: first, count, size"),
])  # fmt: skip
def test_wrong_numbers_of_a_prompts_weights_are_named(number, change, what):
    weight = matrix(3, 32, HIDDEN).packed
    weight.numbers[number] += change
    with pytest.raises(IndexError, match=what):
        prefill.times(np.zeros((1, HIDDEN), F32), weight, prefill.runs(1, np.array([2])))


PLANTED = """
import numpy as np
from numba import prange
from flashmoe_mlx.custom_kernels.cpu.bounds import jit

@jit(parallel=True)
def beyond(x, out):
    for i in prange(out.size):
        out[i] = x[x.size + i]

out = np.zeros(2)
beyond(np.arange(16.0)[:8], out)
print(out, sum(beyond.stats.cache_hits.values()))
"""


def test_the_modes_cache_code_separately(tmp_path):
    file = tmp_path / "planted.py"
    file.write_text(PLANTED)

    def run(checked: str) -> str:
        env = os.environ | {bounds.VARIABLE: checked}
        env.pop("PYTHONDONTWRITEBYTECODE", None)
        done = subprocess.run([sys.executable, file], env=env, capture_output=True, text=True)
        return done.stdout + done.stderr

    assert run("0") == "[8. 9.] 0\n"
    assert "IndexError: ('beyond (planted.py:9, out[i] = x[x.size + i]): index" in run("1")
    assert run("0") == "[8. 9.] 1\n"


def test_a_wrong_mode_is_named(monkeypatch):
    monkeypatch.setenv(bounds.VARIABLE, "yes")
    with pytest.raises(FlashMoEError, match="FLASHMOE_DEBUG_BOUNDS = 'yes' is not valid"):
        bounds._asked()


def test_kernels_without_checks():
    """Users run other code: with threads, and vectorized where the checks would be."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", *WITHOUT_CHECKS],
        cwd=Path(__file__).parents[1],
        env=env | {bounds.VARIABLE: "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
