"""The checkpoint to convert: its files on disk or on the Hub, and each tensor's place."""
