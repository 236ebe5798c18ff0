"""Expert batches of a prompt: each expert is read once, however few slots a layer has."""

from collections import deque
from collections.abc import Iterator

import numpy as np

from .requests import Pending
from .store import ExpertStore

FEW = 16  # missing experts; splitting fewer in halves costs more than it overlaps


def expert_batches(
    store: ExpertStore, layer: int, ids: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Load experts in batches that fit the layer's slots.

    Resident experts come first, so that they compute while others are read. Of the others, those
    with the most rows come last and stay resident for the next tokens. If reading takes time of the
    computing cores, all experts that fit come in one batch. While one batch computes, the next ones
    are read, as far ahead as slots allow.

    Args:
        store: the experts' store.
        layer: decoder layer.
        ids: `[..., K]` expert ids.

    Yields:
        The flat positions in `ids` of the batch's experts, and their slots. They stay valid until
        the next batch, or until an array given to `ExpertStore.hold` is evaluated.
    """
    flat, bank = ids.reshape(-1), store.banks[layer]
    if not flat.size:  # a rank may have none of a token's experts; GPUs refuse an empty launch
        return
    counts = np.bincount(flat, minlength=bank.layout.num_experts)
    wanted = np.flatnonzero(counts)
    if bank.holds_all:
        store.count_hits(layer, wanted.tolist())
        yield np.arange(flat.size), flat.astype(np.int64)
        return
    slot_of = np.full(len(counts), -1, dtype=np.int64)
    room = len(bank)
    ahead: deque[Pending] = deque()

    def serve() -> tuple[np.ndarray, np.ndarray]:
        slot_of[ahead[0].experts] = ahead[0].wait()
        slots = slot_of[flat]
        slot_of[ahead[0].experts] = -1
        places = np.flatnonzero(slots >= 0)
        return places, slots[places]

    store.cancel_prefetch(layer, wanted.tolist())
    try:
        for batch in split(store, layer, wanted, counts[wanted]):
            while len(batch) > room:
                yield serve()
                room += len(ahead.popleft().experts)
            ahead.append(store.request(layer, batch))
            room -= len(batch)
        while ahead:
            yield serve()
            ahead.popleft()
    finally:  # after an error, the traceback keeps this frame
        for pending in ahead:
            pending.release()


def split(store: ExpertStore, layer: int, experts: np.ndarray, rows: np.ndarray) -> list[list[int]]:
    """Split experts into batches of which two fit the slots: resident ones, then by rows."""
    bank = store.banks[layer]
    if len(experts) <= len(bank) and store.reads_compute:
        return [experts.tolist()]
    by_rows = experts[np.argsort(rows, kind="stable")].tolist()
    resident = set(bank.resident(by_rows))
    missing = [e for e in by_rows if e not in resident]
    missing.sort(key=bank.arriving.__contains__, reverse=True)  # in flight: first
    most = len(bank) if len(experts) <= len(bank) else max(1, len(bank) // 2)
    half = min(most, max(FEW, -(-len(missing) // 2)))
    batches = _groups([e for e in by_rows if e in resident], most) + _groups(missing, half)
    return [sorted(batch) for batch in batches]


def _groups(experts: list[int], size: int) -> list[list[int]]:
    """Split a list into groups of at most `size`."""
    return [experts[i : i + size] for i in range(0, len(experts), size)] if experts else []
