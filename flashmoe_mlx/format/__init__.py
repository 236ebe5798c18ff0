"""Bytes on disk: where tensors and experts lie, and the JSON beside them.

Knows the standard library only: no MLX, no model, no memory.
"""
