"""Time each part of each layer, in a pass that evaluates every part before the next.

Proxies replace the model's modules during the pass; they evaluate their results and read the clock.
Parts cannot overlap, so the pass is slower than the runs that it explains; both totals are printed.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from ..models.qwen3_5.model import DecoderLayer, Model
from ..store.store import ExpertStats, ExpertStore

PARTS = ("attention", "router", "read", "experts", "rest")


@dataclass
class LayerTime:
    """Seconds and counters of one layer, summed over all steps.

    Attributes:
        kind: "linear" or "full" attention.
        attention: the mixer, with its norm and residual.
        router: until the first expert request: norm, router, and on a CPU the first half of the
            shared expert.
        read: waits for reads of experts.
        experts: routed and shared experts; of a model of mlx-lm, the routed ones.
        rest: of a model of mlx-lm, whatever else its layer does.
        asked: experts requested, once per step.
        hits: requested experts that were resident.
        distinct: distinct experts requested, summed over the steps.
        bytes_read: bytes read into slots.
        steps: runs of the layer.
    """

    kind: str
    attention: float = 0.0
    router: float = 0.0
    read: float = 0.0
    experts: float = 0.0
    rest: float = 0.0
    asked: int = 0
    hits: int = 0
    distinct: int = 0
    bytes_read: int = 0
    steps: int = 0

    def clear(self) -> None:
        """Set all figures to zero."""
        self.__init__(self.kind)  # type: ignore[misc]

    @property
    def seconds(self) -> float:
        """Sum of all parts."""
        return sum(getattr(self, part) for part in PARTS)

    @property
    def hit_rate(self) -> float:
        """Share of the requested experts that were resident, 0 to 1."""
        return self.hits / self.asked if self.asked else 0.0

    def as_dict(self, steps: int) -> dict[str, Any]:
        """Return JSON values; times are milliseconds per step."""
        times = {f"{part}_ms": getattr(self, part) / steps * 1e3 for part in PARTS}
        counts = {k: v for k, v in asdict(self).items() if k not in (*PARTS, "kind")}
        return {"kind": self.kind, **times, **counts, "hit_rate": self.hit_rate}


Pick = Callable[[mx.array], LayerTime]  # chooses the counters for hidden states [B, T, H]


class _Attention:
    """Proxy of a layer's mixer."""

    def __init__(self, module: Callable[..., Any], pick: Pick) -> None:
        self._module, self._pick = module, pick

    def traced(self, *_: Any) -> None:
        """Return no traced step: parts run one by one."""

    def __call__(self, h: mx.array, *rest: Any) -> Any:
        mx.eval(h)
        start = time.perf_counter()
        y = self._module(h, *rest)
        mx.eval(y)
        self._pick(h).attention += time.perf_counter() - start
        return y


class Experts:
    """Proxy of a layer's mixture of experts."""

    def __init__(self, module: Any, pick: Pick, store: ExpertStore) -> None:
        """Stand in for `module`; `pick` chooses the counters."""
        self._module, self._pick, self._store = module, pick, store
        self._first: float | None = None
        self._ids: set[int] = set()
        self._device_seconds = 0.0

    def traced(self, *_: Any) -> None:
        """Return no traced step: parts run one by one."""

    def asked(self, experts: Sequence[int]) -> None:
        """Record a request, and the time of the first one."""
        self._first = self._first or time.perf_counter()
        self._ids.update(experts)

    def add_device_seconds(self, seconds: float) -> None:
        """Add the time of loads by the GPU itself."""
        self._device_seconds += seconds

    def prefetch(self, *args: Any) -> None:
        """Prefetch as the block does, untimed."""
        self._module.prefetch(*args)

    def __call__(self, h: mx.array, *rest: Any) -> Any:
        """Run the module and add up its times."""
        mx.eval(h)
        self._first, self._ids, self._device_seconds = None, set(), 0.0
        before: ExpertStats = replace(self._store.stats)
        start = time.perf_counter()
        y = self._module(h, *rest)
        mx.eval(y)
        seconds, after, times = time.perf_counter() - start, self._store.stats, self._pick(h)
        router = self._first - start if self._first else 0.0
        read = after.seconds_waited - before.seconds_waited + self._device_seconds
        times.router += router
        times.read += read
        times.experts += seconds - router - read
        times.asked += after.asked - before.asked
        times.hits += after.hits - before.hits
        times.distinct += len(self._ids)
        times.bytes_read += after.bytes_read - before.bytes_read
        times.steps += 1
        return y


