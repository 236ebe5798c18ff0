"""Check a model directory's small files before mlx-lm and transformers open them.

Standard library only.
"""

import os
import stat
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from ..errors import FlashMoEError
from .config_entries import RESTORE
from .json_file import MOST_BYTES, exists, list_files, read_object, unreadable

CONFIG = "config.json"
GENERATION = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
READ_AS_JSON = (
    CONFIG, GENERATION, TOKENIZER_CONFIG, "hf_quant_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.json", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
# Other files that those libraries read. They parse tokenizer.json themselves: a check would take as
# long as loading it.
READ = (
    "tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken", "*.jinja",
)  # fmt: skip
OPENED = (*READ, "*.json", "*.txt", "*.py")  # possibly
# Without one of these, transformers silently makes an empty tokenizer.
VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model", "*.tiktoken", "vocab.txt")
# Entries of tokenizer_config.json that name a module for mlx-lm to import.
MODULES = {"tool_parser_type": "tool_parsers", "chat_template_type": "chat_templates"}


def is_local(name: str) -> bool:
    """Say whether a name can only be a path: the Hub has none of that form."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1


def read_config(directory: Path) -> dict[str, Any]:
    """Read config.json.

    Raises:
        FlashMoEError: it is missing, unreadable, or not a JSON object.
    """
    try:
        return read_object(directory / CONFIG, RESTORE)
    except FileNotFoundError:
        raise FlashMoEError(f"{directory}: no {CONFIG}. Give the directory of a model.") from None


def check_small_files(directory: Path) -> None:
    """Check all files that mlx-lm and transformers read, except weights.

    Raises:
        FlashMoEError: a file is a pipe or a device, too large, not JSON, or names a module that
            mlx-lm lacks; or the vocabulary is missing.
    """
    found = list(_files(directory))
    for path in found:
        _check_kind(path)
    as_json = [directory / name for name in READ_AS_JSON]
    contents = {path.name: read_object(path, RESTORE) for path in found if path in as_json}
    _check_ends(directory, contents)
    _check_modules(directory / TOKENIZER_CONFIG, contents.get(TOKENIZER_CONFIG, {}))
    if not any(fnmatch(path.name, pattern) for path in found for pattern in VOCABULARIES):
        raise FlashMoEError(
            f"{directory}: no tokenizer (none of {', '.join(VOCABULARIES)}). Copy the "
            "checkpoint's own into it."
        )


def _files(directory: Path) -> Iterator[Path]:
    """Yield existing files that those libraries may open."""
    for folder in (directory, directory / "additional_chat_templates"):
        for path in list_files(folder):
            if any(fnmatch(path.name, pattern) for pattern in OPENED) and exists(path):
                yield path


def _check_kind(path: Path) -> None:
    try:
        found = os.stat(path)
    except OSError as error:
        raise unreadable(path, error) from error
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        raise FlashMoEError(f"{path}: not a regular file. {RESTORE}")  # opening a pipe would block
    if found.st_size > MOST_BYTES and any(fnmatch(path.name, pattern) for pattern in READ):
        raise FlashMoEError(
            f"{path}: {found.st_size} bytes long, but at most {MOST_BYTES} are allowed. {RESTORE}"
        )


def _check_ends(directory: Path, contents: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse an eos_token_id that is neither a token id nor a list of them."""
    for name in (CONFIG, GENERATION):
        ends = contents.get(name, {}).get("eos_token_id")
        ids = ends if isinstance(ends, list) else [ends]
        if ends is not None and any(type(end) is not int or end < 0 for end in ids):
            raise FlashMoEError(
                f"{directory / name}: eos_token_id = {ends!r} is neither a token's id nor a list "
                f"of them. {RESTORE}"
            )


def _check_modules(path: Path, content: Mapping[str, Any]) -> None:
    """Refuse the name of a module that mlx-lm lacks."""
    for entry, package in MODULES.items():
        name = content.get(entry)
        if name and name not in (known := _modules(package)):
            raise FlashMoEError(
                f"{path}: {entry} = {name!r} is not one of mlx-lm's ({', '.join(known)}). "
                "Remove the entry, or update mlx-lm."
            )


def _modules(package: str) -> list[str]:
    """Return the modules of a package of mlx-lm, without importing it."""
    spec = find_spec("mlx_lm")
    roots = spec.submodule_search_locations if spec else None
    folders = [os.path.join(root, package) for root in roots or ()]
    return sorted(module.name for module in iter_modules(folders) if not module.ispkg)
