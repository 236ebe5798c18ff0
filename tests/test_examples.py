"""The scripts in docs/examples run unchanged, each in a separate process."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from stock_server import StockServer

from flashmoe_mlx import generate, load
from flashmoe_mlx.loader import BUNDLED_MODEL

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
QUESTION = [{"role": "user", "content": "What is a library?"}]
MOST_LINES = 40


def run(script: str, *args: str, code: int = 0) -> str:
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *args],
        capture_output=True, text=True, timeout=120, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert result.returncode == code, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def answer() -> str:
    """Return the bundled model's answer, generated in this process."""
    model, tokenizer = load(BUNDLED_MODEL)
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)
    text = generate(model, tokenizer, prompt, max_tokens=64)
    model.close()
    return text


def test_all_are_short_and_tested():
    scripts = {path.name: path.read_text() for path in EXAMPLES.glob("*.py")}
    assert all(text.count("\n") < MOST_LINES for text in scripts.values())
    tested = set(re.findall(r'(?:run\(|EXAMPLES / )"(\w+\.py)"', Path(__file__).read_text()))
    assert tested == scripts.keys()


def test_stream(answer):
    text, figures = run("stream.py").splitlines()
    assert text == answer
    assert re.fullmatch(r"[\d.]+ tokens/s; Experts: \d+ asked, .*", figures)


def test_batch(answer):
    first, second, third, figures = run("batch.py").splitlines()
    assert first == f"What is a library? {answer.strip()}"
    assert second.startswith("What is a disk? ") and third.startswith("What is a token? ")
    assert figures.startswith("Experts: ")


def test_convert_and_run(tmp_path):
    output = run("convert_and_run.py", str(BUNDLED_MODEL), str(tmp_path / "model"))
    assert "Expert cache: 2 MiB, 25 experts per layer (as asked)" in output
    assert (tmp_path / "model" / "model_experts" / "manifest.json").exists()
    assert re.search(
        r"\.\d% hits, [1-9][\d.]* MB in [1-9]\d* reads", output
    )  # the answer was streamed


@pytest.fixture
def server(models, tmp_path) -> Iterator[str]:
    with StockServer(models["packed4"], tmp_path / "log") as server:
        yield server.address


def test_tool_call(server):
    assert run("tool_call.py", server) == "create_file {'path': 'notes.txt'}\n"


def test_tools():
    """It only defines functions; tests/cli/test_chat_terminal.py offers them to a model."""
    assert run("tools.py") == ""


# Answers /health with 200, then with 503.
FAILING = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    codes = [200, 503]
    def do_GET(self):
        code = self.codes.pop(0)
        print(code, flush=True)
        self.send_response(code)
        self.end_headers()
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_watched_server(port):
    """The script exits with 1 at the first 503, or with the server's exit code."""
    url = f"http://127.0.0.1:{port}/health"
    server = [sys.executable, "-c", FAILING, str(port)]
    assert run("watched_server.py", url, *server, code=1) == "200\n503\n"
    assert run("watched_server.py", url, sys.executable, "-c", "exit(7)", code=7) == ""


CHAT, TEXT = {"messages": QUESTION, "max_tokens": 2}, {"prompt": "A disk", "max_tokens": 2}


def test_checked_server_refuses_what_ends_stocks_thread(models, tmp_path):
    program = [str(EXAMPLES / "checked_server.py")]
    with StockServer(models["packed4"], tmp_path / "log", program=program) as server:
        while "loading" in str(first := server.ask(CHAT)):
            time.sleep(0.1)
        for change, message in (
            ({"prompt": ""}, "prompt must be one text, and not empty"),
            ({"prompt": ["A disk", "A file"]}, "prompt must be one text, and not empty"),
            ({"stop": 5}, "stop must be a text or a list of texts"),
            ({"stop": ["a", 5]}, "stop must be a text or a list of texts"),
            ({"top_k": 4096, "temperature": 1.0}, "top_k must be below 4096"),
            ({"logit_bias": {"4096": 1}}, "logit_bias must name tokens from 0 to 4095"),
            ({"seed": -1}, "seed must be from 0 to 2^64 - 1"),
        ):
            assert server.ask(TEXT | change, "completions") == {"error": message}
        assert server.health() == 200
        allowed = {"stop": ["xyz"], "top_k": 4095, "logit_bias": {"4095": 1}, "seed": 0}
        assert server.ask(TEXT | allowed, "completions")["choices"]
        assert server.ask(CHAT)["choices"][0]["message"] == first["choices"][0]["message"]
