"""The scenes world: a procedural world of coloured shapes with captions and an exact checker."""
