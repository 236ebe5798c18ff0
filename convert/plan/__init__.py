"""Plan a conversion from headers and config alone. Knows the source; writes nothing."""
