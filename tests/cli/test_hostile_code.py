"""Directories that bring code along: none of it runs without the flag, and nobody is asked.

Each directory goes through all of our commands in a process whose standard input is full of "y".
Whatever runs leaves a file.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from convert_helpers import read

from flashmoe_mlx.convert import convert as repack
from flashmoe_mlx.convert.write.output import SHIM
from flashmoe_mlx.loader import BUNDLED_MODEL

ESCAPE = (
    "{{ cycler.__init__.__globals__.os.system('touch %s') }}"
    "{{ ''.__class__.__mro__[1].__subclasses__() }}"
)
# Runs commands, [name, arguments] each, one after the other; prints of each its name, exit code,
# what it said, which traps have sprung, and how much of standard input was read.
RUNNER = """
import contextlib, io, json, os, sys
from flashmoe_mlx import FlashMoEError, load
from flashmoe_mlx.bench import main as bench
from flashmoe_mlx.cli import doctor, generate, plan
from flashmoe_mlx.convert import cli

def load_it(argv):
    try:
        load(*argv)[0].close()
    except FlashMoEError as error:
        sys.exit(f"error: {error}")

mains = {"generate": generate.main, "doctor": doctor.main, "plan": plan.main,
         "bench": bench.main, "convert": cli.main, "load": load_it}
found = []
for name, argv in json.loads(sys.argv[1]):
    said, code = io.StringIO(), 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = mains[name](argv)
        except SystemExit as end:
            code = end.code
    read = os.lseek(0, 0, os.SEEK_CUR)
    found.append([name, code or 0, said.getvalue(), os.listdir(sys.argv[2]), read])
print(json.dumps(found))
"""


class Pickle:
    """What runs when it is loaded."""

    def __init__(self, command: str) -> None:
        self._command = command

    def __reduce__(self) -> Any:
        return os.system, (self._command,)


class Trap:
    """A folder with hostile directories, and what their code leaves behind."""

    def __init__(self, root: Path) -> None:
        self.root, self.sprung = root, root / "sprung"
        self.sprung.mkdir()

    def code(self, path: Path) -> None:
        """Write a module that has every class that anybody asks for."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            f"open({str(self.sprung / path.name)!r}, 'w').close()\n"
            "from transformers import PreTrainedTokenizerFast as Tok\n"
            "from transformers import PretrainedConfig as Config\n"
        )

    def pickle(self, path: Path) -> None:
        path.write_bytes(pickle.dumps(Pickle(f"touch {self.sprung / path.name}")))


def change(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps(read(path) | entries))


def arm(trap: Trap, model: Path) -> None:
    """Put code wherever somebody might look for some."""
    text = read(model / "config.json")["text_config"]
    for name in (
        "evil.py", "tokenizer_evil.py", "configuration_evil.py", "custom_generate/generate.py",
        "conftest.py", "sitecustomize.py",
    ):  # fmt: skip
        trap.code(model / name)
    for name in ("pytorch_model.bin", "training_args.bin", "tokenizer.pkl", "optimizer.pt"):
        trap.pickle(model / name)
    (model / "chat_template.jinja").write_text(ESCAPE % (trap.sprung / "template"))
    change(
        model / "config.json",
        model_file=read(model / "config.json").get("model_file", "evil.py"),
        auto_map={"AutoConfig": "configuration_evil.Config", "AutoModel": "evil.Model"},
        text_config=text | {"auto_map": {"AutoConfig": "configuration_evil.Config"}},
        # transformers' own class refuses this, so that it would take another.
        vision_config={"id2label": {"a": "b"}},
    )
    change(
        model / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["tokenizer_evil.Tok", "tokenizer_evil.Tok"]},
        tokenizer_class="EvilTokenizer",
    )


@pytest.fixture
def trap(tmp_path: Path) -> Trap:
    return Trap(tmp_path)


def inside(trap: Trap) -> Path:
    """A checkpoint whose configuration names modules that lie in it."""
    model = shutil.copytree(BUNDLED_MODEL, trap.root / "inside")
    arm(trap, model)
    return model


