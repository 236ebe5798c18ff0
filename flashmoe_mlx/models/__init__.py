"""Model code: what stock mlx-lm calls, and the checks of what is loaded into it.

Knows the store and the kernels. Must not know commands or benchmarks.
"""
