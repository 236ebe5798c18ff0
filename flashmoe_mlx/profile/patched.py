"""Time the layers of any model; of one that mlx-lm builds, the experts and the rest of a layer.

As in `layers`, proxies stand in for the modules during the pass and evaluate every part.
"""

import re
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..models.qwen3_5.model import Model
from ..models.switch import StreamedSwitch
from ..store.store import ExpertStore
from . import layers as own
from .layers import Experts, LayerTime, Listener

LAYER = re.compile(r"(.*)\.(\d+)\.")  # the list of layers, and a layer's number


class _Layer:
    """Proxy of a decoder layer; other attributes are the layer's own."""

    def __init__(self, layer: nn.Module, several: LayerTime, single: LayerTime) -> None:
        self._layer, self._several, self._single = layer, several, single

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def pick(self, h: mx.array) -> LayerTime:
        """Return the counters of the step that runs."""
        return self._now  # whose step `__call__` began

    def __call__(self, h: mx.array, *args: Any, **kwargs: Any) -> Any:
        self._now = self._several if h.shape[1] > 1 else self._single
        mx.eval(h)
        start, before = time.perf_counter(), self._now.seconds
        y = self._layer(h, *args, **kwargs)
        mx.eval(y)
        inside = self._now.seconds - before  # reads and experts
        self._now.rest += time.perf_counter() - start - inside
        if self._now.kind == "dense":
            self._now.steps += 1
        return y


def untimed(model: Any) -> list[LayerTime]:
    """Return zeroed counters for each layer."""
    if isinstance(model, Model):
        return own.untimed(model)
    layers, experts = _found(model)
    return [LayerTime("moe" if n in experts else "dense") for n in range(len(layers))]


def timed_layers(
    model: Any, store: ExpertStore, prompt: list[LayerTime] | None = None
) -> AbstractContextManager[list[LayerTime]]:
    """Time the layers while the block runs: see `layers.timed_layers`."""
    return (own.timed_layers if isinstance(model, Model) else _timed)(model, store, prompt)


@contextmanager
def _timed(
    model: Any, store: ExpertStore, prompt: list[LayerTime] | None
) -> Iterator[list[LayerTime]]:
    layers, experts = _found(model)
    singles, originals, proxies = untimed(model), list(layers), list[Experts]()
    parents = []
    for number, layer in enumerate(originals):
        layers[number] = _Layer(layer, (prompt or singles)[number], singles[number])
        for path, module in experts.get(number, ()):
            proxies.append(Experts(module, layers[number].pick, store))
            parents.append((_at(layer, path[:-1]), path[-1], module))
            setattr(parents[-1][0], path[-1], proxies[-1])
    before, store.observer = store.observer, Listener(proxies)
    try:
        yield singles
    finally:
        store.observer = before
        layers[:] = originals
        for parent, name, module in parents:
            setattr(parent, name, module)


def _found(model: nn.Module) -> tuple[list[Any], dict[int, list[tuple[list[str], Any]]]]:
    """Return the list of decoder layers, and the experts of each, by paths inside the layer."""
    experts: dict[int, list[tuple[list[str], Any]]] = {}
    layers: list[Any] = []
    found = [(p, m) for p, m in model.named_modules() if isinstance(m, StreamedSwitch)]
    for path, module in sorted(found, key=lambda pair: pair[1].layer):
        if (match := LAYER.match(path)) is None:
            continue
        layers = _at(model, match[1].split("."))
        inside = path[match.end() :].split(".")
        experts.setdefault(int(match[2]), []).append((inside, module))
    return layers, experts


def _at(module: Any, path: list[str]) -> Any:
    """Return what lies at a path below a module."""
    for name in path:
        module = module[int(name)] if name.isdigit() else module[name]
    return module
