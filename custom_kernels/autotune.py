"""Autotune: use our kernels where they are correct and faster than MLX's own ops.

At first use on a device, each op is checked against the float32 reference and timed against stock.
Verdicts are stored on disk per device, MLX version and kernel text.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import mlx.core as mx
import numpy as np

from ..progress import first_use
from . import launch
from .case import KernelCase
from .device import kernel_mode
from .kept import cache_dir, write_whole
from .timing import Clock, fitting_calls, ops_of, timed

NEEDS_GPU = "needs a GPU"
SECONDS = 0.004  # per chain
MOST_CALLS = 32  # per chain
RUNS = 9  # chains per op
ROTATED = 64 << 20  # bytes of inputs per chain: more than caches hold
# Two roundings to the output's dtype, or a float32 sum of 4096 terms in another order: sqrt(4096)
# ulps. Relative to the largest output.
OUTPUT_ULPS, SUM_ULPS = 2, 64
# Some stock ops are far off (MLX's bfloat16 matmuls on a CPU), so their error alone sets no limit.
CEILING = 1 / 16
MEASURED = ("sm_90",)  # H100, H200: kernels are checked, but not timed against stock


@dataclass(frozen=True)
class Verdict:
    """Result of one case on one device.

    Attributes:
        ok: the kernel ran and agrees with the reference.
        error: largest difference from the reference over the largest output, of the output closest
            to (or furthest beyond) its limit. None if NaN or if the kernel did not run.
        limit: upper bound of `error`.
        custom_ms: milliseconds per call of our kernel, None if not timed.
        stock_ms: milliseconds per call of MLX's own ops.
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
        """Return whether the kernel is correct and at least as fast as stock."""
        timed = self.custom_ms is not None and self.stock_ms is not None
        return self.ok and timed and self.custom_ms <= self.stock_ms  # type: ignore[operator]

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read the result of `as_dict`; raise TypeError for anything else."""
        made = cls(**values)
        numbers = made.error, made.limit, made.custom_ms, made.stock_ms
        sound = all(n is None or type(n) in (int, float) for n in numbers)
        if not (sound and isinstance(made.ok, bool) and isinstance(made.message, str)):
            raise TypeError(f"not a verdict: {values}")
        return made


_preferred: dict[KernelCase, bool] = {}
_reported: set[str] = set()
_times = True


def prefers_custom(case: KernelCase) -> bool:
    """Return whether to run an op by our kernel, on the default device of the first call.

    The first call for a case may measure; later ones are a dictionary lookup. With
    `FLASHMOE_KERNELS=stock` the answer is False, with `custom` it ignores speed.

    Raises:
        FlashMoEError: FLASHMOE_KERNELS is not auto, stock or custom.
    """
    try:
        return _preferred[case]
    except KeyError:
        return _preferred.setdefault(case, _decide(case))


def forget() -> None:
    """Clear this process's verdicts, for another default device or cache directory."""
    _preferred.clear()
    _reported.clear()


def without_timing() -> None:
    """Choose our kernels wherever they are correct: machines that compute as one must agree."""
    global _times
    _times = False
    _preferred.clear()


def _decide(case: KernelCase) -> bool:
    mode = kernel_mode()
    if mode == "stock":
        return False
    timed = mode == "auto" and _times and not _is_measured()
    found = _recall(case, timed)
    if found is None:
        with first_use(f"checking kernel {case.op}"):
            found = verdict(case, timed=timed, fresh=True)
        report(case, found)
    return found.faster if timed else found.ok


@functools.cache
def _is_measured() -> bool:
    """Say whether this GPU is one where our kernels were the faster ones, without exception."""
    return launch.is_cuda() and mx.device_info().get("architecture") in MEASURED


def report(case: KernelCase, found: Verdict) -> None:
    """Print a kernel's failure, once per op."""
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
    """Return a case's verdict on the default device, stored or measured.

    Args:
        case: the op and its shape.
        timed: also compare its speed with stock's.
        fresh: measure even if a verdict is stored.
        clock: seconds.
    """
    found = None if fresh else _recall(case, timed)
    if found is None:
        found = measure(case, timed, clock)
        _remember(case, found)
    return found


def measure(case: KernelCase, timed: bool = True, clock: Clock = time.perf_counter) -> Verdict:
    """Check and time a case without reading or writing stored verdicts."""
    try:
        found = check(case)
        if not (found.ok and timed):
            return found
        custom_ms, stock_ms = _race(case, clock)
        return Verdict(True, found.error, found.limit, custom_ms, stock_ms)
    except Exception as error:  # compilers, drivers and launches raise anything
        if not launch.available() and "back-end" in str(error):
            return Verdict(False, message=NEEDS_GPU)
        reason = " ".join(str(error).split())[:300]  # compilers give the reason in later lines
        return Verdict(False, message=f"does not run ({type(error).__name__}: {reason})")
    finally:
        mx.clear_cache()


