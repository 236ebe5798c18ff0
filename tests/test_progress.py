"""Bars: what a terminal shows while a command works, and that nothing else shows them."""

import io
import os
import pty
import re
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import mlx.core as mx
import numba
import pytest
from mlx_lm.generate import generate_step

from flashmoe_mlx import BUNDLED_MODEL, load, progress
from flashmoe_mlx.cli import prompt_bar
from flashmoe_mlx.cli.prompt_bar import PromptProgress
from flashmoe_mlx.custom_kernels import autotune
from flashmoe_mlx.custom_kernels.cpu import compile as cpu_compile
from flashmoe_mlx.custom_kernels.cpu.numba_cache import make_cache_safe
from flashmoe_mlx.progress import bar, first_use, first_use_seconds


class Terminal(io.StringIO):
    """Standard error as a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def shown(monkeypatch) -> Terminal:
    """Be a command of ours on a terminal, and return what it shows."""
    terminal = Terminal()
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=terminal))
    monkeypatch.setattr(progress, "running", lambda: "flashmoe-generate")
    monkeypatch.setattr(progress, "TICK", 0.01)
    monkeypatch.setattr(progress, "DELAY", 0)
    return terminal


def drawn(terminal: Terminal) -> list[str]:
    return [text for text in re.split(r"[\r\n]+", terminal.getvalue()) if text.strip()]


def more_drawn(terminal: Terminal) -> list[str]:
    """Wait until the terminal shows three lines more, and return them."""
    before, deadline = len(drawn(terminal)), time.monotonic() + 20
    while len(drawn(terminal)) < before + 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(drawn(terminal)) >= before + 3
    return drawn(terminal)[before:]


def test_a_bar_moves_while_nothing_is_added_and_is_gone_at_the_end(shown):
    with bar(1000, "B", "loading") as progress_bar:
        progress_bar.update(250)
        lines = more_drawn(shown)
    assert all(re.match(r"loading: +25%\|.* 250/1.00k ", line) for line in lines)
    assert re.search(r"\r +\r$", shown.getvalue())  # the line is cleared
    after = shown.getvalue()
    time.sleep(0.05)
    assert shown.getvalue() == after


def test_the_innermost_bar_is_shown(shown):
    with bar(None, what="outer"):
        with bar(None, what="inner"):
            inner = more_drawn(shown)
        outer = more_drawn(shown)
    assert all(re.fullmatch(r"inner \[00:0\d\]", text) for text in inner)
    assert all(re.fullmatch(r"outer \[00:0\d\]", text) for text in outer)


def test_steps_have_names_of_their_own(shown):
    with bar(2) as steps:
        steps.set_description("reading the disk")
        steps.update()
        lines = more_drawn(shown)
    assert all(re.fullmatch(r"reading the disk: 1/2 \[00:0\d\]", line) for line in lines[-2:])


def test_short_work_shows_nothing(shown, monkeypatch):
    monkeypatch.setattr(progress, "DELAY", 60)
    with bar(10, " tokens", "reading") as progress_bar:
        progress_bar.update(5)
        time.sleep(0.05)
    assert shown.getvalue() == ""


@pytest.mark.parametrize("running", [None, "flashmoe-generate"])
def test_other_programs_and_pipes_show_nothing(running, monkeypatch):
    stream = Terminal() if running is None else io.StringIO()
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream))
    monkeypatch.setattr(progress, "running", lambda: running)
    threads = threading.active_count()
    with bar(10, "B", "loading") as hidden:
        hidden.update(10)
        hidden.set_description("still loading")
        assert threading.active_count() == threads
    assert stream.getvalue() == ""


def test_an_error_clears_the_bar(shown):
    with pytest.raises(KeyboardInterrupt), bar(10, "B", "loading"):
        raise KeyboardInterrupt
    assert shown.getvalue().endswith("\r") and not progress._open


def test_a_log_names_the_work_of_a_first_use_once(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=log))
    monkeypatch.setattr(progress, "running", lambda: "flashmoe-doctor")
    monkeypatch.setattr(progress, "_logged", set())
    for what in ("compiling", "checking", "compiling"):
        with first_use(what):
            pass
    assert log.getvalue() == "".join(
        f"[flashmoe] {what}, first use only\n" for what in ("compiling", "checking")
    )


def test_time_of_first_use_is_counted_without_a_terminal():
    before = first_use_seconds()
    with first_use("compiling"):
        time.sleep(0.02)
    assert first_use_seconds() - before >= 0.02


def test_compiling_and_autotune_name_themselves(shown, monkeypatch, tmp_path):
    """Neither compiles here: the child processes and the check return at once."""
    monkeypatch.setattr(cpu_compile, "_marker", lambda formats: tmp_path / "marker")
    monkeypatch.setattr(cpu_compile, "_run", lambda commands: True)
    monkeypatch.setattr(cpu_compile, "compile_all", lambda formats: None)
    cpu_compile.prepare([(4, 64, "float32")])
    assert (tmp_path / "marker").exists()
    monkeypatch.setattr(autotune, "_recall", lambda case, timed: None)
    monkeypatch.setattr(autotune, "verdict", lambda *args, **options: autotune.Verdict(True))

    class Case:
        op = "router"

    autotune._decide(Case())
    said = [text.partition(" [")[0] for text in drawn(shown)]
    assert said == ["compiling kernels, first use only", "checking kernel router, first use only"]


def test_numba_shows_that_it_compiles(shown):
    """For example in a conversion; functions that it calls belong to it."""
    make_cache_safe()

    @numba.njit
    def inner(x):
        return x + 1

    @numba.njit
    def outer(x):
        return inner(x) * 2

    assert outer(1) == 4
    said = {text.partition(" [")[0] for text in drawn(shown)}
    assert said == {"compiling kernels, first use only"} and not progress._open
    before = shown.getvalue()
    assert outer(2) == 6 and shown.getvalue() == before


# flashmoe-generate, with bars that appear at once.
COMMAND = """
import sys
import flashmoe_mlx.progress as progress
progress.DELAY, progress.TICK = 0, 0.02
from flashmoe_mlx.cli.generate import main
sys.exit(main())
"""
PHASES = ("starting", "loading", "loading experts", "loading the trunk", "reading the prompt")


@contextmanager
def terminal():
    ours, theirs = pty.openpty()
    try:
        yield ours, theirs
    finally:
        os.close(ours)


def run_in_terminal(command: list[str], errors_only: bool = False) -> tuple[str, str]:
    """Return what a terminal shows, and standard output if only errors go to the terminal."""
    environment = os.environ | {"COLUMNS": "80", "TERM": "xterm"}
    with terminal() as (ours, theirs):
        process = subprocess.Popen(
            command, stderr=theirs, env=environment, text=True,
            stdout=subprocess.PIPE if errors_only else theirs, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs)
        data = b""
        try:
            while part := os.read(ours, 65536):
                data += part
        except OSError:  # Linux raises EIO when the command has ended
            pass
        output = process.stdout.read() if process.stdout else ""
        assert process.wait(60) == 0, data
    return data.decode(), output


@pytest.fixture
def command(tmp_path) -> list[str]:
    path = tmp_path / "flashmoe-generate"
    path.write_text(COMMAND)
    return [sys.executable, str(path), "What is a library?", "-m", "6"]


def test_each_phase_of_a_run_shows_itself(command):
    """And the text stands alone: each bar is cleared before it."""
    shown, _ = run_in_terminal(command)
    lines = shown.replace("\r\n", "\n").split("\n")
    bars = lines[0].split("\r")
    names = [re.split(r" \[|:", text)[0] for text in bars if text.strip()]
    assert [name for name in dict.fromkeys(names) if name in PHASES] == list(PHASES)
    assert names[-1] == bars[-1] == "A library is a collection of"  # the answer
    assert re.fullmatch(r" +", bars[-2])
    assert "Tokens: " in lines[2]


def test_bars_go_to_standard_error(command):
    shown, output = run_in_terminal(command, errors_only=True)
    assert "reading the prompt" in shown and "library" not in shown
    assert output.startswith("A library is a collection of\n\nTokens: ")


# Loads the bundled model, then says which kernels a prompt and an answer still compile or load.
LATE = """
import numba.core.caching as caching
from flashmoe_mlx import BUNDLED_MODEL, generate, load
model, tokenizer = load(BUNDLED_MODEL, expert_cache="1500KiB")
for name in ("load_overload", "save_overload"):
    def watched(cache, *args, real=getattr(caching.Cache, name)):
        print(cache._py_func.__qualname__)
        return real(cache, *args)
    setattr(caching.Cache, name, watched)
