"""Folders for what is kept between runs: this user's alone, and whole files or none."""

import errno
import os
import stat
from pathlib import Path

import pytest

from flashmoe_mlx.custom_kernels import kept


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
def test_writes_that_fail(number, tmp_path, monkeypatch, capsys):
    def fsync(file: int) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError):
        kept.write_whole(tmp_path / "file", b"data")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / f"flashmoe-mlx-{os.getuid()}"


def test_the_temporary_folder_is_this_users_alone(temporary):
    assert kept.temporary_dir() == kept.temporary_dir() == temporary
    assert stat.S_IMODE(temporary.stat().st_mode) == 0o700


@pytest.mark.parametrize("kind", ["writable by all", "another's", "symlink", "file"])
def test_a_temporary_folder_that_another_may_write_is_not_used(kind, temporary, monkeypatch):
    """It holds code that runs."""
    if kind == "symlink":
        (temporary.parent / "other").mkdir()
        temporary.symlink_to(temporary.parent / "other")
    elif kind == "file":
        temporary.touch()
    else:
        temporary.mkdir()
        temporary.chmod(0o777 if kind == "writable by all" else 0o700)
    if kind == "another's":
        place = str(temporary)
        other = os.stat_result((*temporary.lstat()[:4], os.getuid() + 1, *temporary.lstat()[5:]))
        real = Path.lstat
        monkeypatch.setattr(Path, "lstat", lambda p: other if str(p) == place else real(p))
    assert kept.temporary_dir() == kept.NOWHERE


def test_no_temporary_files_at_all(monkeypatch):
    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr("tempfile.gettempdir", none)
    assert kept.temporary_dir() == kept.NOWHERE


def test_the_cache_directory_without_a_home(temporary, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/somewhere")
    assert kept.cache_dir() == Path("/somewhere/.cache/flashmoe-mlx")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for an unknown number
    assert kept.cache_dir() == temporary
