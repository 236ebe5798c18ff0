"""What others measured and published (published.toml), beside what `plan_model` predicts for it."""

import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Any

from .plan_model import Engine, Machine, decode, hit_rate, named_args, prefill_seconds, weigh

_DATA = tomllib.loads(resources.files(__package__).joinpath("published.toml").read_text("utf-8"))
MACHINES = {
    name: Machine(x["memory"] * 1e9, x["ssd"] * 1e9, x["bandwidth"] * 1e9, x["source"])
    for name, x in _DATA["machines"].items()
}
ENGINES = {name: Engine(**values) for name, values in _DATA["engines"].items()}
_ALL_ENGINES = ENGINES | {name: Engine(**x) for name, x in _DATA["other_engines"].items()}
MLX_RESIDENT = _ALL_ENGINES["mlx-resident"]


@dataclass(frozen=True)
class Setup:
    """What was measured: names of model, machine and engine; and where it was published."""

    name: str
    model: str
    machine: str
    engine: str
    source: str


@dataclass(frozen=True)
class Row:
    """One published measurement; published.toml explains the fields."""

    setup: Setup
    name: str
    published: float
    unit: str = "tok/s"
    bits: float = 4
    top_k: int = 4
    slots: int = 0
    cache_gib: float = 0
    kind: str = "predicted"
    tokens: int = 0

    def predicted(self) -> float:
        """Return what the model says, in the row's unit."""
        weights = weigh(named_args(self.setup.model), self.bits, self.top_k)
        machine, engine = MACHINES[self.setup.machine], _ALL_ENGINES[self.setup.engine]
        cache = self.cache_gib * 2**30 or self.slots * weights.layers * weights.record
        cache = min(cache, weights.expert_bytes)
        found = decode(weights, machine, engine, cache)
        if self.unit == "% hits":
            return 100 * hit_rate((cache or found.page_cache) / weights.expert_bytes)
        if self.unit == "ms":
            return 1e3 * (found.copied + found.read)
        if self.tokens:
            return self.tokens / prefill_seconds(weights, machine, engine, self.tokens, cache)
        return 1 / found.seconds

    @property
    def error(self) -> float:
        """(predicted - published) / published."""
        return self.predicted() / self.published - 1

    def as_dict(self) -> dict[str, Any]:
        """Return the row as plain JSON values."""
        return {
            "row": f"{self.setup.name}, {self.name}", "unit": self.unit,
            "published": self.published, "predicted": self.predicted(), "error": self.error,
            "kind": self.kind, "source": self.setup.source,
        }  # fmt: skip


_SETUPS = {name: Setup(**values) for name, values in _DATA["setups"].items()}
ROWS = [Row(**row | {"setup": _SETUPS[row["setup"]]}) for row in _DATA["published"]["rows"]]


def tally(limit: float = 0.2) -> tuple[int, int]:
    """Return how many predicted decode rows lie within the limit, and how many there are."""
    rows = [row for row in ROWS if row.unit == "tok/s" and row.kind == "predicted"]
    return sum(abs(row.error) <= limit for row in rows), len(rows)
