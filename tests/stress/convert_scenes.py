"""Checkpoints, a local Hub, commands and comparisons for the trials of flashmoe-convert."""

import contextlib
import filecmp
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashmoe_mlx.bench.synthetic import Recipe, checkpoint
from flashmoe_mlx.convert.source.shards import FOLDER
from flashmoe_mlx.convert.verify.verify import verify
from flashmoe_mlx.convert.write.files import TEMPORARY
from flashmoe_mlx.convert.write.journal import JOURNAL
from flashmoe_mlx.errors import FlashMoEError
from flashmoe_mlx.format.layout import EXPERT_DIR, MANIFEST

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from convert_helpers import (  # noqa: E402
    fused,
    make_weights,
    save_in_order,
    spell,
    unpack,
    write_tokenizer,
)
from hub_server import HubServer  # noqa: E402

REPO = "owner/model"
JOURNAL_PLACE, MANIFEST_PLACE = f"{EXPERT_DIR}/{JOURNAL}", f"{EXPERT_DIR}/{MANIFEST}"


@dataclass(frozen=True)
class Conversion:
    """A flashmoe-convert command, without its output directory.

    Attributes:
        source: directory of the checkpoint.
        arguments: all arguments except --mlx-path.
        environment: environment of the process.
    """

    source: Path
    arguments: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)

    def start(self, out: Path, **strike: Any) -> "subprocess.Popen[str]":
        """Start the command; `convert_strike.py` kills it."""
        return self.command(*self.arguments, "--mlx-path", str(out), **strike)

    def command(self, *arguments: str, **strike: Any) -> "subprocess.Popen[str]":
        """Start flashmoe-convert with any arguments."""
        script = str(HERE / "convert_strike.py")
        return subprocess.Popen(
            [sys.executable, script, json.dumps(strike), *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | self.environment,
        )  # fmt: skip


def result(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """Wait; return the exit code and the last line of output."""
    lines = process.communicate()[0].strip().splitlines() or [""]
    return process.returncode, lines[-1]


def write_source(source: Path, recipe: Recipe, fmt: str, shards: int) -> None:
    """Write a checkpoint: bfloat16 as on the Hub ("hf"), or stock mlx-lm's with 4 bits ("mlx")."""
    if fmt == "hf":
        weights = spell(fused(make_weights(recipe.config())), "model.language_model.")
        save_in_order(source, recipe.config(), weights, shards)
        write_tokenizer(source)
    else:
        unpack(checkpoint(recipe, source.parent / "packed"), source, shards)


@contextlib.contextmanager
def conversion(
    work: Path, recipe: Recipe, fmt: str, shards: int, hub: bool
) -> Iterator[Conversion]:
    """Write a checkpoint under `work`, and serve it as a Hub if requested."""
    source = work / "source"
    write_source(source, recipe, fmt, shards)
    options = ("-q",) if fmt == "hf" else ()
    if not hub:
        yield Conversion(source, ("--hf-path", str(source), *options))
        return
    (work / "tmp").mkdir(exist_ok=True)
    with HubServer() as server:
        server.add(REPO, source)
        environment = {
            "HF_ENDPOINT": server.url, "HF_HUB_CACHE": str(work / "cache"), "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TMPDIR": str(work / "tmp"),
        }  # fmt: skip
        yield Conversion(source, ("--hf-path", REPO, *options), environment)


def files(directory: Path) -> list[str]:
    """Return every file below a directory, relative to it."""
    found = (path for path in directory.rglob("*") if path.is_file())
    return sorted(path.relative_to(directory).as_posix() for path in found)


def differences(made: Path, expected: Path) -> list[str]:
    """Return the files that differ, or exist in only one directory."""
    names = set(files(made)) | set(files(expected))
    return [name for name in sorted(names) if not _same(made / name, expected / name)]


def _same(left: Path, right: Path) -> bool:
    return left.is_file() and right.is_file() and filecmp.cmp(left, right, shallow=False)


def pretends(out: Path, whole: Path) -> list[str]:
    """Return the parts of an unfinished directory that wrongly look finished.

    Every file with a final name must have its final bytes, and verify must fail without a manifest.
    """
    if not out.exists():
        return []
    done = [name for name in files(out) if not _is_passing(name)]
    wrong = [f"{name} is not whole" for name in done if not _same(out / name, whole / name)]
    if (out / MANIFEST_PLACE).exists():
        missing = set(files(whole)) - set(done)
        return wrong + [f"the manifest is there without {name}" for name in sorted(missing)]
    with contextlib.suppress(FlashMoEError):
        verify(out)
        wrong.append("it verifies without a manifest")
    return wrong


def _is_passing(name: str) -> bool:
    """Return whether a file exists only during a conversion."""
    return name.endswith(TEMPORARY) or name.startswith(f"{FOLDER}/") or name == JOURNAL_PLACE


def is_whole(out: Path) -> bool:
    """Return whether a conversion is complete, by the commands that a user has."""
    return (out / MANIFEST_PLACE).exists() and not (out / JOURNAL_PLACE).exists()


def on_disk(folder: Path) -> int:
    """Return the disk usage of a folder in bytes, while its files change."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += 512 * path.lstat().st_blocks if path.is_file() else 0
    return total


@contextlib.contextmanager
def watched(folder: Path, seconds: float = 0.01) -> Iterator[list[int]]:
    """Repeatedly measure a folder's disk usage; yield a list with the maximum."""
    most, ended = [0], threading.Event()

    def look() -> None:
        while not ended.wait(seconds):
            with contextlib.suppress(OSError):  # the folder has vanished
                most[0] = max(most[0], on_disk(folder))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()


def wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    """Wait until a path exists or a process ends."""
    while not path.exists() and process.poll() is None:
        time.sleep(0.002)
