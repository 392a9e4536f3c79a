"""Texts to feed tiny models, and CLIP's own tokenizer for them."""

from fixclip_core.weights.write import clip_tokenizer

__all__ = ["clip_tokenizer", "sentences"]


def sentences(number: int) -> str:
    """About 10 tokens a sentence, every sentence another."""
    colours = ["red", "green", "blue", "yellow", "white", "black", "orange", "purple", "pink"]
    things = ["horse", "house", "boat", "tree", "lamp", "chair", "bird", "cloud", "kite", "piano", "drum"]
    return " ".join(f"A {colours[i % 9]} {things[i % 11]} stands near the number {i}." for i in range(number))
