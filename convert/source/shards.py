"""Weight files of a repository, fetched when they are needed and deleted when they are spent."""

import re
import shutil
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from ...errors import FlashMoEError
from .hub import HALF, WEIGHTS
from .locate import Found
from .read import Bytes, Reader

FOLDER = ".source"  # in the output directory, while the conversion is unfinished
# What newer versions of huggingface_hub never take up again: their every attempt has another name.
_ORPHAN = re.compile(r"\.[0-9a-f]{8}\.incomplete$")


class Shards:
    """The weight files of a checkpoint: all of a local one are there, a repository's come and go.

    Files are named by their outlines, whose headers the conversion was planned from.
    """

    def __init__(self, found: Found, out: Path) -> None:
        """Fetch nothing yet; `out` is the output directory, which need not exist."""
        self._root, self._repo, self._folder = found.directory, found.repo, out / FOLDER
        self._checked: set[Path] = set()

    @cached_property
    def sizes(self) -> dict[Path, int]:
        """Bytes of every file that must be fetched before it can be read."""
        if self._repo is None:
            return {}
        return {
            self._root / name: file.size
            for name, file in self._repo.files.items()
            if name.endswith(WEIGHTS) and not self._repo.cached(name)
        }

    def held(self) -> frozenset[Path]:
        """Return the files that were fetched and not deleted, maybe by a run before this one."""
        return frozenset(file for file in self.sizes if self._fetched(file).exists())

    def _name(self, file: Path) -> str:
        return file.relative_to(self._root).as_posix()

    def _fetched(self, file: Path) -> Path:
        return self._folder / self._name(file)

    def find(self, file: Path) -> Path:
        """Return where a file's data is; never an outline's path.

        Raises:
            FlashMoEError: it is gone from the Hub's cache.
        """
        if self._repo is None:
            return file
        if file in self.sizes:
            return self._fetched(file)
        if cached := self._repo.cached(self._name(file)):
            return cached
        raise FlashMoEError(f"{self._repo.name}: {self._name(file)} has left the Hub's cache.")

    def lasting(self, files: Iterable[Path]) -> set[Path]:
        """Return where those files are that lie on this machine for all of the conversion."""
        if self._repo is None:
            return set(files)
        return {path for file in files if (path := self._repo.cached(self._name(file)))}

    def fetch(self, files: Iterable[Path]) -> None:
        """Download files, or find them on disk; every byte is checked.

        Raises:
            FlashMoEError: the Hub does not deliver.
            OSError: the disk is full.
        """
        for file in sorted(files):
            assert self._repo
            if file not in self._checked:
                self._repo.download(self._name(file), self._folder)
                self._checked.add(file)

    def delete(self, files: Iterable[Path], reader: Reader | None = None) -> None:
        """Delete fetched files, which `reader` may have open."""
        for file in files:
            if reader:
                reader.close(file)
            for path in (self._fetched(file), _half(self._fetched(file))):
                path.unlink(missing_ok=True)
            self._checked.discard(file)

    def tidy(self, needed: frozenset[Path]) -> None:
        """Delete what a run that was killed left here, but for what this one can use."""
        self.delete(self.sizes.keys() - needed)
        for path in self._folder.rglob("*.incomplete"):
            if _ORPHAN.search(path.name):
                self._adopt(path, needed)

    def _adopt(self, orphan: Path, needed: frozenset[Path]) -> None:
        """Keep the first bytes of a file, to go on from; a file with holes is something else."""
        assert self._repo
        found = orphan.stat()
        for file in needed:
            half = _half(self._fetched(file))
            is_it = self._repo.files[self._name(file)].checksum in orphan.name  # its ETag
            if is_it and found.st_size <= 512 * found.st_blocks and not half.exists():
                orphan.replace(half)
                return
        orphan.unlink()

    def remove(self) -> None:
        """Delete the folder of fetched files."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def nbytes(self) -> int:
        """Return the bytes on disk of what was fetched, whole or in part."""
        return sum(512 * path.lstat().st_blocks for path in self._folder.rglob("*"))


def _half(path: Path) -> Path:
    return path.with_name(path.name + HALF)


class RangeReader(Reader):
    """Reads byte ranges over the network, where a few of many gigabytes are needed."""

    def __init__(self, found: Found) -> None:
        """Open nothing yet."""
        super().__init__()
        self._found = found

    def read_into(self, file: Path, offset: int, buffer: Bytes) -> None:
        """Fill `buffer` (uint8, contiguous) from `offset`.

        Raises:
            FlashMoEError: the Hub does not deliver.
        """
        if self._found.repo is None:
            return super().read_into(file, offset, buffer)
        name = file.relative_to(self._found.directory).as_posix()
        buffer.data[:] = self._found.repo.read(name, offset, buffer.size)
        return None
