"""Router and expert MLP: one token at a time (decode) or sorted by expert (prefill)."""
