"""Check what was written: compare every byte, repair, and test that it loads."""
