"""Check that a prompt cache fits the model, because kernels trust its arrays' sizes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, KVCache, QuantizedKVCache, _BaseCache

from ..errors import FlashMoEError

FLOATS = (mx.float32, mx.bfloat16, mx.float16)
_compared: WeakKeyDictionary[Any, tuple[Sequence[Any], int]] = WeakKeyDictionary()
REMEDY = "Give a prompt cache that this model made."


@dataclass(frozen=True)
class DeltaCacheSpec:
    """A GatedDeltaNet layer's cache: an `ArraysCache` of two arrays, given without batch dimension.

    Attributes:
        past: `[taps - 1, channels]`, the convolution's last inputs.
        state: `[Hv, Dv, Dk]`, the delta state.
    """

    past: tuple[int, ...]
    state: tuple[int, ...]

    def check(self, cache: Any, batch: int, wide: bool) -> None:
        """Compare a layer's cache with the layer; widen 16-bit arrays if `wide`."""
        if not isinstance(cache, ArraysCache) or len(cache.cache) != 2:
            raise _Mismatch(
                f"is {_name(cache)}, but GatedDeltaNet needs an ArraysCache of two arrays"
            )
        past, state = cache.cache
        if (past is None) != (state is None):
            raise _Mismatch("has only one of the convolution's past and the delta state")
        if past is not None:
            cache.cache[0] = _checked("the convolution's past", past, (batch, *self.past), wide)
            cache.cache[1] = _checked("the delta state", state, (batch, *self.state), True)
        for name in ("left_padding", "lengths"):
            rows = getattr(cache, name)
            if rows is not None and not _counts(rows, batch):
                raise _Mismatch(
                    f"has {name} {_show(rows)}, but the layer needs {batch} whole numbers"
                )


