"""Which files of a converted directory are published, and which are not.

What the manifest lists is, byte for byte, and the model card. Whatever else lies in the directory
may be private.
"""

import json
import os
from pathlib import Path

from ...errors import FlashMoEError
from ...format.layout import EXPERT_DIR, MANIFEST
from ..source.foreign_code import SHIM_NAME
from ..source.hub import CARD, WEIGHTS
from ..verify.verify import entries, read_checksums, verify
from ..write.output import SHIM, WRITTEN_ANEW, is_copied

LAST = f"{EXPERT_DIR}/{MANIFEST}"
SHOWN = 10  # names of what is left out


def listed(out: Path) -> set[str]:
    """Return the names of the files to publish before the card and the manifest, and check them.

    Raises:
        FlashMoEError: one is missing, altered, a symlink out of the directory, or no file that a
            conversion writes.
    """
    names = set(entries(read_checksums(out)))
    for name in sorted(names):
        if not (is_copied(name) or name in WRITTEN_ANEW or name.endswith(WEIGHTS)):
            raise FlashMoEError(
                f"{out / LAST}: lists {name!r}, which flashmoe-convert does not write. Convert "
                "again."
            )
        check_inside(out, name)
    check_inside(out, LAST)
    for problem in verify(out, names):
        raise FlashMoEError(
            f"{out}: {problem}. Run flashmoe-convert verify {out} before you upload it."
        )
    _check_code(out)
    return names


def _check_code(out: Path) -> None:
    """Check what stock mlx-lm runs, whatever the manifest says of it."""
    named = json.loads((out / "config.json").read_bytes()).get("model_file")
    if named != SHIM_NAME or (out / SHIM_NAME).read_bytes() != SHIM.encode():
        raise FlashMoEError(
            f"{out / SHIM_NAME}: not the two lines that flashmoe-convert writes, or not what "
            "config.json names as model_file. Convert again."
        )


def check_inside(out: Path, name: str) -> None:
    """Check that a file lies in the directory, also if its name is a symlink's.

    Raises:
        FlashMoEError: it is elsewhere, or no regular file.
    """
    path = out / name
    if not path.resolve().is_relative_to(out.resolve()):
        raise FlashMoEError(
            f"{path}: a symlink out of the directory, to {path.resolve()}. Put the file itself in "
            "its place before you upload it."
        )
    if not path.is_file():
        raise FlashMoEError(
            f"{path}: missing, or no regular file. Run flashmoe-convert verify {out} before you "
            "upload it."
        )


def own_card(out: Path) -> bytes | None:
    """Return the directory's model card, if it has one.

    Raises:
        FlashMoEError: it is a symlink out of the directory, or no text.
    """
    path = out / CARD
    if not os.path.lexists(path):
        return None
    check_inside(out, CARD)
    try:
        return path.read_bytes().decode().encode()
    except UnicodeDecodeError as error:
        raise FlashMoEError(f"{path}: not UTF-8 ({error}). Correct it, or delete it.") from error


def left_out(out: Path, names: set[str]) -> str:
    """Name what else lies in a directory; "" if nothing does."""
    published = names | {CARD, LAST}
    others = []
    for folder, folders, files in os.walk(out):
        here = Path(folder).relative_to(out)
        linked = [name for name in folders if (Path(folder) / name).is_symlink()]
        found = {(here / name).as_posix() for name in (*files, *linked)} - published
        others += [name if name.isprintable() else ascii(name) for name in found]
    more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
    return ", ".join(sorted(others)[:SHOWN]) + more
