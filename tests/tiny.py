"""CLIP's own tokenizer for tiny models, and texts to feed them."""

import gzip
from pathlib import Path

import open_clip.tokenizer
from transformers import CLIPTokenizer


def clip_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """The stock tokenizer, from the vocabulary file that open_clip ships."""
    path = open_clip.tokenizer.default_bpe()
    lines = gzip.decompress(Path(path).read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    merges = [tuple(line.split()) for line in lines]
    letters = list(open_clip.tokenizer.bytes_to_unicode().values())
    pieces = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge) for merge in merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=77)


def sentences(number: int) -> str:
    """About 10 tokens a sentence, every sentence another."""
    colours = ["red", "green", "blue", "yellow", "white", "black", "orange", "purple", "pink"]
    things = ["horse", "house", "boat", "tree", "lamp", "chair", "bird", "cloud", "kite", "piano", "drum"]
    return " ".join(f"A {colours[i % 9]} {things[i % 11]} stands near the number {i}." for i in range(number))
