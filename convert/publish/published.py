"""Which files of a converted directory are published: the manifest's, unaltered, and the card.

All other files in the directory may be private.
"""

import os
import shlex
from pathlib import Path

from ...errors import FlashMoEError
from ...format.json_file import read_bytes, read_object, unreadable
from ...format.layout import EXPERT_DIR, MANIFEST
from ..source.foreign_code import SHIM_NAME
from ..source.hub import CARD, WEIGHTS
from ..verify.verify import entries, read_checksums, verify
from ..write.output import GENERATED, SHIM, is_copied

LAST = f"{EXPERT_DIR}/{MANIFEST}"
AGAIN = "Convert again."
SHOWN = 10  # names of unlisted files to print


def check_listed(out: Path) -> set[str]:
    """Return the names in the manifest.

    Raises:
        FlashMoEError: a file is missing, altered, a symlink out of the directory, or of a name
            that a conversion does not write.
    """
    names = set(entries(read_checksums(out)))
    for name in sorted(names):
        if not (is_copied(name) or name in GENERATED or name.endswith(WEIGHTS)):
            raise FlashMoEError(
                f"{out / LAST}: lists {name!r}, which flashmoe-convert does not write. Convert "
                "again."
            )
        _check_inside(out, name)
    _check_inside(out, LAST)
    for problem in verify(out, names):
        raise FlashMoEError(
            f"{out}: {problem}. Run flashmoe-convert verify {shlex.quote(str(out))} before you "
            "upload it."
        )
    # Stock mlx-lm runs this file, so the manifest's word for it is not enough.
    try:
        named = read_object(out / "config.json", AGAIN).get("model_file")
        shim = read_bytes(out / SHIM_NAME, AGAIN)
    except FileNotFoundError as error:  # a manifest need not list them
        raise unreadable(error.filename, error) from error
    if named != SHIM_NAME or shim != SHIM.encode():
        raise FlashMoEError(
            f"{out / SHIM_NAME}: not the two lines that flashmoe-convert writes, or not what "
            "config.json names as model_file. Convert again."
        )
    return names


def _check_inside(out: Path, name: str) -> None:
    path = out / name
    if not path.resolve().is_relative_to(out.resolve()):
        raise FlashMoEError(
            f"{path}: a symlink out of the directory, to {path.resolve()}. Replace it with the "
            "file itself before you upload it."
        )
    if not path.is_file():
        raise FlashMoEError(
            f"{path}: missing, or not a regular file. Run flashmoe-convert verify "
            f"{shlex.quote(str(out))} before you "
            "upload it."
        )


def own_card(out: Path) -> bytes | None:
    """Return the directory's model card, or None; raises FlashMoEError if it is not a text."""
    path = out / CARD
    if not os.path.lexists(path):
        return None
    _check_inside(out, CARD)
    try:
        return path.read_bytes().decode().encode()
    except UnicodeDecodeError as error:
        raise FlashMoEError(f"{path}: not UTF-8 ({error}). Correct it, or delete it.") from error


def unlisted(out: Path, names: set[str]) -> str:
    """List the directory's other files, or return ""."""
    published = names | {CARD, LAST}
    others = []
    for folder, folders, files in os.walk(out):
        here = Path(folder).relative_to(out)
        linked = [name for name in folders if (Path(folder) / name).is_symlink()]
        found = {(here / name).as_posix() for name in (*files, *linked)} - published
        others += [name if name.isprintable() else ascii(name) for name in found]
    more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
    return ", ".join(sorted(others)[:SHOWN]) + more
