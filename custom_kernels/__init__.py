"""Kernels and their float32 references. Imports only mlx and numpy."""
