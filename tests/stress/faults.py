"""Inject faults at random moments: requests fail with the right error, and never give wrong tokens.

    python tests/stress/faults.py [--times 100] [--seed 0] [--only "EIO" ...]

A model with a small expert cache repeatedly answers a prompt, each time with a fault at a random
read. The tool compares the tokens before the fault, and those of a run after it, with a run without
faults. Exits with 1 if a row of the table fails.
"""

import argparse
import contextlib
import gc
import io
import os
import random
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fault_kinds import Fault, Files, ignored
from fault_table import FAULTS
from mlx_lm import stream_generate

from flashmoe_mlx import load
from flashmoe_mlx.convert import convert
from flashmoe_mlx.loader import BUNDLED_MODEL

PROMPT = "What is a library?"
SLOTS = 9  # per layer, of 100 experts


@dataclass
class Scene:
    """A streamed model, and its answer and number of reads without faults."""

    directory: Path
    model: Any
    files: Files
    prompt: list[int]
    tokens: int
    tokenizer: Any
    clean: list[int] = field(default_factory=list)
    reads: int = 0

    def answer(self, model: Any, found: list[int]) -> None:
        """Append the tokens of an answer to `found`."""
        for response in stream_generate(model, self.tokenizer, self.prompt, max_tokens=self.tokens):
            found.append(response.token)


@contextlib.contextmanager
def scene(tokens: int = 12) -> Iterator[Scene]:
    """Convert the bundled model into a temporary directory, and load it with a small cache."""
    with tempfile.TemporaryDirectory() as work:
        directory = Path(work) / "model"
        with contextlib.redirect_stdout(io.StringIO()):
            convert(BUNDLED_MODEL, directory)
        # Without prefetch: the store retries failed prefetches, so that faults would stay hidden.
        model, tokenizer = load(directory, expert_cache=SLOTS * 4 * 40_000, lookahead="off")
        layers = model._store.layout.layers
        paths = sorted({field.file for layer in layers for field in layer.fields})
        files = Files.of(paths, Path(work) / "kept")
        text = [{"role": "user", "content": PROMPT}]
        prompt = tokenizer.apply_chat_template(text, add_generation_prompt=True)
        made = Scene(directory, model, files, prompt, tokens, tokenizer)
        try:
            made.answer(model, [])  # compiles kernels and fills banks
            before = model.expert_stats().reads
            made.answer(model, made.clean)
            made.reads = model.expert_stats().reads - before
            yield made
        finally:
            model.close()


@dataclass
class Row:
    """The results of one fault.

    Attributes:
        fault: the fault.
        injected: number of faults that occurred.
        named: of these, the number that ended as expected: with the right error, or without one.
        wrong: number of runs with a token that differs from the run without faults.
        usable: number of correct runs afterwards.
        lost: number of additional signals whose exception Python or C code ignored: in a
            finalizer, or where MLX's bindings try to convert an array.
        held: descriptors, Python threads and system threads, before and after.
        messages: the errors, with N for each number.
    """

    fault: Fault
    injected: int = 0
    named: int = 0
    wrong: int = 0
    usable: int = 0
    lost: int = 0
    held: tuple[tuple[int, int, int], tuple[int, int, int]] = ((0, 0, 0), (0, 0, 0))
    messages: set[str] = field(default_factory=set)

    @property
    def ok(self) -> bool:
        """Return whether all results are as expected."""
        all_ok = self.injected == self.named == self.usable and not self.wrong
        few_lost = self.lost <= self.injected / 20 + 1
        return self.injected > 0 and all_ok and few_lost and self.held[0] == self.held[1]


def held() -> tuple[int, int, int]:
    """Count the descriptors, Python threads and system threads of this process."""
    gc.collect()
    tasks = "/proc/self/task"
    own = len(os.listdir(tasks)) if os.path.isdir(tasks) else 0
    return len(os.listdir("/dev/fd")), threading.active_count(), own


