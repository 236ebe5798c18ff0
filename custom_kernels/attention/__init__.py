"""Attention: kernels for one decode step, and prefill on a CPU."""
