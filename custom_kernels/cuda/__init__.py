"""What only NVIDIA GPUs have: a slot table that the GPU keeps by itself."""
