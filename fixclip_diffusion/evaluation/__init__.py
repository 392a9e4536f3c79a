"""Whether pictures follow their prompts."""
