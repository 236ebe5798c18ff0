"""Repack a checkpoint into the directory format that streams experts from disk."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .run import convert

__all__ = ["convert"]


def __getattr__(name: str) -> Any:
    """Import `convert` on first use: `verify` works without MLX."""
    if name != "convert":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .run import convert

    return convert
