"""Compare every byte of a converted directory with its checksums, and repair it."""
