"""Damage each file of a converted directory, and check that `flashmoe-convert verify` names it.

The trial `flip` of `convert_trials.py`.
"""

import contextlib
import io
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from convert_scenes import MANIFEST_PLACE, files

from flashmoe_mlx import load
from flashmoe_mlx.convert.cli import main
from flashmoe_mlx.errors import FlashMoEError
from flashmoe_mlx.format.headers import read_header
from flashmoe_mlx.format.layout import EXPERT_DIR

CARD = "README.md"  # documentation, which users may edit
Damage = Callable[[Path, random.Random], None]


def spoil(path: Path, chances: random.Random, place: int | None = None) -> int:
    """Flip one bit of a file, in a random byte or the given one; return the index of the byte."""
    place = chances.randrange(path.stat().st_size) if place is None else place
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0] ^ 1 << chances.randrange(8)
        file.seek(place)
        file.write(bytes([byte]))
    return place


def flip(path: Path, chances: random.Random) -> None:
    """Flip one bit at a random place."""
    spoil(path, chances)


def flip_end(path: Path, chances: random.Random) -> None:
    """Flip one bit of the first or the last byte."""
    spoil(path, chances, chances.choice((0, path.stat().st_size - 1)))


def flip_header(path: Path, chances: random.Random) -> None:
    """Flip one bit of a header, its length or its padding; in other files, any bit."""
    length = int.from_bytes(path.read_bytes()[:8], "little") + 8
    spoil(path, chances, chances.randrange(min(length, path.stat().st_size)))


def truncate(path: Path, chances: random.Random) -> None:
    """Truncate a file at a random place."""
    os.truncate(path, chances.randrange(path.stat().st_size))


def extend(path: Path, chances: random.Random) -> None:
    """Append up to 20,000 bytes."""
    with open(path, "ab") as file:
        file.write(chances.randbytes(chances.randint(1, 20_000)))


def remove(path: Path, chances: random.Random) -> None:
    """Delete a file."""
    path.unlink()


def swap(path: Path, chances: random.Random) -> None:
    """Swap two expert files; overwrite any other file with an expert file's bytes."""
    others = [p for p in sorted(path.parent.iterdir()) if p.is_file() and p != path]
    kind = path.suffix, path.stem[:6]
    same = [p for p in others if (p.suffix, p.stem[:6]) == kind]
    other = chances.choice(same or others)
    one, two = path.read_bytes(), other.read_bytes()
    path.write_bytes(two)
    if path.parent.name == EXPERT_DIR and other.suffix == path.suffix:
        other.write_bytes(one)


def edit_header(path: Path, chances: random.Random) -> None:
    """Change one digit in a header, which remains JSON; in other files, flip a bit."""
    if path.suffix != ".safetensors":
        return flip(path, chances)
    data = bytearray(path.read_bytes())
    end = 8 + int.from_bytes(data[:8], "little")
    place = chances.choice([8 + m.start() for m in re.finditer(rb"[0-9]", data[8:end])])
    data[place] = ord(chances.choice([c for c in "0123456789" if ord(c) != data[place]]))
    path.write_bytes(data)
    return None


DAMAGES: tuple[Damage, ...] = (
    flip, flip_end, flip_header, truncate, extend, remove, swap, edit_header,
)  # fmt: skip


def verified(out: Path) -> tuple[int, str]:
    """Run `flashmoe-convert verify`; return its exit code and output."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(["verify", str(out)])
    return code, said.getvalue()


def complaint(name: str, spoiled: int | None, intact: Path, code: int, said: str) -> str:
    """Return what is wrong with verify's output, or an empty text."""
    if name == MANIFEST_PLACE:
        return "" if code == 2 and "manifest.json" in said else "the manifest is not named"
    if code != 1 or f"{name}: " not in said:
        return f"exit code {code}, and {name} is not named"
    if spoiled is None:
        return ""
    wanted = tensor_at(intact / name, spoiled)
    return "" if wanted in said else f"{wanted!r} is not named"


def tensor_at(path: Path, place: int) -> str:
    """Return verify's name for the byte at `place` of an undamaged file."""
    if path.suffix != ".safetensors":
        return "file differs"
    for name, tensor in read_header(path).items():
        if tensor.offset <= place < tensor.offset + tensor.nbytes:
            if match := re.fullmatch(r"experts\.(\d+)\.(.*)", name):
                return f"layer {int(path.stem[6:])} expert {match[1]} {match[2]} differs"
            return f"tensor {name} differs"
    return "header differs"


def loaded(out: Path) -> str:
    """Load the directory and return the outcome in a word."""
    try:
        model, _ = load(out)
    except FlashMoEError:
        return "refused"
    except Exception as error:
        return f"{type(error).__name__} of another library"
    model.close()
    return "not noticed"


def damaged_everywhere(work: Path, whole: Path, times: int, seed: int) -> int:
    """Damage each file `times` times in each way; return the number that verify did not name."""
    out, bad = work / "out", 0
    shutil.copytree(whole, out)
    counts: dict[str, dict[str, int]] = {}
    for damage in DAMAGES:
        outcomes = counts.setdefault(damage.__name__, {})
        for name in files(out):
            for turn in range(times if name != CARD else 0):
                chances = random.Random(f"{seed} {turn} {name}")
                wrong, became = _one(damage, out, whole, name, chances)
                outcomes[became] = outcomes.get(became, 0) + 1
                bad += bool(wrong)
                if wrong:
                    print(f"{damage.__name__} {name}: WRONG: {wrong}", flush=True)
        print(
            f"{damage.__name__:12} {sum(outcomes.values()):5} times; at load: {outcomes}",
            flush=True,
        )
    print(f"{bad} were not named by verify")
    return bad


def _one(
    damage: Damage, out: Path, whole: Path, name: str, chances: random.Random
) -> tuple[str, str]:
    """Damage a file, verify, load, and restore it; return the error and the load's outcome."""
    path, place = out / name, None
    if damage is flip:
        place = spoil(path, chances)
    else:
        damage(path, chances)
    try:
        wrong = complaint(name, place, whole, *verified(out))
    except Exception as error:
        wrong = f"{type(error).__name__}: {error}"
    became = loaded(out) if damage not in (flip, flip_end) else "not tried"
    for other in [name] if damage is not swap else files(whole):
        if not (out / other).exists() or (out / other).read_bytes() != (whole / other).read_bytes():
            shutil.copyfile(whole / other, out / other)
    return wrong, became
