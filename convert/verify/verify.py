"""Compare every byte of a converted directory with the manifest's checksums."""

import json
import os
import shlex
import stat
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ...errors import FlashMoEError
from ...format.headers import list_weight_files
from ...format.json_file import exists, read_bytes, unreadable
from ...format.layout import EXPERT_DIR, MANIFEST, layer_file, read_manifest
from ...format.names import FIELDS
from ...settings import StreamConfig
from ..source.read import Reader
from ..write.files import OWN_CHECKSUM, Entry, as_text, json_bytes

BLOCK_BYTES = 8 << 20  # per thread
CONFIG = "config.json"
SETTINGS = {field.name for field in fields(StreamConfig)}  # users may add them to config.json


@dataclass(frozen=True)
class Part:
    """A byte range with a checksum, in a file (relative to the directory).

    For an expert, `fields` are the (name, bytes, checksum) of its tensors.
    """

    file: str
    what: str
    offset: int
    nbytes: int
    checksum: str
    layer: int | None = None
    expert: int | None = None
    fields: tuple[tuple[str, int, str], ...] = ()


@dataclass(frozen=True)
class Problem:
    """A fault of one expert, or of a file; `found` is the checksum of its bytes."""

    file: str
    text: str
    layer: int | None = None
    expert: int | None = None
    found: str = ""

    def __str__(self) -> str:
        """Return one line."""
        return f"{self.file}: {self.text}"


def verify(directory: Path, only: set[str] | None = None) -> list[Problem]:
    """Compare every byte with the manifest, on all cores, and return the differences.

    Args:
        directory: one that `flashmoe-convert` wrote.
        only: names of the files to read, instead of all.

    Raises:
        FlashMoEError: the manifest is missing, damaged or without checksums, or the directory is
            unreadable.
    """
    directory = Path(directory).expanduser()
    manifest = read_checksums(directory)
    problems = _unlisted(directory, manifest) if only is None else []
    parts: list[Part] = []
    for name, entry in entries(manifest).items():
        if name == CONFIG and _differs_in_settings(directory / name, entry):
            continue
        if only is None or name in only:
            problem = _size_problem(directory / name, name, entry["size"])
            problems += [problem] if problem else []
            parts += [] if problem else list(_parts(name, entry))
    return problems + _name_swaps(list(_differing(directory, parts)), manifest)


