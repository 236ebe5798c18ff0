"""A module with an expert store: open, close, copy, statistics."""

import copy
import importlib.metadata
import socket
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..custom_kernels.autotune import without_timing
from ..custom_kernels.device import kernel_mode
from ..distributed.collectives import check_sends
from ..distributed.expert_parallel import (
    AUTO,
    EXACT,
    LOADING,
    PIPELINE,
    TENSOR,
    ExpertParallel,
    Mode,
)
from ..errors import FlashMoEError
from ..format.layout import ExpertLayout
from ..format.placement import Placement
from ..store.store import ExpertStats, ExpertStore
from .layer import StreamedLayer

SAMPLE = 4096  # numbers of each matrix outside the layers


def versions() -> dict[str, str]:
    """Return the versions of the packages that ranks must have in common."""
    found = {}
    for name in ("flashmoe-mlx", "mlx", "mlx-lm"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a folder
            found[name] = "not installed"
    return found


@dataclass(frozen=True)
class Experts:
    """Experts on disk, and how to open a store on them.

    Attributes:
        layout: where they lie.
        start: opens a store on a part of the layout; takes the number of ranks on this host.
        sharding: how ranks share the model: "auto", "exact" or "tensor".
        rank_weights: each rank's share, None for equal ones.
        timeout: seconds that a rank may be late.
        top_k: experts per token.
    """

    layout: ExpertLayout
    start: Callable[[ExpertLayout, int], ExpertStore]
    sharding: str
    rank_weights: tuple[int, ...] | None
    timeout: float
    top_k: int

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return itself: the files do not change."""
        return self


class StreamedModule(nn.Module):
    """A module whose experts may come from an `ExpertStore`; `with` closes it at the end.

    Alone, it opens the store at once. In a group of several ranks it waits for `shard`, or for its
    first use: mlx-lm builds a model twice, and splits its layers afterwards.
    """

    def __init__(self, experts: Experts | None) -> None:
        """Keep what to open; None means that all experts are parameters."""
        super().__init__()
        self._experts = experts
        self._store: ExpertStore | None = None
        self._opened = experts is None
        self._parallel: ExpertParallel | None = None

    def open_if_alone(self) -> None:
        """Open the store, unless other ranks may share the model."""
        if self._experts and mx.distributed.init().size() == 1:
            self._open(None)

    def _open(self, parallel: ExpertParallel | None, sharers: int = 1) -> None:
        """Open the store, or this rank's part of it."""
        assert self._experts
        layout = self._experts.layout
        found = [m for m in self.modules() if isinstance(m, StreamedLayer)]
        layers = sorted(found, key=lambda layer: layer.number)
        alone = parallel is None or not parallel.mode.splits_experts
        if alone and layout.placement:
            raise FlashMoEError(
                f"{layout.directory}: holds only the experts of {layout.placement}. Start all "
                "ranks with mlx.launch, without --pipeline."
            )
        if parallel and not alone:
            layout = layout.part(parallel.placement)
        self._opened = True
        if not layers:  # a stage of a pipeline
            return
        layout = layout.of_layers([layer.number for layer in layers])
        store = self._experts.start(layout, sharers)
        try:
            for place, layer in enumerate(layers):
                layer.attach(store, place, parallel)
        except BaseException:
            store.close()
            raise
        self._store = store

    def shard(self, group: mx.distributed.Group | None = None) -> None:
        """Share the model with the other ranks of a group; all of them must call this.

        Args:
            group: by default all ranks that `mlx.launch` started.

        Raises:
            FlashMoEError: ranks differ in model, versions or settings, or one of them cannot open
                its experts; on all ranks.
        """
        if self._experts is None:
            self._refuse_training()
            raise FlashMoEError("experts that are parameters cannot be split. Load the model.")
        modes = {"exact": EXACT, "auto": AUTO, "tensor": TENSOR}
        self._join(modes[self._experts.sharding], group or mx.distributed.init())

    def _join(self, mode: Mode, group: mx.distributed.Group) -> None:
        """Agree with the other ranks, and open this rank's part of the experts."""
        assert self._experts
        parallel = ExpertParallel(group, mode, self._experts.timeout)
        with parallel.ending():
            hosts = [other["host"] for other in parallel.compare(self._facts(mode))]
            if mode is PIPELINE:
                check_sends(group)
            parallel.weigh(self._experts.rank_weights)
            without_timing()  # or each rank would choose its own kernels
            try:
                if mode is TENSOR:
                    self.shard_trunk(group)
                self._open(parallel, hosts.count(hosts[group.rank()]))
            except Exception as error:
                parallel.fail(error)
            parallel.raise_failures("loading", LOADING)
            parallel.agree(self._store is None or self._store.holds_all)
        self._parallel = parallel

    def shard_trunk(self, group: mx.distributed.Group) -> None:
        """Split the trunk as mlx-lm does."""
        raise FlashMoEError(
            "sharding = 'tensor': mlx-lm cannot split the trunk of this model. Choose exact."
        )

    def _facts(self, mode: Mode) -> dict[str, str]:
        """Describe what all ranks must have in common."""
        assert self._experts
        sample = 0
        for name, array in tree_flatten(self.parameters()):
            if "layers." not in name:
                some = array.reshape(-1)[:SAMPLE].astype(mx.float32)
                sample = zlib.crc32(np.array(some).tobytes(), sample)
        records = [layer.record_bytes for layer in self._experts.layout.layers]
        return {f"version of {name}": found for name, found in versions().items()} | {
            "model": f"{zlib.crc32(repr(records).encode(), sample):08x}",
            "top-k": str(self._experts.top_k),
            "sharding": mode.name,
            "rank_weights": str(self._experts.rank_weights),
            "kernels": f"{kernel_mode()} on {mx.default_device().type.name}",
            "host": socket.gethostname(),
        }

    def placement(self) -> Placement | None:
        """Return which experts this rank has, None if all."""
        return self._store.layout.placement if self._store else None

    def run(
        self, forward: Callable[[], mx.array], inputs: mx.array, cache: Sequence[Any] | None
    ) -> mx.array:
        """Run a forward pass, and raise errors of any rank on all of them.

        Args:
            forward: returns logits `[B, T, V]`.
            inputs: token ids `[B, T]`, or embeddings `[B, T, H]`.
            cache: the prompt cache.
        """
        self.check_usable()
        if (parallel := self._parallel) is None:
            return forward()
        with parallel.step():
            mx.eval(inputs)  # they may come from a collective, which goes first on every rank
            logits = self._stage(parallel, forward, inputs) if self._is_stage else forward()
            if inputs.shape[1] == 1:
                parallel.finish(logits)
                return logits
            if cache:  # here, where the watchdog looks; nobody may want a prompt's logits
                mx.eval([c.state for c in cache if not c.empty()])
            if parallel.has_choices:
                parallel.finish(() if cache else logits)
            return logits

    @property
    def _is_stage(self) -> bool:
        """Say whether this rank has some of the layers."""
        return getattr(getattr(self, "model", None), "pipeline_size", 1) > 1

    def _stage(
        self, parallel: ExpertParallel, forward: Callable[[], mx.array], inputs: mx.array
    ) -> mx.array:
        """Run this stage of a pipeline. After an error, take part until all ranks know of it."""
        failed = parallel.failed
        try:
            if not failed:
                return forward()
        except Exception as error:  # of a read: the stage before has been received
            parallel.fail(error)
        stage: Any = self.model
        h = inputs if inputs.ndim == 3 else stage.embed_tokens(inputs)
        if failed and stage.pipeline_rank < stage.pipeline_size - 1:
            mx.eval(mx.distributed.recv_like(h, stage.pipeline_rank + 1))
        h = mx.full(h.shape, mx.nan, h.dtype)
        if stage.pipeline_rank:
            h = mx.distributed.send(h, stage.pipeline_rank - 1)
            mx.eval(h)
        return mx.distributed.all_gather(h)[: len(h)]

    def expert_stats(self) -> ExpertStats:
        """Return the live counters of the expert store; all zero if experts are parameters."""
        return self._store.stats if self._store else ExpertStats()

    def expert_cache(self) -> str:
        """Describe the size of the expert cache, and its reason, in one line."""
        if not self._opened:
            return "Expert cache: opened at first use"
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
        """Open the store if it is not; refuse a closed one, even if all experts are resident.

        Raises:
            FlashMoEError: the model was closed, or this process is a fork of the one that loaded
                it.
        """
        if not self._opened:
            self._join(PIPELINE, mx.distributed.init()) if self._is_stage else self._open(None)
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
        if self._experts:
            raise FlashMoEError(
                "the experts of this model stream from disk, so a copy by mlx-lm would lack them. "
                "Convert, quantize or fuse the original checkpoint, then run flashmoe-convert."
            )

    def _refuse_training(self) -> None:
        if self._experts:
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
        if self._experts:
            raise TypeError(
                "a model whose experts stream holds open files and threads and cannot be pickled; "
                "load it again in the other process"
            )
        return super().__reduce_ex__(protocol)
