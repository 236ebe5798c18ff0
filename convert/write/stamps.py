"""Detect that a source changes during its conversion, from size and times of every file.

A file overwritten while it is read gives a mixture with correct checksums. Unlike the content time
(mtime), the change time (ctime) cannot be set back, as `cp -p` and `rsync` do.
"""

from collections.abc import Iterable
from pathlib import Path

from ...errors import FlashMoEError
from ...format.layout import EXPERT_DIR, MANIFEST
from ..source.checkpoint import INDEX, Source
from ..source.hub import CARD
from .output import copied_files

Stamp = list[int]  # bytes, mtime and ctime in ns


class SourceChangedError(FlashMoEError):
    """The source changed since the conversion began."""


def source_files(source: Source) -> set[Path]:
    """Return every file that a conversion reads."""
    layers = source.layout.layers if source.layout else ()
    optional = (CARD, INDEX, f"{EXPERT_DIR}/{MANIFEST}")
    return {
        source.directory / "config.json",
        *(path for name in optional if (path := source.directory / name).is_file()),
        *copied_files(source),
        *(file for file, _ in source.trunk.values()),
        *(source.foreign.files if source.foreign else ()),
        *(matrix.file for matrix in source.matrices.values()),
        *(field.file for layer in layers for field in layer.fields),
    }


class Stamps:
    """The stamps of files when the conversion began."""

    def __init__(self, files: Iterable[Path]) -> None:
        """Stamp every file."""
        self._begun = {path: _stamp(path) for path in sorted(files)}

    def named(self, directory: Path) -> dict[str, Stamp]:
        """Return the stamps by path, relative to `directory` for files below it."""
        return {
            str(path.relative_to(directory) if path.is_relative_to(directory) else path): stamp
            for path, stamp in self._begun.items()
        }

    def check(self, out: Path) -> None:
        """Raise SourceChangedError if a stamp differs; `out` is the directory being written."""
        for path, before in self._begun.items():
            try:
                now: Stamp | str = _stamp(path)
            except FlashMoEError as error:
                now = str(error)
            if now != before:
                raise SourceChangedError(
                    f"{path}: changed during the conversion (size and times were {before}, now "
                    f"{now}), so the output may be a mixture. Delete {out}, and convert again "
                    "once nothing writes to the source."
                )


def _stamp(path: Path) -> Stamp:
    try:
        found = path.stat()
    except OSError as error:
        raise FlashMoEError(f"{path}: cannot be read ({error.strerror}).") from error
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]
