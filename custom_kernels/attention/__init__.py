"""Attention of one decode step: norms, rotation and cache in one kernel, the sum in another."""
