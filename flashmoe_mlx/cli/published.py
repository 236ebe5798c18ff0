"""Published measurements (published.toml), and the predictions of `plan_model` for them."""

import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Any

from .plan_model import Engine, Machine, count_bytes, decode, hit_rate, named_args, prefill_seconds

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
    """What a source measured: names of model, machine and engine."""

    name: str
    model: str
    machine: str
    engine: str
    source: str


@dataclass(frozen=True)
class Row:
    """One measurement; published.toml explains the fields."""

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
        """Return the prediction, in the row's unit."""
        weights = count_bytes(named_args(self.setup.model), self.bits, self.top_k)
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


def count_within(limit: float = 0.2) -> tuple[int, int]:
    """Return the number of predicted decode rows whose error is within the limit, and of all."""
    rows = [row for row in ROWS if row.unit == "tok/s" and row.kind == "predicted"]
    return sum(abs(row.error) <= limit for row in rows), len(rows)
