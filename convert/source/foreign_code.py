"""Code in a checkpoint that `--trust-remote-code` would run besides our own shim.

transformers loads the classes that `auto_map` and `custom_pipelines` of configuration files name,
from modules beside them ("module.Class") or of another repository ("owner/name--module.Class").
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...format.json_file import read_json

SHIM_NAME = "flashmoe_model.py"
CODE = ".py"
CONFIGS = "*config*.json"  # not vocabularies, where any word may be a key
MAX_NAME = 100
RESTORE = "Restore the checkpoint's own file."
KEYS = ("auto_map", "custom_pipelines", "custom_generate")


@dataclass(frozen=True)
class ForeignCode:
    """Code from other authors, by names that are safe to print.

    Attributes:
        files: modules in the directory.
        elsewhere: modules of other repositories, as "module.py of owner/name".
        missing: modules that a configuration names, but that do not exist.
    """

    files: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Whether any field has a name."""
        return bool(self.files or self.elsewhere or self.missing)

    def __str__(self) -> str:
        """List the names."""
        missing = (f"{name} (named, but missing)" for name in self.missing)
        return ", ".join((*self.files, *self.elsewhere, *missing))


REMEDY = "--trust-remote-code would run it; --no-remote-code leaves it out"


def foreign_code(directory: Path, files: list[Path]) -> ForeignCode:
    """Find the code among a directory's files, and the modules that its configurations name.

    Raises:
        FlashMoEError: a configuration file cannot be read.
    """
    own = {_safe(path.name) for path in files if path.suffix == CODE and path.name != SHIM_NAME}
    named = {
        _module(text)
        for path in config_files(directory)
        for text in _texts(read_json(path, RESTORE), False)
    }
    named.discard("")
    elsewhere = {name for name in named if " of " in name}
    parts = own, elsewhere, named - elsewhere - own
    return ForeignCode(*(tuple(sorted(part)) for part in parts))


def _module(reference: str) -> str:
    """Return the file that "module.Class" or "owner/name--module.Class" names, or ""."""
    repo, mark, place = reference.rpartition("--")
    name = _safe(place.rpartition(".")[0])
    if not name:
        return ""
    return f"{name}{CODE} of {_safe(repo)}" if mark else f"{name}{CODE}"


def _safe(name: str) -> str:
    return re.sub(r"[^\w./-]", "?", name)[:MAX_NAME]


def config_files(directory: Path) -> list[Path]:
    """Return the files that transformers searches for class names."""
    return [path for path in sorted(directory.glob(CONFIGS)) if path.is_file()]


def _texts(value: Any, named: bool) -> Iterator[str]:
    """Yield every string of a JSON value below one of KEYS."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _texts(entry, named or key in KEYS)
    elif isinstance(value, list):
        for entry in value:
            yield from _texts(entry, named)
    elif named and isinstance(value, str):
        yield value


def without(content: Any, keys: tuple[str, ...]) -> Any:
    """Return a JSON value without some keys, at any depth."""
    if isinstance(content, dict):
        return {key: without(entry, keys) for key, entry in content.items() if key not in keys}
    return [without(e, keys) for e in content] if isinstance(content, list) else content
