"""A conversion that is killed, or runs out of disk, resumes to the same bytes."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from convert_helpers import KILLER, LAYER_BYTES, LAYERS, assert_not_whole, contents, read

from flashmoe_mlx.convert import convert, run
from flashmoe_mlx.convert.write import journal, output
from flashmoe_mlx.errors import FlashMoEError
from flashmoe_mlx.format.layout import open_layout

JOURNAL = "model_experts/unfinished.json"
MANIFEST = "model_experts/manifest.json"
KILLED = str(int(signal.SIGKILL))


class Killer:
    """Runs conversions of `source` that kill themselves at the n-th system call."""

    def __init__(self, source: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", KILLER, str(source)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, out: Path, last_call: int) -> str:
        """Convert, and return "9" for SIGKILL, or the names of all its system calls."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(f"{last_call} {out}\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        self._process.communicate("")


@pytest.fixture(scope="module")
def killer(root: Path) -> Iterator[Killer]:
    killer = Killer(root / "hf")
    yield killer
    killer.close()


def test_killed_anywhere_it_resumes(root, tmp_path, killer):
    """At random calls of every kind and the last ones: before, after, or amid a write."""
    expected = contents(root / "whole")
    calls = killer.run(tmp_path / "count", 10**9).split()
    assert contents(tmp_path / "count") == expected
    for place, call in enumerate(calls):
        if call == "replace":  # bytes are on the disk before the name, and the name before the next
            assert (calls[place - 1], *calls[place + 1 : place + 3]) == ("fsync", "open", "fsync")
    points = []
    for kind in ("open", "pwrite", "fsync", "replace", "mkdir", "unlink"):
        places = [point for point, call in enumerate(calls) if call == kind]
        points += random.Random(kind).sample(places, min(3, len(places)))
    points += range(len(calls) - 8, len(calls))  # the manifest is written, then the journal deleted
    assert len(points) >= 20
    for point in points:
        out = tmp_path / "out"
        assert killer.run(out, point) == KILLED
        assert_not_whole(out)
        if not (out / MANIFEST).exists() or (out / JOURNAL).exists():
            convert(root / "hf", out, quantize=True)
        assert contents(out) == expected, f"killed at call {point}, {calls[point]}"
        shutil.rmtree(out)


def test_killed_again_and_again(root, tmp_path, killer):
    """The files of each run are kept: the last run has little to do."""
    out, rounds = tmp_path / "out", 0
    assert killer.run(out, 215) == KILLED  # with the trunk finished
    while killer.run(out, 80) == KILLED:
        rounds += 1
        assert rounds < 20
    assert rounds >= 2
    assert contents(out) == contents(root / "whole")


