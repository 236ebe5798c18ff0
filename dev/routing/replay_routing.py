"""Replay recorded routing through cache policies, and score ways to guess experts in advance.

    python dev/routing/replay_routing.py TRACES [--banks 10 25 50 75]

TRACES is a directory that `record_routing.py` or `routing_like.py` wrote. Its texts are replayed
one after the other, as one session; all calls go through the package's own waves.
"""

import argparse
import weakref
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from cache_policies import Belady, LeastDemand, Lru, Policy, S3Fifo

from flashmoe_mlx.models.qwen3_5.moe import StreamedExperts

Ids = npt.NDArray[np.int16]
HALF_LIVES = (32, 128, 512)  # uses


@dataclass(frozen=True)
class Trace:
    """The experts that one text asked for.

    Attributes:
        name: of the text.
        experts: per layer.
        record_bytes: of one expert.
        lengths: tokens of each call of the model; a call of one token is a decoding step.
        ids: `[tokens, layers, k]`, what the routers chose.
        before: `[tokens, layers - 1, 2 k]`, best first: what layer l + 1's router says to what
            goes into the experts of layer l.
        after: the same of what comes out of them.
    """

    name: str
    experts: int
    record_bytes: int
    lengths: npt.NDArray[np.int64]
    ids: Ids
    before: Ids | None = None
    after: Ids | None = None

    def save(self, directory: Path) -> None:
        """Write NAME.npz."""
        arrays = {k: v for k, v in asdict(self).items() if v is not None}
        np.savez_compressed(directory / f"{self.name}.npz", **arrays)

    @staticmethod
    def load(file: Path) -> "Trace":
        """Read what `save` wrote."""
        arrays = dict(np.load(file))
        name, experts, size = (arrays.pop(k)[()] for k in ("name", "experts", "record_bytes"))
        return Trace(str(name), int(experts), int(size), **arrays)

    def calls(self, layer: int) -> Iterator[Ids]:
        """Yield the ids `[tokens, k]` of each call of a layer."""
        yield from np.split(self.ids[:, layer], np.cumsum(self.lengths)[:-1])


Maker = Callable[[int, Sequence[Sequence[int]]], Policy]


class Asked:
    """Experts that stay until this is forgotten, as `expert_store.Pending`."""

    def __init__(self, experts: Sequence[int]) -> None:
        self.experts = experts

    def wait(self) -> Sequence[int]:
        """Return slots; here they are the ids."""
        return self.experts


class Waves(StreamedExperts):
    """The package's way to cut a prompt's experts into waves, for a store that reads nothing."""

    def __init__(self, store: "Replay") -> None:
        nn.Module.__init__(self)
        self._store, self._layer = store, 0  # type: ignore[assignment]


class Replay:
    """One layer's bank under a policy, in place of an `ExpertStore` that waits for a disk."""

    reads_compute = False
    complete = False  # also where all experts fit: the policy hears of each use

    def __init__(self, policy: Policy, experts: int) -> None:
        self.policy = policy
        self.layout = SimpleNamespace(num_experts=experts)
        self.banks = [self]
        self.arriving: frozenset[int] = frozenset()
        self._waves = Waves(self)
        self._asked: weakref.WeakSet[Asked] = weakref.WeakSet()
        self._step = self._missed = 0

    def __len__(self) -> int:
        """Return the number of slots."""
        return self.policy.slots

    def resident(self, experts: Sequence[int]) -> list[int]:
        """Return those in the bank."""
        return [e for e in experts if e in self.policy.held]

    def decide(self, layer: int, experts: Sequence[int]) -> None:
        """Do nothing: nothing was guessed."""

    def request(self, layer: int, experts: Sequence[int]) -> Asked:
        """Bring experts into the bank."""
        policy = self.policy
        missing = set(experts).difference(policy.held)
        keep = set(experts).union(*(asked.experts for asked in self._asked))
        for expert in sorted(missing):
            if len(policy.held) == policy.slots:
                policy.drop(keep)
            policy.add(expert)
        for expert in experts:
            policy.use(expert, expert in missing)
        self._missed += len(missing)
        asked = Asked(experts)
        self._asked.add(asked)
        return asked

    def run(self, ids: Ids) -> int:
        """Put one call's ids `[tokens, k]` through the bank, and return how many were missing."""
        before = self._missed
        self.policy.begin(self._step)
        if len(ids) == 1:  # the same waves, without working out places
            waves = self._waves._waves(np.sort(ids[0]), np.ones(ids.size))
            asked = [self.request(0, wave) for wave in waves]
            del asked
        else:
            for _ in self._waves.waves(ids.astype(np.int64)):
                pass
        self._step += 1
        return self._missed - before


@dataclass
class Count:
    """Experts used, once per call and layer, and those of them that had to be read."""

    used: int = 0
    missed: int = 0

    @property
    def hits(self) -> float:
        """Share that was in the bank."""
        return 1 - self.missed / self.used if self.used else 0.0


@dataclass
class Guess:
    """What a prediction is worth, in experts of decoded tokens.

    Attributes:
        used: experts that were used.
        right: those of them that were guessed.
        missed: experts that were not in the bank.
        found: those of them that were guessed.
        useless: guessed, not in the bank, and not used.
    """

    used: int = 0
    right: int = 0
    missed: int = 0
    found: int = 0
    useless: int = 0

    def score(self, guessed: set[int], used: set[int], held: Set[int]) -> None:
        """Count one token in one layer."""
        missed = used - held
        self.used += len(used)
        self.right += len(used & guessed)
        self.missed += len(missed)
        self.found += len(missed & guessed)
        self.useless += len(guessed - held - used)