def check(case: KernelCase) -> Verdict:
    """Compare a case's kernel with the reference; errors of the kernel propagate.

    Each output's error may be at most twice stock's, with a floor of a few ulps and a ceiling;
    stock's ops run only above the floor.
    """
    with _uncompiled():
        inputs = case.inputs()
        outputs = case.custom(*inputs)
        mx.eval(outputs)
        with mx.stream(mx.cpu if launch.is_cuda() else mx.default_device()):
            expected = case.reference(*inputs)
            mx.eval(expected)
        if [y.shape for y in outputs] != [y.shape for y in expected]:
            return Verdict(False, message=f"returns shapes {[y.shape for y in outputs]}")
        pairs = [*zip(outputs, expected, strict=True)]
        errors = [(_error(y, right), _floor(y)) for y, right in pairs]
        if any(error > limit for error, limit in errors):
            stocks = case.stock(*inputs)
            errors = [
                (error, _limit(stock, right))
                for (error, _), stock, right in zip(errors, stocks, expected, strict=True)
            ]
    error, limit = max(errors, key=lambda e: e[0] / max(e[1], 1e-30))
    if error <= limit:
        return Verdict(True, error, limit)
    if error == math.inf:
        return Verdict(False, None, limit, message="returns values that are not finite")
    return Verdict(False, error, limit, message=f"error {error:.1e}, limit {limit:.1e}")


@contextlib.contextmanager
def _uncompiled() -> Iterator[None]:
    """Run MLX's ops one by one on NVIDIA, where each fused one takes seconds to compile."""
    if not launch.is_cuda() or "MLX_DISABLE_COMPILE" in os.environ:
        yield
        return
    mx.disable_compile()
    try:
        yield
    finally:
        mx.enable_compile()


def _error(y: mx.array, expected: mx.array) -> float:
    """Return the largest difference over the largest output; infinite if y is not finite."""
    found, right = (np.asarray(a.astype(mx.float32)) for a in (y, expected))
    if not np.isfinite(found).all():
        return math.inf
    return float(np.abs(found - right).max() / (np.abs(right).max() or 1))


def _floor(y: mx.array) -> float:
    """Return the error that is always allowed: rounding of y's dtype, and of long sums."""
    if not mx.issubdtype(y.dtype, mx.floating):
        return 0.0
    return max(OUTPUT_ULPS * mx.finfo(y.dtype).eps, SUM_ULPS * mx.finfo(mx.float32).eps)


def _limit(stock: mx.array, expected: mx.array) -> float:
    return max(_floor(stock), min(2 * _error(stock, expected), CEILING))


def _race(case: KernelCase, clock: Clock) -> list[float]:
    """Return milliseconds per call of custom and stock, in about a tenth of a second."""
    inputs = [case.inputs()]
    ops = ops_of(case, ("custom", "stock"))
    calls = fitting_calls(ops, inputs[0], SECONDS, MOST_CALLS, clock)
    sets = min(calls, 1 + ROTATED // max(case.nbytes, 1))
    inputs += [case.inputs(seed) for seed in range(1, sets)]
    # Other programs only add time, so the minimum is the op's own.
    times = timed(ops, inputs, calls, RUNS, clock, min)
    return [max(net, 0.0) for net, _ in times]


def device_name() -> str:
    """Return the default device's name and back-end, such as "Apple M4 Max (Metal)"."""
    backends: Sequence[tuple[str, Any]] = (("Metal", mx.metal), ("CUDA", mx.cuda))
    backend = next((name for name, module in backends if module.is_available()), "no GPU")
    used = backend if mx.default_device() == mx.Device(mx.gpu) else f"CPU, {backend}"
    return f"{mx.device_info().get('device_name', 'unknown')} ({used})"


@functools.cache
def _versions() -> dict[str, str]:
    """Return the versions of MLX and numba, and a digest of every kernel's text."""
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
    """Return the file of this device's verdicts, and the facts in its name."""
    facts = {"device": device_name(), **_versions()}
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
    return cache_dir() / f"kernels-{key}.json", facts


def _read(path: Path) -> dict[str, Any]:
    """Return the verdicts in a file; empty if it is missing, unreadable or damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["verdicts"])
    except Exception:
        return {}


def _recall(case: KernelCase, timed: bool) -> Verdict | None:
    """Return the stored verdict, or None if missing or, with `timed`, without times."""
    try:
        found = Verdict.from_dict(_read(_file()[0])[str(case)])
    except (KeyError, TypeError):
        return None
    return None if timed and found.ok and found.custom_ms is None else found


def _remember(case: KernelCase, found: Verdict) -> None:
    """Add a verdict to the file, atomically; without a writable home each run measures."""
    path, facts = _file()
    text = json.dumps({**facts, "verdicts": {**_read(path), str(case): found.as_dict()}}, indent=1)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.encode())
