"""A decode step of all layers in one traced function, on a GPU.

The host prepares a step layer by layer three times slower than the GPU computes it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, KVCache

from ...custom_kernels.attention.step import integer
from ...custom_kernels.traced import Traced


class DecodeStep:
    """The layers' own traced steps as one function of hidden states and caches.

    It takes over once every layer has a trace: all experts resident, caches of mlx-lm's plain
    classes, one token per row. Whatever else comes runs layer by layer, with equal results.
    """

    def __init__(self) -> None:
        """Start without a trace."""
        self._traced = Traced()
        self._most_keys = 0

    def run(
        self, h: mx.array, layers: Sequence[Any], norm: nn.RMSNorm, caches: Sequence[Any]
    ) -> mx.array | None:
        """Run one token per row through all layers and the norm, and advance the caches.

        Args:
            h: `[B, 1, H]`.
            layers: all decoder layers.
            norm: the final norm.
            caches: one per layer.

        Returns:
            `[B, 1, H]`, or None, with unchanged caches, if the layers must run one by one.
        """
        if h.shape[1] > 1 or (found := _states(caches)) is None:
            return None
        position, keys, states = found
        if not (self._traced.ready(h, keys) and position < self._most_keys) and not self._trace(
            h, layers, norm, keys, position
        ):
            return None
        y, *after = self._traced.functions[0](h, integer(position), integer(position + 1), *states)
        _put_back(caches, after[: len(states)])
        for layer, ids in zip(layers, after[len(states) :], strict=False):  # none on one machine
            layer.mlp.switch_mlp.note_later(ids)
        return y

    def _trace(
        self, h: mx.array, layers: Sequence[Any], norm: nn.RMSNorm, keys: mx.array, position: int
    ) -> bool:
        """Trace the step for this many slots; return whether every layer has a trace of its own."""
        mixers, blocks = [], []
        for layer in layers:  # stops at the first without a trace: a streamed model comes here
            if (block := layer.mlp.traced(h)) is None:
                return False
            if (mixer := layer.mixer.traced(h, position + 1)) is None:
                return False
            blocks.append(block)
            mixers.append(mixer)
        self._most_keys = min(x.mixer.fused_keys for x in layers if not x.is_linear)

        def step(
            h: mx.array, offset: mx.array, length: mx.array, *states: mx.array
        ) -> tuple[mx.array, ...]:
            after, chosen = list[mx.array](), list[mx.array]()
            pairs = zip(states[::2], states[1::2], strict=True)
            for mixer, block, pair in zip(mixers, blocks, pairs, strict=True):
                h, *new = mixer(h, *pair, offset, length)
                h, ids = block(h)
                after += new
                chosen += [] if ids is None else [ids]
            return norm(h), *after, *chosen

        self._traced.trace((h, keys), (*layers, norm), step)
        return True


def _states(caches: Sequence[Any]) -> tuple[int, mx.array, list[mx.array]] | None:
    """Return the number of tokens so far, a layer's keys, and two arrays per layer.

    None if a cache is new, full, padded or of another class.
    """
    first = next((c for c in caches if type(c) is KVCache and c.keys is not None), None)
    if first is None or first.offset >= first.keys.shape[2]:
        return None
    states: list[mx.array] = []
    for cache in caches:
        if type(cache) is ArraysCache:
            if cache[0] is None or cache.lengths is not None or cache.left_padding is not None:
                return None
            states += cache.cache
        else:
            if type(cache) is not KVCache or cache.offset != first.offset:
                return None
            if cache.keys is None or cache.keys.shape != first.keys.shape:
                return None
            states += cache.keys, cache.values
    return first.offset, first.keys, states


def _put_back(caches: Sequence[Any], states: Sequence[mx.array]) -> None:
    """Give the caches their arrays after a token."""
    arrays: Iterator[mx.array] = iter(states)
    for cache, first, second in zip(caches, arrays, arrays, strict=True):
        if type(cache) is KVCache:
            cache.keys, cache.values = first, second
            cache.offset += 1
        else:
            cache[0], cache[1] = first, second