class Listener:
    """Passes the store's requests to each layer's proxy."""

    def __init__(self, proxies: list[Experts]) -> None:
        """Take a proxy per layer of the store."""
        self._proxies = proxies

    def asked(self, layer: int, experts: Sequence[int]) -> None:
        """Pass on a request."""
        self._proxies[layer].asked(experts)

    def loading(self, layer: int, ids: mx.array, slots: mx.array) -> None:
        """Pass on a request that the GPU serves itself, and time it."""
        self._proxies[layer].asked(np.unique(np.array(ids)).tolist())
        start = time.perf_counter()
        mx.eval(slots)
        self._proxies[layer].add_device_seconds(time.perf_counter() - start)


@contextmanager
def timed_layers(
    model: Model, store: ExpertStore, prompt: list[LayerTime] | None = None
) -> Iterator[list[LayerTime]]:
    """Time the layers' parts while the block runs, then restore the model.

    Args:
        model: the model.
        store: its store.
        prompt: counters per layer for steps of several tokens, by default the same ones.
    """
    found = untimed(model)
    originals, proxies = [], list[Experts]()
    for layer, several, single in zip(model.layers, prompt or found, found, strict=True):
        name = _mixer(layer)
        originals.append((layer, name, layer[name], layer.mlp))
        pick = partial(_pick, several, single)
        proxies.append(Experts(layer.mlp, pick, store))
        setattr(layer, name, _Attention(layer[name], pick))
        setattr(layer, "mlp", proxies[-1])  # noqa: B010
    before, store.observer = store.observer, Listener(proxies)
    try:
        yield found
    finally:
        store.observer = before
        for layer, name, mixer, mlp in originals:
            setattr(layer, name, mixer)
            layer.mlp = mlp


def untimed(model: Model) -> list[LayerTime]:
    """Return zeroed counters for each layer."""
    return [LayerTime("linear" if layer.is_linear else "full") for layer in model.layers]


def _pick(several: LayerTime, single: LayerTime, h: mx.array) -> LayerTime:
    return several if h.shape[1] > 1 else single


def _mixer(layer: DecoderLayer) -> str:
    return "linear_attn" if layer.is_linear else "self_attn"


def print_rows(layers: list[LayerTime], steps: int) -> LayerTime:
    """Print a line for each layer and one for the total, and return the total."""
    shown = [part for part in PARTS if any(getattr(layer, part) for layer in layers)]
    titles = " ".join(f"{part:>9}" for part in shown)
    print(f"{'layer':>5} {'kind':>6} {titles}    total   hits  MB/step")
    for number, layer in enumerate(layers):
        print(_row(str(number), layer, steps, shown))
    total = LayerTime("")
    for name in (*PARTS, "asked", "hits", "bytes_read"):
        setattr(total, name, sum(getattr(layer, name) for layer in layers))
    print(_row("all", total, steps, shown))
    return total


def _row(name: str, layer: LayerTime, steps: int, shown: Sequence[str]) -> str:
    parts = " ".join(f"{getattr(layer, part) / steps * 1e3:9.3f}" for part in shown)
    total, mb = layer.seconds / steps * 1e3, layer.bytes_read / steps / 1e6
    return f"{name:>5} {layer.kind:>6} {parts} {total:8.3f} {layer.hit_rate:6.1%} {mb:8.2f}"
