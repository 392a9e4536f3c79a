"""The command `fixclip`."""