def distinct(trace: Trace, layer: int) -> list[list[int]]:
    """Return the experts that each call of a layer uses."""
    return [np.unique(call).tolist() for call in trace.calls(layer)]


def replay(traces: Sequence[Trace], slots: int, make: Maker) -> dict[str, list[Count]]:
    """Put texts one after the other through banks of `slots`, one per layer.

    Returns:
        For each text, what its "prompt" and its decoded tokens ("decode") used.
    """
    counts = {kind: [Count() for _ in traces] for kind in ("prompt", "decode")}
    for layer in range(traces[0].ids.shape[1]):
        future = [experts for trace in traces for experts in distinct(trace, layer)]
        bank = Replay(make(slots, future), traces[0].experts)
        for number, trace in enumerate(traces):
            for call in trace.calls(layer):
                count = counts["decode" if len(call) == 1 else "prompt"][number]
                count.used += len(np.unique(call))
                count.missed += bank.run(call)
    return counts


def predict(traces: Sequence[Trace], slots: int) -> dict[str, Guess]:
    """Score guesses of the next experts, with banks of `slots` as the package keeps them."""
    guesses: dict[str, Guess] = {}
    k = traces[0].ids.shape[2]
    for layer in range(1, traces[0].ids.shape[1]):
        bank = Replay(LeastDemand(slots, traces[0].experts), traces[0].experts)
        for trace in traces:
            token = 0
            for call in trace.calls(layer):
                token += len(call)
                if len(call) == 1:
                    for name, guessed in _guessed(trace, token - 1, layer, k):
                        guess = guesses.setdefault(name, Guess())
                        guess.score(guessed, set(call[0].tolist()), bank.policy.held.keys())
                bank.run(call)
    return guesses


def _guessed(trace: Trace, token: int, layer: int, k: int) -> Iterator[tuple[str, set[int]]]:
    """Yield what each way to guess says of one token in one layer."""
    yield "this layer's last token", set(trace.ids[token - 1, layer].tolist())
    yield "this layer's last 2 tokens", set(trace.ids[token - 2 : token, layer].ravel().tolist())
    for when, ranked in (("before", trace.before), ("after", trace.after)):
        if ranked is not None:
            for n in (k // 4, k // 2, k, 2 * k):
                name = f"router {when} the last layer's experts, best {n}"
                yield name, set(ranked[token, layer - 1, :n].tolist())


def policies(experts: int) -> dict[str, Maker]:
    """Return what makes each policy from slots and a layer's future calls."""

    def demand(half_life: float) -> Maker:
        return lambda slots, future: LeastDemand(slots, experts, half_life)

    return {
        "LRU": lambda slots, future: Lru(slots),
        "S3-FIFO": lambda slots, future: S3Fifo(slots),
        **{f"LFU, half-life {n} uses": demand(n) for n in HALF_LIVES},
        "optimum (Belady)": Belady,
    }


def total(counts: Sequence[Count]) -> Count:
    """Add up."""
    return Count(sum(c.used for c in counts), sum(c.missed for c in counts))


def report(traces: Sequence[Trace], banks: Sequence[int]) -> None:
    """Print hit rates, megabytes read per token, and what each text says of LRU."""
    experts = traces[0].experts
    tokens = sum(int((trace.lengths == 1).sum()) for trace in traces)
    print(f"{len(traces)} texts, {tokens} decoded tokens, banks of {banks} % of {experts} experts")
    print("hits while decoding, %; MB read per token; texts with more hits than LRU's, and fewer")
    lru: dict[int, list[Count]] = {}
    for name, make in policies(experts).items():
        cells = []
        for bank in banks:
            counts = replay(traces, experts * bank // 100, make)["decode"]
            lru[bank] = lru.get(bank) or counts
            megabytes = total(counts).missed / tokens * traces[0].record_bytes / 1e6
            more = sum(c.missed < b.missed for c, b in zip(counts, lru[bank], strict=True))
            fewer = sum(c.missed > b.missed for c, b in zip(counts, lru[bank], strict=True))
            cells.append(f"{total(counts).hits:6.1%} {megabytes:7.3f} +{more:<2} -{fewer:<2}")
        print(f"{name:26}", " | ".join(cells), flush=True)


def report_predictions(traces: Sequence[Trace], slots: int) -> None:
    """Print how often guesses are right, and what reading them in advance would gain and cost."""
    print(f"\nguesses from layer 1 on; bank of {slots}, which misses some of the experts used")
    print("of those used, guessed | of those missing, guessed | read for nothing, per missing one")
    for name, g in predict(traces, slots).items():
        print(f"{name:50} {g.right / g.used:6.1%} {g.found / g.missed:6.1%} "
              f"{g.useless / g.missed:6.2f}")  # fmt: skip


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", type=Path, help="A directory of traces.")
    parser.add_argument("--banks", nargs="+", type=int, default=[10, 25, 50, 75], help="Percent.")
    args = parser.parse_args()
    traces = [Trace.load(file) for file in sorted(args.traces.glob("*.npz"))]
    report(traces, args.banks)
    report_predictions(traces, traces[0].experts // 4)


if __name__ == "__main__":
    main()
