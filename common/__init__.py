"""What the five trainers share: configuration, sample numbering, optimizers, checkpoints, logging, media, the loop."""
