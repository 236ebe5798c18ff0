"""Which experts each of several machines has. Standard library only."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from math import gcd
from pathlib import Path
from typing import Any

from ..errors import FlashMoEError, shown


@dataclass(frozen=True)
class Placement:
    """One rank's part of every layer's experts.

    Equal weights deal experts in turn, e mod ranks: neighbours often work together. Other weights
    give each rank a contiguous range.

    Attributes:
        rank: this machine's number.
        weights: each rank's share, such as (2, 1) for two thirds and one third; without common
            divisor.
    """

    rank: int
    weights: tuple[int, ...]

    def __post_init__(self) -> None:
        """Divide the weights by their greatest common divisor."""
        most = gcd(*self.weights)
        object.__setattr__(self, "weights", tuple(weight // most for weight in self.weights))

    @property
    def size(self) -> int:
        """The number of ranks."""
        return len(self.weights)

    def experts(self, count: int) -> range:
        """Return this rank's experts of a layer with `count`.

        Raises:
            FlashMoEError: it would have none.
        """
        if len(set(self.weights)) == 1:
            found = range(self.rank, count, self.size)
        else:
            total = sum(self.weights)
            ends = [round(count * part / total) for part in accumulate(self.weights)]
            found = range(ends[self.rank - 1] if self.rank else 0, ends[self.rank])
        if not found:
            raise FlashMoEError(
                f"rank {self.rank} of {self.size} would have none of {count} experts. Start fewer "
                "ranks, or give it a larger weight."
            )
        return found

    def __str__(self) -> str:
        """Describe it, such as "rank 1 of 2, weights 2,1"."""
        weights = (
            f", weights {','.join(map(str, self.weights))}" if len(set(self.weights)) > 1 else ""
        )
        return f"rank {self.rank} of {self.size}{weights}"

    def as_json(self) -> dict[str, Any]:
        """Return what `read_placement` reads."""
        return {"rank": self.rank, "weights": list(self.weights)}


def read_placement(manifest: Mapping[str, Any], path: Path) -> Placement | None:
    """Return whose experts a directory holds, by its manifest; None if it holds all.

    Raises:
        FlashMoEError: the entry "placement" is not one; `path` is the manifest's.
    """
    if (found := manifest.get("placement")) is None:
        return None
    entry = found if isinstance(found, dict) else {}
    rank, weights = entry.get("rank"), entry.get("weights")
    if not (
        entry.keys() == {"rank", "weights"}
        and isinstance(weights, list)
        and all(type(weight) is int and weight > 0 for weight in weights)
        and type(rank) is int
        and 0 <= rank < len(weights)
    ):
        raise FlashMoEError(
            f"{path}: placement = {shown(found)} is not one of several ranks with the weights of "
            'all, such as {"rank": 1, "weights": [2, 1]}. Convert the model again.'
        )
    return Placement(rank, tuple(weights))