print("text:", len(generate(model, tokenizer, "What is a library? " * 4, max_tokens=5)) > 0)
"""


def test_loading_compiles_every_kernel():
    """What a prompt compiled would count as the model's time."""
    assert subprocess.check_output([sys.executable, "-c", LATE], text=True) == "text: True\n"


def test_a_prompt_is_shown_by_layers_within_a_chunk():
    added: list[int] = []
    prompt = PromptProgress(added.append, 8, 4)
    prompt.chunk_done(0, 12)
    for layer in (0, 1, 1, 2, 3):
        prompt.asked(layer, [0])
    prompt.chunk_done(8, 12)
    prompt.asked(2, [0])
    prompt.chunk_done(11, 12)
    prompt.asked(1, [0])  # the last token's layers show nothing
    prompt.chunk_done(12, 12)
    assert added == [2, 2, 2, 2, 2, 1, 1]


def test_the_model_reports_its_layers(monkeypatch):
    added: list[int] = []

    @contextmanager
    def recorded(total, unit, what):
        yield SimpleNamespace(update=added.append)

    monkeypatch.setattr(prompt_bar, "bar", recorded)
    with load(BUNDLED_MODEL, expert_cache="1500KiB")[0] as model:
        tokens = mx.arange(3, 44)
        with prompt_bar.reading_prompt(model, tokens.size, 20) as done:
            steps = generate_step(
                tokens, model, prefill_step_size=20, max_tokens=1, prompt_progress_callback=done
            )
            next(steps)
        assert sum(added) == tokens.size
        assert added[:4] == [5] * 4  # 20 tokens, four layers
        assert model._store.observer is None
