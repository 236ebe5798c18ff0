"""A layer's step, traced once: preparing its launches takes longer than running them."""

from collections.abc import Callable, Iterator
from operator import is_
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .device import on_gpu


class Traced:
    """Functions of a layer for inputs of one shape and dtype, compiled around its weights.

    They stay valid while the layer's modules hold the arrays of the trace. To change weights,
    replace them, as `Module.update` and `set_dtype` do: `weight *= 2` and `weight[0] = 7` keep the
    array and go unnoticed.
    """

    def __init__(self) -> None:
        """Start without functions."""
        self.functions: tuple[Callable[..., Any], ...] = ()
        self._kind: list[Any] = []
        self._modules: list[nn.Module] = []
        self._names: list[str] = []
        self._values: list[Any] = []

    def ready(self, *inputs: mx.array) -> bool:
        """Return whether `functions` are valid for these inputs and the current weights."""
        now = map(dict.get, self._modules, self._names)
        return _kind(inputs) == self._kind and all(map(is_, now, self._values))

    def trace(
        self,
        inputs: tuple[mx.array, ...],
        modules: tuple[nn.Module, ...],
        *functions: Callable[..., Any],
    ) -> None:
        """Compile functions that read only arguments and `modules`, after a run with `inputs`.

        CPU kernels compute eagerly and leave nothing to trace.
        """
        if not on_gpu(inputs[0]):
            return
        entries = [entry for module in modules for entry in _entries(module)]
        self._modules, self._names, self._values = (list(t) for t in zip(*entries, strict=True))
        self._kind = _kind(inputs)
        self.functions = tuple(mx.compile(function) for function in functions)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Traced":
        """Start empty: a copy of a model has other weights."""
        return Traced()


def _kind(inputs: tuple[mx.array, ...]) -> list[Any]:
    """Return shapes and dtypes."""
    return [(x.shape, x.dtype) for x in inputs]


def _entries(module: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    for name, value in module.items():
        yield module, name, value
        if isinstance(value, nn.Module):
            yield from _entries(value)
