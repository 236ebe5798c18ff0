"""Stock mlx-lm's commands run a converted directory, with the results of a stock checkpoint."""

import json
import os
import pty
import re
import select
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm import fuse, lora
from mlx_lm.perplexity import eval_ppl
from shared_folders import PATCHED, Directories

from flashmoe_mlx import FlashMoEError, load
from flashmoe_mlx.cli import full_check, generate
from flashmoe_mlx.cli.doctor_model import examine
from flashmoe_mlx.format.layout import open_layout

QUESTION = "What is a package?"
OFFLINE = {"HF_HUB_OFFLINE": "1"}


EVERY_TOOL = "packed4", *PATCHED
every_tool = pytest.mark.parametrize("name", EVERY_TOOL)

# Runs `mlx_lm` commands, [arguments, standard input] each; prints the standard output of each.
RUNNER = """
import contextlib, io, json, sys
from mlx_lm.cli import main
outputs = []
for arguments, text in json.loads(sys.argv[1]):
    sys.argv, sys.stdin = ["mlx_lm", *arguments], io.StringIO(text)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        main()
    outputs.append(said.getvalue())
print(json.dumps(outputs))
"""


@pytest.fixture(scope="module")
def packed(models) -> str:
    return str(models["packed4"])


def between_rules(output: str) -> str:
    """Return the text that mlx_lm.generate prints between its two lines of `=`."""
    return output.split("==========\n")[1].removesuffix("\n")


@pytest.fixture(scope="module")
def converted(models, patched) -> dict[str, Path]:
    """Map Qwen3.5's formats, and other families, to directories."""
    return Directories(
        lambda name: patched / f"{name}-converted" if name in PATCHED else models[name]
    )


def commands_for(directory: Path, cache: Path) -> dict[str, tuple[list[str], str]]:
    """Return stock commands: arguments, and standard input."""
    model = ["--model", str(directory), "--trust-remote-code"]
    cached = ["--prompt-cache-file", str(cache)]
    return {
        "generate": (["generate", *model, "-p", QUESTION, "-m", "24"], ""),
        "cache_prompt": (["cache_prompt", *model, "--prompt", QUESTION, *cached], ""),
        "cached": (["generate", *model, *cached, "-p", " Say more.", "-m", "8"], ""),
        "chat": (["chat", *model, "--max-tokens", "4"], f"{QUESTION}\nWhy?\nq\n"),
        "benchmark": (["benchmark", *model, "-p", "8", "-g", "4", "-n", "1"], ""),
    }


@pytest.fixture(scope="module")
def outputs(converted, tmp_path_factory) -> dict[Any, str]:
    """Map (model, stock command), all run in one process, to the output; "stderr" is that of all.

    Of a linked directory, only "generate".
    """
    folder = tmp_path_factory.mktemp("cache")
    commands = {
        (name, command): given
        for name in (*EVERY_TOOL, "linked")
        for command, given in commands_for(converted[name], folder / f"{name}.safetensors").items()
        if name != "linked" or command == "generate"
    }
    result = subprocess.run(
        [sys.executable, "-c", RUNNER, json.dumps(list(commands.values()))],
        capture_output=True, text=True, timeout=240,
        env=os.environ | {"FLASHMOE_STATS": "1", "FLASHMOE_IO_THREADS": "2", **OFFLINE},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout.splitlines()[-1])
    return dict(zip(commands, said, strict=True)) | {"stderr": result.stderr}


@pytest.mark.parametrize("name", [*EVERY_TOOL, "linked"])
def test_generate(name, outputs, load_stock):
    model, tokenizer = load_stock(name)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True
    )
    expected = mlx_lm.generate(model, tokenizer, prompt, max_tokens=24)
    assert between_rules(outputs[name, "generate"]) == expected


def test_each_model_reports_its_reads(outputs):
    said = r"\[flashmoe\] Experts: \d+ asked, .* MB in \d+ reads.*; lookahead: (off|on trial)$"
    assert len(re.findall(said, outputs["stderr"], re.M)) == len(outputs) - 1
    assert outputs["stderr"].count("[flashmoe] Expert cache: ") == len(outputs) - 1


