"""Watch commands in a terminal: the longest time in which each shows nothing.

    python tests/stress/silence.py FOLDER

FOLDER gets a made-up model of 1.8 GB, a conversion of the bundled model, and empty caches of
compiled kernels. Before each command the page cache drops the model's files and the packages. Exits
with 1 if a command is silent for more than LIMIT seconds.
"""

import argparse
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Iterable
from pathlib import Path

import mlx_lm

from flashmoe_mlx.bench.synthetic import Recipe, checkpoint
from flashmoe_mlx.loader import BUNDLED_MODEL

LIMIT = 2.0  # seconds
LONG = "The quick brown fox jumps over the lazy dog. " * 20  # 900 bytes, a token each
COMMANDS = (
    "convert --hf-path {bundled} --mlx-path {folder}/packed -q --q-bits 4",
    "convert verify {folder}/packed",
    "generate -m 8 {long}",
    "generate --model {model} -m 8 {long}",
    "generate --model {model} -m 8 {long}",  # the kernels are compiled now
    "generate --model {model} -m 8 {long} --expert-cache 256MiB --stats --plot {folder}/p.png",
    "generate --model {model} -m 8 {long} --expert-cache 256MiB --live --verify-reads",
    "chat {model} --max-tokens 8",
    "chat {model} --max-tokens 8 --expert-cache 256MiB",
    "plan",
    "plan --model 397b --machine m3-max-48",
    "doctor {model}",
    "bench io --model {model} --rounds 2 --threads 1 8",
)
PROMPT, TYPED = ">>> ", (LONG, "What is a library?", "/exit")  # of a chat
CONTROL = re.compile(r"\x1b[\[78][0-9;?]*[A-Za-z]?")


def forget(paths: Iterable[Path]) -> None:
    """Drop files from the page cache."""
    os.sync()
    for path in paths:
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def watch(command: list[str], environment: dict[str, str]) -> tuple[float, str, float, int]:
    """Return the longest silence, what was shown before it, the whole time and the exit code.

    Where the command shows PROMPT, the next line of TYPED is typed.
    """
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    start = last = time.monotonic()
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
    )
    os.close(theirs)
    longest, place, shown, more, typed = 0.0, "the start", "", True, iter(TYPED)
    while more:
        select.select([ours], [], [])
        try:
            data = os.read(ours, 65536)
        except OSError:  # Linux raises EIO when the command has ended
            data = b""
        now, more = time.monotonic(), bool(data)
        if now - last > longest:
            longest, place = now - last, last_line(shown) or "the start"
        last, shown = now, (shown + data.decode(errors="replace"))[-4000:]
        if CONTROL.sub("", shown).endswith(PROMPT):
            os.write(ours, f"{next(typed)}\n".encode())
    os.close(ours)
    return longest, place, last - start, process.wait()


def last_line(shown: str) -> str:
    """Return the last line on the terminal that is not empty, in short."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", CONTROL.sub("", shown))]
    return next((line for line in reversed(lines) if line), "")[:60]


def main() -> int:
    """Watch all commands, print a row for each, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.absolute()
    model = checkpoint(Recipe("35b", 4, 4096, 4), folder)
    places = {"model": model, "folder": folder, "bundled": BUNDLED_MODEL, "long": LONG}
    caches = {"NUMBA_CACHE_DIR": str(folder / "numba"), "XDG_CACHE_HOME": str(folder / "cache")}
    environment = os.environ | caches | {"TERM": "xterm", "HF_HUB_OFFLINE": "1"}
    packages = Path(mlx_lm.__file__).parents[1]
    worst = 0.0
    print(f"{'silent s':>8} {'whole s':>8}  command; what it showed before")
    for line in COMMANDS:
        forget([*model.rglob("*"), *packages.rglob("*.so"), *packages.rglob("*.py*")])
        words = [word.format(**places) for word in line.split()]
        silent, place, whole, code = watch(
            [sys.executable, "-m", "flashmoe_mlx", *words], environment
        )
        print(
            f"{silent:8.2f} {whole:8.2f}  {line}; {place}{f'; exit code {code}' * bool(code)}",
            flush=True,
        )
        worst = max(worst, silent)
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
