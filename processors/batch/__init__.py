"""batch: what a camera saw, cut into windows that are worth a verdict."""
