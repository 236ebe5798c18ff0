"""The command `flashmoe-bench`: throughput, disk and kernels, on models with random weights.

No other folder imports it.
"""
