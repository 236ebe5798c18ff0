"""Kernels and their float32 references, without model code."""
