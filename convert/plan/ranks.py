"""Which ranks' experts a command writes, and the flags that ask for them."""

from pathlib import Path

from ...errors import FlashMoEError
from ...format.placement import Placement
from ...settings import MOST_RANKS, parse_weights


def placements(
    ranks: int | None, rank: int | None, weights: str | None, split: int | None
) -> list[Placement | None]:
    """Return whose experts go into each directory: [None] for one that has all.

    Raises:
        FlashMoEError: the options contradict each other, or are out of range.
    """
    if split is not None and (ranks, rank) != (None, None):
        raise FlashMoEError(
            f"--split {split} writes the directories of all ranks. Drop --ranks and --rank, or "
            "--split."
        )
    if (ranks is None) != (rank is None):
        raise FlashMoEError(
            f"--ranks {ranks} and --rank {rank} go together. Give the number of ranks, and one of "
            "them, counted from 0."
        )
    name, count = ("--ranks", ranks) if split is None else ("--split", split)
    if count is None:
        if weights is not None:
            raise FlashMoEError(
                f"--rank-weights {weights} has no effect without --ranks or --split. Add one, or "
                "drop it."
            )
        return [None]
    if not 2 <= count <= MOST_RANKS:
        raise FlashMoEError(f"{name} must be from 2 to {MOST_RANKS}, got {count}")
    if rank is not None and not 0 <= rank < count:
        raise FlashMoEError(f"--rank must be from 0 to {count - 1}, got {rank}")
    shares = (1,) * count if weights is None else parse_weights(weights, "--rank-weights")
    if len(shares) != count:
        raise FlashMoEError(
            f"--rank-weights {weights}: {len(shares)} weights for {count} ranks. Give one per rank."
        )
    return [Placement(n, shares) for n in (range(count) if rank is None else [rank])]


def outputs(out: Path, parts: list[Placement | None]) -> dict[Path, Placement | None]:
    """Return whose experts each directory gets; several of them are OUT-rank0, OUT-rank1, ..."""
    if len(parts) == 1:
        return {out: parts[0]}
    return {Path(f"{out}-rank{number}"): part for number, part in enumerate(parts)}


def rank_flags(placement: Placement | None) -> list[str]:
    """Return the words of the command line that ask for one rank's experts."""
    if placement is None:
        return []
    words = ["--ranks", str(placement.size), "--rank", str(placement.rank)]
    if len(set(placement.weights)) > 1:
        words += ["--rank-weights", ",".join(map(str, placement.weights))]
    return words
