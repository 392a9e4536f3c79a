"""Training of the encoder: losses, the task that combines them, and the trainer."""
