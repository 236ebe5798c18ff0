"""Quantised matrices times rows: dequantise in FMA form, matrix by vector, and plain ops."""
