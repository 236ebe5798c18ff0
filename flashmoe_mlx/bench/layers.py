"""Where a benchmark's time goes, layer by layer."""

from collections.abc import Callable

from ..profile.counters import Use
from ..profile.layers import LayerTime, print_rows, timed_layers
from .model import Subject


def profile(
    subject: Subject, work: Callable[[Callable[[], None]], Use]
) -> tuple[list[LayerTime], float]:
    """Time the layers during `work`, which is given a function to call when the counting begins.

    Returns:
        The layers' times, and the seconds of all of `work` that counted.
    """
    with timed_layers(subject.model, subject.store) as layers:

        def started() -> None:
            for layer in layers:
                layer.clear()

        use = work(started)
    return layers, use.seconds


def print_layers(layers: list[LayerTime], steps: int, seconds: float, usual: float) -> None:
    """Print the table: milliseconds per step.

    Args:
        layers: what `timed_layers` found.
        steps: in the pass: tokens, or steps of a batch.
        seconds: that the pass took.
        usual: seconds that a run takes without this pass's waiting.
    """
    print(
        "layers, in a profiling pass that waits for each part "
        f"({seconds / usual:.2f} times a run's time); milliseconds per step"
    )
    total = print_rows(layers, steps)
    rest = (seconds - total.seconds) / steps * 1e3
    print(f"embedding, head, sampling and the rest: {rest:.3f} ms", flush=True)
