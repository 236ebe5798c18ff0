"""Policies for a full bank of experts, for `replay_routing.py`; the package itself has one."""

from collections import Counter, OrderedDict, deque
from collections.abc import Sequence

from flashmoe_mlx.store.slots import HALF_LIFE, DecayedLFU


class Policy:
    """Which expert leaves a full bank. This one drops the oldest: first in, first out."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.held: OrderedDict[int, None] = OrderedDict()

    def begin(self, step: int) -> None:
        """Hear that another call of the model begins."""

    def use(self, expert: int, new: bool) -> None:
        """Hear that an expert is used, that was there or is `new`."""

    def add(self, expert: int) -> None:
        """Take in an expert; there is room."""
        self.held[expert] = None

    def drop(self, keep: set[int]) -> None:
        """Make room, but not by dropping one of `keep`."""
        self.remove(next(e for e in self.held if e not in keep))

    def remove(self, expert: int) -> None:
        """Forget an expert."""
        del self.held[expert]


class Lru(Policy):
    """Drop what was not used for longest."""

    def use(self, expert: int, new: bool) -> None:
        """Move it to the end of the row."""
        self.held.move_to_end(expert)


class LeastDemand(Policy):
    """Drop what was used least, where earlier uses count less: what `slot_bank.Bank` does."""

    def __init__(self, slots: int, experts: int, half_life: float = HALF_LIFE) -> None:
        super().__init__(slots)
        self._demand = DecayedLFU(experts, half_life)

    def use(self, expert: int, new: bool) -> None:
        """Count it."""
        self._demand.count(expert)

    def drop(self, keep: set[int]) -> None:
        """Drop what is least in demand."""
        self.remove(self._demand.ascending(self.held.keys() - keep)[0])


class S3Fifo(Policy):
    """A small queue for newcomers, a main one for what was used again, and one of ghosts."""

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self._small: deque[int] = deque()
        self._main: deque[int] = deque()
        self._ghosts: OrderedDict[int, None] = OrderedDict()
        self._uses = Counter[int]()

    def use(self, expert: int, new: bool) -> None:
        """Count it, up to three; coming in is no use."""
        self._uses[expert] = 0 if new else min(3, self._uses[expert] + 1)

    def add(self, expert: int) -> None:
        """Put it into the main queue if it was dropped of late, else into the small one."""
        super().add(expert)
        (self._main if expert in self._ghosts else self._small).append(expert)
        self._ghosts.pop(expert, None)

    def drop(self, keep: set[int]) -> None:
        """Drop from the small queue while it has more than a tenth, else from the main one."""
        free = self.held.keys() - keep
        while True:
            small = len(self._small) > self.slots // 10 or free.isdisjoint(self._main)
            expert = (self._small if small else self._main).popleft()
            if expert in free and not self._uses[expert]:
                break
            self._main.append(expert)
            self._uses[expert] = 0 if small else max(0, self._uses[expert] - 1)
        self.remove(expert)
        if small:
            self._ghosts[expert] = None
            if len(self._ghosts) > self.slots:
                self._ghosts.popitem(last=False)


class Belady(Policy):
    """Drop what is used again last: the best that is possible, with the future known."""

    def __init__(self, slots: int, calls: Sequence[Sequence[int]]) -> None:
        super().__init__(slots)
        self._step = 0
        self._next: dict[tuple[int, int], int] = {}
        self._due: dict[int, int] = {}
        coming: dict[int, int] = {}
        for step in range(len(calls) - 1, -1, -1):
            for expert in calls[step]:
                self._next[step, expert] = coming.get(expert, len(calls))
                coming[expert] = step

    def begin(self, step: int) -> None:
        """Remember where in the future this is."""
        self._step = step

    def use(self, expert: int, new: bool) -> None:
        """Look up when it is used again."""
        self._due[expert] = self._next[self._step, expert]

    def drop(self, keep: set[int]) -> None:
        """Drop what is due last."""
        self.remove(max(self.held.keys() - keep, key=self._due.__getitem__))
