"""Training of the projection. Everything else is frozen: an argument of the step, never in the optimizer."""
