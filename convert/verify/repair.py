"""Rewrite what `verify` reports: experts in place, other files completely."""

import json
import os
import shutil
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ...errors import FlashMoEError
from ...format.layout import EXPERT_DIR, MANIFEST
from ...format.placement import read_placement
from ..plan.parts import LayerPlan, Options
from ..plan.plan import build_plan
from ..source.checkpoint import Source
from ..source.locate import Found, located
from ..source.open import open_source
from ..source.read import Reader
from ..source.shards import RangeReader
from ..write.execute import ExpertSteps, as_buffer
from ..write.files import TEMPORARY, Entry, as_text, sync_directory, write_at, write_file
from ..write.journal import locked
from ..write.output import place, small_files, write_weights
from .verify import Problem, entries, read_checksums, verify

_SCRATCH = "repair" + TEMPORARY


def repair(
    directory: Path, problems: list[Problem], hf_path: str | Path, revision: str | None = None
) -> list[Problem]:
    """Repair what differs, read the files again, and return the remaining problems.

    Only bytes with the manifest's checksum are written.

    Args:
        directory: one that `flashmoe-convert` wrote.
        problems: what `verify` returned.
        hf_path: the checkpoint that it was made from: a directory, or a name on the Hub.
        revision: branch, tag or commit on the Hub; the manifest's by default.

    Raises:
        FlashMoEError: the source gives other bytes, or the disk does not allow it.
    """
    manifest = read_checksums(directory)
    if manifest["source"].get("repo") == str(hf_path):
        revision = revision or manifest["source"]["revision"]
    with located(str(hf_path), revision) as found, locked(directory):
        try:
            source = open_source(found.directory, str(hf_path), found.commit)
            _Repair(directory, manifest, source).run(problems, found)
        except OSError as error:
            raise FlashMoEError(
                f"{error.filename or directory}: cannot be written ({error.strerror}). Fix that, "
                "and run the same command again."
            ) from error
    known = entries(manifest)
    left = [problem for problem in problems if problem.file not in known]
    return left + verify(directory, {p.file for p in problems if p.file in known})


class _Repair:
    def __init__(self, directory: Path, manifest: dict[str, Any], source: Source) -> None:
        self._directory, self._source = directory, source
        self._entries, self._made_with = entries(manifest), manifest["tools"]
        options = Options(**{key: manifest["options"].get(key) for key in Options.__annotations__})
        path = directory / EXPERT_DIR / MANIFEST
        options = replace(options, placement=read_placement(manifest, path))
        if options.calibrate:
            raise FlashMoEError(
                f"{directory}: made with --calibrate {options.calibrate}, so parts of it cannot be "
                "made separately. Convert again."
            )
        self._plan = build_plan(source, options)
        self._files = {place(file): file for file in self._plan.weight_files}

    def run(self, problems: list[Problem], found: Found) -> None:
        """Rewrite files that differ outside of experts, then single experts."""
        whole = {p.file for p in problems if p.expert is None and p.file in self._entries}
        single = [p for p in problems if p.expert is not None and p.file not in whole]
        with (
            RangeReader(found) as reader,
            tqdm(unit="B", unit_scale=True, file=sys.stderr, disable=None) as bar,
        ):
            for name in sorted(whole):
                self._rewrite(name, reader, bar)
            for problem in single:
                bar.update(self._rewrite_expert(problem, reader))

    def _rewrite(self, name: str, reader: Reader, bar: Any) -> None:
        """Write a file to the scratch folder, and move it into place if its checksums are right."""
        scratch = self._directory / _SCRATCH
        shutil.rmtree(scratch, ignore_errors=True)
        (scratch / EXPERT_DIR).mkdir(parents=True)
        try:
            entry = self._write(name, scratch, reader, bar)
            expected = {k: v for k, v in self._entries[name].items() if k != "layer"}
            if json.loads(json.dumps(entry)) != expected:
                raise self._other_bytes(name, entry["checksum"], expected["checksum"])
            os.replace(scratch / name, self._directory / name)
            sync_directory((self._directory / name).parent)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _write(self, name: str, scratch: Path, reader: Reader, bar: Any) -> Entry:
        if name in self._files:
            return write_weights(self._source, self._files[name], scratch, reader, bar.update)
        contents = small_files(self._source, self._plan)
        if name not in contents:
            raise self._other_source(name)
        return write_file(scratch / name, contents[name])

    def _rewrite_expert(self, problem: Problem, reader: Reader) -> int:
        """Overwrite one expert's record if the new checksum is right; return its bytes."""
        assert problem.expert is not None
        layer, path = self._files.get(problem.file), self._directory / problem.file
        if not isinstance(layer, LayerPlan):
            raise self._other_source(problem.file)
        steps = ExpertSteps(self._source, layer, reader)
        one = range(problem.expert, problem.expert + 1)
        (record,) = steps.encode(one, steps.load(one))
        data = b"".join(map(as_buffer, record))
        entry = self._entries[problem.file]
        place = layer.numbers.index(problem.expert)
        found, expected = as_text(zlib.crc32(data)), entry["records"][place]
        if found != expected:
            raise self._other_bytes(
                f"{problem.file} layer {layer.layer} expert {problem.expert}", found, expected
            )
        if path.is_symlink():
            raise FlashMoEError(f"{path}: a symlink to {path.resolve()}. Repair the copy there.")
        start = entry["size"] - layer.nbytes + place * layer.record_bytes
        with open(path, "r+b", buffering=0) as file:
            write_at(file.fileno(), data, start)
            os.fsync(file.fileno())
        return layer.record_bytes

    def _other_source(self, name: str) -> FlashMoEError:
        return FlashMoEError(
            f"{self._source.name}: does not give {name}. Give the checkpoint that "
            f"{self._directory} was made from."
        )

    def _other_bytes(self, what: str, found: str, expected: str) -> FlashMoEError:
        return FlashMoEError(
            f"{self._source.name}: gives {what} the checksum {found}, expected {expected}. Give "
            f"the checkpoint that {self._directory} was made from, with {self._made_with}; or "
            "convert again."
        )
