"""Read a file that may be anything: its kind, size and depth are checked before it is used.

Standard library only.
"""

import json
import os
import re
import stat
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import FlashMoEError

MOST_BYTES = 100_000_000  # a tokenizer.json of 260,000 tokens has 34 million
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # Python takes half of a pair, MLX does not
MOST_LEVELS = 100  # of arrays and objects inside one another


def unreadable(path: Path | str, error: OSError) -> FlashMoEError:
    """Return what to raise where the system refuses to read: nothing is said about the content."""
    return FlashMoEError(
        f"{path}: unreadable ({error.strerror}). Check the file's permissions and the disk."
    )


def exists(path: Path) -> bool:
    """Say whether there is something at `path`.

    Raises:
        FlashMoEError: the system does not tell.
    """
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last: a NUL in the name
        return False
    except OSError as error:
        raise unreadable(path, error) from error
    return True


def list_files(directory: Path) -> list[Path]:
    """Return what a directory holds, sorted; nothing if there is no directory.

    Raises:
        FlashMoEError: it cannot be listed.
    """
    try:
        return [directory / name for name in sorted(os.listdir(directory))]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise unreadable(directory, error) from error


def open_regular(path: Path, remedy: str) -> tuple[BinaryIO, int]:
    """Open a regular file; return it and its size.

    Raises:
        FileNotFoundError: there is no file.
        FlashMoEError: it is unreadable, or a pipe, a device or a directory, which stay unopened.
    """
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait forever
            raise FlashMoEError(f"{path}: not a regular file. {remedy}")
        return open(path, "rb"), found.st_size
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(error.errno, error.strerror, str(path)) from error
    except OSError as error:
        raise unreadable(path, error) from error


def read_bytes(path: Path, remedy: str, most: int = MOST_BYTES) -> bytes:
    """Read a regular file of at most `most` bytes.

    Raises:
        FileNotFoundError: there is no file.
        FlashMoEError: it is of another kind, too large, or unreadable.
    """
    file, size = open_regular(path, remedy)
    with file:
        if size > most:
            raise FlashMoEError(
                f"{path}: {size} bytes long, but such a file has at most {most}. {remedy}"
            )
        try:
            return file.read(most)
        except OSError as error:
            raise unreadable(path, error) from error


def parse(text: bytes) -> Any:
    """Read JSON from UTF-8.

    Raises:
        ValueError: it is something else, nested too deep, has a key twice in one object, or half
            of a surrogate pair, which is no character.
    """
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
        if SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        value = None
    else:
        if _levels(value) <= MOST_LEVELS:
            return value
    raise ValueError(f"nested more than {MOST_LEVELS} levels deep")


def read_json(path: Path, remedy: str) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        remedy: a sentence: what to do about a file that is no good.

    Raises:
        FileNotFoundError: there is no file.
        FlashMoEError: it is of another kind, too large, unreadable, or not JSON.
    """
    raw = read_bytes(path, remedy)
    try:
        return parse(raw)
    except ValueError as error:
        raise FlashMoEError(f"{path}: not JSON ({error}). {remedy}") from error


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        FileNotFoundError: there is no file.
        FlashMoEError: it is of another kind, too large, unreadable, or not a JSON object.
    """
    value = read_json(path, remedy)
    if not isinstance(value, dict):
        raise FlashMoEError(f"{path}: not a JSON object. {remedy}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict of JSON's pairs; the last of several equal keys would win unnoticed."""
    result = dict(pairs)
    if len(result) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{twice[:40]!r} occurs more than once")
    return result


def _levels(value: Any) -> int:
    """Return how many arrays and objects lie inside one another at most, counted to the limit."""
    level, depth = [value] if isinstance(value, dict | list) else [], 0
    while level and depth <= MOST_LEVELS:
        depth += 1
        children = (node.values() if isinstance(node, dict) else node for node in level)
        level = [child for nodes in children for child in nodes if isinstance(child, dict | list)]
    return depth
