"""A module with an expert store: close, copy, statistics."""

import copy
from types import TracebackType
from typing import Any, Self

import mlx.nn as nn

from ..errors import FlashMoEError
from ..store.store import ExpertStats, ExpertStore


class StreamedModule(nn.Module):
    """A module whose experts may come from an `ExpertStore`; `with` closes it at the end."""

    def __init__(self, store: ExpertStore | None) -> None:
        """Keep the store; None means that all experts are parameters."""
        super().__init__()
        self._store = store

    def expert_stats(self) -> ExpertStats:
        """Return the live counters of the expert store; all zero if experts are parameters."""
        return self._store.stats if self._store else ExpertStats()

    def expert_cache(self) -> str:
        """Describe the size of the expert cache, and its reason, in one line."""
        return str(self._store.plan) if self._store else "Expert cache: all experts are resident"

    def expert_counts(self) -> tuple[int, int]:
        """Return the experts that memory holds, and those of the model, all layers together."""
        layers = self._store.layout.layers if self._store else ()
        total = sum(layer.num_experts for layer in layers)
        return (self._store.plan.slots * len(layers) if self._store else total), total

    def close(self) -> None:
        """Close the expert files and stop the reader threads, also for copies of the model.

        The model can no longer compute. Closing twice is safe. Memory is freed with the last
        reference to the model.
        """
        if self._store:
            self._store.close()

    def check_usable(self) -> None:
        """Refuse to compute with a closed store, even if all experts are resident.

        Raises:
            FlashMoEError: the model was closed, or this process is a fork of the one that loaded
                it.
        """
        if self._store:
            self._store.check_usable()

    # mlx-lm's tools call one of these before they train, fuse, convert or quantize.

    def freeze(
        self, *, recurse: bool = True, keys: str | list[str] | None = None, strict: bool = False
    ) -> nn.Module:
        """Refuse, as `train` does, if experts stream."""
        self._refuse_training()
        return super().freeze(recurse=recurse, keys=keys, strict=strict)

    def train(self, mode: bool = True) -> nn.Module:
        """Set training mode.

        Raises:
            FlashMoEError: `mode` is true and experts stream.
        """
        if mode:
            self._refuse_training()
        return super().train(mode)

    def fuse(self, **_: Any) -> nn.Module:
        """Refuse to be fused with adapters; mlx_lm.fuse calls this on each module that has it.

        Raises:
            FlashMoEError: experts stream.
        """
        self.refuse_copy()
        return self

    def refuse_copy(self) -> None:
        """Refuse to be written by mlx-lm, which would write the trunk only.

        Raises:
            FlashMoEError: experts stream.
        """
        if self._store:
            raise FlashMoEError(
                "the experts of this model stream from disk, so a copy by mlx-lm would lack them. "
                "Convert, quantize or fuse the original checkpoint, then run flashmoe-convert."
            )

    def _refuse_training(self) -> None:
        if self._store:
            raise FlashMoEError(
                "a model whose experts stream cannot be trained. Train adapters on the original "
                "checkpoint with stock mlx-lm; --adapter-path applies them to this model."
            )

    def __enter__(self) -> Self:
        """Return the model."""
        self.check_usable()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()

    def __copy__(self) -> Self:
        """Return a module with the same weights and store."""
        return self._twin(dict(self), self.__dict__)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a module with copied weights and the same store."""
        return self._twin(copy.deepcopy(dict(self), memo), copy.deepcopy(self.__dict__, memo))

    def _twin(self, parameters: dict[str, Any], others: dict[str, Any]) -> Self:
        twin = type(self).__new__(type(self))
        dict.update(twin, parameters)  # nn.Module's `update` differs
        twin.__dict__.update(others)
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be pickled, unless all experts are parameters.

        Raises:
            TypeError: there is a store.
        """
        if self._store:
            raise TypeError(
                "a model whose experts stream holds open files and threads and cannot be pickled; "
                "load it again in the other process"
            )
        return super().__reduce_ex__(protocol)
