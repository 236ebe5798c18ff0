"""The commands `flashmoe-generate`, `flashmoe-doctor` and `flashmoe-plan`, and their options.

Nothing else imports it, but for benchmarks, which describe the machine with it.
"""
