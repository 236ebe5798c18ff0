"""Statistics of a generation: its two phases, each layer's parts, and speed over time.

Timing the layers evaluates every part before the next (`layers`): the run is slower, its tokens are
the same.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..errors import FlashMoEError
from ..models.qwen3_5.model import Model
from ..progress import first_use_seconds
from ..store.memory import peak_bytes
from .counters import Use, now
from .layers import LayerTime, print_rows
from .patched import timed_layers, untimed
from .plot import plot_run


class TokenTimes:
    """When a generation's tokens arrived: the one count of tokens, for every report.

    The token that ends the text counts, as in mlx-lm: the model computes it like any other.

    Attributes:
        prompt: tokens of the prompt.
        start: time before the prompt, in seconds.
        times: time of each generated token.
    """

    def __init__(self, prompt: int, clock: Callable[[], float] = time.perf_counter) -> None:
        """Start the clock, before the prompt is read."""
        self.prompt, self._clock, self._ahead = prompt, clock, -first_use_seconds()
        self.start, self.times = clock(), list[float]()

    def note(self) -> None:
        """Count a token."""
        self.times.append(self._clock())
        if len(self.times) == 1:
            self._ahead += first_use_seconds()

    def elapsed(self) -> float:
        """Return the seconds since the start."""
        return self._clock() - self.start

    @property
    def count(self) -> int:
        """Tokens generated."""
        return len(self.times)

    @property
    def prompt_seconds(self) -> float:
        """Time until the first token, less what only a machine's first run does."""
        return self.times[0] - self.start - self._ahead if self.times else 0.0

    @property
    def prompt_rate(self) -> float:
        """Tokens of the prompt per second, 0 if unknown."""
        return self.prompt / self.prompt_seconds if self.prompt_seconds > 0 else 0.0

    @property
    def seconds(self) -> float:
        """Time from the first token to the last."""
        return self.times[-1] - self.times[0] if self.times else 0.0

    @property
    def rate(self) -> float:
        """Generated tokens per second after the first, which came with the prompt; 0 if unknown."""
        return (self.count - 1) / self.seconds if self.seconds else 0.0


class RunStats:
    """Counters of one generation."""

    def __init__(self, model: Model, times: TokenTimes) -> None:
        """Start counting; `times` receives each token before `note`."""
        self._model, self._store, self._times = model, model._store, times
        self.prompt, self.layers = untimed(model), list[LayerTime]()
        self._uses = [now(self._store)] * 3  # before the first token, after it, and after the last

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Time the layers while the block runs."""
        assert self._store
        with timed_layers(self._model, self._store, self.prompt) as self.layers:
            yield

    def note(self) -> None:
        """Record what a token used."""
        use = now(self._store)
        self._uses[1:] = [use, use] if self._times.count == 1 else [self._uses[1], use]

    @property
    def speed(self) -> list[float]:
        """Tokens per second, for each token after the first."""
        return [1 / (then - before) for before, then in pairwise(self._times.times)]

    def phases(self) -> dict[str, dict[str, Any]]:
        """Return each phase's figures as JSON values.

        The prompt ends with the first token. That token counts as generated, but the phase
        "generation" has neither its time nor its reads, and tokens_per_s is that of the others.
        """
        (start, first, last), times = self._uses, self._times
        prompt = times.prompt, times.prompt_seconds, times.prompt_rate
        generation = times.count, times.seconds, times.rate
        return {
            "prompt": _figures(first - start, *prompt),
            "generation": _figures(last - first, *generation),
        }

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON values; times of layers are milliseconds per step."""
        layers = {"prompt": self.prompt, "generation": self.layers}
        return {
            "expert_cache": str(self._model.expert_cache()),
            "tokens": {"prompt": self._times.prompt, "generation": self._times.count},
            "phases": self.phases(),
            "layers": {
                n: [x.as_dict(max(1, x.steps)) for x in found] for n, found in layers.items()
            },
            "tokens_per_s": self.speed,
            "total": self._model.expert_stats().as_dict(),
            "peak_bytes": peak_bytes(),
        }

    def print(self) -> None:
        """Print all counters, the cache, the phases and the layers."""
        print(self._model.expert_stats())
        print(self._model.expert_cache())
        print(
            f"{'phase':>10} {'tokens':>6} {'seconds':>8} {'tok/s':>8} {'asked':>7} {'hits':>6} "
            f"{'MB':>9} {'reads':>6} {'GB/s':>6} {'waited s':>8}"
        )
        for name, row in self.phases().items():
            hits = f"{row['hit_rate']:.1%}" if row["asked"] else "-"
            print(
                f"{name:>10} {row['tokens']:6} {row['seconds']:8.3f} {row['tokens_per_s']:8.2f} "
                f"{row['asked']:7} {hits:>6} {row['bytes_read'] / 1e6:9.1f} "
                f"{row['reads']:6} {row['bytes_per_s'] / 1e9:6.2f} {row['seconds_waited']:8.3f}"
            )
        for what, layers in (("several tokens", self.prompt), ("a token each", self.layers)):
            if steps := layers[0].steps if layers else 0:
                print(f"layers, steps of {what}: {steps}; milliseconds per step, parts one by one")
                print_rows(layers, steps)

    def save(self, path: Path) -> None:
        """Write everything into a file, as JSON.

        Raises:
            FlashMoEError: it cannot be written.
        """
        try:
            path.write_text(json.dumps(self.as_dict(), indent=1) + "\n")
        except OSError as error:
            raise FlashMoEError(
                f"--stats-json {path}: cannot be written ({error.strerror}). Give another file."
            ) from error

    def plot(self, path: Path, model: str) -> None:
        """Plot the layers, and tokens per second over time, into a file; `model` is a name."""
        plot_run(path, self.as_dict(), model)


def _figures(use: Use, tokens: int, seconds: float, rate: float) -> dict[str, Any]:
    stats, reading = use.stats, use.stats.seconds_reading
    names = ("asked", "hits", "hit_rate", "reads", "bytes_read", "seconds_waited")
    return {
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_s": rate,
        **{name: getattr(stats, name) for name in names},
        "bytes_per_s": stats.bytes_read / reading if reading else 0.0,
        "disk_bytes": use.from_disk,
        "seconds_reading": reading,
    }
