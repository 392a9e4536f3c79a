"""The web page: see what a long prompt does."""