def test_settings_in_config_json_count(models, tmp_path):
    """In a copy of the directory (symlinks), config.json asks for too small a cache."""
    for entry in models["packed4"].iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    config["flashmoe"]["expert_cache"] = 1000
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FlashMoEError, match="= 1000 bytes holds 0 experts per layer"):
        mlx_lm.load(str(tmp_path), trust_remote_code=True)


@every_tool
def test_prompt_cache(name, outputs):
    assert between_rules(outputs[name, "cached"]).strip()


@every_tool
def test_chat(name, outputs):
    shown = outputs[name, "chat"]
    assert shown.count("›") == 3  # one per question, one for "q"
    assert shown.rstrip().endswith("bye\x1b[0m")


@every_tool
def test_benchmark(name, outputs):
    assert "generation_tps" in outputs[name, "benchmark"]


class Terminal:
    """A command in its own terminal, and all text that it has shown."""

    def __init__(self, *command: str, **env: str) -> None:
        self.end, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            env=os.environ | OFFLINE | {"TERM": "xterm"} | env,
        )  # fmt: skip
        os.close(theirs)
        self.shown = ""

    def read(self) -> bool:
        """Append the next output; return False if the command has closed its terminal."""
        assert select.select([self.end], [], [], 120)[0], self.shown
        try:
            data = os.read(self.end, 65536)
        except OSError:  # Linux raises EIO at the end
            data = b""
        self.shown += data.decode(errors="replace")
        return bool(data)

    def read_until(self, mark: str, times: int = 1) -> None:
        while self.shown.count(mark) < times:
            assert self.read(), self.shown

    def type(self, line: str) -> None:
        os.write(self.end, f"{line}\n".encode())

    def wait(self) -> int:
        """Read the remaining output, and return the exit code."""
        while self.read():
            pass
        os.close(self.end)
        return self.process.wait(30)


def test_chat_in_a_terminal(packed):
    terminal = Terminal(
        "mlx_lm", "chat", "--model", packed, "--trust-remote-code", "--max-tokens", "12",
        FLASHMOE_EXPERT_CACHE="2MiB",
    )  # fmt: skip
    for number, line in enumerate((QUESTION, "Why?"), 1):
        terminal.read_until("›", number)
        before = len(terminal.shown)
        terminal.type(line)
        terminal.read_until("›", number + 1)
        echo, answer = terminal.shown[before:].split("\n", 1)
        assert line in echo and re.search(r"\w+ \w+ \w+", answer), terminal.shown
    terminal.type("q")
    assert terminal.wait() == 0, terminal.shown
    assert "bye" in terminal.shown and "Traceback" not in terminal.shown


def test_flashmoe_generate_in_a_terminal(packed, capsys):
    """The text appears before the figures, and equals the text without a terminal."""
    asked = ["--model", packed, "--prompt", "Tell me a long story about a king.", "-m", "60"]
    terminal = Terminal("flashmoe_mlx.cli.generate", *asked)
    while not re.search(r"[a-z]", terminal.shown):
        assert terminal.read(), terminal.shown
    assert "Tokens:" not in terminal.shown
    assert terminal.wait() == 0, terminal.shown
    text, figures = terminal.shown.replace("\r\n", "\n").split("\n\n")
    generate.main(asked)
    # Bars that came before are gone: they end with an empty line and a carriage return.
    assert text.rpartition("\r")[2] == capsys.readouterr().out.split("\n\n")[0]
    lines = [re.fullmatch(r"\x1b\[2m(\w+): .*\x1b\[0m", line) for line in figures.splitlines()]
    assert [line and line[1] for line in lines] == ["Tokens", "Experts", "Memory"]


