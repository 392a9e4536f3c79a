"""Weights of other projects in, and weights for other projects out."""
