"""Change checkpoints at random, and see that flashmoe-convert refuses or converts them, no more.

For `tools/convert_trials.py fuzz`. A case is a checkpoint with something changed, and one to three
commands on it. Each command must return 0, 1 or 2: nothing but the project's own error comes out.
It must end within LIMIT_S, in EXTRA_MEMORY more than the process has when it starts, and open no
file for writing, nor make or rename one, outside its output.
"""

import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convert_mutations import MUTATIONS

from flashmoe_mlx.convert.cli import main
from flashmoe_mlx.convert.plan.parts import Options
from flashmoe_mlx.convert.plan.plan import build_plan
from flashmoe_mlx.convert.source.checkpoint import open_source
from flashmoe_mlx.convert.write.journal import header
from flashmoe_mlx.convert.write.output import small_files
from flashmoe_mlx.convert.write.steps import plan_steps
from flashmoe_mlx.errors import FlashMoEError

PLANNED = 0.8  # of the cases: planned only, as it takes a tenth of the time
LIMIT_S = 20
EXTRA_MEMORY = 1 << 30
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = (
    "os.rename", "os.mkdir", "os.remove", "os.symlink", "os.link", "os.truncate", "os.rmdir",
)  # fmt: skip
OPTIONS = (
    (), (), ("-q",), ("-q",), ("-q",), ("-q", "--q-bits", "2"), ("-q", "--q-group-size", "32"),
    ("-q", "--quant-predicate", "mixed_2_6"), ("-q", "--dtype", "float16"), ("--link",),
    ("-q", "--q-bits", "3", "--q-method", "min-max"),
)  # fmt: skip


class Guard:
    """Refuses to let this process change files outside one directory, while it is armed."""

    def __init__(self) -> None:
        """Watch from now on; there is no way back."""
        self.root: Path | None = None
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.root is None:
            return
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES:
            self._check(event, arguments[0])
        elif event in CHANGES and -1 in arguments[1:]:  # no dir_fd
            first, last = {"os.rename": (0, 2), "os.symlink": (1, 2), "os.link": (1, 2)}.get(
                event, (0, 1)
            )
            for path in arguments[first:last]:
                self._check(event, path)

    def _check(self, event: str, path: Any) -> None:
        if isinstance(path, int) or self.root is None:
            return
        where = Path(os.fsdecode(path)).absolute()
        where = where.parent.resolve() / where.name
        ours = where.is_relative_to(self.root) or "__pycache__" in str(where)  # numba's
        if not ours and str(where) != os.devnull:
            raise AssertionError(f"{event} of {where}, outside the output")


@contextlib.contextmanager
def limited(guard: Guard, root: Path) -> Iterator[None]:
    """Stop whatever takes too long, or writes elsewhere."""

    def late(*arguments: object) -> None:
        raise AssertionError(f"took more than {LIMIT_S} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT_S)
    guard.root = root.parent.resolve() / root.name
    try:
        yield
    finally:
        guard.root = None
        signal.alarm(0)


def command(guard: Guard, root: Path, arguments: list[str]) -> int:
    """Run flashmoe-convert, printing as to a terminal, and return its exit code."""
    said = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    errors = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors), limited(guard, root):
        code = main(arguments)
    errors.flush()
    text = errors.buffer.getvalue()
    assert code in (0, 1, 2), f"exit code {code}"
    assert (code == 2) == (b"flashmoe-convert: error: " in text), text
    assert len(text) < 4000, f"an error of {len(text)} bytes"
    return code


def plan(guard: Guard, source: Path, work: Path, chances: random.Random) -> str:
    """Read and plan, and print nothing; return what came of it."""
    options = Options(
        quantize=chances.random() < 0.7, bits=chances.choice((None, None, 2, 3)),
        group_size=chances.choice((None, None, 32)),
    )  # fmt: skip
    try:
        with limited(guard, work / "out"):
            found = open_source(source, "source")
            made = build_plan(found, options)
            steps = plan_steps(found, made, {}, frozenset())
            headers = [header(file) for file in (*made.trunk, *made.layers)]
            small_files(found, made)
    except FlashMoEError as error:
        assert len(str(error)) < 4000, f"an error of {len(str(error))} characters"
        return "refused"
    assert steps and all(h.file_bytes for h in headers)
    return "planned"


