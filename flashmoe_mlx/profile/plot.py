"""Plot a profiling pass: each layer's time by part, and its hit rate."""

import importlib.util
from pathlib import Path
from typing import Any

from ..errors import FlashMoEError
from .layers import PARTS

SUFFIXES = (".png", ".svg", ".pdf")


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
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6, len(layers) / 4), 4), layout="constrained")
    draw_layers(figure, figure.subplots(), layers, title)
    figure.savefig(path, dpi=150)


def draw_layers(figure: Any, axes: Any, layers: list[dict[str, Any]], title: str) -> None:
    """Draw each layer's time by part, its hit rate, and a legend."""
    bottom = [0.0] * len(layers)
    shown = [part for part in PARTS if any(layer[f"{part}_ms"] for layer in layers)]
    for part in shown:
        heights = [layer[f"{part}_ms"] for layer in layers]
        axes.bar(range(len(layers)), heights, bottom=bottom, label=part)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.set(xlabel="layer", ylabel="ms per step", title=title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    rates = axes.twinx()
    rates.plot([100 * layer["hit_rate"] for layer in layers], "k.-", label="hits")
    rates.set(ylabel="hits in the bank, %", ylim=(0, 105))
    figure.legend(loc="outside lower center", ncols=len(shown) + 1)
