"""Repack a checkpoint into the directory format that streams experts from disk."""

from flashmoe_mlx.convert.run import convert

__all__ = ["convert"]
