"""The command `fixclip`: app (errors, shared options) and a file for each group of commands."""