def read_checksums(directory: Path) -> dict[str, Any]:
    """Read the manifest; raises FlashMoEError unless it is intact and has every checksum."""
    if not (exists(directory) and directory.is_dir()):
        raise FlashMoEError(f"{directory}: not a directory. Give one that flashmoe-convert wrote.")
    path = directory / EXPERT_DIR / MANIFEST
    manifest = read_manifest(path)
    if "link" in manifest:
        raise FlashMoEError(
            f"{directory}: its experts lie in {manifest['link']}, which has no checksums, because "
            "--link made this directory. Convert without --link to get checksums."
        )
    if OWN_CHECKSUM not in manifest:
        raise FlashMoEError(
            f"{path}: has no checksum of every file; an older flashmoe-convert or another tool "
            "wrote it. Convert again."
        )
    rest = {key: value for key, value in manifest.items() if key != OWN_CHECKSUM}
    own = as_text(zlib.crc32(json_bytes(rest)))
    try:
        raw = read_bytes(path, "Convert again.")
    except FileNotFoundError as error:  # deleted since read_manifest
        raise unreadable(path, error) from error
    if manifest[OWN_CHECKSUM] != own or raw != json_bytes(manifest):
        raise FlashMoEError(
            f"{path}: altered since it was written (its own checksum is "
            f"{manifest[OWN_CHECKSUM]!r}, that of its content {own!r}). Convert again, or restore "
            "the manifest from a copy."
        )
    try:
        manifest["source"].items(), manifest["tools"], manifest["options"].items()
        for name, entry in entries(manifest).items():
            if not all(_is_sound(part) for part in _parts(name, entry)):
                raise ValueError(f"sizes or checksums of {name}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FlashMoEError(f"{path}: damaged ({error!r}). Convert again.") from error
    return manifest


def _is_sound(part: Part) -> bool:
    numbers = (part.offset, part.nbytes)
    return all(type(n) is int and n >= 0 for n in numbers) and type(part.checksum) is str


def entries(manifest: dict[str, Any]) -> dict[str, Entry]:
    """Return every file's entry by its path in the directory."""
    found: dict[str, Entry] = {}
    for entry in manifest["files"]:
        name = entry["file"]
        if name != os.path.basename(name) or name in ("", ".", ".."):
            raise ValueError(f"{name!r} is not the name of a file in the directory")
        found[name] = entry
    for layer, entry in enumerate(manifest["layers"]):
        if entry["file"] != layer_file(layer):
            raise ValueError(f"{entry['file']!r} is listed as layer {layer}")
        found[f"{EXPERT_DIR}/{layer_file(layer)}"] = entry | {"layer": layer}
    return found


def _parts(name: str, entry: Entry) -> Iterator[Part]:
    """Split a file into its header and its tensors or experts, if it has any."""
    if "layer" in entry:
        yield from _experts(name, entry)
    elif "tensors" in entry:
        sizes = [nbytes for nbytes, _ in entry["tensors"].values()]
        start = entry["size"] - sum(sizes)
        yield Part(name, "header", 0, start, entry["header"])
        for (tensor, (_, checksum)), nbytes in zip(entry["tensors"].items(), sizes, strict=True):
            yield Part(name, f"tensor {tensor}", start, nbytes, checksum)
            start += nbytes
    else:
        yield Part(name, "file", 0, entry["size"], entry["checksum"])


def numbers(entry: Entry) -> Sequence[int]:
    """Return the ids of a layer's experts in the model, in the order of their records."""
    found: Sequence[int] = entry.get("numbers") or range(len(entry["records"]))
    return found


def _experts(name: str, entry: Entry) -> Iterator[Part]:
    sizes, records, names = entry["field_bytes"], entry["records"], entry.get("fields", FIELDS)
    layer, start = entry["layer"], entry["size"] - len(records) * sum(sizes)
    yield Part(name, "header", 0, start, entry["header"], layer)
    for expert, checksum, digits in zip(numbers(entry), records, entry["tensors"], strict=True):
        single = [digits[8 * index : 8 * index + 8] for index in range(len(names))]
        fields = tuple(zip(names, sizes, single, strict=True))
        what = f"layer {layer} expert {expert}"
        yield Part(name, what, start, sum(sizes), checksum, layer, expert, fields)
        start += sum(sizes)


def _size_problem(path: Path, name: str, size: int) -> Problem | None:
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return Problem(name, "missing")
    except OSError as error:
        return Problem(name, f"unreadable ({error.strerror})")
    if not stat.S_ISREG(status.st_mode):
        return Problem(name, "not a regular file")
    if found := status.st_size - size:
        state = "truncated" if found < 0 else "extended"
        return Problem(name, f"{state}: {size + found} bytes long, {size} were written")
    return None


def _differs_in_settings(path: Path, entry: Entry) -> bool:
    """Whether config.json differs from what was written only by settings that users may add."""
    try:
        config = json.loads(read_bytes(path, "Convert again."))  # a pipe would block
        own = config["flashmoe"]
        config["flashmoe"] = {name: own[name] for name in own if name not in SETTINGS}
        written = json_bytes(dict(sorted(config.items())))
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        FlashMoEError,
    ):
        return False  # the comparison with the manifest says what is wrong
    same = (len(written), as_text(zlib.crc32(written))) == (entry["size"], entry["checksum"])
    return same and not own.keys().isdisjoint(SETTINGS)


