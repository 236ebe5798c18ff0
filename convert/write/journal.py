"""What an unfinished conversion has finished: `model_experts/unfinished.json`.

It says what was begun (source, options) and has the entry of every weight file that is in place,
or in part in NAME.tmp when its source comes piece by piece, and is replaced as a whole after each
step. So a command that is killed anywhere finds its way when it is run again. It goes when the
manifest, which is made of the same entries, is written.
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
from ..plan.parts import LayerPlan, Plan, TrunkFile, flags
from .checksum import as_text
from .files import TEMPORARY, Entry, Header, sync_directory, write_file
from .output import place

JOURNAL = "unfinished.json"
JOURNAL_VERSION = 1
BLOCK_BYTES = 16 << 20
_FIRST = JOURNAL + TEMPORARY  # what a conversion writes first

Begun = dict[str, Any]
Entries = dict[str, Entry]


def check_output(out: Path) -> None:
    """Check that a directory can be written: absent, empty, or an unfinished conversion.

    Raises:
        FlashMoEError: it holds something else.
    """
    if not os.path.lexists(out) or (out / EXPERT_DIR / JOURNAL).is_file() or _is_empty(out):
        return
    unfinished = (out / EXPERT_DIR).is_dir() and not (out / EXPERT_DIR / MANIFEST).exists()
    state = "is an unfinished conversion" if unfinished else "exists already"
    raise FlashMoEError(f"{out}: {state}. Delete it, or give another --mlx-path.")


def _is_empty(out: Path) -> bool:
    """Say whether nothing is there but what a conversion that was killed at once leaves."""
    if not out.is_dir():
        return False
    experts = out / EXPERT_DIR
    if any(path != experts for path in out.iterdir()) or experts.is_symlink():
        return False
    return not experts.exists() or {path.name for path in experts.iterdir()} <= {_FIRST}


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Make the output directory, and keep other conversions out of it.

    Raises:
        FlashMoEError: another process is at it.
    """
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
        _lock(directory, out)
        yield
    finally:
        os.close(directory)


def _lock(directory: int, out: Path) -> None:
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, even killed
    except BlockingIOError:
        raise FlashMoEError(
            f"{out}: another flashmoe-convert is writing it. Wait for it, or stop it."
        ) from None
    except OSError:
        return  # a file system without locks


def read_journal(out: Path, begun: Begun) -> Entries:
    """Return the entries of the files that are in place; none if nothing was begun.

    Raises:
        FlashMoEError: something else was begun, or the journal cannot be read.
    """
    path = out / EXPERT_DIR / JOURNAL
    try:
        content = read_json(path, f"Delete {out} and convert again.")
        before, entries = content["begun"], content["files"]
        version = content["version"]
        entries.items(), before.items()
    except FileNotFoundError:
        return {}
    except FlashMoEError:
        raise
    except (KeyError, TypeError, AttributeError) as error:
        raise FlashMoEError(
            f"{path}: damaged ({error!r}). Delete {out} and convert again."
        ) from error
    now = {"version": JOURNAL_VERSION} | json.loads(json.dumps(begun))
    before = {"version": version} | before
    for key in now:
        if before.get(key) != now[key]:
            raise FlashMoEError(
                f"{out}: an unfinished conversion that was begun with "
                f"{_difference(key, before.get(key), now[key])}. Give {_again(key, before)} to "
                f"finish it, or delete {out} to begin anew."
            )
    return entries


def _again(key: str, before: Begun) -> str:
    """Say what to give to go on with what was begun."""
    source = before.get("source")
    if key == "source" and isinstance(source, dict) and "revision" in source:
        return f"--revision {source['revision']}"
    return "it the same again"


def _difference(key: str, before: Any, now: Any) -> str:
    """Say what one thing was, that a conversion was begun with, and what it is now."""
    if key == "files" and isinstance(before, dict):
        name = next(n for n in sorted({*before, *now}) if before.get(n) != now.get(n))
        was, is_ = before.get(name, "no such file"), now.get(name, "no such file")
        return f"another {name} (size and times: {was}, now {is_})"
    if isinstance(before, dict):
        show = flags if key == "options" else lambda values: " ".join(map(str, values.values()))
        before, now = show(before), show(now)
    return f"{key} {before}, not {now}"


