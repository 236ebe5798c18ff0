"""Which published models this machine can run, how fast by prediction, and the command for it."""

import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..store.io_mode import USEFUL_CACHE
from ..store.sizing import automatic_bytes
from .here import Here, models_folder
from .plan_model import Weights, count_bytes, decode, named_args, needed_bytes
from .published import ENGINES, MLX_RESIDENT
from .text import mark, place, rate, size, table

MODELS = {"35b": "Qwen3.5-35B-A3B", "122b": "Qwen3.5-122B-A10B", "397b": "Qwen3.5-397B-A17B"}
SHARDS = 11e9  # disk that a conversion needs besides its output: two files of the source


@dataclass(frozen=True)
class Row:
    """One model at one width.

    Attributes:
        model: its name in `flashmoe-plan --model`.
        name: its full name.
        bits: per expert weight.
        fits: whether memory holds the trunk and one token's experts.
        resident: whether all experts stay in memory.
        memory_needed: the least memory that can be free.
        cache: bytes of the expert cache that `auto` chooses.
        disk_needed: trunk and experts, and room to convert them where that pays.
        disk_fits: whether that much is free.
        tokens_per_s: the prediction, None if it does not fit or has no figures to start from.
        commands: to paste.
    """

    model: str
    name: str
    bits: int
    fits: bool
    resident: bool
    memory_needed: float
    cache: float
    disk_needed: float
    disk_fits: bool
    tokens_per_s: float | None
    commands: tuple[str, ...]

    @property
    def runs(self) -> bool:
        """Whether memory and disk suffice."""
        return self.fits and self.disk_fits

    def expected(self) -> str:
        """Return the speed in words."""
        if self.tokens_per_s is None:
            return "speed not predicted"
        return f"about {rate(self.tokens_per_s)} tokens/s (predicted)"


def what_runs(here: Here) -> list[Row]:
    """Return a row per model at 4 bits, and at 2 bits where 4 do not stay in memory."""
    found = []
    for model in MODELS:
        found.append(_row(model, 4, here))
        if not found[-1].resident:
            found.append(_row(model, 2, here))
    return found


def _row(model: str, bits: int, here: Here) -> Row:
    weights, machine = count_bytes(named_args(model), bits), here.machine()
    needed, room = needed_bytes(weights, machine), machine.memory
    if here.gpu_memory is not None:  # it holds the trunk and the cache
        needed, room = weights.trunk + weights.token_bytes, here.gpu_memory
    cache = _cache(weights, here)
    fits, resident = needed <= room, cache >= weights.expert_bytes
    ready = resident and bits == 4  # runs at full speed without a conversion
    disk = weights.trunk + weights.expert_bytes + (0 if ready else SHARDS)
    speed = _speed(weights, here, cache) if fits else None
    commands = _commands(model, bits, ready, here.folder)
    return Row(
        model, MODELS[model], bits, fits, resident, needed, cache, disk, disk <= here.free, speed,
        commands,
    )  # fmt: skip


def _cache(weights: Weights, here: Here) -> float:
    """Return the bytes that `auto` gives to the expert cache of a converted model."""
    experts, trunk = round(weights.expert_bytes), round(weights.trunk)
    small = here.available - trunk < USEFUL_CACHE * experts  # for a page cache
    alone = here.gpu_memory is not None or (small and sys.platform != "darwin")
    available = here.available if here.gpu_memory is None else here.gpu_memory
    share, _ = automatic_bytes(experts, trunk, available, alone)
    return max(weights.token_bytes, min(share, experts))


def _speed(weights: Weights, here: Here, cache: float) -> float | None:
    resident = cache >= weights.expert_bytes
    if here.gpu_memory is not None or (isinstance(here.read, str) and not resident):
        return None
    engine = MLX_RESIDENT if resident else ENGINES["flash-moe"]
    return 1 / decode(weights, here.machine(), engine, cache).seconds


def _commands(model: str, bits: int, ready: bool, folder: Path) -> tuple[str, ...]:
    repo = f"mlx-community/{MODELS[model]}-4bit"
    if ready:
        return (generate_command(repo),)
    out = f"qwen-{model}" + ("-2bit" if bits == 2 else "")
    if folder != models_folder():
        out = str(folder / out)
    quantize = " -q --q-bits 2" if bits == 2 else ""
    convert = f"flashmoe-convert --hf-path {repo} --mlx-path {shlex.quote(out)}{quantize}"
    return convert, generate_command(out)


