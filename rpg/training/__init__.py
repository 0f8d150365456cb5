"""Training: loop, trainer, data, losses, run folder, processes."""
