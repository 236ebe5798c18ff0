"""Conversions from the Hub that were killed or interrupted are continued."""

import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from convert_helpers import (
    KILLER,
    LAYER_BYTES,
    LAYERS,
    flip,
    read,
)
from hub_helpers import FEW, JOURNAL, MANIFEST, NAME, assert_same, on_disk
from hub_server import Fault, HubServer, commit

from flashmoe_mlx.convert import convert
from flashmoe_mlx.convert.source import hub
from flashmoe_mlx.convert.source.shards import FOLDER
from flashmoe_mlx.convert.write import journal, output
from flashmoe_mlx.errors import FlashMoEError
from flashmoe_mlx.format.headers import read_header


def environment(server: HubServer, tmp_path: Path) -> dict[str, str]:
    return os.environ | {
        "HF_ENDPOINT": server.url, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip


def test_killed_while_a_file_comes(root, server, files, sizes, tmp_path):
    """Half of a file is on disk and is deleted; packed files are not downloaded again."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "flashmoe_mlx.convert.cli", "--model", NAME, "-q"]
    process = subprocess.Popen(
        [*command, "--mlx-path", str(out)], env=environment(server, tmp_path),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def kill(file: str, sent: int) -> None:
        if file == files[6] and sent > 100_000:
            process.kill()

    server.listener = kill
    assert process.wait() == -signal.SIGKILL
    assert (out / JOURNAL).exists()
    assert list((out / FOLDER).rglob("*.incomplete"))
    held: list[int] = []
    server.listener = lambda file, sent: held.append(on_disk(out / FOLDER))
    server.reset()
    convert(NAME, out, quantize=True)
    assert_same(root, out)
    *_, second, first = sorted(sizes.values())
    assert max(held[1:]) <= first + second + FEW
    assert all(server.sent[name] <= hub.FIRST_BYTES for name in files[:5])


@pytest.mark.parametrize("content", ["right", "wrong", "holes", "no ranges"])
def test_half_a_file_is_resumed(root, server, half, files, content):
    """The client never resumes the file that it left when it was killed; we do."""
    name = next(f for f in files if not (half / FOLDER / f).exists() and f > files[4])
    data = (root / "chain" / name).read_bytes()
    left = half / FOLDER / ".cache/huggingface/download"
    checksum = hashlib.sha256(data).hexdigest()
    for path, size in ((f"x.{checksum}.0123abcd", 200_000), (f"y.{'0' * 64}.0123abcd", 1000)):
        (left / f"{path}.incomplete").write_bytes(
            {"wrong": bytes(size), "holes": b""}.get(content, data[:size])
        )
        if content == "holes":
            os.truncate(left / f"{path}.incomplete", size)
    server.reset()
    server.faults[name] = [Fault("drop", 5000)]  # of the header
    if content == "no ranges":
        server.faults[name] += [Fault("etag", "0" * 64), Fault("plain", True)]
    convert(NAME, half, quantize=True)
    assert_same(root, half)
    rest = len(data) - 200_000
    came = {"right": rest, "wrong": rest + len(data)}.get(content, len(data))
    assert server.sent[name] == 5000 + hub.FIRST_BYTES + came


def test_killed_anywhere(root, server, tmp_path):
    """At system calls of every kind; threads make them, so their order varies from run to run."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLER, NAME], env=environment(server, tmp_path),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdin and process.stdout

    def killed_at(call: int, out: Path) -> str:
        print(call, out, file=process.stdin, flush=True)
        return process.stdout.readline().strip()

    for point in random.Random(5).sample(range(40, 700), 3):  # of nearly a thousand
        out = tmp_path / f"killed-at-{point}"
        assert killed_at(point, out) == str(int(signal.SIGKILL))
        assert not (out / MANIFEST).exists()
        convert(NAME, out, quantize=True)
        assert_same(root, out)
    process.communicate("")


@pytest.mark.parametrize("name", ["write_manifest", "remove_journal"])
def test_stopped_at_the_end(root, server, half, files, name, monkeypatch):
    """The downloads are deleted by then, and none is downloaded again."""

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr({"write_manifest": output, "remove_journal": journal}[name], name, stop)
        convert(NAME, half, quantize=True)
    assert not (half / FOLDER).exists()
    server.reset()
    convert(NAME, half, quantize=True)
    assert_same(root, half)
    assert all(server.sent[file] <= hub.FIRST_BYTES for file in files)


def test_a_branch_that_moved_is_refused(root, server, half, tmp_path):
    """Two commits are not mixed; --revision finishes the first."""
    shutil.copytree(root / "chain", tmp_path / "later")
    server.add(NAME, tmp_path / "later", "b")
    before = f"source {NAME} {commit('a')}, not {NAME} {commit('b')}"
    with pytest.raises(FlashMoEError, match=rf"{before}. Give --revision {commit('a')} to fin"):
        convert(NAME, half, quantize=True)
    convert(NAME, half, quantize=True, revision=commit("a"))
    assert_same(root, half)


@pytest.mark.parametrize("damage", ["gone", "byte", "short", "entry"])
def test_partial_files_that_changed_are_written_again(root, server, half, damage):
    path = half / "model.safetensors.tmp"
    entry = read(half / JOURNAL)["files"]["model.safetensors"]
    assert any(entry["written"]) and not all(entry["written"])
    if damage == "gone":
        path.unlink()
    elif damage == "byte":
        flip(path, next(place for place, byte in enumerate(path.read_bytes()) if byte))
    elif damage == "short":
        os.truncate(path, 5000)
    else:
        text = (half / JOURNAL).read_text().replace('"written": ["', '"written": ["0", "')
        (half / JOURNAL).write_text(text)
    convert(NAME, half, quantize=True)
    assert_same(root, half)


def test_a_dry_run_reports_what_is_left(root, server, half, sizes, capsys):
    convert(NAME, half, quantize=True, dry_run=True)
    text = capsys.readouterr().out
    (fetch, left) = re.search(r"to fetch +(\d+) files[^$]*to write +([\d,]+) by", text).groups()
    assert 0 < int(fetch) < len(sizes)
    begun = read(half / JOURNAL)["files"]
    trunk = read_header(root / "whole/model.safetensors")
    written = zip(trunk.values(), begun["model.safetensors"]["written"], strict=True)
    done = sum(tensor.nbytes for tensor, checksum in written if checksum)
    done += sum(LAYER_BYTES for name in begun if name.startswith("model_experts/"))
    total = sum(tensor.nbytes for tensor in trunk.values()) + LAYERS * LAYER_BYTES
    assert int(left.replace(",", "")) == total - done
