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
from flashmoe_mlx.cli import answer
from flashmoe_mlx.cli.live import WINDOW, Live, reads, recent_rate
from flashmoe_mlx.loader import BUNDLED_MODEL
from flashmoe_mlx.profile.stats import RunStats, TokenTimes
from flashmoe_mlx.store.store import ExpertStats

generate = importlib.import_module("flashmoe_mlx.cli.generate")
TOKENS, LAYERS, TOP_K = 6, 4, 4
ARGUMENTS = ["--prompt", "What is a library?", "-m", str(TOKENS), "--expert-cache", "1500KiB"]


def text_of(output: str) -> str:
    return output.partition("\n\nTokens: ")[0]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Return the output of a run with all reports and of one without, and the directory."""
    folder, printed = tmp_path_factory.mktemp("stats"), []
    watched = [
        "--live",
        "--stats",
        "--stats-json",
        str(folder / "s.json"),
        "--plot",
        str(folder / "p.png"),
    ]
    for flags in (watched, []):
        with pytest.MonkeyPatch.context() as patch:
            lines: list[str] = []
            patch.setattr("sys.stdout.write", lines.append)
            patch.setattr("sys.stderr.write", lines.append)
            generate.main([*ARGUMENTS, *flags])
        printed.append("".join(lines))
    return folder, *printed


def test_a_watched_run_gives_the_same_text(outputs):
    _, watched, plain = outputs
    assert text_of(plain) and watched.startswith(text_of(plain))
    assert "phase" not in plain


def test_the_summary(outputs):
    tokens, experts, memory, bundled = outputs[2].split("\n\n")[1].splitlines()
    assert re.fullmatch(rf"Tokens: 19 read at \S+ tok/s, {TOKENS} written at \S+ tok/s", tokens)
    assert re.fullmatch(r"Experts: 9% in memory, \d+% hits, read \d+ MB at .* GB/s(, .*)?", experts)
    assert re.fullmatch(r"Memory: \d+ MiB at peak", memory)
    assert bundled.startswith("20 MB test model: ")
    assert "\x1b" not in outputs[2]


def test_no_summary_if_asked(capsys):
    generate.main([*ARGUMENTS, "--verbose", "False"])
    assert capsys.readouterr().out.count("\n") == 1


def test_all_reports_count_the_same_tokens(outputs):
    """The summary, the phases, the JSON file and --live."""
    folder, watched, _ = outputs
    found = json.loads((folder / "s.json").read_text())
    said = re.search(r"(\d+) read at .*, (\d+) written", watched).groups()
    rows = [re.search(rf"^ *{name} +(\d+) ", watched, re.M)[1] for name in ("prompt", "generation")]
    phases = [str(phase["tokens"]) for phase in found["phases"].values()]
    assert [*said] == rows == phases == [str(n) for n in found["tokens"].values()]
    assert re.findall(r"\[flashmoe\] (\d+) tokens in", watched)[-1] == said[1] == str(TOKENS)


def test_json_adds_up(outputs):
    found = json.loads((outputs[0] / "s.json").read_text())
    phases, total = found["phases"], found["total"]
    assert phases["generation"]["tokens"] == TOKENS == len(found["tokens_per_s"]) + 1
    rate = phases["generation"]["tokens_per_s"]
    assert rate * phases["generation"]["seconds"] == pytest.approx(TOKENS - 1)
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
    assert lines[start + 2].split()[:2] == ["generation", str(TOKENS)]
    assert [line.split()[:1] for line in lines].count(["all"]) == 2  # one table per phase


def test_picture(outputs):
    data = (outputs[0] / "p.png").read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 10_000


def test_stats_do_not_change_the_model(monkeypatch):
    """No proxy and no observer of requests stays."""
    model, _ = load(BUNDLED_MODEL, expert_cache="1500KiB")
    before = [(type(layer.mlp), type(layer.get("linear_attn"))) for layer in model.layers]
    monkeypatch.setattr(answer, "load", lambda *args, **kwargs: (model, load_tokenizer()))
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
        generate.main(["Hello", "-m", "1", *flags])
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_reads():
    before = ExpertStats(asked=10, hits=5, bytes_read=10**6, seconds_reading=1.0)
    after = ExpertStats(asked=30, hits=20, bytes_read=3 * 10**9 + 10**6, seconds_reading=2.5)
    assert reads(before, after) == "2.00 GB/s while reading, 75% hits"
    assert reads(after, after) == "nothing read, 100% hits"


def test_the_rate_is_that_of_the_last_seconds():
    slow, fast = [10 * n for n in range(5)], [40 + n / 10 for n in range(1, 41)]
    assert recent_rate([]) == recent_rate([5.0]) == 0
    assert recent_rate(slow) == 0.1  # the last token took longer than the window
    assert recent_rate(slow + fast) == pytest.approx(10)
    assert recent_rate(slow + fast[:5]) == pytest.approx(10)


def test_hit_rate_without_requests(capsys):
    model, _ = load(BUNDLED_MODEL)
    said = str(ExpertStats(bytes_preloaded=2 * 10**6, seconds_preloading=0.5))
    assert said == "Experts: all are resident, nothing is read; 2.0 MB at load in 0.50 s"
    stats = RunStats(model, TokenTimes(0))
    stats.print()
    rows = capsys.readouterr().out.splitlines()[3:]
    assert [row.split()[4:6] for row in rows] == [["0", "-"]] * 2


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_live_shows_tokens_time_and_the_reads_of_the_window():
    clock, counted = Clock(), ExpertStats()
    times = TokenTimes(19, clock)
    live = Live(times, lambda: counted)
    clock.now = 61.9
    assert live.line() == "[flashmoe] reading 19 tokens, 1:01"
    for second in range(62, 70):  # half of the experts hit until 66, all after that
        clock.now = second
        counted.asked += 4
        counted.hits += 2 if second <= 66 else 4
        times.note()
        live.note()
    assert live.line() == "[flashmoe] 8 tokens in 1:09, 1.0 tok/s, nothing read, 100% hits"
    assert live._counted[0][0] == 69 - WINDOW


def test_without_a_terminal_live_writes_a_line_a_second(capsys):
    """Also while no token comes; the last line is that of the end."""
    times = TokenTimes(19)
    live = Live(times, ExpertStats)
    live._interval /= 20
    with live.shown():
        time.sleep(0.25)
        times.note()
        live.note()
    *before, last = capsys.readouterr().err.splitlines()
    assert len(before) >= 2 and set(before) == {"[flashmoe] reading 19 tokens, 0:00"}
    assert last.startswith("[flashmoe] 1 tokens in 0:00, ")


SHOW = """
import time
from flashmoe_mlx.store.stats import ExpertStats
from flashmoe_mlx.cli.live import Live
from flashmoe_mlx.profile.stats import TokenTimes
times = TokenTimes(19)
with Live(times, ExpertStats).shown():
    print("text", end="", flush=True)
    times.note()
    time.sleep(0.5)
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
            "\x1b[20;1H\x1b[2K[flashmoe] 1 tokens in 0:00",
            "\x1b[r\x1b[20;1H",
        )
    )
    assert region < text < line < end
