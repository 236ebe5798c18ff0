"""Qwen3.5 MoE, the fast path: our own definition with fused kernels, exact."""
