"""Code that comes with a checkpoint: what `--trust-remote-code` would run besides our own shim.

transformers takes classes from `auto_map` and `custom_pipelines` of configuration files, out of
modules beside them ("module.Class") or of another repository ("owner/name--module.Class").
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...format.json_file import read_json

SHIM_NAME = "flashmoe_model.py"
CODE = ".py"
CONFIGS = "*config*.json"  # vocabularies are JSON too, and any word may be a key of them
MAX_NAME = 100
RESTORE = "Restore the checkpoint's own."
KEYS = ("auto_map", "custom_pipelines", "custom_generate")


@dataclass(frozen=True)
class ForeignCode:
    """Code that is not this package's, by names that are safe to print.

    Attributes:
        files: modules in the directory.
        elsewhere: modules that would be downloaded, as "module.py of owner/name".
        missing: modules that are named, but not there.
    """

    files: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Whether there is any, or something asks for some."""
        return bool(self.files or self.elsewhere or self.missing)

    def __str__(self) -> str:
        """Name it."""
        missing = (f"{name} (named, but not there)" for name in self.missing)
        return ", ".join((*self.files, *self.elsewhere, *missing))


REMEDY = "--trust-remote-code would run it; --no-remote-code leaves it out"


def foreign_code(directory: Path, files: list[Path]) -> ForeignCode:
    """Find the code among the files of a directory, and what its configurations name besides.

    Raises:
        FlashMoEError: a configuration file cannot be read.
    """
    own = {_safe(path.name) for path in files if path.suffix == CODE and path.name != SHIM_NAME}
    named = {_module(text) for path in config_files(directory) for text in _references(path)}
    named.discard("")
    elsewhere = {name for name in named if " of " in name}
    parts = own, elsewhere, named - elsewhere - own
    return ForeignCode(*(tuple(sorted(part)) for part in parts))


def _module(reference: str) -> str:
    """Return the file that "module.Class" or "owner/name--module.Class" names; "" if it is none."""
    repo, mark, place = reference.rpartition("--")
    name = _safe(place.rpartition(".")[0])
    if not name:
        return ""
    return f"{name}{CODE} of {_safe(repo)}" if mark else f"{name}{CODE}"


def _safe(name: str) -> str:
    return re.sub(r"[^\w./-]", "?", name)[:MAX_NAME]


def config_files(directory: Path) -> list[Path]:
    """Return the files in which transformers looks for the names of classes."""
    return [path for path in sorted(directory.glob(CONFIGS)) if path.is_file()]


def _references(path: Path) -> list[str]:
    """Return every text below the keys that name code."""
    return list(_texts(read_json(path, RESTORE), False))


def _texts(value: Any, named: bool) -> Iterator[str]:
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _texts(entry, named or key in KEYS)
    elif isinstance(value, list):
        for entry in value:
            yield from _texts(entry, named)
    elif named and isinstance(value, str):
        yield value


def without_code(path: Path) -> Path | dict[str, Any]:
    """Return the content of a configuration file less what names code; the path if nothing does.

    Raises:
        FlashMoEError: it cannot be read.
    """
    content = read_json(path, RESTORE)
    stripped = without(content, KEYS)
    return path if stripped == content else stripped


def without(content: Any, keys: tuple[str, ...]) -> Any:
    """Return a JSON value without some keys, wherever they are in it."""

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: walk(entry) for key, entry in value.items() if key not in keys}
        return [walk(entry) for entry in value] if isinstance(value, list) else value

    return walk(content)
