"""Quantized matrices times rows: matrix by vector, dequantize, and MLX's ops."""
