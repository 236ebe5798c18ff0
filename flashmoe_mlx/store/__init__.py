"""Experts in memory: slots, requests, reads, and the back-ends that hold the bytes.

Knows bytes and slots. Must not know models, tokens or ranks.
"""
