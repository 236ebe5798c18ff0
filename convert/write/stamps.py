"""Whether a source is still as it was when its conversion began: a stamp of every file.

A file that is overwritten while it is read gives a mixture whose checksums are right, so only its
size and times tell. The time of the last change (ctime) cannot be set back, unlike that of the
content (mtime), which `cp -p` and `rsync` restore.
"""

from collections.abc import Iterable
from pathlib import Path

from ...errors import FlashMoEError
from ...format.layout import EXPERT_DIR, MANIFEST
from ..source.checkpoint import INDEX, Source
from ..source.hub import CARD
from .output import copied_files

Stamp = list[int]


class SourceChangedError(FlashMoEError):
    """The source is no longer the one that the conversion began with."""


def source_files(source: Source) -> set[Path]:
    """Return every file that a conversion reads."""
    layers = source.layout.layers if source.layout else ()
    maybe = (CARD, INDEX, f"{EXPERT_DIR}/{MANIFEST}")
    return {
        source.directory / "config.json",
        *(path for name in maybe if (path := source.directory / name).is_file()),
        *copied_files(source),
        *(file for file, _ in source.trunk.values()),
        *(matrix.file for matrix in source.matrices.values()),
        *(field.file for layer in layers for field in layer.fields),
    }


class Stamps:
    """Size in bytes, time of the content and time of the last change (ns) of files, as once seen.

    Attributes:
        begun: the stamp of each file.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        """Look at every file.

        Raises:
            FlashMoEError: one cannot be looked at.
        """
        self.begun = {path: _stamp(path) for path in sorted(files)}

    def named(self, directory: Path) -> dict[str, Stamp]:
        """Return the stamps by name: within a directory, or the whole path of files elsewhere."""
        return {
            str(path.relative_to(directory) if path.is_relative_to(directory) else path): stamp
            for path, stamp in self.begun.items()
        }

    def check(self, out: Path) -> None:
        """Check that every file still is as it was when what is in `out` was begun.

        Raises:
            SourceChangedError: one is not.
        """
        for path, before in self.begun.items():
            try:
                now: Stamp | str = _stamp(path)
            except FlashMoEError as error:
                now = str(error)
            if now != before:
                raise SourceChangedError(
                    f"{path}: changed while it was converted (size and times were {before}, now "
                    f"{now}), so what was written may be a mixture. Delete {out}, and convert "
                    "again once nothing writes to the source."
                )


def _stamp(path: Path) -> Stamp:
    try:
        found = path.stat()
    except OSError as error:
        raise FlashMoEError(f"{path}: cannot be read ({error.strerror}).") from error
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]
