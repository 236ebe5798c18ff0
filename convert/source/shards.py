"""A repository's weight files: downloaded when needed, deleted after their last use."""

import re
import shutil
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path

from ...errors import FlashMoEError
from .hub import PARTIAL, WEIGHTS, Ranges
from .locate import Found
from .read import Bytes, Reader

GAP_BYTES = 1 << 18  # shorter ones are cheaper to download than another request
WORTHWHILE = 0.9  # of a file, above which it is downloaded whole
FOLDER = ".source"  # in the output directory, until the conversion is finished
# huggingface_hub never resumes these: each attempt gets another random name.
_ORPHAN = re.compile(r"\.[0-9a-f]{8}\.incomplete$")


class Shards:
    """The weight files of a checkpoint, named by their outlines (see `locate.Found`)."""

    def __init__(self, found: Found, out: Path) -> None:
        """Set up without I/O; the output directory `out` need not exist."""
        self._root, self._repo, self._folder = found.directory, found.repo, out / FOLDER
        self._checked: set[Path] = set()
        self._ranges: dict[Path, Ranges] = {}  # of files not downloaded whole

    @cached_property
    def sizes(self) -> dict[Path, int]:
        """Bytes to download of every file."""
        if self._repo is None:
            return {}
        sizes = {
            self._root / name: file.size
            for name, file in self._repo.files.items()
            if name.endswith(WEIGHTS) and not self._repo.cached(name)
        }
        parts = {path: sum(last - first for first, last in x) for path, x in self._ranges.items()}
        return {path: parts.get(path, size) for path, size in sizes.items()}

    def leave_out(self, unneeded: Mapping[Path, Ranges]) -> None:
        """Download files without these byte ranges, where that saves a tenth of one.

        A part of a file has no checksum of its own; the connection's protects it.
        """
        for path in unneeded.keys() & self.sizes.keys():
            wanted = _complement(unneeded[path], self.sizes[path])
            if sum(last - first for first, last in wanted) < WORTHWHILE * self.sizes[path]:
                self._ranges[path] = wanted
        self.__dict__.pop("sizes", None)  # they are smaller now

    def held(self) -> frozenset[Path]:
        """Return the downloaded files on disk, those of an earlier run included."""
        return frozenset(file for file in self.sizes if self._fetched(file).exists())

    def _name(self, file: Path) -> str:
        return file.relative_to(self._root).as_posix()

    def _fetched(self, file: Path) -> Path:
        return self._folder / self._name(file)

    def _partial(self, file: Path) -> Path:
        return self._folder / (self._name(file) + PARTIAL)

    def find(self, file: Path) -> Path:
        """Return the path of a file's data. Raises FlashMoEError if it left the Hub's cache."""
        if self._repo is None:
            return file
        if file in self.sizes:
            return self._fetched(file)
        if cached := self._repo.cached(self._name(file)):
            return cached
        raise FlashMoEError(
            f"{self._repo.name}: {self._name(file)} has left the Hub's cache. Convert again."
        )

    def lasting(self, files: Iterable[Path]) -> set[Path]:
        """Return the paths of those files that stay on this machine during the conversion."""
        if self._repo is None:
            return set(files)
        return {path for file in files if (path := self._repo.cached(self._name(file)))}

    def fetch(self, files: Iterable[Path]) -> None:
        """Download files, or find them on disk, and check every byte; see `Repo.download`."""
        for file in sorted(files):
            assert self._repo
            if file in self._checked:
                continue
            if file in self._ranges:
                self._repo.download_ranges(self._name(file), self._folder, self._ranges[file])
            else:
                self._repo.download(self._name(file), self._folder)
            self._checked.add(file)

    def delete(self, files: Iterable[Path], reader: Reader | None = None) -> None:
        """Delete downloaded files, after `reader` has closed them."""
        for file in files:
            if reader:
                reader.close(file)
            for path in (self._fetched(file), self._partial(file)):
                path.unlink(missing_ok=True)
            self._checked.discard(file)

    def tidy(self, needed: frozenset[Path]) -> None:
        """Delete the leftovers of a killed run that this run does not need."""
        self.delete(self.sizes.keys() - needed)
        for path in self._folder.rglob("*.incomplete"):
            if _ORPHAN.search(path.name):
                self._adopt(path, needed)

    def _adopt(self, orphan: Path, needed: frozenset[Path]) -> None:
        """Keep the first bytes of a needed file; a sparse one was written out of order."""
        assert self._repo
        status = orphan.stat()
        for file in needed:
            partial = self._partial(file)
            matches = self._repo.files[self._name(file)].checksum in orphan.name  # its ETag
            if matches and status.st_size <= 512 * status.st_blocks and not partial.exists():
                orphan.replace(partial)
                return
        orphan.unlink()

    def remove(self) -> None:
        """Delete the download folder."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def nbytes(self) -> int:
        """Return the bytes on disk of all downloads, partial ones included."""
        return sum(512 * path.lstat().st_blocks for path in self._folder.rglob("*"))


def _complement(unneeded: Ranges, size: int) -> Ranges:
    """Return the ranges of a file's other bytes; gaps shorter than a request costs are filled."""
    wanted, start = [], 0
    for first, last in sorted(unneeded):
        if first - start > 0:
            wanted.append((start, first))
        start = max(start, last)
    wanted.append((start, size))
    joined: Ranges = []
    for first, last in wanted:
        if joined and first - joined[-1][1] < GAP_BYTES:
            first = joined.pop()[0]
        joined.append((first, last))
    return [(first, last) for first, last in joined if first < last]


class RangeReader(Reader):
    """Reads byte ranges over the network, for a few ranges of large files."""

    def __init__(self, found: Found) -> None:
        """Set up without I/O."""
        super().__init__()
        self._found = found

    def read_into(self, file: Path, offset: int, buffer: Bytes) -> None:
        """Fill `buffer` (uint8, contiguous) from `offset`."""
        if self._found.repo is None:
            return super().read_into(file, offset, buffer)
        name = file.relative_to(self._found.directory).as_posix()
        buffer.data[:] = self._found.repo.read(name, offset, buffer.size)
        return None
