"""Where this machine keeps what it need not make again, and files that are whole or missing."""

import contextlib
import os
import stat
import threading
from pathlib import Path

NOWHERE = Path(os.devnull) / "flashmoe-mlx"  # a folder that cannot be made


def cache_dir() -> Path:
    """Return the directory for what this machine need not find out again; it may not exist."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "flashmoe-mlx"
    home = Path(os.path.expanduser("~"))
    return home / ".cache/flashmoe-mlx" if home.is_absolute() else temporary_dir()


def temporary_dir() -> Path:
    """Return a folder among the temporary files that only this user may write, made if need be.

    Where none can be made, or another user made it, that is `NOWHERE`: code is run from it.
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
    """Write a file that is whole or as it was before, even if the power fails.

    Raises:
        OSError: it cannot be written; nothing is left of it.
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
        os.fsync(folder)  # the name
    finally:
        os.close(folder)
