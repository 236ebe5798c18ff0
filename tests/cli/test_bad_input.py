"""Bad input to commands, `load()`, variables and config.json: one sentence, exit code 2."""

import importlib
import io
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import mlx.core as mx
import pytest
from bad_input_cases import BENCH, CONFIG, CONVERT, DOCTOR, GENERATE, PLAN, VARIABLES

from flashmoe_mlx import FlashMoEError, load, requirements
from flashmoe_mlx.bench import io as bench_io
from flashmoe_mlx.bench import main
from flashmoe_mlx.cli import doctor, doctor_checks, plan
from flashmoe_mlx.convert import cli, convert
from flashmoe_mlx.loader import BUNDLED_MODEL

generate = importlib.import_module("flashmoe_mlx.cli.generate")
COMMANDS = {
    "generate": (lambda arguments: generate.main(["--prompt", "Hello", *arguments]), GENERATE),
    "convert": (lambda arguments: sys.exit(cli.main(arguments)), CONVERT),
    "bench": (main.main, BENCH),
    "doctor": (doctor.main, DOCTOR),
    "plan": (plan.main, PLAN),
}
CASES = [
    (command, line, message) for command, (_, cases) in COMMANDS.items() for line, message in cases
]


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bad") / "packed"
    convert(BUNDLED_MODEL, path)
    return path


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def refuse(capsys, command: str, arguments: list[str]) -> str:
    """Run a command that must exit with 2, and return the last line of its output."""
    with pytest.raises(SystemExit) as ended:
        COMMANDS[command][0](arguments)
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert lines[0].startswith("usage: ") or len(lines) == 1
    assert lines[-1].startswith(f"flashmoe-{command}")
    return lines[-1].partition(" error: ")[2]


def test_there_are_many_cases():
    assert len(CASES) + len(VARIABLES) + len(CONFIG) > 120


@pytest.mark.parametrize(("command", "line", "message"), CASES)
def test_command(command, line, message, packed, tmp_path, capsys):
    places = {"{bundled}": BUNDLED_MODEL, "{packed}": packed, "{out}": tmp_path / "out"}
    for name, path in places.items():
        line, message = (text.replace(name, str(path)) for text in (line, message))
    assert message in refuse(capsys, command, line.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "value", "message"), VARIABLES)
def test_variable(name, value, message, capsys, monkeypatch):
    monkeypatch.setenv(f"FLASHMOE_{name}", value)
    assert message in refuse(capsys, "generate", [])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_an_unknown_variable(command, capsys, monkeypatch):
    monkeypatch.setenv("FLASHMOE_IO_THREAD", "4")
    line = {"convert": ["verify", "x"], "bench": ["kernels"], "plan": ["--check"]}
    message = refuse(capsys, command, line.get(command, []))
    assert message.startswith("FLASHMOE_IO_THREAD: no environment variable of flashmoe-mlx has")


def test_load_refuses_an_unknown_variable(monkeypatch):
    monkeypatch.setenv("FLASHMOE_LOOKAHED", "on")
    with pytest.raises(FlashMoEError, match="Did you mean FLASHMOE_LOOKAHEAD"):
        load(BUNDLED_MODEL)


def test_standard_input_that_is_not_utf8(capsys, monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO(b"caf\xe9"), "utf-8", errors="surrogateescape")
    monkeypatch.setattr(sys, "stdin", stdin)
    message = refuse(capsys, "generate", ["--prompt", "-"])
    assert message == "standard input: byte 0xe9 after 3 characters is not UTF-8. Give UTF-8."


def model_of(directory: Path, leave: str = "config.json") -> Path:
    """Make a directory with links to all but one of the bundled model's files."""
    directory.mkdir()
    for path in BUNDLED_MODEL.iterdir():
        if path.name != leave:
            (directory / path.name).symlink_to(path)
    return directory