@dataclass(frozen=True)
class KeyValueSpec:
    """A full attention layer's cache: keys and values `[B, heads, slots, dim]`."""

    heads: int
    dim: int

    def check(self, cache: Any, batch: int, wide: bool) -> None:
        """Compare a layer's cache with the layer; widen 16-bit arrays if `wide`."""
        if isinstance(cache, ArraysCache) or not hasattr(cache, "update_and_fetch"):
            raise _Mismatch(f"is {_name(cache)}, but attention needs keys and values")
        if (keys := cache.keys) is None:
            return
        if hasattr(cache, "bits"):
            self._check_quantized(cache, batch)
        else:
            slots = keys.shape[2] if keys.ndim == 4 else 0
            shape = batch, self.heads, slots, self.dim
            cache.keys = _checked("keys", keys, shape, wide)
            cache.values = _checked("values", cache.values, shape, wide)
            if cache.keys.dtype != cache.values.dtype:
                raise _Mismatch(f"has keys {_show(keys)} and values {_show(cache.values)}")
        self._check_places(cache, batch)

    def _check_quantized(self, cache: Any, batch: int) -> None:
        bits, group = cache.bits, cache.group_size
        if bits not in (2, 3, 4, 5, 6, 8) or group not in (32, 64, 128) or self.dim % group:
            raise _Mismatch(f"has {bits} bits in groups of {group}, for heads of {self.dim}")
        for name, arrays in (("keys", cache.keys), ("values", cache.values)):
            if len(arrays) != 3 or arrays[0].ndim != 4:
                raise _Mismatch(f"has {name} that are not codes, scales and biases")
            shape = batch, self.heads, cache.keys[0].shape[2]
            codes, *others = arrays
            if codes.shape != (*shape, self.dim * bits // 32) or codes.dtype != mx.uint32:
                raise _Mismatch(f"has codes of {name} {_show(codes)}")
            for other in others:
                _checked(f"scales or biases of {name}", other, (*shape, self.dim // group), False)

    def _check_places(self, cache: Any, batch: int) -> None:
        """Check the slots in use: `offset`, or `_idx` if offsets differ by row."""
        whole = cache.keys[0] if hasattr(cache, "bits") else cache.keys
        name = "_idx" if hasattr(cache, "_idx") else "offset"
        used = getattr(cache, name)
        if type(used) is not int or not 0 <= used <= whole.shape[2]:
            raise _Mismatch(f"has {name} = {used!r}, but {whole.shape[2]} slots")
        for name in ("offset", "left_padding"):
            rows = getattr(cache, name, 0)
            if type(rows) is not int and not _counts(rows, batch):
                raise _Mismatch(
                    f"has {name} {_show(rows)}, but the layer needs {batch} whole numbers"
                )


class _Mismatch(Exception):
    """A difference between a cache and its layer."""


def check_caches(
    caches: Sequence[Any], specs: Sequence[DeltaCacheSpec | KeyValueSpec], h: mx.array
) -> None:
    """Compare every layer's cache with the layer, before any kernel uses it.

    If the layer computes in float32, 16-bit arrays are widened in place, as in stock mlx-lm. Caches
    are not compared again while the first cache and the batch size stay the same: 40 layers would
    take 0.1 ms per token.

    Args:
        caches: one per layer, or None.
        specs: one per layer.
        h: `[B, T, H]`, input of the first layer.

    Raises:
        FlashMoEError: an entry has another kind, shape or dtype.
    """
    if len(caches) != len(specs):
        raise FlashMoEError(
            f"the prompt cache has {len(caches)} layers, but the model has {len(specs)}. {REMEDY}"
        )
    first, batch, wide = caches[0], h.shape[0], h.dtype == mx.float32
    known = isinstance(first, _BaseCache) and _compared.get(first)
    if known and known[0] is specs and known[1] == batch:
        return
    for layer, (cache, spec) in enumerate(zip(caches, specs, strict=True)):
        if cache is None:
            continue
        try:
            spec.check(cache, batch, wide)
        except (_Mismatch, AttributeError, TypeError) as error:
            raise FlashMoEError(f"the prompt cache of layer {layer} {error}. {REMEDY}") from error
    if isinstance(first, _BaseCache):
        _compared[first] = specs, batch


def check_classes(caches: Sequence[Any], expected: Sequence[Any]) -> None:
    """Compare the classes of caches with those that mlx-lm makes for the model.

    Raises:
        FlashMoEError: a layer has another one; a `KVCache` may be quantized.
    """
    if len(caches) != len(expected):
        raise FlashMoEError(
            f"the prompt cache has {len(caches)} layers, but the model has {len(expected)}. "
            f"{REMEDY}"
        )
    for layer, (cache, own) in enumerate(zip(caches, expected, strict=True)):
        quantized = type(own) is KVCache and type(cache) is QuantizedKVCache
        if type(cache) is not type(own) and not quantized:
            raise FlashMoEError(
                f"the prompt cache of layer {layer} is {_name(cache)}, but the model needs "
                f"{_name(own)}. {REMEDY}"
            )


def _checked(name: str, array: Any, shape: tuple[int, ...], wide: bool) -> mx.array:
    """Return the array, as float32 if `wide`; raise if it is not float, or of another shape."""
    if array.shape != shape or array.dtype not in FLOATS:
        raise _Mismatch(f"has {name} {_show(array)}, but the layer needs floats {list(shape)}")
    return array.astype(mx.float32) if wide and array.dtype != mx.float32 else array


def _counts(rows: Any, batch: int) -> bool:
    """Say whether this is one whole number per row."""
    return (
        isinstance(rows, mx.array)
        and rows.shape == (batch,)
        and mx.issubdtype(rows.dtype, mx.integer)
    )


def _show(array: Any) -> str:
    if not isinstance(array, mx.array):
        return repr(array)[:80]
    return f"{str(array.dtype).removeprefix('mlx.core.')}{list(array.shape)}"


def _name(cache: Any) -> str:
    return type(cache).__name__
