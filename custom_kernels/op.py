"""Ops with several implementations: the first that accepts its inputs computes.

An implementation looks at its inputs (device, dtype, format, and what autotune found) and returns
None if it does not take them; the naive form takes all. Callers never ask which device it is.
"""

from collections.abc import Callable
from functools import update_wrapper
from typing import Any, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Op(Generic[P, T]):
    """An op, made of its naive form."""

    def __init__(self, naive: Callable[P, T]) -> None:
        """Start with the naive form alone."""
        self.naive = naive
        self.implementations: list[Callable[P, T | None]] = []
        update_wrapper(self, naive)

    def register(self, implementation: Callable[P, T | None]) -> Callable[P, T | None]:
        """Try an implementation after those that are registered, before the naive form."""
        self.implementations.append(implementation)
        return implementation

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """Compute by the first implementation that accepts the inputs."""
        for implementation in self.implementations:
            if (result := implementation(*args, **kwargs)) is not None:
                return result
        return self.naive(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Op[P, T]":
        """Share it: an op has no state."""
        return self
