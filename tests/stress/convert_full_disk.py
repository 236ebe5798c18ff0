"""Fill the disk during conversions, then free space and resume. For `convert_trials.py`."""

import contextlib
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

from convert_scenes import (
    Conversion,
    differences,
    is_whole,
    on_disk,
    pretends,
    result,
    wait_for,
)  # fmt: skip

SPARE = 2 << 20  # bytes for the directories' own blocks


@contextlib.contextmanager
def mounted(place: Path, nbytes: int) -> Iterator[None]:
    """Mount an in-memory file system of `size` bytes.

    Raises:
        SystemExit: this process lacks the permission.
    """
    place.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "none", str(place)]
    if subprocess.run(mount).returncode:
        raise SystemExit("full-disk needs root, to mount a small file system")
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def fill(disk: Path) -> None:
    """Write a file until the disk is full."""
    with open(disk / "ballast", "ab", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(1 << 16)):
            pass


def full_disks(work: Path, made_by: Conversion, whole: Path, runs: int, seed: int) -> int:
    """Fill the disk at random moments; return the number of wrong results."""
    shards = sorted(path.stat().st_size for path in made_by.source.glob("*.safetensors"))
    fetched = sum(shards[-2:]) if made_by.environment else 0
    size = on_disk(whole) + fetched + SPARE
    bad = 0
    for run in range(runs):
        with mounted(work / "disk", size):
            said, wrong = _fills_up(
                made_by, work / "disk", whole, size, random.Random(f"{seed} {run}")
            )
        bad += bool(wrong)
        print(f"run {run:3}: {'WRONG: ' + '; '.join(wrong) if wrong else 'identical'}: {said}")
    print(f"{runs} full disks of {size:,} bytes: {runs - bad} results as expected")
    return bad


def _fills_up(
    made_by: Conversion, disk: Path, whole: Path, size: int, chances: random.Random
) -> tuple[str, list[str]]:
    """Fill the disk during a conversion, then free it; return the message, and the errors."""
    out, wrong = disk / "out", []
    process = made_by.start(out)
    wait_for(out, process)
    written = chances.uniform(0, on_disk(whole))
    while process.poll() is None and on_disk(out) < written:
        pass
    fill(disk)
    code, said = result(process)
    if is_whole(out):
        return "had ended before", [f"{name} differs" for name in differences(out, whole)]
    wrong += _refusal(code, said, out) + pretends(out, whole)
    code, again = result(made_by.start(out))  # still full
    wrong += _refusal(code, again, out) + pretends(out, whole)
    (disk / "ballast").unlink()
    code, line = result(made_by.start(out))
    wrong += [f"exit code {code} with room: {line}"] if code else []
    return f"{said} | then: {again}", wrong + [
        f"{name} differs" for name in differences(out, whole)
    ]


def _refusal(code: int, said: str, out: Path) -> list[str]:
    """Return what is wrong with the end of a conversion on a full disk."""
    wrong = [] if code == 2 else [f"exit code {code}"]
    is_said = "No space left on device" in said or "are free" in said
    return wrong + ([] if is_said and str(out) in said else [f"said {said!r}"])
