"""Read what was written: compare every byte, repair, and build the model without weights."""
