"""What the benchmarks show besides their tables: JSON on request, and rows beside a bar."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import FlashMoEError


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


def show(text: str) -> None:
    """Print a row at once, without breaking a bar on the same terminal."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()
