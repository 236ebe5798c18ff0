"""A layer's step, traced once: to prepare its launches anew takes longer than to run them."""

from collections.abc import Callable, Iterator
from operator import is_
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .device import on_gpu


class Traced:
    """Functions of a layer for inputs of one shape and dtype, compiled around its weights.

    They are used as long as the layer's modules hold the same arrays as when they were traced.
    Replace weights to change them, as `Module.update` and `set_dtype` do: `weight *= 2` and
    `weight[0] = 7` keep the array and are not seen.
    """

    def __init__(self) -> None:
        """Start without functions."""
        self.functions: tuple[Callable[..., Any], ...] = ()
        self._kind: tuple[Any, ...] = ()
        self._modules: list[nn.Module] = []
        self._names: list[str] = []
        self._values: list[Any] = []

    def ready(self, x: mx.array) -> bool:
        """Say whether `functions` hold for this input and for the weights as they are now."""
        now = map(dict.get, self._modules, self._names)
        return (x.shape, x.dtype) == self._kind and all(map(is_, now, self._values))

    def trace(
        self, x: mx.array, modules: tuple[nn.Module, ...], *functions: Callable[..., Any]
    ) -> None:
        """Take functions that have just run for such an input, and read only `modules` besides.

        CPU kernels compute at once and leave nothing to trace.
        """
        if not on_gpu(x):
            return
        entries = [entry for module in modules for entry in _entries(module)]
        self._modules, self._names, self._values = (list(t) for t in zip(*entries, strict=True))
        self._kind = x.shape, x.dtype
        self.functions = tuple(mx.compile(function) for function in functions)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Traced":
        """Start anew: a copy of a model has weights of its own."""
        return Traced()


def _entries(module: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    for name, value in module.items():
        yield module, name, value
        if isinstance(value, nn.Module):
            yield from _entries(value)
