"""The command `flashmoe-bench`: throughput, disk and kernels on models of random weights.

Nothing imports it.
"""