def case(guard: Guard, sources: Path, work: Path, chances: random.Random) -> tuple[str, str]:
    """Try one case; return what was changed, and what came of it."""
    kind = chances.choice(("hf", "hf", "stock", "stock", "packed"))
    source, out = work / kind, work / "out"
    for folder in (source, out):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sources / kind, source)
    changes = chances.choices(MUTATIONS, k=chances.choice((1, 1, 1, 2)))
    for change in changes:
        with contextlib.suppress(Exception):
            change(source, chances)  # the second change may find nothing that it knows
    what = f"{kind}: {', '.join(change.__name__ for change in changes)}"
    if chances.random() < PLANNED:
        return what, plan(guard, source, work, chances)
    options = list(chances.choice(OPTIONS))
    convert = ["--hf-path", str(source), "--mlx-path", str(out), *options]
    code = command(guard, out, [*convert, "--dry-run"])
    assert not out.exists(), "a dry run wrote"
    if kind == "packed":
        command(guard, out, ["verify", str(source)])
    if code:
        assert command(guard, out, convert) == 2, "refused, but not by the conversion"
        return what, "refused"
    if command(guard, out, convert):
        return what, "refused while it was written"
    if "--link" not in options:
        assert command(guard, out, ["verify", str(out)]) == 0, "the result does not verify"
    return what, "converted"


def child(sources: Path, work: Path, seed: int, first: int, seconds: float) -> None:
    """Try cases for some time, and print each case's number, and what was wrong with it."""
    guard = Guard()
    case(guard, sources, work, random.Random("warm up"))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + EXTRA_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    end, number = time.monotonic() + seconds, first
    while time.monotonic() < end:
        print(json.dumps({"begun": number}), flush=True)
        try:
            what, came = case(guard, sources, work, random.Random(f"{seed} {number}"))
            print(json.dumps({"what": what, "came": came}), flush=True)
        except BaseException as error:
            trace = traceback.extract_tb(error.__traceback__)[-5:]
            frames = [f"{frame.name}:{frame.lineno}" for frame in trace]
            text = f"{type(error).__name__}: {str(error)[:300]} at {' > '.join(frames)}"
            print(json.dumps({"wrong": text}), flush=True)
        number += 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(json.dumps({"peak": peak}), flush=True)


def fuzz(work: Path, minutes: float, seed: int) -> int:
    """Try cases for so long, in processes that may die; return how many cases went wrong."""
    from convert_helpers import write_checkpoints

    from flashmoe_mlx.convert import convert

    sources = work / "sources"
    sources.mkdir()
    with contextlib.redirect_stdout(io.StringIO()):
        write_checkpoints(sources)
        convert(sources / "stock", sources / "packed")
    end, number, bad = time.monotonic() + 60 * minutes, 0, 0
    came: Counter[str] = Counter()
    while (left := end - time.monotonic()) > 0:
        begun = None
        for found in _messages(sources, work, seed, number, left):
            if "begun" in found:
                begun, number = found["begun"], found["begun"] + 1
            elif "wrong" in found:
                print(f"case {begun}: {found['wrong']}", flush=True)
                bad, begun = bad + 1, None
            elif "came" in found:
                came[found["came"]] += 1
                begun = None
            else:
                print(f"peak resident memory of the process: {found['peak']} MiB")
        if begun is not None or not number:
            print(f"case {begun}: the process died", flush=True)
            bad += 1
        if not number:
            break
    print(f"seed {seed}: {number} cases {dict(came)}, {bad} wrong")
    return bad


def _messages(
    sources: Path, work: Path, seed: int, first: int, seconds: float
) -> Iterator[dict[str, Any]]:
    """Run a child and yield what it prints."""
    cases = Path(tempfile.mkdtemp(prefix="cases-", dir=work))
    arguments = [str(sources), str(cases), str(seed), str(first), str(seconds)]
    with subprocess.Popen(
        [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        for line in process.stdout:
            yield json.loads(line)
    shutil.rmtree(cases, ignore_errors=True)


if __name__ == "__main__":
    folders, numbers = map(Path, sys.argv[1:3]), map(int, sys.argv[3:5])
    child(*folders, *numbers, float(sys.argv[5]))
