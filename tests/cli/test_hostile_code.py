"""Directories that contain code: it runs only with the flag, and no command asks to run it.

One process runs all commands on all directories; its standard input is full of "y". Code that runs
leaves a file.
"""

import itertools
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
# Runs commands, [name, arguments] each; prints for each the name, the exit code, the output, the
# files that code has left so far, and how much of standard input has been read.
RUNNER = """
import contextlib, io, json, os, pathlib, sys
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
root, found = pathlib.Path.cwd(), []
for name, argv in json.loads(sys.argv[1]):
    said, code = io.StringIO(), 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = mains[name](argv)
        except SystemExit as end:
            code = end.code
    read = os.lseek(0, 0, os.SEEK_CUR)
    sprung = sorted(str(path.relative_to(root)) for path in root.glob("*/sprung/*"))
    found.append([name, code or 0, said.getvalue(), sprung, read])
print(json.dumps(found))
"""


class Pickle:
    """An object that runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self._command = command

    def __reduce__(self) -> Any:
        return os.system, (self._command,)


class Trap:
    """A folder with a hostile directory, and `sprung`, where its code leaves files."""

    def __init__(self, root: Path) -> None:
        self.root, self.sprung = root, root / "sprung"
        self.sprung.mkdir(parents=True)

    def code(self, path: Path) -> None:
        """Write a module with every class that a loader may import."""
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
    """Put code in every place where a loader may look for it."""
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
        # transformers' own class rejects this entry, so that it looks for another class.
        vision_config={"id2label": {"a": "b"}},
    )
    change(
        model / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["tokenizer_evil.Tok", "tokenizer_evil.Tok"]},
        tokenizer_class="EvilTokenizer",
    )


def inside(trap: Trap) -> Path:
    """A checkpoint whose configuration names modules in it."""
    model = shutil.copytree(BUNDLED_MODEL, trap.root / "inside")
    arm(trap, model)
    return model


def outside(trap: Trap) -> Path:
    """A checkpoint that names a module beside it, and modules of a cached Hub repository."""
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
    """A conversion with a modified shim."""
    repack(BUNDLED_MODEL, model := trap.root / "converted")
    arm(trap, model)
    trap.code(model / "flashmoe_model.py")
    return model


def run(root: Path, commands: list[list[Any]]) -> list[list[Any]]:
    (root / "input").write_text("y\n" * 10_000)
    with open(root / "input") as answers:
        result = subprocess.run(
            [sys.executable, "-c", RUNNER, json.dumps(commands)],
            stdin=answers, capture_output=True, text=True, timeout=600, cwd=root,
            env=os.environ | {
                "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(root / "outside/hub"),
                "HF_MODULES_CACHE": str(root / "modules"),
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
    """Return the commands that load a tokenizer or copy files."""
    return [
        generate(model), generate(model, "--ignore-chat-template"), ["load", [str(model)]],
        convert(model, root / "out", "--dry-run"), convert(model, root / "out"),
        ["convert", ["verify", str(root / "out")]],
        generate(root / "out", "--ignore-chat-template"),
    ]  # fmt: skip


def everything(root: Path, model: Path) -> list[list[Any]]:
    """Return all our commands that take a directory."""
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


SCENES = {inside: everything, outside: few, converted: few}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> dict[str, tuple[Trap, list[list[Any]], list[Any]]]:
    """Map each scene to its trap, its commands' results, and the result with the flag."""
    root = tmp_path_factory.mktemp("code")
    traps = {make: Trap(root / make.__name__) for make in SCENES}
    models = {make: make(trap) for make, trap in traps.items()}
    lists = [commands(traps[make].root, models[make]) for make, commands in SCENES.items()]
    trusting = [generate(model, "--trust-remote-code") for model in models.values()]
    found = iter(run(root, [*itertools.chain(*lists), *trusting]))
    results = [list(itertools.islice(found, len(commands))) for commands in lists]
    names = [make.__name__ for make in SCENES]
    return dict(zip(names, zip(traps.values(), results, found, strict=True), strict=True))


@pytest.mark.parametrize("name", [make.__name__ for make in SCENES])
def test_code_runs_only_with_the_flag(scenes, name):
    trap, found, trusting = scenes[name]
    for command, code, said, sprung, taken in found:
        assert (sprung, taken) == ([], 0), (command, said)
        assert "Traceback" not in said, (command, said)
        assert code in (0, 2), (command, code, said)
    # With the flag the trap springs, which shows that the above can fail.
    assert f"{name}/sprung/tokenizer_evil.py" in trusting[3], trusting
    for path in trap.root.glob("out*/**/*"):
        assert path.suffix not in (".bin", ".pt", ".pkl") and path.name != "evil.py", path
        assert path.name != "flashmoe_model.py" or path.read_text() == SHIM
