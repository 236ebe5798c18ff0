"""Repack a checkpoint into the directory format that streams experts from disk."""
