"""Long prompts in Stable Diffusion: the FIX-CLIP text encoder as a drop-in component."""
