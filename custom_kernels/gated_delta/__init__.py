"""GatedDeltaNet: the recurrence by plain ops, by GPU kernels a step or a prompt at a time."""