def write_journal(out: Path, begun: Begun, entries: Entries) -> None:
    """Write the journal anew."""
    content = {"version": JOURNAL_VERSION, "begun": begun, "files": entries}
    write_file(out / EXPERT_DIR / JOURNAL, json.dumps(content).encode())


def remove_journal(out: Path) -> None:
    """Remove the journal: the manifest has taken its place."""
    (out / EXPERT_DIR / JOURNAL).unlink()
    sync_directory(out / EXPERT_DIR)


def header(file: TrunkFile | LayerPlan) -> Header:
    """Return the header that a weight file gets."""
    return Header(file.specs(), DATA_ALIGNMENT if isinstance(file, LayerPlan) else 8)


def finished(out: Path, plan: Plan, begun: Begun) -> Entries:
    """Return the entries of the files that were finished and, as far as a glance tells, still are.

    The glance is at size, header and the last tensor or expert; `verify` reads every byte. Of files
    that are there in part every byte is read: their entries have the key "written".

    Raises:
        FlashMoEError: what was begun is another conversion.
    """
    entries = read_journal(out, begun)
    found = {}
    for file in plan.weight_files:
        name = place(file)
        with suppress(OSError, KeyError, IndexError, TypeError, ValueError):  # then it is not
            entry = entries[name]
            if "written" in entry:
                good = _is_begun(out / (name + TEMPORARY), header(file), entry)
            else:
                good = _is_whole(out / name, header(file), entry, file)
            if good:
                found[name] = entry
    return found


def _is_begun(path: Path, planned: Header, entry: Entry) -> bool:
    if as_text(zlib.crc32(planned.data)) != entry["header"] or not path.is_file():
        return False
    with open(path, "rb") as stream:
        starts = planned.starts
        for start, end, checksum in zip(starts, starts[1:], entry["written"], strict=False):
            stream.seek(len(planned.data) + start)
            if checksum and as_text(_read_checksum(stream, end - start)) != checksum:
                return False
    return len(entry["written"]) == len(planned.names)


def _is_whole(path: Path, planned: Header, entry: Entry, file: TrunkFile | LayerPlan) -> bool:
    if isinstance(file, LayerPlan):
        last, checksum = file.record_bytes, entry["records"][-1]
    else:
        last, checksum = entry["tensors"][planned.names[-1]]
    if as_text(zlib.crc32(planned.data)) != entry["header"] or not path.is_file():
        return False
    with open(path, "rb") as stream:
        if os.fstat(stream.fileno()).st_size != planned.file_bytes:
            return False
        if stream.read(len(planned.data)) != planned.data:
            return False
        stream.seek(planned.file_bytes - last)
        return as_text(_read_checksum(stream, last)) == checksum


def _read_checksum(stream: BinaryIO, nbytes: int) -> int:
    found = 0
    while nbytes and (block := stream.read(min(nbytes, BLOCK_BYTES))):
        found, nbytes = zlib.crc32(block, found), nbytes - len(block)
    return found


def data_bytes(plan: Plan, done: Entries) -> int:
    """Return the bytes of tensors that are written, by the entries of `finished`."""
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


def leftovers(out: Path, plan: Plan, done: Entries) -> list[Path]:
    """Return the weight files, whole or NAME.tmp, that `finished` does not vouch for.

    They are what a killed conversion was writing, or had written and not put into the journal yet.
    """
    paths = []
    for file in plan.weight_files:
        path, entry = out / place(file), done.get(place(file))
        if entry is None or "written" in entry:
            paths.append(path)
        if entry is None or "written" not in entry:
            paths.append(path.with_name(path.name + TEMPORARY))
    return [path for path in paths if os.path.lexists(path)]


def leftover_bytes(out: Path, plan: Plan, done: Entries) -> int:
    """Return the bytes on disk of leftovers."""
    found = (path.lstat() for path in leftovers(out, plan, done))
    return sum(min(status.st_size, 512 * status.st_blocks) for status in found)


def remove_leftovers(out: Path, plan: Plan, done: Entries) -> None:
    """Delete leftovers, so that no file is on the disk twice while it is written anew."""
    for path in leftovers(out, plan, done):
        path.unlink()
