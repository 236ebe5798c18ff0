"""NVIDIA only: a slot table in GPU memory, and copies from pinned host memory."""
