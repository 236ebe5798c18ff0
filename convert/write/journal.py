"""The journal of an unfinished conversion: `model_experts/unfinished.json`.

It holds what the output depends on (source, options) and the entry of every weight file in place,
or in part in NAME.tmp if its source arrives piece by piece. Each step replaces it atomically, so a
killed command resumes. The manifest, made of the same entries, succeeds it.
"""

import fcntl
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ...errors import FlashMoEError
from ...format.json_file import read_json
from ...format.layout import DATA_ALIGNMENT, EXPERT_DIR, MANIFEST
from ..plan.parts import File, LayerPlan, Plan, flags
from .files import TEMPORARY, Entry, Header, as_text, sync_directory, write_file
from .output import place

JOURNAL = "unfinished.json"
JOURNAL_VERSION = 1
BLOCK_BYTES = 16 << 20
_FIRST = JOURNAL + TEMPORARY  # the first file that a conversion writes

Begun = dict[str, Any]
Entries = dict[str, Entry]


def check_output(out: Path) -> None:
    """Refuse a directory that is not absent, empty, or an unfinished conversion."""
    if not os.path.lexists(out) or (out / EXPERT_DIR / JOURNAL).is_file() or _is_empty(out):
        return
    unfinished = (out / EXPERT_DIR).is_dir() and not (out / EXPERT_DIR / MANIFEST).exists()
    state = "is an unfinished conversion" if unfinished else "exists already"
    raise FlashMoEError(f"{out}: {state}. Delete it, or give another --mlx-path.")


