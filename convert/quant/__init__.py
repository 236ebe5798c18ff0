"""Quantize a matrix or an expert. Knows arrays, not output files."""
