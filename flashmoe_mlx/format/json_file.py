"""Read untrusted files: check kind, size and depth first. Standard library only."""

import json
import os
import re
import stat
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import FlashMoEError

MOST_BYTES = 100_000_000  # a tokenizer.json of 260,000 tokens has 34 million
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # Python accepts half of a pair, MLX does not
MOST_LEVELS = 100  # of arrays and objects inside one another


def unreadable(path: Path | str, error: OSError) -> FlashMoEError:
    """Return the error for a file that the system refuses to read."""
    return FlashMoEError(
        f"{path}: unreadable ({error.strerror}). Check the file's permissions and the disk."
    )


def exists(path: Path) -> bool:
    """Say whether `path` exists.

    Raises:
        FlashMoEError: the system refuses to tell.
    """
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
        return False
    except OSError as error:
        raise unreadable(path, error) from error
    return True


def list_files(directory: Path) -> list[Path]:
    """Return a directory's entries, sorted; none if it does not exist.

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
        FileNotFoundError: it does not exist.
        FlashMoEError: it is unreadable, or not a regular file; it is then not opened.
    """
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):  # opening a pipe would block
            raise FlashMoEError(f"{path}: not a regular file. {remedy}")
        return open(path, "rb"), found.st_size
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(error.errno, error.strerror, str(path)) from error
    except OSError as error:
        raise unreadable(path, error) from error


def read_bytes(path: Path, remedy: str, most: int = MOST_BYTES) -> bytes:
    """Read a regular file of at most `most` bytes.

    Raises:
        FileNotFoundError: it does not exist.
        FlashMoEError: it is not a regular file, too large, or unreadable.
    """
    file, size = open_regular(path, remedy)
    with file:
        if size > most:
            raise FlashMoEError(
                f"{path}: {size} bytes long, but at most {most} are allowed. {remedy}"
            )
        try:
            return file.read(most)
        except OSError as error:
            raise unreadable(path, error) from error


def parse(text: bytes) -> Any:
    """Read JSON from UTF-8.

    Raises:
        ValueError: it is not JSON, is nested too deep, repeats a key in an object, or has half of
            a surrogate pair.
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
    """Read a JSON file; errors end with the sentence `remedy`.

    Raises:
        FileNotFoundError: it does not exist.
        FlashMoEError: it is not a regular file, too large, unreadable, or not JSON.
    """
    raw = read_bytes(path, remedy)
    try:
        return parse(raw)
    except ValueError as error:
        raise FlashMoEError(f"{path}: not JSON ({error}). {remedy}") from error


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON file that holds an object: as `read_json`, which see for errors."""
    value = read_json(path, remedy)
    if not isinstance(value, dict):
        raise FlashMoEError(f"{path}: not a JSON object. {remedy}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object, and refuse repeated keys, of which Python keeps the last."""
    result = dict(pairs)
    if len(result) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{twice[:40]!r} occurs more than once")
    return result


def _levels(value: Any) -> int:
    """Return the nesting depth of arrays and objects, counted up to MOST_LEVELS + 1."""
    level, depth = [value] if isinstance(value, dict | list) else [], 0
    while level and depth <= MOST_LEVELS:
        depth += 1
        children = (node.values() if isinstance(node, dict) else node for node in level)
        level = [child for nodes in children for child in nodes if isinstance(child, dict | list)]
    return depth
