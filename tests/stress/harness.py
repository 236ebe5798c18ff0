"""Run numbered cases in a separate process, so that a signal or a hang ends only one case."""

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
    """The cases of a fuzzer; created once per process, with a folder to write to."""

    patience = 120  # seconds, the most for one case

    def __init__(self, folder: Path) -> None:
        """Prepare the cases in `folder`."""

    def limit(self) -> None:
        """Limit the resources of this process, after `__init__`; tests do not call it."""

    def run(self, seed: int) -> str:
        """Run one case and return its outcome in a word; raise on a wrong outcome."""
        raise TypeError("a subclass implements run")


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
        except BaseException:  # report every kind
            result = "WRONG\n" + traceback.format_exc()
        faulthandler.cancel_dump_traceback_later()
        pipe.send((seed, result))


def run(
    make: Callable[[Path], Cases], seeds: range, minutes: float
) -> tuple[dict[str, int], list[str]]:
    """Run cases until the end or the time limit; count the outcomes, and list the errors."""
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
    """Run cases in one process, add their outcomes, and return the remaining cases."""
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
            raise SystemExit("preparing the cases failed") from None
        seeds = seeds[1:]
        wrong.append(f"case {seed}: the process ended with {process.exitcode}")
    if seeds:
        process.kill()
    process.join()
    return seeds


def main(about: str | None, make: Callable[[Path], Cases], argv: list[str] | None = None) -> None:
    """Run a fuzzer as a command, with bounds checks in kernels; exit with 1 after an error."""
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