@every_tool
def test_perplexity(name, converted, load_stock):
    stock, _ = load_stock(name)
    trust = {"trust_remote_code": True}
    model, tokenizer = mlx_lm.load(str(converted[name]), tokenizer_config=trust, **trust)
    text = "A package is a file that holds a program and what is needed to install it. " * 12
    data = mx.array(tokenizer.encode(text)[:192]).reshape(3, 64)
    ours, theirs = eval_ppl(model, data, batch_size=2), eval_ppl(stock, data, batch_size=2)
    assert ours == pytest.approx(theirs, rel=1e-5)


def half_of_the_experts(path: str) -> int:
    text = json.loads((Path(path) / "config.json").read_text())["text_config"]
    layout = open_layout(Path(path), text["num_hidden_layers"], text["num_experts"])
    return layout.total_bytes // 2


def test_rows_of_a_batch_share_reads(packed):
    """Eight equal requests read as many bytes as one; different requests share some reads."""
    model, tokenizer = load(packed, expert_cache=half_of_the_experts(packed), lookahead="off")
    questions = [f"Tell me {n} things about disks." for n in range(8)]
    prompts = [tokenizer.encode(question) for question in questions]

    def use(batch: list[list[int]]) -> tuple[list[str], int, int]:
        stats = model.expert_stats()
        before = stats.asked, stats.bytes_read
        texts = mlx_lm.batch_generate(model, tokenizer, batch, max_tokens=12).texts
        return texts, stats.asked - before[0], stats.bytes_read - before[1]

    use(prompts[:1])
    one, eight = use(prompts[:1]), use(prompts[:1] * 8)
    assert eight == (one[0] * 8, *one[1:])
    alone = [use([prompt]) for prompt in prompts]
    texts, asked, _ = use(prompts)
    assert texts == [text for (text,), _, _ in alone]
    assert asked < 0.9 * sum(asked for _, asked, _ in alone)


# ---- flashmoe-doctor --full ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["packed2", "linked", "unmodified"])
def test_greedy_tokens_are_counted(name, models, monkeypatch):
    monkeypatch.setattr(full_check, "TEXTS", ("Once upon a time",))
    monkeypatch.setattr(full_check, "QUESTIONS", ("Who are you?",))
    monkeypatch.setattr(full_check, "TOKENS", 5)
    assert full_check.greedy(examine(models[name])) == (True, "10 of 10 equal stock mlx-lm's")


class Fixed:
    """A model with the same logits after every token."""

    def __init__(self, *logits: float) -> None:
        self.logits = logits

    def make_cache(self) -> None: ...

    def __call__(self, fed: mx.array, cache: None) -> mx.array:
        return mx.broadcast_to(mx.array(self.logits), (*fed.shape, len(self.logits)))


def test_a_difference_has_the_gap_between_stocks_two_largest_logits():
    stock = Fixed(1.0, 2.5, 2.25)
    assert full_check.differences(stock, Fixed(0, 1, 2), [1, 2], 3) == [(0.25, full_check.TIE)] * 3
    assert full_check.differences(stock, Fixed(0, 1, 0), [1, 2], 3) == []


def test_stock_does_not_copy_the_trunk_alone(packed, tmp_path):
    for options in ({}, {"quantize": True}, {"dequantize": True}):
        with pytest.raises(FlashMoEError, match="so a copy by mlx-lm would lack them"):
            mlx_lm.convert(packed, str(tmp_path / "out"), trust_remote_code=True, **options)
        assert not (tmp_path / "out").exists()


def test_stock_neither_fuses_nor_trains_streamed_experts(packed, tmp_path, monkeypatch):
    model, tokenizer = load(packed)
    monkeypatch.setattr(fuse, "load", lambda *_, **__: (model, tokenizer, {}))
    monkeypatch.setattr(sys, "argv", ["fuse", "--save-path", str(tmp_path / "out")])
    with model:
        with pytest.raises(FlashMoEError, match="so a copy by mlx-lm would lack them"):
            fuse.main()
        assert not (tmp_path / "out").exists()
        with pytest.raises(FlashMoEError, match="whose experts stream cannot be trained"):
            lora.train_model(SimpleNamespace(seed=0), model, [], [])
        with pytest.raises(FlashMoEError, match="whose experts stream cannot be trained"):
            model.train()
        assert not model.eval().training
