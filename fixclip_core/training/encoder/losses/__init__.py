"""The encoder's losses, one file each: formula and shapes stand at its top."""
