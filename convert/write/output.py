"""The files of a converted directory: their names, their content, and how each is written."""

import zlib
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ...errors import FlashMoEError
from ...format.json_file import read_json
from ...format.layout import EXPERT_DIR, MANIFEST, MANIFEST_FORMAT, MANIFEST_VERSION
from ..plan.parts import File, Plan, TrunkFile
from ..quant.calibrate import LayerInputs
from ..source.checkpoint import INDEX, Source
from ..source.foreign_code import (
    CODE,
    KEYS,
    RESTORE,
    SHIM_NAME,
    ForeignCode,
    config_files,
    foreign_code,
    without,
)
from ..source.hub import CARD, WEIGHTS
from ..source.read import Reader
from .execute import Progress, Visit, write_layer, write_trunk
from .files import (
    CHECKSUM,
    OWN_CHECKSUM,
    Entry,
    as_text,
    json_bytes,
    link_file,
    write_file,
    write_json,
)

SHIM = "from flashmoe_mlx.loader import bind\n\nModel, ModelArgs = bind(__file__)\n"
# Not pickles, under any name: loading one executes it.
COPIED = (
    "tokenizer*.py", "tokenization*.py", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken",
    "*.jsonl", "LICENSE*",
)  # fmt: skip
GENERATED = ("config.json", SHIM_NAME, INDEX)


def place(file: File) -> str:
    """Return a weight file's path in the output directory."""
    return file.name if isinstance(file, TrunkFile) else f"{EXPERT_DIR}/{file.file}"


def write_weights(
    source: Source,
    file: File,
    out: Path,
    reader: Reader,
    progress: Progress,
    inputs: LayerInputs | None = None,
    visit: Visit | None = None,
) -> Entry:
    """Write one weight file, or a part of it, to its place in `out`, and return its entry."""
    if isinstance(file, TrunkFile):
        return write_trunk(source, file, out, reader, progress, visit)
    return write_layer(source, file, out / EXPERT_DIR, reader, progress, inputs, visit)


def small_files(source: Source, plan: Plan) -> dict[str, bytes | Path]:
    """Return every file without weights by name: its bytes, or the file to copy."""
    found: dict[str, bytes | Path] = {path.name: path for path in copied_files(source)}
    if not plan.remote_code:
        for path in set(config_files(source.directory)) & set(found.values()):
            content = read_json(path, RESTORE)
            stripped = without(content, KEYS)
            if stripped != content:
                found[path.name] = json_bytes(stripped)
        found = {name: content for name, content in found.items() if not name.endswith(CODE)}
    return found | {
        "config.json": json_bytes(dict(sorted(plan.config.items()))),
        SHIM_NAME: SHIM.encode(),
        INDEX: json_bytes(_index(plan)),
    }


def copied_code(source: Source, plan: Plan) -> ForeignCode:
    """Return the source's code that the conversion copies."""
    if not plan.remote_code:
        return ForeignCode()
    return foreign_code(source.directory, copied_files(source))


def copied_files(source: Source) -> list[Path]:
    """Return the tokenizer, template and generation files to copy.

    Raises:
        FlashMoEError: one is a symlink out of the checkpoint; publishing the result would publish
            another file of this machine.
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
                f"{path}: a symlink out of the checkpoint, to {path.resolve()}. Delete it, or "
                "replace it with a copy of that file."
            )
    return paths


def is_copied(name: str) -> bool:
    """Whether a conversion copies a file of this name."""
    known = any(fnmatchcase(name, pattern) for pattern in COPIED)
    return known and not name.startswith(".") and name not in GENERATED


def _roots(source: Source) -> list[Path]:
    """Return the folders that a checkpoint's symlinks may point into."""
    roots = [source.directory.resolve()]
    if roots[0].parent.name == "snapshots":  # the Hub's cache keeps the files in ../../blobs
        roots.append(roots[0].parents[1])
    if source.layout and source.layout.kind == "linked":
        roots.append(source.layout.directory.resolve())
    return roots


def write_index(plan: Plan, out: Path) -> None:
    """Write the index of the trunk's files."""
    write_json(out / INDEX, _index(plan))


def _index(plan: Plan) -> dict[str, Any]:
    names = {spec.name: file.name for file in plan.trunk for spec in file.outputs}
    return {
        "metadata": {"total_size": plan.trunk_bytes},
        "weight_map": dict(sorted(names.items())),
    }


def write_manifest(out: Path, content: dict[str, Any]) -> None:
    """Write the manifest; its own checksum is the last entry."""
    head = {"format": MANIFEST_FORMAT, "version": MANIFEST_VERSION, "checksum": CHECKSUM}
    content = head | content
    own = as_text(zlib.crc32(json_bytes(content)))
    write_json(out / EXPERT_DIR / MANIFEST, content | {OWN_CHECKSUM: own})


def check_linkable(source: Source) -> None:
    """Refuse `--link` for a source that is not a stock MLX checkpoint."""
    if source.layout is None or source.layout.kind != "stock":
        raise FlashMoEError(
            f"{source.directory}: --link needs an MLX checkpoint with stacked experts, but "
            "flashmoe-convert wrote this directory. Use it as it is."
        )


def link_source(source: Source, plan: Plan, out: Path) -> dict[str, Any]:
    """Symlink the source's files (`--link`), and return the manifest's content."""
    directory = source.directory.resolve()
    weights = (*directory.glob("*" + WEIGHTS), directory / INDEX, directory / CARD)
    for path in sorted(weights):
        if path.is_file():
            link_file(path, out / path.name)
    for name, content in small_files(source, plan).items():
        if isinstance(content, Path):
            link_file(directory / name, out / name)
        elif name != INDEX:
            write_file(out / name, content)
    return {"link": str(directory)}
