"""The files of a converted directory: which there are, what is in them, how each is written."""

import zlib
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ...errors import FlashMoEError
from ...format.layout import EXPERT_DIR, MANIFEST, MANIFEST_FORMAT, MANIFEST_VERSION
from ..plan.parts import LayerPlan, Plan, TrunkFile
from ..quant.calibrate import LayerInputs
from ..source.checkpoint import INDEX, Source
from ..source.foreign_code import (
    CODE,
    SHIM_NAME,
    ForeignCode,
    config_files,
    foreign_code,
    without_code,
)
from ..source.read import Reader
from .act import Progress, Visit, write_layer, write_trunk
from .checksum import CHECKSUM, as_text
from .files import Entry, copy_file, json_bytes, write_file, write_json

OWN_CHECKSUM = "manifest_checksum"
MODEL_FILE = SHIM_NAME
SHIM = "from flashmoe_mlx.loader import bind\n\nModel, ModelArgs = bind(__file__)\n"
# No pickles, whatever they are called: loading one runs what is in it.
COPIED = (
    "tokenizer*.py", "tokenization*.py", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken",
    "*.jsonl", "LICENSE*",
)  # fmt: skip
WRITTEN_ANEW = ("config.json", MODEL_FILE, INDEX)


def place(file: TrunkFile | LayerPlan) -> str:
    """Return where a weight file lies in the output directory."""
    return file.name if isinstance(file, TrunkFile) else f"{EXPERT_DIR}/{file.file}"


def write_weights(
    source: Source,
    file: TrunkFile | LayerPlan,
    out: Path,
    reader: Reader,
    progress: Progress,
    seen: LayerInputs | None = None,
    visit: Visit | None = None,
) -> Entry:
    """Write one weight file, or a part of it, into its place in `out`, and return its entry."""
    if isinstance(file, TrunkFile):
        return write_trunk(file, out, reader, progress, visit)
    return write_layer(source, file, out / EXPERT_DIR, reader, progress, seen, visit)


def small_files(source: Source, plan: Plan) -> dict[str, bytes | Path]:
    """Return every file that holds no weights by name: its bytes, or the file to copy."""
    return _copied(source, plan.remote_code) | {
        "config.json": json_bytes(dict(sorted(plan.config.items()))),
        MODEL_FILE: SHIM.encode(),
        INDEX: json_bytes(_index(plan)),
    }


def _copied(source: Source, remote_code: bool) -> dict[str, bytes | Path]:
    """Return the files to copy by name; without code, less what of it they name."""
    found: dict[str, bytes | Path] = {path.name: path for path in copied_files(source)}
    if remote_code:
        return found
    for path in set(config_files(source.directory)) & set(found.values()):
        content = without_code(path)
        found[path.name] = content if isinstance(content, Path) else json_bytes(content)
    return {name: content for name, content in found.items() if not name.endswith(CODE)}


def brought_code(source: Source, plan: Plan) -> ForeignCode:
    """Return the code of others that goes along."""
    if not plan.remote_code:
        return ForeignCode()
    return foreign_code(source.directory, copied_files(source))


def write_small(path: Path, content: bytes | Path) -> Entry:
    """Write a file of known bytes, or copy one."""
    return copy_file(content, path) if isinstance(content, Path) else write_file(path, content)


def copied_files(source: Source) -> list[Path]:
    """Return the tokenizer, template and generation files that go along byte for byte.

    Raises:
        FlashMoEError: one is a symlink out of the checkpoint: who publishes the result would
            publish a file of this machine.
    """
    model_file = source.config.get("model_file")
    paths = [
        path
        for path in sorted(source.directory.iterdir())
        if is_copied(path.name) and path.name != model_file and path.is_file()
    ]
    for path in paths:
        if not any(path.resolve().is_relative_to(root) for root in _roots(source)):
            raise FlashMoEError(
                f"{path}: a symlink out of the checkpoint, to {path.resolve()}. Remove it, or put "
                "a copy of that file in its place."
            )
    return paths


def is_copied(name: str) -> bool:
    """Say whether a file of this name goes along with a conversion."""
    hidden = name.startswith(".")
    known = any(fnmatchcase(name, pattern) for pattern in COPIED)
    return known and not hidden and name not in WRITTEN_ANEW


def _roots(source: Source) -> list[Path]:
    """Return the folders that a checkpoint's symlinks may lead to."""
    roots = [source.directory.resolve()]
    if roots[0].parent.name == "snapshots":  # the Hub's cache, which keeps files in ../../blobs
        roots.append(roots[0].parents[1])
    if source.layout and source.layout.kind == "linked":
        roots.append(source.layout.directory.resolve())
    return roots


def write_index(plan: Plan, out: Path) -> None:
    """Write the index of the trunk's files."""
    write_json(out / INDEX, _index(plan))


def _index(plan: Plan) -> dict[str, Any]:
    """Return the index of the trunk's files, as mlx-lm writes it."""
    names = {spec.name: file.name for file in plan.trunk for spec in file.outputs}
    return {
        "metadata": {"total_size": plan.trunk_bytes},
        "weight_map": dict(sorted(names.items())),
    }


def write_manifest(out: Path, content: dict[str, Any]) -> None:
    """Write the manifest, with a checksum of its own as the last entry."""
    head = {"format": MANIFEST_FORMAT, "version": MANIFEST_VERSION, "checksum": CHECKSUM}
    content = head | content
    own = as_text(zlib.crc32(json_bytes(content)))
    write_json(out / EXPERT_DIR / MANIFEST, content | {OWN_CHECKSUM: own})
