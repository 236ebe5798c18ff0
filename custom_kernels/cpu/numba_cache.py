"""numba's cache on disk, made safe from other processes, from damage, and where no folder is.

numba picks the next free name for compiled code, notes it in an index, and writes the code. Two
processes can pick the same name for two kernels; then one is found under the other's name, and
computes something else from then on. Here they take turns.

numba trusts what it reads, so a file that a power loss left empty or zeroed ends every later run.
Here each file ends with a checksum, behind what numba itself reads; a file that does not match
counts as missing, and is compiled and written again.

numba refuses to go on where neither the package's folder nor the user's can be written. Here code
is then kept among the temporary files, or in memory.
"""

import contextlib
import fcntl
import io
import os
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any

from numba.core.caching import (
    Cache,
    CacheImpl,
    CompileResultCacheImpl,
    IndexDataCacheFile,
    UserWideCacheLocator,
)

from .. import kept

SEAL = sha256().digest_size
REMEDY = "Set NUMBA_CACHE_DIR to a folder that can be written."
PACKAGE = __name__.partition(".")[0]

complaints: list[str] = []  # why compiled code is not kept, or not for long; said once
damaged: list[str] = []  # the first file that was not as it was written


@contextlib.contextmanager
def _turn(index: str) -> Iterator[None]:
    """Hold a lock beside an index file; where none can be made, nothing can be cached either."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            file = stack.enter_context(open(f"{index}.lock", "w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _save(file: Any, key: Any, data: Any) -> None:
    """Save compiled code before the index names it, so that no index names what is older."""
    with _turn(file._index_path):
        overloads = _names(file)
        if (name := overloads.get(key)) is None:
            taken = set(overloads.values())
            name = next(n for n in map(file._data_name, count(1)) if n not in taken)
        file._save_data(name, data)
        file._save_index(overloads | {key: name})


def _load(file: Any, key: Any) -> Any:
    with _turn(file._index_path):
        if (name := _names(file).get(key)) is None:
            return None
        return _read(file._data_path(name), lambda: file._load_data(name))


def _names(file: Any) -> dict[Any, str]:
    return _read(file._index_path, file._load_index) or {}


def _read(path: str, read: Callable[[], Any]) -> Any:
    """Return what numba reads from a file; None if it is missing or not as it was written."""
    try:
        data = Path(path).read_bytes()
        if sha256(data[:-SEAL]).digest() != data[-SEAL:]:
            raise ValueError("another checksum")
        return read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # whatever reading and unpickling raise
        text = "compiled code that is damaged or an older version's; it is compiled again"
        _say_once(damaged, f"{path}: {text} ({error})")
        return None


@contextlib.contextmanager
def _write(file: Any, path: str) -> Iterator[io.BytesIO]:
    """Take a file's content from numba, and write it with its checksum, whole or not at all."""
    content = io.BytesIO()
    yield content
    data = content.getvalue()
    kept.write_whole(Path(path), data + sha256(data).digest())


def _save_overload(cache: Any, signature: Any, data: Any) -> None:
    """Save compiled code if the disk takes it; this process has it in any case."""
    try:
        _save_as_numba_does(cache, signature, data)
    except OSError as error:
        text = f"compiled CPU kernels cannot be kept ({error.strerror}): each run compiles them"
        _say_once(complaints, f"{error.filename or cache.cache_path}: {text}. {REMEDY}")


_save_as_numba_does = Cache._save_overload


class _HomeLocator(UserWideCacheLocator):
    """The user's cache directory, if anybody knows where that is."""

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> Any:
        """Return a locator, or None if the directory cannot be written."""
        known = os.path.isabs(cls(py_func, py_file).get_cache_path())
        return super().from_function(py_func, py_file) if known else None


class _LastLocator(UserWideCacheLocator):
    """Where compiled code of ours goes if it can be kept neither in the package nor at home."""

    def __init__(self, py_func: Any, py_file: str) -> None:
        super().__init__(py_func, py_file)
        package = os.path.join(os.path.dirname(py_file), "__pycache__")
        self.refused = f"{package} and {super().get_cache_path()} cannot be written"
        self._path = os.path.join(kept.temporary_dir(), self.get_suitable_cache_subpath(py_file))

    def get_cache_path(self) -> str:
        """Return the folder among the temporary files."""
        return self._path

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> Any:
        """Return a locator for a function of this package, and say what that means."""
        if py_func.__module__.partition(".")[0] != PACKAGE:
            return None
        found = super().from_function(py_func, py_file) or cls(py_func, py_file)
        result = f"kept in {kept.temporary_dir()}"
        if not os.path.isdir(found.get_cache_path()):
            result = "compiled again in each run, which takes a minute or two"
        _say_once(complaints, f"{found.refused}, so CPU kernels are {result}. {REMEDY}")
        return found


def _say_once(said: list[str], text: str) -> None:
    if not said:
        said.append(text)
        print(f"[flashmoe] {text}", file=sys.stderr, flush=True)


def folder() -> Path:
    """Return where compiled kernels are kept; it does not exist if they are kept in memory."""
    return Path(CompileResultCacheImpl(folder).locator.get_cache_path())


def take_turns() -> None:
    """Have this process use numba's cache as above; twice does no harm."""
    IndexDataCacheFile.save, IndexDataCacheFile.load = _save, _load
    IndexDataCacheFile._open_for_write = _write
    Cache._save_overload = _save_overload
    ours = [_HomeLocator if c is UserWideCacheLocator else c for c in CacheImpl._locator_classes]
    CacheImpl._locator_classes = [*(c for c in ours if c is not _LastLocator), _LastLocator]
