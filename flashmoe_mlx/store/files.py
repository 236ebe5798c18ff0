"""Open expert files and their reader for a store, and close both in the right order."""

import os
import threading
from collections.abc import Iterable
from pathlib import Path

from ..errors import FlashMoEError
from ..format.layout import ExpertLayout
from .backend import Backend, DeviceLoader
from .io_mode import open_expert_file
from .reader import Reader


def open_reader(
    layout: ExpertLayout, direct: bool, threads: int, backend: Backend
) -> tuple[dict[Path, int], Reader]:
    """Open all expert files, and return their descriptors and a reader of them.

    Raises:
        FlashMoEError: a file cannot be opened or a thread not started; all files are closed again.
    """
    files: dict[Path, int] = {}
    try:
        for path in sorted({field.file for layer in layout.layers for field in layer.fields}):
            files[path] = open_expert_file(path, direct)
        names = {descriptor: path for path, descriptor in files.items()}
        return files, Reader(names, threads, backend)
    except BaseException as error:
        close_files(files.values())
        if not isinstance(error, OSError):
            raise
        raise FlashMoEError(
            f"{error.filename}: cannot be opened ({error.strerror}). "
            "Check that the model directory is complete and readable."
        ) from error


def close(reader: Reader, loaders: list[DeviceLoader], files: list[int], process: int) -> None:
    """Close loaders, reader and files; in a fork of `process`, only the files."""
    if threading.current_thread() in reader.threads:  # the garbage collector runs anywhere
        threading.Thread(target=close, args=(reader, loaders, files, process)).start()
        return
    if os.getpid() == process:  # a fork has no reader threads to release locks
        for loader in loaders:
            loader.close()
        reader.close()
    close_files(files)


def close_files(descriptors: Iterable[int]) -> None:
    """Close file descriptors."""
    for descriptor in descriptors:
        os.close(descriptor)
