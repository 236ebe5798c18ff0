"""The summary at the end of a run: tokens, experts and memory, a line each."""

import os
import sys
from typing import Any

from ..profile.stats import TokenTimes
from ..store.memory import peak_bytes
from ..store.stats import ExpertStats

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
BUNDLED = "20 MB test model: it shows that streaming works, not what a large model knows."


def print_summary(model: Any, times: TokenTimes, bundled: bool) -> None:
    """Print the summary on standard output, dimmed on a terminal."""
    lines = [
        tokens_line(times),
        experts_line(model.expert_stats(), *model.expert_counts()),
        f"Memory: {memory(peak_bytes())} at peak",
        *([BUNDLED] if bundled else []),
    ]
    before, after = (DIM, PLAIN) if has_colors() else ("", "")
    for line in lines:
        print(f"{before}{line}{after}")


def has_colors() -> bool:
    """Say whether standard output is a terminal, and NO_COLOR is not set."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def tokens_line(times: TokenTimes) -> str:
    """Say how many tokens were read and written, and how fast; a single token has no rate."""
    parts = (times.prompt, "read", times.prompt_rate), (times.count, "written", times.rate)
    said = (f"{n} {done}" + (f" at {three(rate)} tok/s" if rate else "") for n, done, rate in parts)
    return "Tokens: " + ", ".join(said)


def experts_line(stats: ExpertStats, resident: int, experts: int) -> str:
    """Describe experts in memory, of all layers, and their reads since loading, without zeros."""
    if resident == experts:
        return f"Experts: all {experts} in memory"
    parts = [f"Experts: {max(resident / experts, 0.01):.0%} in memory"]
    if stats.asked:
        parts.append(f"{stats.hit_rate:.0%} hits")
    if stats.bytes_read:
        reading = stats.seconds_reading
        rate = f" at {three(stats.bytes_read / reading / 1e9)} GB/s" if reading else ""
        parts.append(f"read {size(stats.bytes_read)}{rate}")
    if (waited := seconds(stats.seconds_waited)) != "0.0 s":
        parts.append(f"waited {waited}")
    return ", ".join(parts)


def size(nbytes: float) -> str:
    """Format bytes with up to three digits: 0 MB, 40 MB, 1.23 GB, 402 GB."""
    return f"{nbytes / 1e6:.0f} MB" if nbytes < 1e9 else f"{three(nbytes / 1e9)} GB"


def memory(nbytes: int) -> str:
    """Format memory: 223 MiB, 24.00 GiB."""
    return f"{nbytes / 2**20:.0f} MiB" if nbytes < 10 << 30 else f"{nbytes / 2**30:.2f} GiB"


def seconds(value: float) -> str:
    """Format a duration: 0.1 s, 12 s."""
    return f"{value:.1f} s" if value < 9.95 else f"{value:.0f} s"


def three(number: float) -> str:
    """Format a number of at least 0 with about three digits: 0.18, 83.9, 171."""
    decimals = next((d for d in (2, 1) if round(number, d) < 10 ** (3 - d)), 0)
    return f"{number:.{decimals}f}"
