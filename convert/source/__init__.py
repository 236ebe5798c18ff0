"""The checkpoint to convert: its files on disk or on the Hub, and where each tensor lies."""
