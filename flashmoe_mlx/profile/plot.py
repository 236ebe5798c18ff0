"""Plot a profiling pass: each layer's time by part, its hit rate, and speed over time."""

import importlib.util
from pathlib import Path
from typing import Any

from ..errors import FlashMoEError
from .layers import PARTS

SUFFIXES = (".png", ".svg", ".pdf")
# Okabe and Ito's palette: people who see colors differently tell them apart.
COLORS = dict(zip(PARTS, ("#0072B2", "#E69F00", "#D55E00", "#009E73", "#F0E442"), strict=True))
LINE, MEAN = "black", "#CC79A7"
NOTE = "Layers are timed part by part, which makes their run slower than an untimed one."


def check_plot(path: Path | None) -> None:
    """Refuse a plot that cannot be drawn, before anything is measured.

    Raises:
        FlashMoEError: the suffix is unknown, matplotlib or the directory is missing.
    """
    if path is None:
        return
    if path.suffix not in SUFFIXES:
        raise FlashMoEError(f"--plot {path}: not an image file. Use {', '.join(SUFFIXES)}.")
    if importlib.util.find_spec("matplotlib") is None:
        raise FlashMoEError(
            f"--plot {path}: matplotlib is not installed. Install it: "
            'pip install "flashmoe-mlx[plot]"'
        )
    if not path.absolute().parent.is_dir():
        raise FlashMoEError(f"--plot {path}: {path.absolute().parent} is not a directory.")


def plot(path: Path | None, layers: list[dict[str, Any]], title: str) -> None:
    """Draw the layers of a benchmark's JSON into a file, if `path` is given."""
    if path is None:
        return
    figure = _figure(len(layers), 6)
    above, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    _draw_layers(above, below, layers)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def plot_run(path: Path, found: dict[str, Any], model: str) -> None:
    """Draw a generation into a file: its layers, and tokens per second.

    Args:
        path: the file.
        found: `RunStats.as_dict()`.
        model: its name, for the title.
    """
    phases, layers = found["phases"], found["layers"]
    name = "generation" if layers["generation"][0]["steps"] else "prompt"
    figure = _figure(len(layers[name]), 8)
    above, middle, below = figure.subplots(3, height_ratios=(3, 1, 2))
    middle.sharex(above)
    _draw_layers(above, middle, layers[name])
    _draw_speed(below, found["tokens_per_s"], phases["generation"]["tokens_per_s"])
    figure.suptitle(run_title(model, phases[name]))
    figure.savefig(path, dpi=150)


def run_title(model: str, phase: dict[str, Any]) -> str:
    """Return the title: the model, and a phase's speed and read rate."""
    read = f"{phase['bytes_per_s'] / 1e9:.2f} GB/s while reading" if phase["reads"] else "no reads"
    return f"{model}: {phase['tokens_per_s']:.1f} tok/s, {read}"


def _figure(layers: int, height: float) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(7, layers / 4), height), layout="constrained")
    figure.supxlabel(NOTE, fontsize="small", color="dimgray")
    return figure


def _draw_layers(times: Any, rates: Any, layers: list[dict[str, Any]]) -> None:
    """Draw each layer's time by part and a legend, and below them its hit rate."""
    bottom = [0.0] * len(layers)
    for part, color in COLORS.items():
        if not any(layer[f"{part}_ms"] for layer in layers):
            continue
        heights = [layer[f"{part}_ms"] for layer in layers]
        times.bar(range(len(layers)), heights, bottom=bottom, label=part, color=color)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    times.set(ylabel="ms per step")
    times.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(COLORS), frameon=False)
    rates.plot([100 * layer["hit_rate"] for layer in layers], ".-", color=LINE)
    rates.set(xlabel="layer", ylabel="hit rate, %", ylim=(0, 105))
    rates.xaxis.get_major_locator().set_params(integer=True)


def _draw_speed(axes: Any, speed: list[float], mean: float) -> None:
    """Draw tokens per second from the second token on, and their mean."""
    axes.plot(range(2, len(speed) + 2), speed, ".-", color=LINE)
    if speed:
        axes.axhline(mean, color=MEAN, linestyle="--", label=f"mean {mean:.1f}")
        axes.legend(loc="lower right")
    axes.set(xlabel="token", ylabel="tokens per second", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
