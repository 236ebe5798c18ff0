"""Ops with several implementations: the first that accepts the inputs computes.

An implementation checks its inputs (device, dtype, format, autotune's verdict) and returns None to
decline; the naive form accepts all. Callers never ask for the device.
"""

from collections.abc import Callable
from functools import update_wrapper
from typing import Any, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Op(Generic[P, T]):
    """An op: its naive form and registered implementations."""

    def __init__(self, naive: Callable[P, T]) -> None:
        """Start with the naive form alone."""
        self.naive = naive
        self.implementations: list[Callable[P, T | None]] = []
        update_wrapper(self, naive)

    def register(self, implementation: Callable[P, T | None]) -> Callable[P, T | None]:
        """Append an implementation; it runs after earlier ones and before the naive form."""
        self.implementations.append(implementation)
        return implementation

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """Compute by the first implementation that accepts the inputs."""
        for implementation in self.implementations:
            if (result := implementation(*args, **kwargs)) is not None:
                return result
        return self.naive(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Op[P, T]":
        """Return the op itself: it has no state."""
        return self
