"""Measurements of a run: counters, times of each layer, statistics of a generation.

Knows the store and the models. Must not know commands or benchmarks.
"""
