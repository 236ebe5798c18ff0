"""Run cases by their numbers in a process of its own, so that a signal ends the case and not us."""

import argparse
import collections
import multiprocessing
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PATIENCE = 120  # seconds that one case may take


class Cases:
    """What is tried: made once per process with a folder to write to."""

    def __init__(self, folder: Path) -> None:
        """Prepare in `folder`."""

    def run(self, seed: int) -> str:
        """Run one case and return how it ended, in a word; raise if that is wrong."""
        raise TypeError("a subclass says what is tried")


def _work(pipe: Connection, make: Callable[[Path], Cases], seeds: range) -> None:
    with tempfile.TemporaryDirectory() as folder:
        cases = make(Path(folder))
        for seed in seeds:
            pipe.send((seed, None))
            try:
                result = cases.run(seed)
            except BaseException:  # whatever is not a sentence
                result = "WRONG\n" + traceback.format_exc()
            pipe.send((seed, result))


def run(
    make: Callable[[Path], Cases], seeds: range, minutes: float
) -> tuple[dict[str, int], list[str]]:
    """Run cases until all are done or the time is up: how many ended how, and what was wrong."""
    context, ended = multiprocessing.get_context("spawn"), collections.Counter[str]()
    wrong: list[str] = []
    until, position = time.monotonic() + 60 * minutes, 0
    while position < len(seeds) and time.monotonic() < until:
        pipe, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(theirs, make, seeds[position:]))
        process.start()
        theirs.close()
        seed = None
        try:
            while time.monotonic() < until:
                if not pipe.poll(PATIENCE):
                    wrong.append(f"case {seed}: no end within {PATIENCE} s")
                    break
                seed, result = pipe.recv()
                if result is None:
                    continue
                position += 1
                word, _, trace = result.partition("\n")
                ended[word] += 1
                if trace:
                    wrong.append(f"case {seed}: {trace}")
        except EOFError:
            process.join()
            if position < len(seeds):
                position += 1
                wrong.append(f"case {seed}: the process ended with {process.exitcode}")
        process.kill()
        process.join()
    return dict(ended), wrong


def main(about: str | None, make: Callable[[Path], Cases], argv: list[str] | None = None) -> Any:
    """Run a fuzzer as a command: exit code 1 if anything went wrong."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    args = parser.parse_args(argv)
    ended, wrong = run(make, range(args.seed, args.seed + args.cases), args.minutes)
    for line in wrong[:20]:
        print(line)
    total = sum(ended.values())
    print(f"{total} cases: {ended}; {len(wrong)} wrong")
    sys.exit(1 if wrong else 0)
