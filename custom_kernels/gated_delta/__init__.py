"""GatedDeltaNet: by plain ops, and by GPU kernels for a step or a prompt."""
