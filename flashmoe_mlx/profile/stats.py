"""Statistics of a generation: its two phases, each layer's parts, and speed over time.

Timing the layers evaluates every part before the next (`layers`): the run is slower, its tokens are
the same.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import FlashMoEError
from ..models.qwen3_5.model import Model
from ..store.memory import peak_bytes
from .counters import Use, now
from .layers import LayerTime, print_rows
from .patched import timed_layers, untimed
from .plot import draw_layers


class RunStats:
    """Counters of one generation."""

    def __init__(self, model: Model) -> None:
        """Start counting."""
        self._model, self._store = model, model._store
        self.prompt, self.layers = untimed(model), list[LayerTime]()
        self.tokens = {"prompt": 0, "generation": 0}
        self._uses = [now(self._store)]  # before the first token, and after each
        self.speed: list[float] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Time the layers while the block runs."""
        assert self._store
        with timed_layers(self._model, self._store, self.prompt) as self.layers:
            yield

    def note(self, prompt_tokens: int) -> None:
        """Count a token."""
        self._uses.append(now(self._store))
        self.tokens = {"prompt": prompt_tokens, "generation": len(self._uses) - 1}
        if len(self._uses) > 2:
            self.speed.append(1 / (self._uses[-1].seconds - self._uses[-2].seconds))

    def phases(self) -> dict[str, dict[str, Any]]:
        """Return each phase's figures as JSON values; the prompt ends with the first token."""
        first, last = self._uses[min(1, len(self._uses) - 1)], self._uses[-1]
        return {
            "prompt": _figures(first - self._uses[0], self.tokens["prompt"]),
            "generation": _figures(last - first, max(0, len(self._uses) - 2)),
        }

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON values; times of layers are milliseconds per step."""
        layers = {"prompt": self.prompt, "generation": self.layers}
        return {
            "expert_cache": str(self._model.expert_cache()),
            "tokens": self.tokens,
            "phases": self.phases(),
            "layers": {
                n: [x.as_dict(max(1, x.steps)) for x in found] for n, found in layers.items()
            },
            "tokens_per_s": self.speed,
            "total": self._model.expert_stats().as_dict(),
            "peak_bytes": peak_bytes(),
        }

    def print(self) -> None:
        """Print the phases and the layers."""
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

    def plot(self, path: Path) -> None:
        """Plot the layers, and tokens per second over time, into a file."""
        from matplotlib.figure import Figure

        found = self.as_dict()
        layers = found["layers"]["generation" if self.layers[0].steps else "prompt"]
        figure = Figure(figsize=(max(7, len(layers) / 4), 7), layout="constrained")
        above, below = figure.subplots(2)
        slots = self._store.plan.slots if self._store else 0
        title = f"{self.tokens['generation']} tokens, {slots} experts per layer in memory"
        draw_layers(figure, above, layers, title)
        below.plot(range(2, len(self.speed) + 2), self.speed, ".-")
        below.set(xlabel="token", ylabel="tokens per second", ylim=(0, None))
        below.xaxis.get_major_locator().set_params(integer=True)
        figure.savefig(path, dpi=150)


def _figures(use: Use, tokens: int) -> dict[str, Any]:
    stats, reading = use.stats, use.stats.seconds_reading
    names = ("asked", "hits", "hit_rate", "reads", "bytes_read", "seconds_waited")
    return {
        "tokens": tokens,
        "seconds": use.seconds,
        "tokens_per_s": tokens / use.seconds if use.seconds else 0.0,
        **{name: getattr(stats, name) for name in names},
        "bytes_per_s": stats.bytes_read / reading if reading else 0.0,
        "disk_bytes": use.from_disk,
        "seconds_reading": reading,
    }
