"""Expert parallelism: each rank computes its own experts, and the ranks' outputs add up.

Every rank has a whole trunk and runs the same router, so all know which experts a token needs. A
rank's outputs are zero where the expert is another's; adding zeros is exact, so the sum equals what
one machine computes, to the bit.
"""

import contextlib
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import mlx.core as mx
import numpy as np

from ..errors import FlashMoEError
from ..format.placement import Placement
from .collectives import Group, gather_json
from .heartbeat import Heartbeat, address_of
from .watchdog import Watchdog, end_process

WORKS, FAILED = 1, 2
DIGIT = 128  # numbers below this are exact in every float dtype, bfloat16 included
DIGITS = 3  # of a checksum
STATUS = 1 + DIGITS  # numbers per rank
AT_ONCE = 1 << 23  # numbers per sum, which bounds the memory of copies
LOADING = 10  # times the limit of a step
BACKENDS = "[ring]", "[jaccl]", "[nccl]", "[mpi]"  # in MLX's errors


@dataclass(frozen=True)
class Mode:
    """How ranks share a model.

    Attributes:
        name: "exact", "auto", "tensor" or "pipeline".
        splits_experts: each rank has a part of every layer's experts.
        adds_up: the ranks' outputs are summed here, and not by mlx-lm's own code.
        weighs_first: a prompt token's experts are weighted and added up before they are sent.
    """

    name: str
    splits_experts: bool = True
    adds_up: bool = True
    weighs_first: bool = False


EXACT, AUTO = Mode("exact"), Mode("auto", weighs_first=True)
TENSOR = Mode("tensor", adds_up=False)
PIPELINE = Mode("pipeline", splits_experts=False, adds_up=False)