def test_the_command_killed_by_the_clock(root, tmp_path):
    """The real command, killed at arbitrary times while it writes larger files."""
    out = tmp_path / "out"
    command = [
        sys.executable, "-m", "flashmoe_mlx.convert.cli", "--model", str(root / "hf"), "-q",
        "--mlx-path", str(out),
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not (out / "model_experts").exists() and process.poll() is None:
        time.sleep(0.002)
    time.sleep(0.03)
    process.kill()
    assert process.wait() in (-signal.SIGKILL, 0)
    if process.returncode:
        assert subprocess.run(command, capture_output=True).returncode == 0
    assert contents(out) == contents(root / "whole")


@pytest.fixture(scope="module")
def half_done(killer: Killer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion killed while it wrote layer 2."""
    folder = tmp_path_factory.mktemp("half")
    out = folder / "half"
    calls = len(killer.run(folder / "count", 10**9).split())
    for point in range(calls - 20, 0, -8):  # the layers come last
        assert killer.run(out, point) == KILLED
        if (out / "model_experts/layer_02.safetensors.tmp").exists():
            return out
        shutil.rmtree(out)
    raise AssertionError("never saw that layer")


@pytest.fixture
def half(half_done: Path, tmp_path: Path) -> Path:
    return shutil.copytree(half_done, tmp_path / "half")


def test_finished_files_are_kept(root, half, monkeypatch):
    written = []
    real = output.write_weights

    def write_weights(source, file, *rest):
        written.append(file)
        return real(source, file, *rest)

    monkeypatch.setattr(output, "write_weights", write_weights)
    convert(root / "hf", half, quantize=True)
    assert [file.layer for file in written] == [2, 3]
    assert contents(half) == contents(root / "whole")


@pytest.mark.parametrize("damage", ["short", "longer", "header", "end", "gone"])
def test_finished_files_that_changed_are_written_again(root, half, damage):
    path = half / "model_experts/layer_01.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        if damage in ("header", "end"):
            data[100 if damage == "header" else -100] ^= 1
        path.write_bytes(data[:-1] if damage == "short" else data + b"\0" * (damage == "longer"))
    convert(root / "hf", half, quantize=True)
    assert contents(half) == contents(root / "whole")


def test_no_manifest_while_a_file_is_written_again(root, tmp_path, monkeypatch):
    """Killed between manifest and journal, and then a file was damaged."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(journal, "remove_journal", interrupt)
        convert(root / "hf", out, quantize=True)
    assert (out / MANIFEST).exists() and (out / JOURNAL).exists()
    os.truncate(out / "model_experts/layer_01.safetensors", 99)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(output, "write_weights", interrupt)
        convert(root / "hf", out, quantize=True)
    assert not (out / MANIFEST).exists()
    convert(root / "hf", out, quantize=True)
    assert contents(out) == contents(root / "whole")


def interrupt(*arguments):
    raise KeyboardInterrupt


def test_other_options_are_refused(root, half):
    before = contents(half)
    with pytest.raises(FlashMoEError) as error:
        convert(root / "hf", half, quantize=True, q_bits=2)
    assert str(error.value) == (
        f"{half}: an unfinished conversion, begun with options -q, not -q --q-bits 2. Give "
        f"the same options and source to finish it, or delete {half} to start again."
    )
    with pytest.raises(FlashMoEError, match=r"begun with source \S+hf, not \S+stock"):
        convert(root / "stock", half)
    assert contents(half) == before


def test_another_mlx_is_refused(root, half, monkeypatch):
    monkeypatch.setattr(run, "tools", lambda: "mlx 9.9, gpu")
    with pytest.raises(FlashMoEError, match=r"begun with tools mlx \S+, [cg]pu, not mlx 9.9, gpu"):
        convert(root / "hf", half, quantize=True)


def test_a_source_that_changed_is_refused(root, tmp_path, monkeypatch):
    shutil.copytree(root / "hf", tmp_path / "hf")
    stop_at(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "hf", tmp_path / "out", quantize=True)
    monkeypatch.undo()
    changed = tmp_path / "hf/model-00002-of-00003.safetensors"
    os.utime(changed, (1, 1))
    with pytest.raises(FlashMoEError, match=r"begun with another model-00002-of-00003.safetensors"):
        convert(tmp_path / "hf", tmp_path / "out", quantize=True)
    (tmp_path / "hf/added.txt").write_text("x")
    with pytest.raises(FlashMoEError, match=r"another added.txt .*: no such file, now \[1, "):
        convert(tmp_path / "hf", tmp_path / "out", quantize=True)


def stop_at(monkeypatch: pytest.MonkeyPatch, layer: int) -> None:
    real = output.write_weights

    def write_weights(source, file, *rest):
        if getattr(file, "layer", None) == layer:
            raise KeyboardInterrupt
        return real(source, file, *rest)

    monkeypatch.setattr(output, "write_weights", write_weights)


def test_damaged_journal(root, half):
    for text in ("{", "[]", '{"version": 1, "begun": 3, "files": {}}', "[" * 100_000):
        (half / JOURNAL).write_text(text)
        fault = r"unfinished.json: (damaged|not JSON) .* Delete .*half and"
        with pytest.raises(FlashMoEError, match=fault):
            convert(root / "hf", half, quantize=True)
    (half / JOURNAL).write_text('{"version": 7, "begun": {}, "files": {}}')
    with pytest.raises(FlashMoEError, match=r"begun with version 7, not 1"):
        convert(root / "hf", half, quantize=True)


def test_entries_of_the_journal_are_not_trusted(root, half):
    """Entries of files outside the plan are ignored, whatever path they give."""
    content = read(half / JOURNAL)
    content["files"]["../../etc/passwd"] = {"size": 1}
    content["files"]["model_experts/layer_01.safetensors"] = {"header": 5}
    (half / JOURNAL).write_text(json.dumps(content))
    convert(root / "hf", half, quantize=True)
    assert contents(half) == contents(root / "whole")


def test_two_at_once(root, half):
    with (
        journal.locked(half),
        pytest.raises(FlashMoEError, match=r"another flashmoe-convert is writing"),
    ):
        convert(root / "hf", half, quantize=True)
    convert(root / "hf", half, quantize=True)


def test_file_systems_without_locks(root, tmp_path, monkeypatch):
    def flock(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(journal.fcntl, "flock", flock)
    convert(root / "hf", tmp_path / "out", quantize=True)
    assert contents(tmp_path / "out") == contents(root / "whole")


def test_an_empty_directory_is_accepted(root, tmp_path):
    (tmp_path / "out").mkdir()
    convert(root / "hf", tmp_path / "out", quantize=True)
    assert contents(tmp_path / "out") == contents(root / "whole")
    with pytest.raises(FlashMoEError, match=r"exists already"):
        convert(root / "hf", tmp_path / "out", quantize=True)


def test_link_resumes_too(root, tmp_path, monkeypatch):
    real, links = os.symlink, []

    def symlink(source, target):
        links.append(target)
        if len(links) == 3:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        real(source, target)

    monkeypatch.setattr(os, "symlink", symlink)
    with pytest.raises(FlashMoEError, match=r"No space left on device\). Free some space. Run"):
        convert(root / "stock", tmp_path / "out", link=True)
    with pytest.raises(FlashMoEError, match=r"unfinished"):
        open_layout(tmp_path / "out", LAYERS, 8)
    convert(root / "stock", tmp_path / "out", link=True)
    convert(root / "stock", tmp_path / "expected", link=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_a_file_not_in_the_journal_yet_is_deleted(root, half, monkeypatch):
    """Killed between its rename and the journal's: it is deleted before it is written again."""
    content = read(half / JOURNAL)
    del content["files"]["model_experts/layer_01.safetensors"]
    (half / JOURNAL).write_text(json.dumps(content))
    shutil.copy(half / "model_experts/layer_01.safetensors", half / "model_experts/x")
    (half / "model_experts/x").rename(half / "model_experts/layer_03.safetensors.tmp")
    monkeypatch.setattr(
        run.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, LAYER_BYTES)
    )
    real, before = output.write_weights, []

    def write_weights(source, file, *rest):
        before.append({path.name for path in (half / "model_experts").iterdir()})
        return real(source, file, *rest)

    monkeypatch.setattr(output, "write_weights", write_weights)
    convert(root / "hf", half, quantize=True)
    assert len(before) == 3 and before[0] == {"layer_00.safetensors", "unfinished.json"}
    assert contents(half) == contents(root / "whole")


def test_what_a_killed_run_was_writing_counts_as_free(root, half, monkeypatch, capsys):
    size = (half / "model_experts/layer_02.safetensors.tmp").stat().st_size
    monkeypatch.setattr(run.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))
    convert(root / "hf", half, quantize=True, dry_run=True)
    text = capsys.readouterr().out
    assert size > 0 and f"free disk   {1000 + size:,} bytes" in text
    left = 2 * LAYER_BYTES
    assert f"to write    {left:,} bytes" in text
