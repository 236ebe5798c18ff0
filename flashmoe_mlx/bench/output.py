"""What the benchmarks show besides their tables: JSON on request, and progress on a terminal."""

import argparse
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import FlashMoEError

TICK = 1.0  # seconds


def check_json(args: argparse.Namespace) -> None:
    """Refuse a JSON file that cannot be written, before anything is measured.

    Raises:
        FlashMoEError: its directory does not exist, or it is a directory.
    """
    if args.json in (None, "-"):
        return
    path = Path(args.json)
    if not path.absolute().parent.is_dir() or path.is_dir():
        raise FlashMoEError(f"--json {path}: not a file in an existing directory. Give another.")


def write_json(args: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Write the figures as one line, to the file or to stdout, if --json is given.

    Raises:
        FlashMoEError: the file cannot be written.
    """
    if args.json is None:
        return
    line = json.dumps(figures)
    if args.json == "-":
        print(line)
        return
    try:
        Path(args.json).write_text(line + "\n")
    except OSError as error:
        raise FlashMoEError(
            f"--json {args.json}: cannot be written ({error.strerror}). Give another file."
        ) from error


@contextmanager
def bar(total: int, unit: str) -> Iterator[Any]:
    """Show a progress bar on stderr while the block runs, if that is a terminal.

    Its clock ticks each second, so that a long part does not look like a hang.
    """
    with tqdm(total=total, unit=unit, file=sys.stderr, disable=None, leave=False) as shown:
        ended = threading.Event()

        def tick() -> None:
            while not ended.wait(TICK):
                shown.refresh()

        if not shown.disable:
            threading.Thread(target=tick, daemon=True).start()
        try:
            yield shown
        finally:
            ended.set()


def show(text: str) -> None:
    """Print a row at once, without breaking a bar on the same terminal."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()