def generate_command(model: str | None) -> str:
    """Return the command that runs a model, None for the bundled one."""
    named = "" if model is None else f" --model {shlex.quote(model)}"
    return f'flashmoe-generate{named} --prompt "Hello"'


def best(rows: list[Row]) -> dict[str, Row]:
    """Return the fastest and the largest model that run; at 2 bits only if not at 4."""
    running = [row for row in rows if row.runs]
    if not running:
        return {}
    fastest = max(running, key=lambda row: (row.bits, row.tokens_per_s or 0))
    largest = next(row for row in running if row.model == running[-1].model)
    return {"fastest": fastest} | ({} if largest == fastest else {"largest": largest})


def as_dict(here: Here, rows: list[Row]) -> dict[str, Any]:
    """Return machine, rows and the best rows as plain JSON values."""
    chosen = {why: asdict(row) for why, row in best(rows).items()}
    return {"machine": here.as_dict(), "rows": [asdict(row) for row in rows], "best": chosen}


def render_machine(here: Here) -> list[tuple[str, str]]:
    """Return the lines about the machine: (subject, text)."""
    gpu = here.gpu or "no GPU that MLX computes on"
    if here.gpu_memory is not None:
        gpu += f", {size(here.gpu_memory)} free"
    memory = f"{size(here.available)} available of {size(here.memory)}"
    if here.limit:
        memory += f", cgroup limit {size(here.limit)}"
    read = here.read if isinstance(here.read, str) else f"{size(here.read.bytes_per_s)}/s cold"
    copy = f", {size(here.copy)}/s from the page cache" if here.copy else ""
    return [
        ("machine", f"{here.cpu}, {here.cores} cores; {gpu}"),
        ("memory", f"{memory}; {size(here.bandwidth)}/s ({here.bandwidth_source})"),
        ("disk", f"{size(here.free)} free at {place(here.folder)}; reads: {read}{copy}"),
    ]


def render_rows(found: dict[str, Any]) -> list[str]:
    """Return `as_dict`'s table, what its figures mean, and the commands of the best rows."""
    rows = [Row(**row) for row in found["rows"]]
    head = ["model", "bits", "memory", "tokens/s", "disk"]
    cells = table([head, *(_cells(row) for row in rows)], right=(1, 3))
    return [*cells, "", *_notes(found["machine"], rows), *_advice(rows)]


def _cells(row: Row) -> list[str]:
    how = "resident: all experts" if row.resident else f"streamed: {size(row.cache)} expert cache"
    if not row.fits:
        how = f"needs {size(row.memory_needed)}"
    speed = mark(None) if row.tokens_per_s is None else rate(row.tokens_per_s)
    disk = size(row.disk_needed)
    return [
        row.name, str(row.bits), f"{mark(row.fits)} {how}", speed, f"{mark(row.disk_fits)} {disk}"
    ]  # fmt: skip


def _notes(machine: dict[str, Any], rows: list[Row]) -> list[str]:
    notes = ["tokens/s is predicted, not measured (docs/reference/plan.md)"]
    if machine["gpu_memory"] is not None:
        notes = ["flashmoe-plan has no figures for GPUs with their own memory: no tokens/s"]
    elif machine["gpu"] is None:
        notes.append("an upper bound on a CPU, whose arithmetic it does not count")
    if isinstance(machine["read"], str):
        notes.append("none for streamed models, because the disk could not be measured")
    lines = [f"{'; '.join(notes)}."]
    if any(len(row.commands) > 1 for row in rows):
        lines.append(f"disk: with {size(SHARDS)} that a conversion needs while it runs.")
    if any(row.bits == 2 for row in rows):
        lines.append("2 bits lose quality: see docs/guides/quantize.md before you choose them.")
    return lines


def _advice(rows: list[Row]) -> list[str]:
    lines = []
    for why, row in best(rows).items():
        lines += ["", f"{why.capitalize()}, at {row.bits} bits: {row.name}, {row.expected()}"]
        lines += [f"  {command}" for command in row.commands]
    if not lines:
        lines = ["", "Nothing fits: free memory or disk, or try the bundled model:"]
        lines += [f"  {generate_command(None)}"]
    return lines
