"""Time per call of ops, measured side by side in chains, for autotune and benchmarks."""

import statistics
import time
from collections.abc import Callable, Sequence

import mlx.core as mx

from .case import KernelCase

Op = Callable[..., list[mx.array]]
Clock = Callable[[], float]


def _add_nothing(x: mx.array, *scalars: mx.array) -> mx.array:
    for scalar in scalars:
        x = x + (0 * scalar).astype(x.dtype)
    return x


_add_nothing_fused = mx.compile(_add_nothing)


def ops_of(case: KernelCase, names: Sequence[str]) -> list[Op]:
    """Return a case's ops by name as decode runs them: traced on a GPU.

    Untraced, the times would measure Python preparing launches.
    """
    ops: list[Op] = [getattr(case, name) for name in names]
    return list(map(mx.compile, ops)) if mx.default_device() == mx.Device(mx.gpu) else ops


def chain(op: Op, sets: Sequence[list[mx.array]], calls: int) -> None:
    """Run an op `calls` times in one evaluation, each call depending on the one before.

    Independent calls would overlap on a GPU and hide their latency; decode cannot.

    Args:
        op: takes one set, returns its outputs.
        sets: sets of inputs, used in turn.
        calls: number of calls.
    """
    # Fused into one launch on a GPU; on a CPU, mx.compile would call the system's C++ compiler.
    on_gpu = mx.default_device() == mx.Device(mx.gpu)
    link = _add_nothing_fused if on_gpu else _add_nothing
    outputs: list[mx.array] = []
    for call in range(calls):
        first, *rest = sets[call % len(sets)]
        first = link(first, *(y.reshape(-1)[:1] for y in outputs))
        outputs = op(first, *rest)
    mx.eval(outputs)


def _link(outputs: int) -> Op:
    """Return an op that does nothing, with the same number of outputs for `chain`."""
    return lambda *inputs: [inputs[0]] * outputs


def fitting_calls(
    ops: Sequence[Op], inputs: list[mx.array], seconds: float, most: int, clock: Clock
) -> int:
    """Return the number of calls of the slowest op in a chain of `seconds`, 1 to `most`."""
    slowest = 0.0
    for op in ops:
        chain(op, [inputs], 1)
        start = clock()
        chain(op, [inputs], 1)
        slowest = max(slowest, clock() - start)
    return min(max(int(seconds / slowest), 1), most) if slowest else most


def timed(
    ops: Sequence[Op],
    sets: Sequence[list[mx.array]],
    calls: int,
    runs: int = 5,
    clock: Clock = time.perf_counter,
    typical: Callable[[list[float]], float] = statistics.median,
) -> list[tuple[float, float]]:
    """Time ops in interleaved runs, so that changes of the machine's speed affect all.

    Args:
        ops: run in this order; all with the same number of outputs.
        sets: sets of inputs, used in turn by the calls of a chain.
        calls: calls per chain.
        runs: timed chains per op, after one to warm up.
        clock: seconds.
        typical: reduces the runs' times to one.

    Returns:
        Milliseconds per call of the typical run, without and with the cost of linking calls. The
        first may be negative: noise, if an op takes less time than its link.
    """
    link_alone = _link(len(ops[0](*sets[0])))
    taken: list[list[float]] = [[] for _ in range(len(ops) + 1)]
    for _ in range(runs + 1):
        for op, times in zip((*ops, link_alone), taken, strict=True):
            start = clock()
            chain(op, sets, calls)
            times.append((clock() - start) * 1e3 / calls)
    *found, link = (typical(times[1:]) for times in taken)
    return [(ms - link, ms) for ms in found]
