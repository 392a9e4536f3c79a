"""FIX-CLIP: the long-text encoder, its training and its data."""
