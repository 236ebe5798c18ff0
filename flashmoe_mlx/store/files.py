"""Expert files: opened when a store is, closed when its reader has come to rest."""

import os
import threading
from collections.abc import Iterable
from pathlib import Path

from ..errors import FlashMoEError
from .backend import DeviceLoader
from .io_mode import open_expert_file
from .reader import Reader


def open_files(paths: set[Path], direct: bool) -> dict[Path, int]:
    """Open files and return their descriptors.

    Raises:
        FlashMoEError: one cannot be opened; the others are closed again.
    """
    files: dict[Path, int] = {}
    try:
        for path in sorted(paths):
            files[path] = open_expert_file(path, direct)
    except OSError as error:
        close_files(files.values())
        raise FlashMoEError(
            f"{error.filename}: cannot be opened ({error.strerror}). "
            "Check that the model directory is complete and readable."
        ) from error
    return files


def close(reader: Reader, loaders: list[DeviceLoader], files: list[int], process: int) -> None:
    """Close loaders, reader and files; in another process than the opener's, the files alone."""
    if threading.current_thread() in reader.threads:  # the garbage collector runs anywhere
        threading.Thread(target=close, args=(reader, loaders, files, process)).start()
        return
    if os.getpid() == process:  # a fork has no reader threads, and perhaps locks that stay shut
        for loader in loaders:
            loader.close()
        reader.close()
    close_files(files)


def close_files(descriptors: Iterable[int]) -> None:
    """Close descriptors."""
    for descriptor in descriptors:
        os.close(descriptor)
