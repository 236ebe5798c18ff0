"""A conversion without room says so before it starts, or fails cleanly and resumes."""

import errno
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from convert_helpers import assert_not_whole, contents, read

from flashmoe_mlx.convert import convert, run
from flashmoe_mlx.convert.write import files
from flashmoe_mlx.errors import FlashMoEError

JOURNAL = "model_experts/unfinished.json"
MANIFEST = "model_experts/manifest.json"

ROOM = 500_000


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with space for half a conversion; removing `ballast` frees more."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = 4 << 20
    mounted = os.geteuid() == 0 and sys.platform == "linux" and not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", disk], capture_output=True
    ).returncode  # fmt: skip
    (disk / "ballast").write_bytes(b"x" * (size - ROOM))
    if not mounted:
        _limit_writes(monkeypatch, disk, size)
    yield disk
    if mounted:
        subprocess.run(["umount", disk], check=True)


def _limit_writes(monkeypatch: pytest.MonkeyPatch, disk: Path, size: int) -> None:
    """Fail writes like a full disk, where none can be mounted."""
    real = os.pwrite

    def pwrite(file, data, offset):
        used = sum(path.stat().st_size for path in disk.rglob("*") if path.is_file())
        if used + len(data) > size:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, data, offset)

    monkeypatch.setattr(files.os, "pwrite", pwrite)


@pytest.mark.parametrize("simulated", [False, True])
def test_full_disk(root, small_disk, monkeypatch, simulated):
    if simulated:
        _limit_writes(monkeypatch, small_disk, 4 << 20)
    out = small_disk / "out"
    with pytest.raises(FlashMoEError, match=r"needs 0.7\d MB, but only 0.\d\d MB are free"):
        convert(root / "hf", out, quantize=True)
    assert not out.exists()
    real = shutil.disk_usage
    monkeypatch.setattr(run.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1e9))
    for _ in range(2):  # the second run has no more space than the first
        with pytest.raises(FlashMoEError) as error:
            convert(root / "hf", out, quantize=True)
        assert "(No space left on device). Free some space. Run the same" in str(error.value)
        assert str(error.value).startswith(f"{out}/")
        assert_not_whole(out)
        assert not list(out.rglob("*.tmp"))
    assert read(out / JOURNAL)["files"]
    (small_disk / "ballast").unlink()
    monkeypatch.setattr(run.shutil, "disk_usage", real)
    convert(root / "hf", out, quantize=True)
    assert contents(out) == contents(root / "whole")


def test_the_message_names_file_and_byte(root, tmp_path, monkeypatch):
    real = os.pwrite

    def pwrite(file, data, offset):
        if offset > 100_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, data, offset)

    monkeypatch.setattr(files.os, "pwrite", pwrite)
    with pytest.raises(FlashMoEError) as error:
        convert(root / "hf", tmp_path / "out", quantize=True)
    assert re.match(
        rf"{tmp_path}/out/\S+\.safetensors\.tmp, byte 1\d\d,\d{{3}} of \d\d\d,\d{{3}}: cannot be "
        r"written \(No space left on device\)\. Free some space\. Run the same command again",
        str(error.value),
    )
