"""`flashmoe-chat` in a pseudo-terminal, its history and its options."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import chat_session as recorder
import pytest
from chat_session import PAGE, PROMPT, Terminal, plain

from flashmoe_mlx.cli import console
from flashmoe_mlx.cli.chat import build_parser
from flashmoe_mlx.cli.console import HISTORY, Console
from flashmoe_mlx.custom_kernels.kept import NOWHERE, cache_dir

COMMAND = [sys.executable, "-m", "flashmoe_mlx.cli.chat"]
TOOLS = recorder.ROOT / recorder.TOOLS


@pytest.fixture
def home(tmp_path) -> str:
    """A cache folder with the compiled kernels, and without the user's history."""
    (tmp_path / "flashmoe-mlx").mkdir()
    for path in cache_dir().glob("*"):
        if path.name != HISTORY:
            (tmp_path / "flashmoe-mlx" / path.name).symlink_to(path)
    return str(tmp_path)


@pytest.fixture
def terminal(home):
    """Start the command in a pseudo-terminal."""
    started = []

    def start(*arguments: str) -> Terminal:
        started.append(Terminal([*COMMAND, *arguments], XDG_CACHE_HOME=home))
        return started[-1]

    yield start
    for each in started:
        each.kill()


def test_the_page_shows_a_session(home):
    """Besides the model's own words: a call made, one declined, /reset, /exit."""
    page = PAGE.read_text(encoding="utf-8")
    block = re.search(r"```console\n\$ (.*?)\n(.*?)```\n", page, re.S)
    assert block and block[1].split() == recorder.COMMAND
    shown = recorder.record(recorder.COMMAND[1:], XDG_CACHE_HOME=home)

    def fixed(text: str) -> list[str]:
        return [x for x in text.splitlines() if x.startswith((PROMPT, "call ", "{", "/help"))]

    assert fixed(block[2]) == fixed(shown)
    assert len(fixed(shown)) == len(recorder.TYPED) + 2
    example = re.search(r"```python\n(.*?)```\n", page, re.S)
    assert example and example[1] in TOOLS.read_text(encoding="utf-8")
    kept = Path(home, "flashmoe-mlx", HISTORY).read_text(encoding="utf-8").splitlines()
    assert kept == [keys for before, keys in recorder.TYPED if before == PROMPT]


def test_a_terminal(terminal):
    """Ctrl-C during an answer, another turn, paste, a narrow window, bad bytes, Ctrl-D."""
    # At this temperature answers go on and on.
    chat = terminal("--temp", "9", "--max-tokens", "-1", "--seed", "1")
    chat.wait_for(PROMPT)
    chat.type("What is a library?\n")
    chat.wait_for(" tokens in ")  # the status line of an answer
    chat.resize(40)
    chat.wait_for(" tokens in ")
    chat.type("\x03")
    chat.wait_for("(broken off)")
    chat.wait_for(PROMPT)
    chat.type("\x1b[200~two\nlines\x1b[201~\n")
    chat.wait_for(" tokens in ")
    chat.type("\x03")
    chat.wait_for("(broken off)")
    chat.wait_for(PROMPT)
    chat.type("/stats\n")
    assert re.search(r"Conversation: 4 messages, \d\d+ tokens", plain(chat.wait_for(PROMPT)))
    chat.type("/what\n")
    assert "/what is not a command." in plain(chat.wait_for(PROMPT))
    chat.type(b"\xff\xfe\n")
    chat.wait_for("is not UTF-8")
    chat.wait_for(PROMPT)
    chat.type(b"\x1b[200~" + b"pasted\r" * 300 + b"\x1b[201~\x03")  # the paste stays whole
    chat.type("\n")
    chat.wait_for("Press Ctrl-C again to leave.")
    chat.wait_for(PROMPT)
    chat.type("/reset\n")
    chat.wait_for("forgotten")
    chat.wait_for(PROMPT)
    chat.type("half a li")
    chat.wait_for("half a li")
    chat.type("\x03")
    chat.type("\n")  # readline notices Ctrl-C at the next key if it was busy with the last one
    chat.wait_for("Press Ctrl-C again to leave.")
    chat.wait_for(PROMPT)
    chat.type("\x04")
    assert chat.end() == 0
    assert "Traceback" not in chat.shown.decode(errors="replace")


def broken(folder: Path) -> None:
    folder.write_text("a file in the place of the folder")


def pipe(folder: Path) -> None:
    folder.mkdir()
    os.mkfifo(folder / HISTORY)


def garbage(folder: Path) -> None:
    folder.mkdir()
    (folder / HISTORY).write_bytes(b"\xff\x00\n" * 9)


def nowhere(folder: Path) -> None:
    folder.symlink_to(NOWHERE)


@pytest.mark.parametrize("make_folder", [broken, pipe, garbage, nowhere])
def test_a_broken_history_is_done_without(make_folder, tmp_path, monkeypatch):
    make_folder(tmp_path / "cache")
    monkeypatch.setattr(console, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    talking = Console()
    talking.terminal = True
    with talking.history():
        done = True
    assert done


def test_help_is_fast_because_it_imports_little():
    code = (
        "import sys\nfrom flashmoe_mlx.cli.chat import build_parser\nbuild_parser()\n"
        "print([m for m in ('mlx_lm', 'transformers', 'numba') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


def test_options_are_checked(capsys):
    for wrong in (["--temp", "-1"], ["--max-tokens", "0"], ["--top-p", "2"], ["--seed", "x"]):
        with pytest.raises(SystemExit):
            build_parser().parse_args(wrong)
        assert wrong[0] in capsys.readouterr().err
