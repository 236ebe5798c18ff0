"""Kernels and their float32 references; they know no model code."""
