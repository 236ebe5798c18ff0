"""The measured choice between our kernels and MLX's own ops: right first, then faster.

At first use on a device an op is checked against the float32 reference and timed against stock.
The verdict is remembered on disk for this device, this MLX and these kernel texts.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import mlx.core as mx
import numpy as np

from . import launch
from .case import KernelCase
from .device import kernel_mode
from .kept import cache_dir, write_whole
from .timing import Clock, fitting_calls, ops_of, side_by_side

NEEDS_GPU = "needs a GPU"
SECONDS = 0.004  # that one chain should take
MOST_CALLS = 32  # in one chain
RUNS = 9  # of each op's chain
ROTATED = 64 << 20  # bytes of inputs that the calls of a chain go through, more than caches hold
# Rounding to the output's dtype twice, or a float32 sum of 4096 terms in another order: root of
# 4096 ulps. Relative to the largest output.
OUTPUT_ULPS, SUM_ULPS = 2, 64
# Some stock ops are far off (MLX's bfloat16 matmuls on a CPU): no licence to be as wrong.
CEILING = 1 / 16


@dataclass(frozen=True)
class Verdict:
    """What measuring one case on one device found.

    Attributes:
        ok: the kernel ran and agrees with the reference.
        error: of the output that is furthest from its limit: the largest difference from the
            reference as a share of the largest output. None if it is not a number or did not run.
        limit: that `error` had to keep.
        custom_ms: milliseconds per call of our kernel, None if not timed.
        stock_ms: the same of MLX's own ops.
        message: what is wrong, in one line; empty if `ok`.
    """

    ok: bool
    error: float | None = None
    limit: float | None = None
    custom_ms: float | None = None
    stock_ms: float | None = None
    message: str = ""

    @property
    def faster(self) -> bool:
        """Say whether the kernel is right and takes no longer than stock."""
        timed = self.custom_ms is not None and self.stock_ms is not None
        return self.ok and timed and self.custom_ms <= self.stock_ms  # type: ignore[operator]

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read what `as_dict` returned; raises TypeError for anything else."""
        made = cls(**values)
        numbers = made.error, made.limit, made.custom_ms, made.stock_ms
        sound = all(n is None or type(n) in (int, float) for n in numbers)
        if not (sound and isinstance(made.ok, bool) and isinstance(made.message, str)):
            raise TypeError(f"not a verdict: {values}")
        return made


_choices: dict[KernelCase, bool] = {}
_reported: set[str] = set()


def prefers_custom(case: KernelCase) -> bool:
    """Say whether to run an op by our kernel, on the device that was the default at first use.

    The first call for a case may measure; later ones are a dictionary look-up.
    `FLASHMOE_KERNELS=stock` always says no, `custom` says yes if the kernel is right.

    Raises:
        FlashMoEError: FLASHMOE_KERNELS is none of auto, stock and custom.
    """
    try:
        return _choices[case]
    except KeyError:
        return _choices.setdefault(case, _choose(case))


def forget() -> None:
    """Drop what this process remembers, for another default device or cache directory."""
    _choices.clear()
    _reported.clear()


def _choose(case: KernelCase) -> bool:
    choice = kernel_mode()
    if choice == "stock":
        return False
    timed = choice == "auto"
    found = _recall(case, timed)
    if found is None:
        found = verdict(case, timed=timed, fresh=True)
        report(case, found)
    return found.faster if timed else found.ok


def report(case: KernelCase, found: Verdict) -> None:
    """Tell the user of a kernel that fails, once per op."""
    if found.ok or found.message == NEEDS_GPU or case.op in _reported:
        return
    _reported.add(case.op)
    print(
        f"[flashmoe] kernel {case.op} on {device_name()}: {found.message} ({case}). MLX's own "
        "ops are used instead; please report it with the output of `flashmoe-doctor --json`.",
        file=sys.stderr,
    )


def verdict(
    case: KernelCase, *, timed: bool = True, fresh: bool = False, clock: Clock = time.perf_counter
) -> Verdict:
    """Return the verdict on a case on the default device: the remembered one, or a new one.

    Args:
        case: the op and its shape.
        timed: also compare its speed with stock's.
        fresh: measure even if a verdict is remembered.
        clock: seconds.
    """
    found = None if fresh else _recall(case, timed)
    if found is None:
        found = measure(case, timed, clock)
        _remember(case, found)
    return found


def measure(case: KernelCase, timed: bool = True, clock: Clock = time.perf_counter) -> Verdict:
    """Check a case and time it, without looking at or leaving anything on disk."""
    try:
        found = check(case)
        if not (found.ok and timed):
            return found
        custom_ms, stock_ms = _race(case, clock)
        return Verdict(True, found.error, found.limit, custom_ms, stock_ms)
    except Exception as error:  # whatever a compiler, a driver or a launch may raise
        if not launch.available() and "back-end" in str(error):
            return Verdict(False, message=NEEDS_GPU)
        reason = " ".join(str(error).split())[:300]  # compilers say what is wrong in later lines
        return Verdict(False, message=f"does not run ({type(error).__name__}: {reason})")
    finally:
        mx.clear_cache()


