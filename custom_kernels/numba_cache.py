"""numba's cache on disk, for processes that compile at the same time.

numba picks the next free name for compiled code, notes it in an index, and writes the code. Two
processes can pick the same name for two kernels; then one is found under the other's name, and
computes something else from then on. Here they take turns.
"""

import contextlib
import fcntl
from collections.abc import Iterator
from itertools import count
from typing import Any

from numba.core.caching import IndexDataCacheFile


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
        overloads = file._load_index()
        if (name := overloads.get(key)) is None:
            taken = set(overloads.values())
            name = next(n for n in map(file._data_name, count(1)) if n not in taken)
        file._save_data(name, data)
        file._save_index(overloads | {key: name})


def _load(file: Any, key: Any) -> Any:
    with _turn(file._index_path):
        return _load_as_numba_does(file, key)


_load_as_numba_does = IndexDataCacheFile.load


def take_turns() -> None:
    """Have this process write and read numba's cache under a lock; twice does no harm."""
    IndexDataCacheFile.save, IndexDataCacheFile.load = _save, _load
