"""`flashmoe-generate` reports on a run: tables, JSON, a plot, and a status line."""

import importlib
import json
import os
import pty
import re
import subprocess
import sys
import time

import pytest

from flashmoe_mlx import load
from flashmoe_mlx.cli.live import Live, status_line
from flashmoe_mlx.loader import BUNDLED_MODEL
from flashmoe_mlx.profile.stats import RunStats
from flashmoe_mlx.store.store import ExpertStats

generate = importlib.import_module("flashmoe_mlx.cli.generate")
TOKENS, LAYERS, TOP_K = 6, 4, 4
ARGUMENTS = ["--prompt", "What is a library?", "-m", str(TOKENS), "--expert-cache", "1500KiB"]


def text_of(output: str) -> str:
    return output.partition("\n==========")[0]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Return the output of a run with all reports and of one without, and the directory."""
    folder, printed = tmp_path_factory.mktemp("stats"), []
    watched = ["--stats", "--stats-json", str(folder / "s.json"), "--plot", str(folder / "p.png")]
    for flags in (watched, []):
        with pytest.MonkeyPatch.context() as patch:
            lines: list[str] = []
            patch.setattr("sys.stdout.write", lines.append)
            generate.main([*ARGUMENTS, *flags])
        printed.append("".join(lines))
    return folder, *printed


def test_a_watched_run_gives_the_same_text(outputs):
    _, watched, plain = outputs
    assert text_of(watched) == text_of(plain) != ""
    assert "phase" not in plain


def test_json_adds_up(outputs):
    found = json.loads((outputs[0] / "s.json").read_text())
    phases, total = found["phases"], found["total"]
    assert phases["generation"]["tokens"] == TOKENS - 1 == len(found["tokens_per_s"])
    assert found["tokens"]["generation"] == TOKENS
    layers = found["layers"]["prompt"] + found["layers"]["generation"]
    assert len(layers) == 2 * LAYERS
    for name in ("asked", "hits", "bytes_read"):
        counted = sum(layer[name] for layer in layers)
        assert counted == total[name] == sum(phase[name] for phase in phases.values()), name
    singles = found["layers"]["generation"]
    assert all(layer["asked"] == TOP_K * layer["steps"] for layer in singles)
    assert all(layer["read_ms"] >= 0 and layer["experts_ms"] > 0 for layer in layers)


def test_tables(outputs):
    lines = outputs[1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.split()[:2] == ["phase", "tokens"])
    assert lines[start + 1].split()[0] == "prompt"
    assert lines[start + 2].split()[:2] == ["generation", str(TOKENS - 1)]
    assert [line.split()[0] for line in lines].count("all") == 2  # one table per phase


def test_picture(outputs):
    data = (outputs[0] / "p.png").read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 10_000


def test_stats_do_not_change_the_model(monkeypatch):
    """No proxy and no observer of requests stays."""
    model, _ = load(BUNDLED_MODEL, expert_cache="1500KiB")
    before = [(type(layer.mlp), type(layer.get("linear_attn"))) for layer in model.layers]
    monkeypatch.setattr(generate, "load", lambda *args, **kwargs: (model, load_tokenizer()))
    generate.main([*ARGUMENTS, "--stats"])
    after = [(type(layer.mlp), type(layer.get("linear_attn"))) for layer in model.layers]
    assert before == after and "request" not in vars(model._store)
    model.close()


def load_tokenizer():
    model, tokenizer = load(BUNDLED_MODEL, expert_cache="1500KiB")
    model.close()
    return tokenizer


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stats-json", "no/s.json"], r"--stats-json no/s\.json: .*/no is not a directory\."),
        (["--stats-json", "/"], r"--stats-json /: cannot be written \(Is a directory\)\."),
        (["--plot", "p.bmp"], r"--plot p\.bmp: not an image file\. Use \.png, \.svg, \.pdf\."),
        (["--plot", "no/p.png"], r"--plot no/p\.png: .*/no is not a directory\."),
    ],
)
def test_bad_files(flags, message, capsys):
    with pytest.raises(SystemExit) as ended:
        generate.main(["-m", "1", *flags])
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_line():
    before = ExpertStats(asked=10, hits=5, bytes_read=10**6, seconds_reading=1.0)
    after = ExpertStats(asked=30, hits=20, bytes_read=3 * 10**9 + 10**6, seconds_reading=2.5)
    line = status_line(12.34, before, after)
    assert line == "[flashmoe] 12.3 tokens/s, 2.00 GB/s while reading, 75.0% hits"
    assert status_line(1, after, after) == "[flashmoe] 1.0 tokens/s, nothing read, 100.0% hits"


def test_hit_rate_without_requests(capsys):
    model, _ = load(BUNDLED_MODEL)
    said = str(ExpertStats(bytes_preloaded=2 * 10**6, seconds_preloading=0.5))
    assert said == "Experts: all are resident, nothing is read; 2.0 MB at load in 0.50 s"
    stats = RunStats(model)
    stats.print()
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [row.split()[4:6] for row in rows] == [["0", "-"]] * 2


def test_one_line_per_update_without_a_terminal(capsys, monkeypatch):
    live = Live(ExpertStats())
    with live.shown():
        live.update(lambda: ExpertStats())
        assert capsys.readouterr().err == ""
        monkeypatch.setattr(live, "_then", time.perf_counter() - 2)
        live.update(lambda: ExpertStats(asked=4, hits=1))
    assert re.fullmatch(
        r"\[flashmoe\] [01]\.\d tokens/s, nothing read, 25\.0% hits\n", capsys.readouterr().err
    )


SHOW = """
import time
from flashmoe_mlx.store.stats import ExpertStats
from flashmoe_mlx.cli.live import Live
live = Live(ExpertStats())
with live.shown():
    print("text", end="", flush=True)
    live._then -= 1
    live.update(lambda: ExpertStats(asked=2, hits=1))
"""


def test_the_last_line_of_a_terminal():
    """The other lines scroll above it; at the end it is empty, and all lines scroll again."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"LINES": "20", "COLUMNS": "60"}
    subprocess.run([sys.executable, "-c", SHOW], stdout=theirs, stderr=theirs, env=environment)
    output = os.read(ours, 10_000).decode()
    os.close(ours)
    os.close(theirs)
    region, text, line, end = (
        output.index(part)
        for part in (
            "\x1b[1;19r",
            "text",
            "\x1b[20;1H\x1b[2K[flashmoe] 1.0",
            "\x1b[r\x1b[20;1H",
        )
    )
    assert region < text < line < end