def _is_empty(out: Path) -> bool:
    """Whether it holds at most what a conversion killed at its start leaves."""
    if not out.is_dir():
        return False
    experts = out / EXPERT_DIR
    if any(path != experts for path in out.iterdir()) or experts.is_symlink():
        return False
    return not experts.exists() or {path.name for path in experts.iterdir()} <= {_FIRST}


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Create the output directory and lock it. Raises FlashMoEError if another process has it."""
    try:
        for path in (out, out / EXPERT_DIR):
            path.mkdir(parents=True, exist_ok=True)
            sync_directory(path.parent)
        directory = os.open(out / EXPERT_DIR, os.O_RDONLY)
    except OSError as error:
        raise FlashMoEError(
            f"{error.filename or out}: cannot be written ({error.strerror}). Give another "
            "--mlx-path."
        ) from error
    try:
        with suppress(OSError):  # the file system has no locks
            try:
                # The lock ends with the process, even if it is killed.
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FlashMoEError(
                    f"{out}: another flashmoe-convert is writing it. Wait for it, or stop it."
                ) from None
        yield
    finally:
        os.close(directory)


def read_journal(out: Path, begun: Begun) -> Entries:
    """Return the entries of the files in place; none if nothing was begun.

    Raises:
        FlashMoEError: the journal is damaged, or of another conversion.
    """
    path = out / EXPERT_DIR / JOURNAL
    try:
        content = read_json(path, f"Delete {out} and convert again.")
        before, entries = content["begun"], content["files"]
        version = content["version"]
        entries.items(), before.items()
    except FileNotFoundError:
        return {}
    except (KeyError, TypeError, AttributeError) as error:
        raise FlashMoEError(
            f"{path}: damaged ({error!r}). Delete {out} and convert again."
        ) from error
    now = {"version": JOURNAL_VERSION} | json.loads(json.dumps(begun))
    before = {"version": version} | before
    source = before.get("source")
    for key in now:
        if before.get(key) != now[key]:
            remedy = "the same options and source"
            if key == "source" and isinstance(source, dict) and "revision" in source:
                remedy = f"--revision {source['revision']}"
            raise FlashMoEError(
                f"{out}: an unfinished conversion, begun with "
                f"{_difference(key, before.get(key), now[key])}. Give {remedy} to finish it, or "
                f"delete {out} to start again."
            )
    return entries


def _difference(key: str, before: Any, now: Any) -> str:
    """Describe one value, then and now."""
    if key == "files" and isinstance(before, dict):
        name = next(n for n in sorted({*before, *now}) if before.get(n) != now.get(n))
        then, is_ = before.get(name, "no such file"), now.get(name, "no such file")
        return f"another {name} (size and times: {then}, now {is_})"
    if isinstance(before, dict):
        show = flags if key == "options" else lambda values: " ".join(map(str, values.values()))
        before, now = show(before), show(now)
    return f"{key} {before}, not {now}"


def write_journal(out: Path, begun: Begun, entries: Entries) -> None:
    """Replace the journal."""
    content = {"version": JOURNAL_VERSION, "begun": begun, "files": entries}
    write_file(out / EXPERT_DIR / JOURNAL, json.dumps(content).encode())


def remove_journal(out: Path) -> None:
    """Delete the journal, once the manifest is written."""
    (out / EXPERT_DIR / JOURNAL).unlink()
    sync_directory(out / EXPERT_DIR)


def header(file: File) -> Header:
    """Return the header of a weight file to write."""
    return Header(file.outputs, DATA_ALIGNMENT if isinstance(file, LayerPlan) else 8)


def finished(out: Path, plan: Plan, begun: Begun) -> Entries:
    """Return the entries of the files that are finished, or in part (with the key "written").

    Of finished files it checks size, header and the last tensor or expert (`verify` reads all
    bytes); of partial files it checks every byte.

    Raises:
        FlashMoEError: the directory holds another conversion.
    """
    entries = read_journal(out, begun)
    found = {}
    for file in plan.weight_files:
        name = place(file)
        with suppress(OSError, KeyError, IndexError, TypeError, ValueError):
            entry = entries[name]
            if _matches(out / name, file, entry):
                found[name] = entry
    return found


def _matches(path: Path, file: File, entry: Entry) -> bool:
    planned = header(file)
    start, end = len(planned.data), planned.file_bytes
    if as_text(zlib.crc32(planned.data)) != entry["header"]:
        return False
    partial = "written" in entry
    if partial:
        path = path.with_name(path.name + TEMPORARY)
        parts = zip(planned.starts[:-1], planned.starts[1:], entry["written"], strict=True)
        ranges = [(start + first, last - first, crc) for first, last, crc in parts if crc]
    else:
        if isinstance(file, LayerPlan):
            nbytes, crc = file.record_bytes, entry["records"][-1]
        else:
            nbytes, crc = entry["tensors"][planned.names[-1]]
        ranges = [(0, start, entry["header"]), (end - nbytes, nbytes, crc)]
    if not path.is_file() or (not partial and path.stat().st_size != end):
        return False
    with open(path, "rb") as stream:
        for offset, nbytes, crc in ranges:
            stream.seek(offset)
            if as_text(_read_checksum(stream, nbytes)) != crc:
                return False
    return True


def _read_checksum(stream: BinaryIO, nbytes: int) -> int:
    found = 0
    while nbytes and (block := stream.read(min(nbytes, BLOCK_BYTES))):
        found, nbytes = zlib.crc32(block, found), nbytes - len(block)
    return found


def data_bytes(plan: Plan, done: Entries) -> int:
    """Return the tensor bytes that are written, by the entries of `finished`."""
    total = 0
    for file in plan.weight_files:
        entry = done.get(place(file), {"written": ()})
        if "written" not in entry:
            total += file.nbytes
        elif entry["written"]:
            starts = header(file).starts
            triples = zip(starts, starts[1:], entry["written"], strict=False)
            total += sum(end - start for start, end, checksum in triples if checksum)
    return total


def _leftovers(out: Path, plan: Plan, done: Entries) -> list[Path]:
    """Return the weight files (or NAME.tmp) that a killed run left and `finished` omits."""
    paths = []
    for file in plan.weight_files:
        path, entry = out / place(file), done.get(place(file))
        if entry is None or "written" in entry:
            paths.append(path)
        if entry is None or "written" not in entry:
            paths.append(path.with_name(path.name + TEMPORARY))
    return [path for path in paths if os.path.lexists(path)]


def leftover_bytes(out: Path, plan: Plan, done: Entries) -> int:
    """Return the bytes on disk that `remove_leftovers` frees."""
    found = (path.lstat() for path in _leftovers(out, plan, done))
    return sum(min(status.st_size, 512 * status.st_blocks) for status in found)


def remove_leftovers(out: Path, plan: Plan, done: Entries) -> None:
    """Delete a killed run's leftovers, so that no file is on the disk twice."""
    for path in _leftovers(out, plan, done):
        path.unlink()
