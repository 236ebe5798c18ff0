"""Text for people: sizes, ticks and tables."""

import sys
from collections.abc import Sequence
from pathlib import Path


def size(nbytes: float) -> str:
    """Format bytes with three digits: 627 kB, 1.77 MB, 65.2 GB."""
    for unit, power in (("B", 0), ("kB", 3), ("MB", 6)):
        if nbytes < 999.5 * 10**power:
            return f"{nbytes / 10**power:.3g} {unit}"
    return f"{nbytes / 1e9:.3g} GB" if nbytes < 999.5e9 else f"{nbytes / 1e9:,.0f} GB"


def place(path: Path | str) -> str:
    """Shorten the home folder to ~."""
    home, text = str(Path.home()), str(path)
    return f"~{text[len(home) :]}" if text == home or text.startswith(f"{home}/") else text


def rate(per_s: float) -> str:
    """Format a rate with two digits or more: 0.46, 9.2, 134."""
    return f"{per_s:.0f}" if per_s >= 10 else f"{per_s:.2g}"


def duration(seconds: float) -> str:
    """Format a time with two digits or more: 0.037 ms, 140 ms, 2.5 s."""
    return f"{rate(seconds)} s" if seconds >= 1 else f"{rate(1e3 * seconds)} ms"


def mark(ok: bool | None) -> str:
    """Return a tick, a cross, or a dash for a check that did not run; ASCII if need be."""
    sign = {True: "✓", False: "✗", None: "–"}[ok]
    try:
        sign.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return {True: "ok", False: "FAILS", None: "-"}[ok]
    return sign


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Align cells in columns, those in `right` to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