@pytest.mark.parametrize(("place", "change", "message"), CONFIG)
def test_config(place, change, message, tmp_path, capsys):
    config = json.loads((BUNDLED_MODEL / "config.json").read_text())
    entries = config["text_config"] if place == "text" else config
    entries |= change
    for name in [name for name, value in change.items() if value is None]:
        del entries[name]
    model = model_of(tmp_path / "model")
    (model / "config.json").write_text(json.dumps(config))
    assert message in refuse(capsys, "generate", ["--model", str(model)])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "", r"config\.json: not JSON \(Expecting value"),
        ("config.json", "[1]", r"config\.json: not a JSON object\."),
        ("config.json", "[" * 100_000, r"config\.json: not JSON \(nested more than 100 levels"),
        ("tokenizer.json", "{", r"model: its tokenizer cannot be loaded \("),
        ("tokenizer_config.json", "[", r"model/tokenizer_config\.json: not JSON \(Expecting"),
        ("chat_template.jinja", "{% if %}", r"the chat template fails .*TemplateSyntaxError"),
        ("model.safetensors", "GGUF", r"model\.safetensors: not a whole safetensors file \(4 byte"),
    ],
)
def test_damaged_file(name, content, message, tmp_path, capsys):
    model = model_of(tmp_path / "model", leave=name)
    (model / name).write_text(content)
    assert re.search(message, refuse(capsys, "generate", ["--model", str(model)]))


def test_models_of_other_tools(tmp_path, capsys):
    """A GGUF file, a directory of GGUF files, a dense MLX model, and a bf16 checkpoint."""
    gguf = tmp_path / "gguf"
    gguf.mkdir()
    (gguf / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    dense = tmp_path / "dense"
    dense.mkdir()
    mx.save_safetensors(str(dense / "model.safetensors"), {"a": mx.zeros((2, 2))})
    (dense / "config.json").write_text('{"model_type": "qwen3_5", "text_config": {}}')
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "config.json").write_text((BUNDLED_MODEL / "config.json").read_text())
    weights = {
        f"model.language_model.layers.0.mlp.experts.{name}": mx.zeros((100, 8, 8), mx.bfloat16)
        for name in ("gate_up_proj", "down_proj")
    }
    mx.save_safetensors(str(plain / "model.safetensors"), weights)
    (plain / "tokenizer.json").symlink_to(BUNDLED_MODEL / "tokenizer.json")
    for path, message in (
        (gguf / "model.gguf", "model.gguf: no config.json. Give the directory of a model."),
        (gguf, "gguf: no config.json. Give the directory of a model."),
        (dense, "config.json: model_type = 'qwen3_5' has no routed experts"),
        (plain, "layer 0: no experts found (no switch_mlp.gate_proj.weight). Repack it first"),
    ):
        assert message in refuse(capsys, "generate", ["--model", str(path)])


def test_unfinished_conversion(packed, tmp_path, capsys):
    model = model_of(tmp_path / "model", leave="model.safetensors")
    (model / "model.safetensors").symlink_to(packed / "model.safetensors")
    (model / "model_experts").mkdir()
    message = refuse(capsys, "generate", ["--model", str(model)])
    assert "unfinished conversion (manifest.json is written last and is missing)" in message


def test_a_name_that_mlx_lm_takes_for_a_pattern(tmp_path):
    model = model_of(tmp_path / "model [4-bit]", leave="")
    with pytest.raises(FlashMoEError, match=r"a directory with \*, \? or \[ in its name\. Rename"):
        load(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"expert_cache": 1.5}, "expert_cache = 1.5 is not a size"),
        ({"expert_cache": -1}, "expert_cache = -1 is not a size"),
        ({"io_threads": 2.5}, "io_threads = 2.5 is not a whole number"),
        ({"io_mode": "fast"}, "io_mode = 'fast' is not one of"),
        ({"experts_per_token": "four"}, "experts_per_token = 'four' is not a whole number"),
        ({"adapter_path": "nowhere"}, "adapter_path = 'nowhere' is not a directory. Give one"),
        ({"adapter_path": "."}, ".: adapters that do not fit this model (FileNotFoundError"),
        ({"model_config": {"vocab_size": 3}}, None),
    ],
)
def test_load(settings, message):
    """Only top-level entries of `model_config` count, so a wrong text_config has no effect."""
    if message is None:
        load(BUNDLED_MODEL, **settings)[0].close()
        return
    with pytest.raises(FlashMoEError, match=re.escape(message)):
        load(BUNDLED_MODEL, **settings)


