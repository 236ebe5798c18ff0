"""Cache and temporary folders, and atomic writes."""

import contextlib
import os
import stat
import threading
from pathlib import Path

NOWHERE = Path(os.devnull) / "flashmoe-mlx"  # a folder that cannot exist


def cache_dir() -> Path:
    """Return the directory of cached results; it may not exist."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "flashmoe-mlx"
    home = Path(os.path.expanduser("~"))
    return home / ".cache/flashmoe-mlx" if home.is_absolute() else temporary_dir()


def temporary_dir() -> Path:
    """Return a temporary folder that only this user can write, creating it if necessary.

    Returns `NOWHERE` if that fails or another user made it, because code runs from this folder.
    """
    import tempfile  # slow to import

    try:
        path = Path(tempfile.gettempdir(), f"flashmoe-mlx-{os.getuid()}")
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        found = path.lstat()
    except OSError:
        return NOWHERE
    others = stat.S_IWGRP | stat.S_IWOTH
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    return path if ours and not found.st_mode & others else NOWHERE


def write_whole(path: Path, data: bytes) -> None:
    """Write a file atomically, even if the power fails.

    Raises:
        OSError: the write failed; the file is unchanged.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the directory entry
    finally:
        os.close(folder)
