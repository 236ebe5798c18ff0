"""The summary at the end of a run: three lines of at most 80 columns, without zeros."""

import os
import pty

import pytest

from flashmoe_mlx.cli import summary
from flashmoe_mlx.loader import BUNDLED_MODEL
from flashmoe_mlx.profile import stats
from flashmoe_mlx.profile.stats import TokenTimes
from flashmoe_mlx.store.stats import ExpertStats

GB = 10**9


def times(prompt: int, *seconds: float) -> TokenTimes:
    """Return the times of tokens that arrive at `seconds`."""
    clock = iter((0.0, *seconds))
    made = TokenTimes(prompt, lambda: next(clock))
    for _ in seconds:
        made.note()
    return made


def test_tokens():
    line = summary.tokens_line(times(72, 0.5, 1.0, 1.5, 2.0))
    assert line == "Tokens: 72 read at 144 tok/s, 4 written at 2.00 tok/s"
    assert summary.tokens_line(times(72, 4.0)) == "Tokens: 72 read at 18.0 tok/s, 1 written"


def test_first_use_is_no_part_of_the_rate(monkeypatch):
    used = iter([5.0, 7.5])  # seconds, before the prompt and after it
    monkeypatch.setattr(stats, "first_use_seconds", lambda: next(used))
    assert times(10, 3.0).prompt_rate == 20  # 10 tokens in 3 s, of which 2.5 s were first use


READS = ExpertStats(
    asked=3000, hits=810, reads=40, bytes_read=40 * 10**6, seconds_reading=0.22, seconds_waited=0.12
)


@pytest.mark.parametrize(
    ("counters", "counts", "line"),
    [
        (
            READS, (52, 400),
            "Experts: 13% in memory, 27% hits, read 40 MB at 0.18 GB/s, waited 0.1 s",
        ),
        (READS, (400, 400), "Experts: all 400 in memory"),
        (ExpertStats(), (240, 30720), "Experts: 1% in memory"),
        (ExpertStats(asked=8, hits=8), (399, 400), "Experts: 100% in memory, 100% hits"),
        (
            ExpertStats(asked=9, bytes_read=1234 * 10**6, seconds_waited=12.3), (200, 400),
            "Experts: 50% in memory, 0% hits, read 1.23 GB, waited 12 s",
        ),
    ],
)  # fmt: skip
def test_experts(counters, counts, line):
    assert summary.experts_line(counters, *counts) == line


def test_the_longest_lines_fit_in_80_columns():
    large = ExpertStats(10**9, 10**9 - 1, 10**9, 4025 * GB, 4025 / 18.25, 12345.6)
    assert len(summary.experts_line(large, 30719, 30720)) <= 80
    assert (
        len(summary.tokens_line(times(262144, 1e-2, *(1 + n / 999 for n in range(262143))))) <= 80
    )
    assert len(summary.BUNDLED) <= 80


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0.00"), (0.034, "0.03"), (0.18, "0.18"), (9.994, "9.99"), (9.996, "10.0"),
     (99.94, "99.9"), (99.96, "100"), (1234.5, "1234")],
)  # fmt: skip
def test_numbers(number, text):
    assert summary.three(number) == text


def test_memory():
    assert summary.memory(223 << 20) == "223 MiB"
    assert summary.memory(24 << 30) == "24.00 GiB"


def test_the_bundled_models_size():
    megabytes = sum(path.stat().st_size for path in BUNDLED_MODEL.iterdir()) / 1e6
    assert summary.BUNDLED.startswith(f"{round(megabytes, -1):.0f} MB test model")


@pytest.mark.parametrize(("no_color", "colors"), [(None, True), ("", True), ("0", False)])
def test_colors_only_on_a_terminal_without_no_color(no_color, colors, monkeypatch, capsys):
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color is not None:
        monkeypatch.setenv("NO_COLOR", no_color)
    assert not summary.has_colors()
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr("sys.stdout", terminal)
        assert summary.has_colors() is colors
    os.close(ours)
