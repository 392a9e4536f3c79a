"""The model: open_clip's towers with long text positions, regional prompts, two branches and group features."""
