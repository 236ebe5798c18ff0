"""`flashmoe-generate`'s flags equal mlx-lm's; where the prompt comes from; --help and --version."""

import argparse
import io
import subprocess
import sys

import pytest
from mlx_lm.generate import setup_arg_parser

from flashmoe_mlx import FlashMoEError
from flashmoe_mlx.cli.generate import build_parser, find_prompt
from flashmoe_mlx.commands import COMMANDS, VERSION

# Without a prompt mlx-lm answers "hello"; we read standard input.
OUR_DEFAULTS = {"prompt": None}


def facts(action: argparse.Action) -> dict[str, object]:
    """Return what a program may rely on; without a type, argparse takes text."""
    names = ("option_strings", "dest", "nargs", "const", "default", "choices", "required")
    kind = getattr(action.type, "__name__", "str")
    return {n: getattr(action, n) for n in names} | {"kind": type(action), "type": kind}


STOCK = {action.dest: action for action in setup_arg_parser()._actions if action.dest != "help"}


@pytest.mark.parametrize("name", STOCK)
def test_each_flag_of_mlx_lm_is_the_same(name):
    ours = {action.dest: action for action in build_parser()._actions}[name]
    expected = facts(STOCK[name])
    expected["default"] = OUR_DEFAULTS.get(name, expected["default"])
    if name == "verbose":  # a function of ours
        expected["type"] = "_true"
        for text in ("True", "T", "t", "False", "false", "F", "f", "0", "no", ""):
            assert ours.type(text) == STOCK[name].type(text)
    assert facts(ours) == expected


class Input(io.StringIO):
    """Standard input: a pipe with a text, or a terminal."""

    def __init__(self, text: str | None) -> None:
        super().__init__(text or "")
        self._terminal = text is None

    def isatty(self) -> bool:
        return self._terminal

    def read(self, *args: int) -> str:
        assert not self._terminal, "waits for the user"
        return super().read(*args)


@pytest.mark.parametrize(
    ("text", "option", "piped", "found"),
    [
        ("a\\nb", None, None, "a\nb"),
        (None, "a\\tb", None, "a\tb"),
        ("a", None, "b", "a"),
        (None, "", "b", ""),
        (None, None, "a\\nb\n", "a\\nb\n"),
        (None, "-", "", ""),
        ("-", None, "a", "a"),
    ],
)
def test_where_the_prompt_comes_from(text, option, piped, found, monkeypatch):
    monkeypatch.setattr("sys.stdin", Input(piped))
    assert find_prompt(text, option) == found


@pytest.mark.parametrize(
    ("text", "option", "stdin", "message"),
    [
        ("a", "b", Input("c"), r"PROMPT 'a' and --prompt 'b' are both given\. Give one\."),
        (None, None, Input(None), r"there is no prompt\. Give one: .*--prompt; or chat: flashmoe-"),
        (None, None, None, r"there is no prompt\. Give one: "),
        (None, None, Input(" \n"), r"there is no prompt, and standard input is empty\. Give one: "),
        (
            None, "-", io.TextIOWrapper(io.BytesIO(b"\xff"), "utf-8"),
            r"standard input is not text \(.* 0xff .*\)\. Give UTF-8\.",
        ),
    ],
)  # fmt: skip
def test_no_prompt(text, option, stdin, message, monkeypatch):
    monkeypatch.setattr("sys.stdin", stdin)
    with pytest.raises(FlashMoEError, match=message):
        find_prompt(text, option)


# Prints the packages that a command imported, at its end.
IMPORTED = """
import atexit, importlib, sys
heavy = {"mlx", "mlx_lm", "transformers", "numpy", "huggingface_hub", "tqdm", "packaging"}
atexit.register(lambda: print(sorted(heavy & sys.modules.keys())))
module, sys.argv = sys.argv[1], sys.argv[2:]
if module:
    importlib.import_module(module).main()
else:
    import flashmoe_mlx
    flashmoe_mlx.FlashMoEError, dir(flashmoe_mlx)
"""


@pytest.mark.parametrize(
    ("module", "argv"),
    [
        ("flashmoe_mlx.cli.generate", ["flashmoe-generate", "--help"]),
        ("flashmoe_mlx.cli.generate", ["flashmoe-generate", "--version"]),
        ("flashmoe_mlx.__main__", ["python", "generate", "--help"]),
        ("", ["python"]),
    ],
)
def test_help_and_the_package_itself_import_nothing_slow(module, argv):
    said = subprocess.check_output([sys.executable, "-c", IMPORTED, module, *argv], text=True)
    assert said.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", COMMANDS)
def test_version(name):
    command = [sys.executable, "-m", COMMANDS[name][0], "--version"]
    assert subprocess.check_output(command, text=True) == f"{name} {VERSION}\n"


def package(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "flashmoe_mlx", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_package_lists_the_commands():
    lines = package().stdout.splitlines()
    for name, (_, purpose) in COMMANDS.items():
        assert f"  {name:17}  {purpose}" in lines
    assert all(len(line) <= 80 for line in lines)
    assert package("--version").stdout == f"python -m flashmoe_mlx {VERSION}\n"


def test_the_package_runs_a_command():
    done = package("plan", "--check")
    assert done.returncode == 0 and "Flash-MoE" in done.stdout
    done = package("generate", "--temp", "-1")
    assert done.returncode == 2 and "flashmoe-generate: error: --temp -1.0 is" in done.stderr
    done = package("dream")
    assert done.returncode == 2 and "invalid choice: 'dream' (choose from" in done.stderr


def test_no_command_gives_the_package_a_name():
    """`python -m flashmoe_mlx plan` is known as flashmoe-plan from its first import on."""
    code = (
        "import sys; sys.argv = ['-m']; sys.orig_argv = ['python', '-m', 'flashmoe_mlx', 'plan']\n"
        "import flashmoe_mlx.commands as c; print(c.running())"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "flashmoe-plan\n"
