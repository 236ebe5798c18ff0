"""Sizes, times and rates as people read them; marks where the terminal has no Unicode."""

import io
import sys

import pytest

from flashmoe_mlx.cli.text import duration, mark, place, rate, size, table


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"), (999, "999 B"), (627_000, "627 kB"), (999_999, "1 MB"), (1_769_472, "1.77 MB"),
        (65.2e9, "65.2 GB"), (223e9, "223 GB"), (1.5e12, "1,500 GB"),
    ],
)  # fmt: skip
def test_size(nbytes, text):
    assert size(nbytes) == text


@pytest.mark.parametrize(
    ("per_s", "text"), [(0.463, "0.46"), (9.94, "9.9"), (9.96, "10"), (134.2, "134")]
)
def test_rate(per_s, text):
    assert rate(per_s) == text


def test_duration():
    assert [duration(s) for s in (37e-6, 0.14, 2.5)] == ["0.037 ms", "140 ms", "2.5 s"]


def test_place(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    paths = ("/home/ada", "/home/ada/models", "/home/adam", "/data")
    assert [place(path) for path in paths] == ["~", "~/models", "/home/adam", "/data"]


def test_table():
    assert table([["a", "bits"], ["bcd", "4"]], right=(1,)) == ["a    bits", "bcd     4"]


@pytest.mark.parametrize(
    ("encoding", "marks"), [("utf-8", ["✓", "✗", "–"]), ("ascii", ["ok", "FAILS", "-"])]
)
def test_marks(encoding, marks, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    assert [mark(ok) for ok in (True, False, None)] == marks
