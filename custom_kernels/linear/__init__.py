"""Quantized matrices times rows: dequantize in FMA form, matrix by vector, and plain ops."""