def table_row(stage: Scene, fault: Fault, times: int, rng: random.Random) -> Row:
    """Inject a fault `times` times."""
    row, before = Row(fault), held()
    reads = (
        100 * len(stage.model.layers) if fault.loads else stage.reads
    )  # a load reads all experts
    for _ in range(20 * times):  # a fault whose moment never came does not count
        if row.injected == times:
            break
        strike(stage, fault, rng.randrange(reads), rng, row)
    row.held = before, held()
    return row


def strike(stage: Scene, fault: Fault, moment: int, rng: random.Random, row: Row) -> None:
    """Inject a fault into one request, and make another request afterwards."""
    tokens: list[int] = []
    error: BaseException | None = None
    try:
        with ignored() as lost, fault.plant(stage.files, moment, rng) as planted:
            if fault.loads:
                load(stage.directory, expert_cache="1GiB")[0].close()
            else:
                stage.answer(stage.model, tokens)
    except BaseException as reason:
        error = reason.with_traceback(None)
    stage.files.restore()
    if not planted.struck:
        return
    by_signal = fault.kind in ("KeyboardInterrupt", "SystemExit")
    if error is None and by_signal and (fault.loads or tokens == stage.clean):
        row.lost += 1
        row.messages.update(lost or ["ignored in C code"])
        return
    row.injected += 1
    row.named += as_expected(fault, error)
    row.wrong += tokens != (stage.clean[: len(tokens)] if error or fault.loads else stage.clean)
    row.messages.add(re.sub(r"\d+", "N", f"{type(error).__name__}: {error}"))
    error = None
    row.usable += works(stage, fault)


def as_expected(fault: Fault, error: BaseException | None) -> bool:
    """Return whether a request ended as expected."""
    if fault.error is None or error is None:
        return fault.error is None and error is None
    return type(error).__name__ == fault.kind and bool(re.search(fault.error, str(error)))


def works(stage: Scene, fault: Fault) -> bool:
    """Return whether a request gives the right tokens now, with a new model if the load failed."""
    tokens: list[int] = []
    model = load(stage.directory, expert_cache="1GiB")[0] if fault.loads else stage.model
    try:
        stage.answer(model, tokens)
    finally:
        if fault.loads:
            model.close()
    return tokens == stage.clean


HEADER = (
    f"{'fault':30} {'injected':>8} {'as named':>8} {'wrong':>6} {'usable':>7}  "
    "descriptors, threads (Python's, the system's)"
)


def line(row: Row) -> str:
    """Format a row."""
    before, after = (f"{fds}, {threads}, {tasks}" for fds, threads, tasks in row.held)
    kept = before if before == after else f"{before} -> {after}"
    lost = f"  ({row.lost} more were ignored by Python or MLX)" if row.lost else ""
    return (
        f"{row.fault.name:30} {row.injected:8} {row.named:8} {row.wrong:6} {row.usable:7}  {kept}"
        f"{lost}{'' if row.ok else '  WRONG'}"
    )


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=100, help="times per fault (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default: 0)")
    parser.add_argument("--only", nargs="+", metavar="FAULT", help="run only these rows")
    parser.add_argument("--messages", action="store_true", help="also print the errors")
    args = parser.parse_args()
    chosen = [fault for fault in FAULTS if not args.only or fault.name in args.only]
    rows = []
    with scene() as stage:
        print(f"{args.times} of each, seed {args.seed}; {stage.model.expert_cache()}\n{HEADER}")
        for fault in chosen:
            row = table_row(stage, fault, args.times, random.Random(f"{args.seed} {fault.name}"))
            print(line(row), flush=True)
            for message in sorted(row.messages) if args.messages else ():
                print(f"    {message}", flush=True)
            rows.append(row)
    sys.exit(not rows or not all(row.ok for row in rows))


if __name__ == "__main__":
    main()