def check(case: KernelCase) -> Verdict:
    """Compare a trial's kernel with the reference.

    Each output may be at most twice as far off as stock's, with a floor of a few ulps and a
    ceiling. Passes on what the kernel raises.
    """
    inputs = case.inputs()
    outputs = case.custom(*inputs)
    mx.eval(outputs)
    truths, stocks = case.reference(*inputs), case.stock(*inputs)
    if [y.shape for y in outputs] != [y.shape for y in stocks]:
        return Verdict(False, message=f"gives shapes {[y.shape for y in outputs]}")
    pairs = [
        (_error(y, truth), _limit(stock, truth))
        for y, stock, truth in zip(outputs, stocks, truths, strict=True)
    ]
    error, limit = max(pairs, key=lambda pair: pair[0] / max(pair[1], 1e-30))
    if error <= limit:
        return Verdict(True, error, limit)
    if error == math.inf:
        return Verdict(False, None, limit, message="gives values that are not finite numbers")
    return Verdict(False, error, limit, message=f"error {error:.1e}, limit {limit:.1e}")


def _error(y: mx.array, truth: mx.array) -> float:
    """Return the largest difference over the largest output; infinite for what is no number."""
    found, right = (np.asarray(a.astype(mx.float32)) for a in (y, truth))
    if not np.isfinite(found).all():
        return math.inf
    return float(np.abs(found - right).max() / (np.abs(right).max() or 1))


def _limit(stock: mx.array, truth: mx.array) -> float:
    floor = 0.0
    if mx.issubdtype(stock.dtype, mx.floating):
        ulps = OUTPUT_ULPS * mx.finfo(stock.dtype).eps, SUM_ULPS * mx.finfo(mx.float32).eps
        floor = max(ulps)
    return max(floor, min(2 * _error(stock, truth), CEILING))


def _race(case: KernelCase, clock: Clock) -> list[float]:
    """Return milliseconds per call of custom and stock, in about a tenth of a second."""
    inputs = [case.inputs()]
    ops = ops_of(case, ("custom", "stock"))
    calls = fitting_calls(ops, inputs[0], SECONDS, MOST_CALLS, clock)
    sets = min(calls, 1 + ROTATED // max(case.nbytes, 1))
    inputs += [case.inputs(seed) for seed in range(1, sets)]
    # Other programs only ever add to a time, so the least is the op's own.
    return side_by_side(ops, inputs, calls, RUNS, clock, min)


def device_name() -> str:
    """Return the default device's name and back-end, such as "Apple M4 Max (Metal)"."""
    backends: Sequence[tuple[str, Any]] = (("Metal", mx.metal), ("CUDA", mx.cuda))
    backend = next((name for name, module in backends if module.is_available()), "no GPU")
    used = backend if mx.default_device() == mx.Device(mx.gpu) else f"CPU, {backend}"
    return f"{mx.device_info().get('device_name', 'unknown')} ({used})"


@functools.cache
def _versions() -> dict[str, str]:
    """Return what else a verdict depends on: MLX, numba, and the text of every kernel."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for file in sorted(folder.rglob("*.*")):
        if file.suffix in (".py", ".metal", ".cuh"):
            name = file.relative_to(folder).as_posix()
            digest.update(name.encode() + b"\0" + file.read_bytes() + b"\0")
    return {name: _version(name) for name in ("mlx", "numba")} | {"kernels": digest.hexdigest()}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _file() -> tuple[Path, dict[str, Any]]:
    """Return the file of this device's verdicts, and the facts that they hold for."""
    facts = {"device": device_name(), **_versions()}
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
    return cache_dir() / f"kernels-{key}.json", facts


def _read(path: Path) -> dict[str, Any]:
    """Return the verdicts in a file; none if it is absent, unreadable or damaged in any way."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["verdicts"])
    except Exception:
        return {}


def _recall(case: KernelCase, timed: bool) -> Verdict | None:
    """Return a remembered verdict that answers the question, or None."""
    try:
        found = Verdict.from_dict(_read(_file()[0])[str(case)])
    except (KeyError, TypeError):
        return None
    return None if timed and found.ok and found.custom_ms is None else found


def _remember(case: KernelCase, found: Verdict) -> None:
    """Add a verdict to the file, whole or not at all; a read-only home measures again."""
    path, facts = _file()
    text = json.dumps({**facts, "verdicts": {**_read(path), str(case): found.as_dict()}}, indent=1)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.encode())
