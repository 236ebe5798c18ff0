"""Decide everything from headers and config alone. Knows the source; writes nothing."""
