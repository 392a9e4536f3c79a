"""Training of the adapter between the text encoder and the UNet."""
