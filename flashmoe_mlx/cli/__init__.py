"""The commands `flashmoe-generate`, `flashmoe-doctor` and `flashmoe-plan`, and their options.

Only `bench/` imports it: for published figures, and to check and load a model directory.
"""
