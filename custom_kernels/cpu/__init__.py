"""The same ops on CPUs, by numba: several fused into one call per layer."""
