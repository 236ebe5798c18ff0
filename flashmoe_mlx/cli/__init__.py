"""The commands `flashmoe-generate`, `flashmoe-doctor` and `flashmoe-plan`, and their options.

Only benchmarks import it, for published figures and the check of a model directory.
"""
