"""numba's cache on disk, made safe against concurrent processes, damage and read-only folders.

numba picks the next free name for compiled code, notes it in an index, then writes the code. Two
processes can pick one name for two kernels, and one then runs the other's code. Here a lock
serializes them.

numba trusts what it reads, so a file that a power loss left empty or zeroed breaks every later run.
Here each file ends with a checksum, after the part that numba reads; a file that does not match
counts as missing and is compiled again.

numba fails if neither the package's folder nor the user's is writable. Here compiled code then goes
to the temporary files, or stays in memory.
"""

import contextlib
import fcntl
import functools
import io
import os
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any

from numba.core import event
from numba.core.caching import (
    Cache,
    CacheImpl,
    CompileResultCacheImpl,
    IndexDataCacheFile,
    UserWideCacheLocator,
)

from ...progress import first_use
from .. import kept

SEAL = sha256().digest_size
REMEDY = "Set NUMBA_CACHE_DIR to a writable folder."
PACKAGE = __name__.partition(".")[0]

complaints: list[str] = []  # the first reason why compiled code is not cached, or not for long
damaged: list[str] = []  # the first damaged file


@contextlib.contextmanager
def _locked(index: str) -> Iterator[None]:
    """Hold a lock beside an index file; where that fails, caching fails too."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            file = stack.enter_context(open(f"{index}.lock", "w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _save(file: Any, key: Any, data: Any) -> None:
    """Save compiled code before its index entry, so an entry never names older code."""
    with _locked(file._index_path):
        overloads = _names(file)
        if (name := overloads.get(key)) is None:
            taken = set(overloads.values())
            name = next(n for n in map(file._data_name, count(1)) if n not in taken)
        file._save_data(name, data)
        file._save_index(overloads | {key: name})


def _load(file: Any, key: Any) -> Any:
    with _locked(file._index_path):
        if (name := _names(file).get(key)) is None:
            return None
        return _read(file._data_path(name), lambda: file._load_data(name))


def _names(file: Any) -> dict[Any, str]:
    return _read(file._index_path, file._load_index) or {}


def _read(path: str, read: Callable[[], Any]) -> Any:
    """Return a file's content as numba reads it; None if it is missing or damaged."""
    try:
        data = Path(path).read_bytes()
        if sha256(data[:-SEAL]).digest() != data[-SEAL:]:
            raise ValueError("wrong checksum")
        return read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # reading and unpickling raise anything
        text = "compiled code is damaged or from an older version; compiling it again"
        _say_once(damaged, f"{path}: {text} ({error})")
        return None


@contextlib.contextmanager
def _write(file: Any, path: str) -> Iterator[io.BytesIO]:
    """Write a file's content and its checksum, atomically."""
    content = io.BytesIO()
    yield content
    data = content.getvalue()
    kept.write_whole(Path(path), data + sha256(data).digest())


def _save_overload(cache: Any, signature: Any, data: Any) -> None:
    """Save compiled code if the disk allows; this process holds it in memory anyway."""
    try:
        _save_as_numba_does(cache, signature, data)
    except OSError as error:
        text = f"cannot cache compiled CPU kernels ({error.strerror}): each run compiles them"
        _say_once(complaints, f"{error.filename or cache.cache_path}: {text}. {REMEDY}")


_save_as_numba_does = Cache._save_overload


class _HomeLocator(UserWideCacheLocator):
    """The user's cache directory, if its path is known."""

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> Any:
        """Return a locator, or None if the directory is not writable."""
        known = os.path.isabs(cls(py_func, py_file).get_cache_path())
        return super().from_function(py_func, py_file) if known else None


class _LastLocator(UserWideCacheLocator):
    """The fallback when neither the package's folder nor the home directory is writable."""

    def __init__(self, py_func: Any, py_file: str) -> None:
        super().__init__(py_func, py_file)
        package = os.path.join(os.path.dirname(py_file), "__pycache__")
        self.refused = f"{package} and {super().get_cache_path()} are not writable"
        self._path = os.path.join(kept.temporary_dir(), self.get_suitable_cache_subpath(py_file))

    def get_cache_path(self) -> str:
        """Return the folder among the temporary files."""
        return self._path

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> Any:
        """Return a locator for a function of this package, and warn."""
        if py_func.__module__.partition(".")[0] != PACKAGE:
            return None
        found = super().from_function(py_func, py_file) or cls(py_func, py_file)
        result = f"cached in {kept.temporary_dir()}"
        if not os.path.isdir(found.get_cache_path()):
            result = "compiled in each run, which takes a minute or two"
        _say_once(complaints, f"{found.refused}, so CPU kernels are {result}. {REMEDY}")
        return found


def _say_once(said: list[str], text: str) -> None:
    if not said:
        said.append(text)
        print(f"[flashmoe] {text}", file=sys.stderr, flush=True)


def folder() -> Path:
    """Return the cache folder; it does not exist if compiled kernels stay in memory."""
    return Path(CompileResultCacheImpl(folder).locator.get_cache_path())


class _Compiling(event.Listener):
    """Shows that numba compiles, also where a command has not prepared its kernels."""

    def __init__(self) -> None:
        self._depth, self._shown = 0, contextlib.ExitStack()

    def on_start(self, _: Any) -> None:
        """Show a bar; compiling a function may compile those that it calls."""
        if not self._depth:
            self._shown.enter_context(first_use("compiling kernels"))
        self._depth += 1

    def on_end(self, _: Any) -> None:
        """Clear the bar after the outermost function."""
        self._depth -= 1
        if not self._depth:
            self._shown.close()


@functools.cache
def _show_compiling() -> None:
    event.register("numba:compile", _Compiling())


def make_cache_safe() -> None:
    """Patch numba's cache in this process, and show when it compiles; safe to call twice."""
    _show_compiling()
    IndexDataCacheFile.save, IndexDataCacheFile.load = _save, _load
    IndexDataCacheFile._open_for_write = _write
    Cache._save_overload = _save_overload
    ours = [_HomeLocator if c is UserWideCacheLocator else c for c in CacheImpl._locator_classes]
    CacheImpl._locator_classes = [*(c for c in ours if c is not _LastLocator), _LastLocator]