@pytest.fixture
def unchecked():
    """Packages that this process has not checked yet."""
    requirements.check_packages.cache_clear()


@pytest.mark.parametrize("command", ["flashmoe-generate", "-m", "python"])
def test_packages_too_old(command, unchecked, monkeypatch, capsys):
    real = metadata.version
    old = {"mlx-lm": "0.20.1"}
    monkeypatch.setattr(metadata, "version", lambda name: old.get(name) or real(name))
    monkeypatch.setattr(sys, "argv", [command])
    expected = (
        r"mlx-lm 0\.20\.1 is installed, but (>=[0-9.]+) is needed\. Install them: "
        r'pip install -U "mlx-lm\1"'
    )
    if command == "python":
        with pytest.raises(FlashMoEError, match=expected):
            requirements.check_packages()
        return
    with pytest.raises(SystemExit) as ended:
        requirements.check_packages()
    assert ended.value.code == 2 and re.search(expected, capsys.readouterr().err)


def test_packages_missing(unchecked, monkeypatch):
    real = metadata.version

    def version(name: str) -> str:
        if name == "numpy":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(sys, "argv", ["python"])
    with pytest.raises(FlashMoEError, match=r"numpy is not installed, but any version is needed"):
        requirements.check_packages()


@pytest.mark.parametrize(
    ("module", "arguments", "name"),
    [
        ("cli.generate", ["Hello"], "flashmoe-generate"),
        ("cli.doctor", [], "flashmoe-doctor"),
        ("convert.cli", ["--hf-path", "x"], "flashmoe-convert"),
    ],
)
def test_mlx_without_a_backend(module, arguments, name, tmp_path):
    """The state after pip install on Linux without an extra."""
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx/core.py").write_text("raise ImportError('libmlx.so: cannot open')")
    result = subprocess.run(
        [sys.executable, "-m", f"flashmoe_mlx.{module}", *arguments],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(
        f"{name}: error: MLX cannot be imported (libmlx.so: cannot open). Install its "
        'back-end: pip install "mlx[cpu]" numba'
    )


@pytest.mark.parametrize(
    ("command", "module", "work", "arguments"),
    [
        ("generate", generate, "run", []),
        ("bench", bench_io, "_check", ["io"]),
        ("doctor", doctor_checks, "examine_all", []),
    ],
)
def test_ctrl_c(command, module, work, arguments, capsys, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, work, interrupted)
    with pytest.raises(SystemExit) as ended:
        COMMANDS[command][0](arguments)
    assert ended.value.code == 130
    assert capsys.readouterr().err == f"\nflashmoe-{command}: interrupted\n"


def test_a_reader_that_goes_away():
    """A reader like `head` causes no traceback, neither at once nor at exit."""
    code = "from flashmoe_mlx.cli.generate import main; main(['-m', '40', '--prompt', 'Hello'])"
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run([sys.executable, "-c", code], stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    assert done.returncode == 0 and b"Traceback" not in done.stderr


def test_no_memory(capsys, monkeypatch):
    def run(args):
        raise RuntimeError("[malloc] Unable to allocate 3 bytes.")

    monkeypatch.setattr(generate, "run", run)
    message = refuse(capsys, "generate", [])
    assert message.startswith(
        "memory is short ([malloc] Unable to allocate 3 bytes.). Give a small"
    )


def test_other_errors_keep_their_traceback(monkeypatch):
    def run(args):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(generate, "run", run)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        generate.main([])