def _unlisted(directory: Path, manifest: dict[str, Any]) -> list[Problem]:
    """Report weight files that stock mlx-lm would load but the manifest does not list."""
    known = entries(manifest)
    names = [path.name for path in list_weight_files(directory)]
    text = "not in the manifest, but mlx-lm would load it; remove it"
    return [Problem(name, text) for name in names if name not in known]


def _differing(directory: Path, parts: list[Part]) -> Iterator[Problem]:
    total = sum(part.nbytes for part in parts)
    with (
        Reader() as reader,
        tqdm(total=total, unit="B", unit_scale=True, file=sys.stderr, disable=None) as bar,
    ):
        pool = ThreadPoolExecutor(os.cpu_count() or 1)
        try:
            results = pool.map(lambda part: _check(reader, directory, part), parts)
            for part, problem in zip(parts, results, strict=True):
                bar.update(part.nbytes)
                if problem:
                    yield problem
        finally:
            pool.shutdown(cancel_futures=True)


def _check(reader: Reader, directory: Path, part: Part) -> Problem | None:
    path, start, names = directory / part.file, part.offset, []
    try:
        found = _checksum(reader, path, part.offset, part.nbytes)
        if found == part.checksum:
            return None
        for field, nbytes, checksum in part.fields:
            if _checksum(reader, path, start, nbytes) != checksum:
                names.append(field)
            start += nbytes
    except FlashMoEError as error:  # a bad sector must not stop the other parts
        return Problem(part.file, f"{part.what}: {error}", part.layer, part.expert)
    what = f"{part.what} {', '.join(names)}".rstrip()
    place = f"bytes {part.offset} to {part.offset + part.nbytes}"
    text = f"{what} differs ({place}: checksum {found}, expected {part.checksum})"
    return Problem(part.file, text, part.layer, part.expert, found)


def _checksum(reader: Reader, path: Path, offset: int, nbytes: int) -> str:
    checksum = 0
    for start in range(0, nbytes, BLOCK_BYTES):
        block = reader.read(path, offset + start, min(BLOCK_BYTES, nbytes - start))
        checksum = zlib.crc32(block.data, checksum)
    return as_text(checksum)


def _name_swaps(problems: list[Problem], manifest: dict[str, Any]) -> list[Problem]:
    """Identify records that belong elsewhere; a file of another layer is reported once."""
    layers = [dict(zip(numbers(x), x["records"], strict=True)) for x in manifest["layers"]]
    homes = {c: (n, e) for n, records in enumerate(layers) for e, c in records.items()}
    found = {(p.layer, p.expert): p.found for p in problems if p.expert is not None}
    whole: dict[int, int] = {}
    for layer, records in enumerate(layers):
        present = {e: found.get((layer, e), c) for e, c in records.items()}
        if present != records and present in layers:
            whole[layer] = layers.index(present)
    result = []
    for problem in problems:
        if problem.expert is None or problem.layer not in whole:
            home = homes.get(problem.found) if problem.expert is not None else None
            if home:
                text = f"{problem.text}: the bytes of layer {home[0]} expert {home[1]}"
                problem = replace(problem, text=text)
            result.append(problem)
        elif problem.expert == min(e for n, e in found if n == problem.layer and e is not None):
            text = f"holds the experts of layer {whole[problem.layer]} instead of its own"
            result.append(replace(problem, text=text, expert=None))
    return result


def summary(directory: Path, problems: Iterable[Problem]) -> str:
    """Return the result in one line."""
    count = len(list(problems))
    if not count:
        files = entries(read_manifest(directory / EXPERT_DIR / MANIFEST))
        edited = _differs_in_settings(directory / CONFIG, files[CONFIG])
        but = ", except settings added to config.json" if edited else ""
        return f"{directory}: every byte is as it was written{but}."
    things = "problem" if count == 1 else "problems"
    return (
        f"{directory}: {count} {things}. Repair: flashmoe-convert verify "
        f"{shlex.quote(str(directory))} --repair --hf-path SOURCE"
    )
