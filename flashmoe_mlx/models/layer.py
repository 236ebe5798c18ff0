"""One layer's experts: their slots, and the outputs of all ranks that share them."""

from collections.abc import Callable, Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..custom_kernels.launch import settled
from ..custom_kernels.reference import NONE
from ..distributed.expert_parallel import ExpertParallel
from ..format.layout import LayerLayout
from ..store.scheduler import expert_batches
from ..store.store import ExpertStore

Compute = Callable[[mx.array], mx.array]


class StreamedLayer(nn.Module):
    """One layer's routed experts, read from disk when the router chooses them. No parameters."""

    def __init__(self, number: int, count: int) -> None:
        """Make the layer that has this number among those with experts; `attach` a store.

        Args:
            number: place in the model.
            count: experts in the model's layer, of which a rank may have a part.
        """
        super().__init__()
        self.number, self.count = number, count

    def attach(self, store: ExpertStore, layer: int, parallel: ExpertParallel | None) -> None:
        """Use a layer of the store.

        Args:
            store: holds the experts, or those of this rank.
            layer: place in the store.
            parallel: the other ranks, None if this machine computes alone.
        """
        self._store, self._layer = store, layer
        self._parallel = parallel if parallel and parallel.mode.splits_experts else None
        self._own: mx.array | None = None

    @property
    def layer(self) -> int:
        """Its number among the store's layers."""
        return self._layer

    @property
    def holds_all(self) -> bool:
        """Say whether all experts are resident; then expert e lies in slot e."""
        return self._parallel is None and self._store.banks[self._layer].holds_all

    @property
    def in_memory(self) -> bool:
        """Say whether no expert is read any more, here or on another rank."""
        return self._parallel.resident if self._parallel else self.holds_all

    def slots(self, ids: mx.array, x: mx.array) -> mx.array | None:
        """Make experts resident and return their slots, or None if there are too few slots.

        Waits for the ids, unless all experts are resident or the GPU loads by itself.

        Args:
            ids: `[..., K]`.
            x: `[..., H]`, the router's input.
        """
        if self.holds_all:
            return ids
        if self._parallel:
            return None
        if (loaded := self._store.load_by_device(self._layer, ids, x)) is not None:
            return loaded
        chosen, places = np.unique(self._store.backend.to_host(ids), return_inverse=True)
        if len(chosen) > len(self._store.banks[self._layer]):
            return None
        slots = np.array(self._store.fetch(self._layer, chosen.tolist()), dtype=np.uint32)
        return self._store.backend.to_device(slots[places].reshape(ids.shape))

    def batches(self, ids: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Load experts in batches: see `expert_batches`. Of several ranks, each loads its own."""
        if self._parallel is None:
            return expert_batches(self._store, self._layer, ids)
        return self._own_batches(ids, self._parallel)

    def _own_batches(
        self, ids: np.ndarray, parallel: ExpertParallel
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Load this rank's experts; keep an error, which all ranks raise together in `total`."""
        parallel.note(self.number, ids)
        places, own = _own(self._store.layout.layers[self._layer], ids)
        try:
            for batch, slots in expert_batches(self._store, self._layer, own):
                yield places[batch], slots
        except Exception as error:
            parallel.fail(error)

    @property
    def is_first(self) -> bool:
        """Say whether this is the first rank, which computes what only one of them should."""
        return self._parallel is None or self._parallel.placement.rank == 0

    def own_slots(self, ids: mx.array) -> mx.array:
        """Return the slots of this rank's experts, NONE for all others, if `in_memory`."""
        if self._own is None:
            slots = np.full(self.count, NONE, np.uint32)
            numbers = self._store.layout.layers[self._layer].numbers
            assert numbers is not None
            slots[list(numbers)] = np.arange(len(numbers))
            self._own = settled(mx.array(slots))
        return self._own[ids]

    def in_parts(self, ids: mx.array, compute: Compute, others: Compute | None = None) -> mx.array:
        """Add up what kernels compute of a few tokens' experts.

        A part is what one rank has, or what finds room in the slots.

        Args:
            ids: `[..., K]` uint32.
            compute: makes an array of slots `[..., K]`, zero where they are NONE.
            others: as `compute`, for this rank's further parts.
        """
        if self._parallel and self._parallel.resident:
            self.note_later(ids)
            return self._parallel.lazy_total(compute(self.own_slots(ids)))
        total = None
        for slots in self._slots_by_part(ids):
            part = compute(slots) if total is None else (others or compute)(slots)
            self.hold(part)
            total = part if total is None else total + part
        if total is None:
            total = compute(mx.full(ids.shape, NONE, mx.uint32))
        return self.total(total)

    def note_later(self, ids: mx.array) -> None:
        """Let the ranks compare the router's choice after the token."""
        if self._parallel:
            self._parallel.note_later(ids)

    def lazy_total(self, outputs: mx.array) -> mx.array:
        """Add up the ranks' outputs `[...]`, if `in_memory`."""
        return self._parallel.lazy_total(outputs) if self._parallel else outputs

    def total_of(self, outputs: mx.array) -> mx.array:
        """Add up the ranks' results of `outputs_in_batches`."""
        return self.lazy_total(outputs) if self.in_memory else self.total(outputs)

    def _slots_by_part(self, ids: mx.array) -> Iterator[mx.array]:
        """Load this rank's experts, as many as there are slots at once, and yield their slots."""
        backend, most = self._store.backend, len(self._store.banks[self._layer])
        chosen = backend.to_host(ids)
        if self._parallel:
            self._parallel.note(self.number, chosen)
        places, own = _own(self._store.layout.layers[self._layer], chosen)
        wanted = np.unique(own)
        try:
            for start in range(0, len(wanted), most):
                batch = wanted[start : start + most]
                found = np.array(self._store.fetch(self._layer, batch.tolist()), np.uint32)
                among = np.isin(own, batch)
                slots = np.full(chosen.size, NONE, np.uint32)
                slots[places[among]] = found[np.searchsorted(batch, own[among])]
                yield backend.to_device(slots.reshape(ids.shape))
        except Exception as error:
            if self._parallel is None:
                raise
            self._parallel.fail(error)

    def total(self, outputs: mx.array) -> mx.array:
        """Add up the ranks' outputs `[...]`, each zero where an expert is another rank's."""
        return outputs if self._parallel is None else self._parallel.total(outputs, self.number)

    def total_in_place(self, outputs: np.ndarray) -> None:
        """Add up as `total` does, in place."""
        outputs[:] = np.array(self.total(mx.array(outputs)))

    @property
    def is_split(self) -> bool:
        """Say whether this rank has only a part of the experts, and `total` must be called."""
        return self._parallel is not None

    @property
    def weighs_first(self) -> bool:
        """Say whether a prompt's outputs are weighted before they are added up over the ranks."""
        return self._parallel is not None and self._parallel.mode.weighs_first

    def prefetch(self, ids: np.ndarray) -> None:
        """Start to read experts `[..., K]` that the next step will probably need."""
        self._store.prefetch(self._layer, np.unique(ids).tolist())

    def hold(self, consumer: mx.array, slots: np.ndarray | None = None) -> None:
        """Keep all slots, or these, unchanged until `consumer` is evaluated."""
        self._store.hold(consumer, self._layer, None if slots is None else slots.tolist())


def _own(layer: LayerLayout, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the flat positions in `ids` of a layer's experts, and their numbers in the layer."""
    numbers = layer.numbers or range(layer.num_experts)
    place, rest = np.divmod(ids.reshape(-1).astype(np.int64) - numbers.start, numbers.step)
    mine = np.flatnonzero((rest == 0) & (place >= 0) & (place < len(numbers)))
    return mine, place[mine]
