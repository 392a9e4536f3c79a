"""Training: recipes, the loop, checkpoints, and one folder for each thing that is trained."""
