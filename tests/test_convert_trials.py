"""`tests/stress/convert_trials.py` and `convert_fuzz.py` run, and detect errors."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import convert_damage
import convert_fuzz
import pytest
from convert_damage import DAMAGES, complaint, damaged_everywhere, tensor_at, verified
from convert_helpers import contents, flip
from convert_mutations import MUTATIONS
from convert_scenes import MANIFEST_PLACE, differences, pretends

from flashmoe_mlx.format.headers import read_header

STRESS = Path(__file__).parent / "stress"
LAYER = "model_experts/layer_02.safetensors"


# --- killed --------------------------------------------------------------------------------------

# `convert_strike.py` with another main, which writes a file like a conversion.
STRUCK = """
import json, os, sys, types
def main(arguments):
    file = os.open("x.tmp", os.O_WRONLY | os.O_CREAT)
    os.pwrite(file, b"first", 0)
    os.fsync(file)
    os.pwrite(file, b"second", 5)
    os.replace("x.tmp", "x")
    os.fsync(file)
stub = types.ModuleType("flashmoe_mlx.convert.cli")
stub.main = main
sys.modules[stub.__name__] = stub
import convert_strike
strike = convert_strike.Strike(**json.loads(sys.argv[1]))
main([])
strike.close()
"""


def struck(folder: Path, **how: object) -> int:
    environment = os.environ | {"PYTHONPATH": str(STRESS)}
    command = [sys.executable, "-c", STRUCK, json.dumps(how)]
    return subprocess.run(command, cwd=folder, env=environment).returncode


@pytest.mark.parametrize(
    ("point", "when", "left"),
    [
        (0, "before", {}),
        (1, "before", {"x.tmp": b""}),
        (1, "after", {"x.tmp": b"first"}),
        (3, "amid", {"x.tmp": b"firstsec"}),
        (4, "before", {"x.tmp": b"firstsecond"}),
        (4, "after", {"x": b"firstsecond"}),
    ],
)
def test_killed_at_a_call(tmp_path, point, when, left):
    assert struck(tmp_path, point=point, when=when) == -signal.SIGKILL
    assert contents(tmp_path) == left


def test_a_power_failure_loses_unsynced_bytes(tmp_path):
    found = set()
    for seed in range(6):
        assert struck(tmp_path, point=4, when="after", power=seed) == -signal.SIGKILL
        found.add((tmp_path / "x").read_bytes())
        (tmp_path / "x").unlink()
    assert found <= {b"first", b"first" + bytes(6), b"firstsecond"} and len(found) > 1
    assert struck(tmp_path, point=5, when="after", power=0) == -signal.SIGKILL
    assert (tmp_path / "x").read_bytes() == b"firstsecond"
    assert struck(tmp_path, log="calls.json") == 0
    calls = json.loads((tmp_path / "calls.json").read_text())
    assert [n for n, _ in calls] == ["open", "pwrite", "fsync", "pwrite", "replace", "fsync"]


def test_unfinished_files_that_look_finished(root, tmp_path):
    whole, out = root / "packed", shutil.copytree(root / "packed", tmp_path / "out")
    assert not pretends(out, whole) and not differences(out, whole)
    flip(out / LAYER, 20_000)
    (out / "x.tmp").write_bytes(b"")
    assert pretends(out, whole) == [f"{LAYER} is not whole"]
    assert differences(out, whole) == [LAYER, "x.tmp"]
    (out / LAYER).unlink()
    assert pretends(out, whole) == [f"the manifest is there without {LAYER}"]
    (out / MANIFEST_PLACE).unlink()
    assert pretends(out, whole) == []


# --- damaged -------------------------------------------------------------------------------------


def test_every_damage_is_named(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(convert_damage, "loaded", lambda out: "not tried")
    assert damaged_everywhere(tmp_path, root / "packed", times=1, seed=0) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows[:-1]] == [damage.__name__ for damage in DAMAGES]
    assert contents(tmp_path / "out") == contents(root / "packed")


def test_unnamed_damage_is_detected(root):
    tensor = read_header(root / "packed" / LAYER)["experts.3.up_proj.scales"]
    place = tensor.offset + tensor.nbytes - 1
    assert tensor_at(root / "packed" / LAYER, place) == "layer 2 expert 3 up_proj.scales differs"
    assert tensor_at(root / "packed" / LAYER, 5) == "header differs"
    assert tensor_at(root / "packed" / "config.json", 5) == "file differs"
    said = f"{LAYER}: layer 2 expert 3 up_proj.scales differs (...)"
    assert complaint(LAYER, place, root / "packed", 1, said) == ""
    assert "exit code 0" in complaint(LAYER, place, root / "packed", 0, said)
    assert "gate_proj.weight" in complaint(LAYER, 20_000, root / "packed", 1, said)
    assert "not named" in complaint(MANIFEST_PLACE, None, root / "packed", 1, said)
    assert verified(root / "packed")[0] == 0


# --- hostile -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> convert_fuzz.Cases:
    return convert_fuzz.Cases(tmp_path_factory.mktemp("cases"))


def test_cases(cases):
    """A few cases of `convert_fuzz.py`."""
    assert {"refused", "planned"} <= {cases.run(seed) for seed in range(20)}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_mutations_change_something(root, tmp_path, mutation):
    changed = 0
    for seed in range(3):
        source = shutil.copytree(root / "hf", tmp_path / str(seed))
        mutation(source, random.Random(seed))
        before = {path.name: path.read_bytes() for path in (root / "hf").iterdir()}
        files = {path.name: path.lstat() for path in source.iterdir()}
        changed += files.keys() != before.keys() or any(
            (source / name).is_symlink()
            or not (source / name).is_file()
            or files[name].st_size != len(data)
            or (source / name).read_bytes() != data
            for name, data in before.items()
        )
    assert changed


def test_changes_outside_the_output_are_detected(tmp_path, cases):
    (tmp_path / "out").mkdir()
    acts = (
        lambda: (tmp_path / "x").write_text("x"),
        lambda: (tmp_path / "out/../x").write_text("x"),
        lambda: os.mkdir(tmp_path / "x"),
        lambda: os.rename(tmp_path / "out/y", tmp_path / "x"),
        lambda: os.symlink("/x", tmp_path / "x"),
    )
    for act in acts:
        with (
            pytest.raises(AssertionError, match=r"/x, outside the output"),
            cases.guard.armed(tmp_path / "out"),
        ):
            (tmp_path / "out/y").write_text("y")
            act()
    assert not (tmp_path / "x").exists()
    (tmp_path / "x").write_text("x")  # no longer armed
