"""Which experts each of several machines has. Standard library only."""

from dataclasses import dataclass
from itertools import accumulate

from ..errors import FlashMoEError


@dataclass(frozen=True)
class Placement:
    """One rank's part of every layer's experts.

    Equal weights deal experts in turn, e mod ranks: neighbours often work together. Other weights
    give each rank a contiguous range.

    Attributes:
        rank: this machine's number.
        weights: each rank's share, such as (2, 1) for two thirds and one third.
    """

    rank: int
    weights: tuple[int, ...]

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