def outside(trap: Trap) -> Path:
    """One that names a module beside it, and those of a repository that the Hub's cache has."""
    model = shutil.copytree(BUNDLED_MODEL, trap.root / "outside")
    trap.code(trap.root / "outside.py")
    cache = trap.root / "hub/models--owner--name"
    for name in ("configuration_evil.py", "tokenizer_evil.py"):
        trap.code(cache / "snapshots/0123456789012345678901234567890123456789" / name)
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("0123456789012345678901234567890123456789")
    change(
        model / "config.json",
        model_file="../outside.py",
        auto_map={"AutoConfig": "owner/name--configuration_evil.Config"},
    )
    change(
        model / "tokenizer_config.json",
        auto_map={"AutoTokenizer": [None, "owner/name--tokenizer_evil.Tok"]},
        tokenizer_class="EvilTokenizer",
        chat_template=ESCAPE % (trap.sprung / "template"),
    )
    (model / "chat_template.jinja").unlink()
    return model


def converted(trap: Trap) -> Path:
    """A conversion whose shim was altered."""
    repack(BUNDLED_MODEL, model := trap.root / "converted")
    arm(trap, model)
    trap.code(model / "flashmoe_model.py")
    return model


def run(trap: Trap, commands: list[list[Any]]) -> list[list[Any]]:
    (trap.root / "input").write_text("y\n" * 10_000)
    with open(trap.root / "input") as answers:
        result = subprocess.run(
            [sys.executable, "-c", RUNNER, json.dumps(commands), str(trap.sprung)],
            stdin=answers, capture_output=True, text=True, timeout=600, cwd=trap.root,
            env=os.environ | {
                "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(trap.root / "hub"),
                "HF_MODULES_CACHE": str(trap.root / "modules"),
            },
        )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found: list[list[Any]] = json.loads(result.stdout.splitlines()[-1])
    return found


def generate(model: Path, *more: str) -> list[Any]:
    return ["generate", ["--model", str(model), "--prompt", "hi", "--max-tokens", "1", *more]]


def convert(model: Path, out: Path, *more: str) -> list[Any]:
    return ["convert", ["--hf-path", str(model), "--mlx-path", str(out), *more]]


def few(root: Path, model: Path) -> list[list[Any]]:
    """The commands that load a tokenizer or copy files."""
    return [
        generate(model), generate(model, "--ignore-chat-template"), ["load", [str(model)]],
        convert(model, root / "out", "--dry-run"), convert(model, root / "out"),
        ["convert", ["verify", str(root / "out")]],
        generate(root / "out", "--ignore-chat-template"),
    ]  # fmt: skip


def everything(root: Path, model: Path) -> list[list[Any]]:
    """All commands of ours that take a directory."""
    (root / "empty.txt").write_text("")
    repair = ["verify", str(root / "out"), "--repair", "--hf-path", str(model)]
    return [
        *few(root, model),
        ["doctor", [str(model), "--sample-mib", "2"]],
        ["plan", ["--model", str(model), "--machine", "m4-16"]],
        ["bench", ["io", "--model", str(model), "--sample-mib", "1", "--rounds", "1"]],
        convert(model, root / "out-bare", "--no-remote-code"),
        convert(model, root / "out-link", "--link"),
        convert(model, root / "out-calibrated", "-q", "--calibrate", str(root / "empty.txt")),
        ["convert", repair],
    ]


@pytest.mark.parametrize(
    ("make", "commands"), [(inside, everything), (outside, few), (converted, few)]
)
def test_nothing_runs_without_the_flag(trap, make, commands):
    model = make(trap)
    found = run(trap, [*commands(trap.root, model), generate(model, "--trust-remote-code")])
    for name, code, said, sprung, taken in found[:-1]:
        assert (sprung, taken) == ([], 0), (name, said)
        assert "Traceback" not in said, (name, said)
        assert code in (0, 2), (name, code, said)
    # With the flag the trap springs, so that the above can fail.
    assert "tokenizer_evil.py" in found[-1][3], found[-1]
    for path in trap.root.glob("out*/**/*"):
        assert path.suffix not in (".bin", ".pt", ".pkl") and path.name != "evil.py", path
        assert path.name != "flashmoe_model.py" or path.read_text() == SHIM
