"""What only CPUs have: the same ops by numba, several fused into one call a layer."""
