"""Quantize a matrix or an expert. Knows arrays; no files but those it reads."""
