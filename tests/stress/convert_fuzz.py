"""Change checkpoints at random, and check that flashmoe-convert rejects or converts them.

    python tests/stress/convert_fuzz.py --cases 20000 --minutes 10

A case is a changed checkpoint, and one to three commands on it. Each command must return 0, 1 or 2,
and raise only the project's own error. A case must end within a minute, use at most EXTRA_MEMORY
more than the process had at its start, and open for writing, create or rename files only in its
output.
"""

import contextlib
import io
import os
import random
import resource
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
from convert_mutations import MUTATIONS

from flashmoe_mlx.convert.cli import main
from flashmoe_mlx.convert.plan.parts import Options
from flashmoe_mlx.convert.plan.plan import build_plan
from flashmoe_mlx.convert.source.open import open_source
from flashmoe_mlx.convert.write.journal import header
from flashmoe_mlx.convert.write.output import small_files
from flashmoe_mlx.convert.write.steps import plan_steps
from flashmoe_mlx.errors import FlashMoEError

PLANNED = 0.8  # share of the cases that are only planned, which takes a tenth of the time
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
    """While armed, prevents this process from changing files outside one directory."""

    def __init__(self) -> None:
        """Add the audit hook, which Python cannot remove."""
        self.root: Path | None = None
        sys.addaudithook(self._hook)

    @contextlib.contextmanager
    def armed(self, root: Path) -> Iterator[None]:
        """Raise AssertionError if a file outside `root` changes."""
        self.root = root.parent.resolve() / root.name
        try:
            yield
        finally:
            self.root = None

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


def command(guard: Guard, root: Path, arguments: list[str]) -> int:
    """Run flashmoe-convert, with output as to a terminal, and return its exit code."""
    said = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    errors = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors), guard.armed(root):
        code = main(arguments)
    errors.flush()
    text = errors.buffer.getvalue()
    assert code in (0, 1, 2), f"exit code {code}"
    assert (code == 2) == (b"flashmoe-convert: error: " in text), text
    assert len(text) < 4000, f"an error of {len(text)} bytes"
    return code


def plan(guard: Guard, source: Path, work: Path, chances: random.Random) -> str:
    """Read and plan, without output; return the outcome in a word."""
    options = Options(
        quantize=chances.random() < 0.7, bits=chances.choice((None, None, 2, 3)),
        group_size=chances.choice((None, None, 32)),
    )  # fmt: skip
    try:
        with guard.armed(work / "out"):
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


class Cases(harness.Cases):
    """Checkpoints of three kinds, with changes, and commands on them."""

    patience = 60

    def __init__(self, folder: Path) -> None:
        self.guard, self.sources, self.work = Guard(), folder / "sources", folder / "cases"
        harness.write_models(self.sources)

    def limit(self) -> None:
        """Limit memory to EXTRA_MEMORY more than the process has after one case."""
        self.run(-1)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + EXTRA_MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

    def run(self, seed: int) -> str:
        """Run one case and return its outcome in a word."""
        return outcome(self.guard, self.sources, self.work, random.Random(seed))


def outcome(guard: Guard, sources: Path, work: Path, chances: random.Random) -> str:
    """Change a checkpoint, run commands on it, and return the outcome in a word."""
    kind = chances.choice(("hf", "hf", "stock", "stock", "packed"))
    source, out = work / kind, work / "out"
    for folder in (source, out):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sources / kind, source)
    changes = chances.choices(MUTATIONS, k=chances.choice((1, 1, 1, 2)))
    for change in changes:
        with contextlib.suppress(Exception):
            change(source, chances)  # the first change may have removed what the second needs
    if chances.random() < PLANNED:
        return plan(guard, source, work, chances)
    options = list(chances.choice(OPTIONS))
    convert = ["--hf-path", str(source), "--mlx-path", str(out), *options]
    code = command(guard, out, [*convert, "--dry-run"])
    assert not out.exists(), "a dry run wrote"
    if kind == "packed":
        command(guard, out, ["verify", str(source)])
    if code:
        assert command(guard, out, convert) == 2, "refused, but not by the conversion"
        return "refused"
    if command(guard, out, convert):
        return "refused while it was written"
    if "--link" not in options:
        assert command(guard, out, ["verify", str(out)]) == 0, "the result does not verify"
    return "converted"


if __name__ == "__main__":
    harness.main(__doc__, Cases)
