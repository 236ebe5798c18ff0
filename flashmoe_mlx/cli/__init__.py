"""The commands `flashmoe-generate`, `-chat`, `-doctor` and `-plan`, and their options.

Only `bench/` imports it: for published figures, and to check and load a model directory.
"""
