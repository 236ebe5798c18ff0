"""Replace mx.fast.metal_kernel by the bench, so that a package's own call path runs."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np

from .errors import BenchError
from .modes import MODES
from .recording import Launch, record, to_mx


@dataclass
class Session:
    """Mode and launches of a `with metal_on_cpu()` block."""

    mode: str
    strict: bool
    launches: list[Launch] = field(default_factory=list)


_active: list[Session] = []
_active_make: list[Callable[..., Any]] = []


@dataclass(frozen=True)
class BenchKernel:
    """Replaces a kernel of mx.fast.metal_kernel; calling it runs it on the CPU."""

    real: Callable[..., list[mx.array]]
    name: str

    def __call__(
        self, *, inputs: Sequence[Any], init_value: float | None = None, **geometry: Any
    ) -> list[mx.array]:
        """Record one launch, run it in the session's mode, return MLX arrays."""
        if not _active:
            raise BenchError(
                "bench", f"{self.name} was made in a metal_on_cpu block: call it in one"
            )
        for ignored in ("stream", "verbose"):
            geometry.pop(ignored, None)
        arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]

        def call(*traced: mx.array) -> list[mx.array]:
            return self.real(inputs=list(traced), **geometry)

        (launch,) = record(call, *arrays, init_value=init_value)
        session = _active[-1]
        session.launches.append(launch)
        results = MODES[session.mode](launch, session.strict)
        return [to_mx(data, o) for data, o in zip(results, launch.outputs, strict=True)]


@contextmanager
def metal_on_cpu(mode: str = "fast", strict: bool = True) -> Iterator[Session]:
    """Run the Metal kernels made and called in this block on the CPU, in one of MODES.

    Kernels must be built inside such a block (this one or an earlier one): clear caches of kernels
    built outside. mx.compile is off inside. `strict=False` allows implicit narrowing, as Metal does
    and our rules do not.
    """
    if mode not in MODES:
        raise BenchError("bench", f"no mode {mode!r}; there are {', '.join(MODES)}")
    make = mx.fast.metal_kernel if not _active else _active_make[-1]

    def metal_kernel(name: str, *arguments: Any, **options: Any) -> BenchKernel:
        return BenchKernel(make(name, *arguments, **options), name)

    session = Session(mode, strict)
    _active.append(session)
    _active_make.append(make)
    mx.disable_compile()
    try:
        with (
            patch.object(mx.fast, "metal_kernel", metal_kernel),
            patch.object(mx.metal, "is_available", lambda: True),
        ):
            yield session
    finally:
        _active.pop()
        _active_make.pop()
        if not _active and "MLX_DISABLE_COMPILE" not in os.environ:
            mx.enable_compile()


def _as_list(value: Any) -> list[np.ndarray]:
    items = [value] if isinstance(value, mx.array | np.ndarray) else list(value)
    return [np.asarray(x.astype(mx.float32) if isinstance(x, mx.array) else x) for x in items]


def check_kernel(
    f: Callable[..., Any],
    arrays: Sequence[mx.array],
    reference: Any,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-6,
    modes: Sequence[str] = tuple(MODES),
    strict: bool = True,
) -> None:
    """Run f(*arrays), which builds and calls Metal kernels, in every mode; compare each result.

    Args:
        f: returns one array or several.
        arrays: its arguments.
        reference: the expected results, or a function of the same arguments that returns them.
        rtol: relative tolerance, in float32.
        atol: absolute tolerance.
        modes: names of MODES.
        strict: as in `metal_on_cpu`.

    Raises:
        BenchError: from the first mode that fails; of kind `wrong` if results differ.
    """
    wanted = _as_list(reference(*arrays) if callable(reference) else reference)
    for mode in modes:
        with metal_on_cpu(mode, strict) as session:
            results = _as_list(f(*arrays))
        if not session.launches:
            raise BenchError(
                "bench", "f launched no Metal kernel: clear caches of kernels built before"
            )
        if len(results) != len(wanted):
            raise BenchError("wrong", f"{len(results)} results, {len(wanted)} in the reference")
        for number, (result, right) in enumerate(zip(results, wanted, strict=True)):
            _check_close(f"mode {mode}, result {number}", result, right, rtol, atol)


def _check_close(
    what: str, result: np.ndarray, right: np.ndarray, rtol: float, atol: float
) -> None:
    try:
        np.testing.assert_allclose(result, right, rtol, atol, err_msg=what)
    except AssertionError as error:
        raise BenchError("wrong", str(error)) from None
