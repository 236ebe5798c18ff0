"""Run numbered cases in a process of their own, so that a signal or a hang ends only the case."""

import argparse
import collections
import contextlib
import faulthandler
import io
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


class Cases:
    """What is tried: made once per process, with a folder to write to."""

    patience = 120  # seconds that one case may take

    def __init__(self, folder: Path) -> None:
        """Prepare in `folder`."""

    def limit(self) -> None:
        """Limit what this process may use, after `__init__`; tests leave this out."""

    def run(self, seed: int) -> str:
        """Run one case and return how it ended, in a word; raise if that is wrong."""
        raise TypeError("a subclass says what is tried")


def write_models(folder: Path) -> None:
    """Write a tiny model as on the Hub (`hf`), by stock mlx-lm (`stock`), and ours (`packed`)."""
    from convert_helpers import write_checkpoints

    from flashmoe_mlx.convert import convert

    with contextlib.redirect_stdout(io.StringIO()):
        write_checkpoints(folder)
        convert(folder / "stock", folder / "packed")


def _work(pipe: Connection, make: Callable[[Path], Cases], folder: Path, seeds: range) -> None:
    cases = make(folder)
    cases.limit()
    for seed in seeds:
        pipe.send((seed, None))
        faulthandler.dump_traceback_later(cases.patience, exit=True)
        try:
            result = cases.run(seed)
        except BaseException:  # whatever is not a sentence
            result = "WRONG\n" + traceback.format_exc()
        faulthandler.cancel_dump_traceback_later()
        pipe.send((seed, result))


def run(
    make: Callable[[Path], Cases], seeds: range, minutes: float
) -> tuple[dict[str, int], list[str]]:
    """Run cases until all are done or the time is up: how many ended how, and what was wrong."""
    ended, wrong = collections.Counter[str](), list[str]()
    until = time.monotonic() + 60 * minutes
    while seeds and time.monotonic() < until:
        with tempfile.TemporaryDirectory() as folder:
            seeds = _run_until_death(make, Path(folder), seeds, until, ended, wrong)
    return dict(ended), wrong


def _run_until_death(
    make: Callable[[Path], Cases], folder: Path, seeds: range, until: float,
    ended: collections.Counter[str], wrong: list[str],
) -> range:  # fmt: skip
    """Run cases in one process, add what came of them, and return those that are left."""
    context, seed = multiprocessing.get_context("spawn"), None
    pipe, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(theirs, make, folder, seeds))
    process.start()
    theirs.close()
    try:
        while seeds and time.monotonic() < until:
            seed, result = pipe.recv()
            if result is not None:
                seeds = seeds[1:]
                word, _, trace = result.partition("\n")
                ended[word] += 1
                if trace:
                    wrong.append(f"case {seed}: {trace}")
    except EOFError:
        process.join()
        if seed is None:
            raise SystemExit("the cases could not be prepared") from None
        seeds = seeds[1:]
        wrong.append(f"case {seed}: the process ended with {process.exitcode}")
    if seeds:
        process.kill()
    process.join()
    return seeds


def main(about: str | None, make: Callable[[Path], Cases], argv: list[str] | None = None) -> None:
    """Run a fuzzer as a command, kernels checking their bounds; exit code 1 if a case is wrong."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    args = parser.parse_args(argv)
    os.environ |= {"FLASHMOE_DEBUG_BOUNDS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    ended, wrong = run(make, range(args.seed, args.seed + args.cases), args.minutes)
    for line in wrong[:20]:
        print(line)
    print(f"{sum(ended.values())} cases: {ended}; {len(wrong)} wrong")
    sys.exit(1 if wrong else 0)
