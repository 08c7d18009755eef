"""Everything between files and NumPy batches: tokens, prompts, pictures, data sets. Never JAX, never a device."""
