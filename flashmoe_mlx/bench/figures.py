"""A benchmark's figures: what a run took, its floor, and what others published.

A run's *floor* is the time that no way of streaming could undercut here: the bytes that had to
come from the disk, at the bandwidth measured in the same run, or the time to compute with nothing
to read, whichever is longer.
"""

import statistics
from typing import Any

from ..models.qwen3_5.geometry import GEOMETRIES
from ..profile.counters import Floor, Use
from ..store.memory import peak_bytes
from ..cli.published import ROWS
from .synthetic import Recipe


def result(use: Use, tokens: int, floor: Floor) -> dict[str, Any]:
    """Return one run's figures as JSON values."""
    stats = use.stats
    return {
        "tokens_per_s": tokens / use.seconds,
        "hit_rate": stats.hit_rate,
        "bytes_per_token": stats.bytes_read / tokens,
        "useless_bytes_per_token": stats.bytes_useless / tokens,
        "disk_bytes_per_token": None if use.from_disk is None else use.from_disk / tokens,
        "read_bytes_per_s": stats.bytes_read / stats.seconds_waited if stats.reads else None,
        "cpu_user_s": use.user,
        "cpu_system_s": use.system,
        "floor_disk_s": floor.disk,
        "floor_compute_s": floor.compute,
        "share_of_floor": floor.seconds / use.seconds,
    }


HEADER = (
    f"{'tok/s':>9} {'hits':>6} {'MB/token':>9} {'in vain':>8} {'disk MB':>9} {'GB/s':>6} "
    f"{'disk ms':>9} {'comp. ms':>9} {'share':>6} {'user ms':>8} {'sys ms':>7}  run"
)
LEGEND = (
    "MB/token: read into the banks; in vain: of wrong guesses; disk MB: what the disk delivered; "
    "GB/s: while waiting for reads;\n"
    "disk, comp. ms: a token's least time by the disk and by computing; share: of the longer in "
    "the time taken;\nuser, sys ms: of all cores, in the program and in the kernel"
)


def line(row: dict[str, Any], tokens: int, name: str) -> str:
    """Return a `result` as one line under HEADER."""
    disk, speed = row["disk_bytes_per_token"], row["read_bytes_per_s"]
    return " ".join((
        f"{row['tokens_per_s']:9.2f} {row['hit_rate']:6.1%} {row['bytes_per_token'] / 1e6:9.2f}",
        f"{row['useless_bytes_per_token'] / 1e6:8.2f}",
        f"{'-' if disk is None else f'{disk / 1e6:.2f}':>9}",
        f"{'-' if speed is None else f'{speed / 1e9:.2f}':>6}",
        f"{row['floor_disk_s'] / tokens * 1e3:9.2f} {row['floor_compute_s'] / tokens * 1e3:9.2f}",
        f"{row['share_of_floor']:6.0%} {row['cpu_user_s'] / tokens * 1e3:8.2f}",
        f"{row['cpu_system_s'] / tokens * 1e3:7.2f}  {name}",
    ))  # fmt: skip


def middle(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the row of median speed."""
    speed = statistics.median_low(row["tokens_per_s"] for row in rows)
    return next(row for row in rows if row["tokens_per_s"] == speed)


def published(recipe: Recipe, unit: str) -> list[dict[str, Any]]:
    """Return what others published for whole models of this geometry and width, in `unit`."""
    layers = GEOMETRIES[recipe.geometry].num_hidden_layers
    return [
        {
            "name": f"{row.setup.name}, {row.name}, K={row.top_k}",
            "tokens_per_s": row.published,
            "ms_per_layer": 1e3 / row.published / layers,
            "source": row.setup.source,
        }
        for row in ROWS
        if (row.setup.model, row.bits, row.unit) == (recipe.geometry, recipe.bits, unit)
    ]


def print_published(rows: list[dict[str, Any]], ours: float) -> None:
    """Print published figures beside ours, which is milliseconds per token and layer."""
    if rows:
        print(f"ms per token and layer: {ours:.3f} here; published, of whole models elsewhere:")
    for row in rows:
        print(f"{row['ms_per_layer']:9.3f}  {row['tokens_per_s']} tok/s: {row['name']}")


def peak() -> dict[str, int]:
    """Print and return this process's peak memory, in bytes."""
    print(f"peak resident memory: {peak_bytes() / 2**20:.0f} MiB")
    return {"peak_bytes": peak_bytes()}