class ExpertParallel:
    """This rank's part in a group, and the sums over the group."""

    def __init__(self, group: Group, mode: Mode, timeout: float) -> None:
        """Join a group; `timeout` in seconds ends this process when another rank hangs."""
        self.group, self.mode = group, mode
        self.placement = Placement(group.rank(), (1,) * group.size())
        # MLX compiles kernels for minutes at first use there.
        patience = LOADING if mx.cuda.is_available() else 1
        self.watchdog = Watchdog(timeout, str(self.placement), patience)
        self.resident = False
        self._failure: BaseException | None = None
        self._seen = 0
        self._choices: list[mx.array] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return itself: copies of a model share the group."""
        return self

    def weigh(self, weights: tuple[int, ...] | None) -> None:
        """Give each rank its share of the experts, the same ones on all ranks.

        Raises:
            FlashMoEError: there is not one weight per rank.
        """
        if weights is None:
            return
        if len(weights) != self.placement.size:
            raise FlashMoEError(
                f"rank_weights = {','.join(map(str, weights))}: {len(weights)} weights for "
                f"{self.placement.size} ranks. Give one per rank."
            )
        self.placement = Placement(self.placement.rank, weights)

    def fail(self, error: BaseException) -> None:
        """Keep an error until all ranks can raise it together."""
        self._failure = self._failure or error

    @property
    def failed(self) -> bool:
        """Say whether this rank keeps an error."""
        return self._failure is not None

    def note(self, layer: int, ids: np.ndarray) -> None:
        """Note a router's choice, which must be the same on all ranks."""
        self.watchdog.progress(f"layer {layer}")
        data = f"{layer} {ids.shape}".encode() + ids.astype(np.int64).tobytes()
        self._seen = zlib.crc32(data, self._seen)

    def agree(self, holds_all: bool) -> None:
        """Note whether all ranks hold all of their experts: then no read can fail."""
        with self._together("loading", LOADING):
            self.resident = all(gather_json(self.group, holds_all))

    def note_later(self, ids: mx.array) -> None:
        """Note a router's choice in `finish`, when a GPU has computed it."""
        self._choices.append(ids.reshape(-1))

    @property
    def has_choices(self) -> bool:
        """Say whether `finish` has choices to note."""
        return bool(self._choices)

    def lazy_total(self, rows: mx.array) -> mx.array:
        """Add up outputs `[...]` over the ranks as `total` does, while no rank can fail."""
        return mx.distributed.all_sum(rows, group=self.group) if self.mode.adds_up else rows

    def total(self, rows: mx.array, layer: int) -> mx.array:
        """Add up outputs `[...]` over the ranks, or mark them as failed where mlx-lm adds them up.

        Raises:
            FlashMoEError: a rank failed or its router chose other experts; on all ranks.
        """
        if not self.mode.adds_up:
            return rows if self._failure is None else mx.full(rows.shape, mx.nan, rows.dtype)
        flat = rows.reshape(-1)
        parts = list(mx.split(flat, list(range(AT_ONCE, flat.size, AT_ONCE))))
        where = f"layer {layer}"
        parts[-1], status = self._sum(parts[-1], where)
        self._check(status, where)
        parts[:-1] = [self._all_sum(part, where) for part in parts[:-1]]
        return (parts[0] if len(parts) == 1 else mx.concatenate(parts)).reshape(rows.shape)

    def _sum(self, rows: mx.array, where: str) -> tuple[mx.array, np.ndarray]:
        """Add up `[n]` over the ranks, and return each rank's status `[ranks, STATUS]` as well."""
        status = np.zeros((self.placement.size, STATUS), np.float32)
        status[self.placement.rank] = [FAILED if self._failure else WORKS, *_digits(self._seen)]
        if self.mode is PIPELINE:  # each rank sees other layers
            status[self.placement.rank, 1:] = 0
        tail = mx.array(status.reshape(-1)).astype(rows.dtype)
        both = self._all_sum(mx.concatenate([rows, tail]), where)
        found = np.array(both[rows.size :].astype(mx.float32)).reshape(status.shape)
        return both[: rows.size], found

    def _all_sum(self, x: mx.array, where: str) -> mx.array:
        self.watchdog.progress(where)
        y = mx.distributed.all_sum(x, group=self.group)
        mx.eval(y)
        return y

    def _check(self, status: np.ndarray, where: str) -> None:
        """Compare the ranks' status, and let all of them raise the same error."""
        if (status[:, 0] != WORKS).any():
            self.raise_failures(where)
            raise FlashMoEError(f"{where}: the ranks are not at the same step. Start all again.")
        if (others := np.flatnonzero((status != status[0]).any(axis=1))).size:
            raise FlashMoEError(
                f"{where}: the router of rank {others[0]} chose other experts than that of rank 0. "
                "Their hardware or kernels round differently: run ranks on machines of one kind."
            )

    def raise_failures(self, where: str, patience: int = 1) -> None:
        """Raise on all ranks if one of them keeps an error.

        Args:
            where: what the ranks did.
            patience: how many times the usual limit a rank may be late.

        Raises:
            FlashMoEError: naming rank, place and cause.
        """
        mine = None if self._failure is None else describe(self._failure)
        with self._together(where, patience):
            causes = gather_json(self.group, mine)
        failed = [f"rank {n}: {cause}" for n, cause in enumerate(causes) if cause is not None]
        if failed:
            cause, self._failure = self._failure, None
            raise FlashMoEError(f"{where}: {'; '.join(failed)}") from cause

    def compare(self, facts: dict[str, str]) -> list[dict[str, str]]:
        """Return what each rank says of itself, under keys of which all but "host" must agree.

        Raises:
            FlashMoEError: they differ; on all ranks.
        """
        with self._together("the start of another rank", LOADING):
            found: list[dict[str, str]] = gather_json(self.group, facts)
        for rank, other in enumerate(found):
            for key in facts:
                if key != "host" and other.get(key) != found[0][key]:
                    raise FlashMoEError(
                        f"rank {rank} has {key} = {other.get(key)}, but rank 0 has "
                        f"{found[0][key]}. Start all ranks with the same model, versions and "
                        "settings."
                    )
        if (address := address_of(self.placement.rank)) is not None:
            with self._together("a connection for signs of life", LOADING):
                self.watchdog.heartbeat = Heartbeat(self.group, address)
        return found

    @contextlib.contextmanager
    def _together(self, what: str, patience: int = 1) -> Iterator[None]:
        """Watch collectives."""
        try:
            with self.watchdog.watching(what, patience):
                yield
        except RuntimeError as error:
            raise self._named(error) from error

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """Name a lost connection; outside the main thread, let any error end the process.

        A server's generation thread would die and leave a process that answers nobody.
        """
        try:
            yield
        except Exception as raised:
            error = self._named(raised)
            if threading.current_thread() is not threading.main_thread():
                end_process(f"{self.placement}: {describe(error)}")
            if error is raised:
                raise
            raise error from raised

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Watch a forward pass; its errors end a server: see `ending`."""
        with self.ending(), self.watchdog.watching("a forward pass"):
            yield

    def _named(self, error: Exception) -> Exception:
        """Return an error; a lost connection says which rank lost it."""
        if isinstance(error, RuntimeError) and any(n in str(error).lower() for n in BACKENDS):
            return FlashMoEError(
                f"{self.placement}: another rank ended ({error}); its own output says why. Start "
                "all ranks again."
            )
        return error

    def finish(self, results: Any) -> None:
        """Evaluate a step's results, and compare all ranks' status if its sums did not.

        Raises:
            FlashMoEError: a rank failed, or its routers chose other experts; on all ranks.
        """
        if self._choices or not self.mode.adds_up:
            chosen, self._choices = mx.concatenate([*self._choices, mx.zeros(0, mx.uint32)]), []
            mx.eval(results, chosen)
            self.note(0, np.array(chosen))
            self._check(self._sum(mx.zeros(0), "a token")[1], "a token")


def describe(error: BaseException) -> str:
    """Return an error's text, and the name of its class unless it is one of ours."""
    return str(error) if isinstance(error, FlashMoEError) else f"{type(error).__name__}: {error}"


def _digits(checksum: int) -> list[int]:
    """Return the lowest digits of a checksum."""
    return [checksum // DIGIT**n % DIGIT for n in range(DIGITS)]
