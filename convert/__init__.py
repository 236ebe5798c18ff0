"""Repack a checkpoint into the directory format that streams experts from disk."""

from .run import convert

__all__ = ["convert"]
