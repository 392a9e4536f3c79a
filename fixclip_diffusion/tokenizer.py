"""CLIP's tokenizer with 248 tokens, CLIP's own cleaning of text, and textual inversions of several vectors."""

import html
import re
import tempfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ftfy
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import CLIPTokenizer

from fixclip_diffusion import builtin

# CLIP matches without regard to case, which makes the long ſ an s and loses the iota subscript U+0345, whose capital
# is a letter while it is none itself.
WORD_PATTERN = r"'[sſ]|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}\x{0345}]+"


class CleanText(str):
    """Text that is cleaned already; `FixClipTokenizer` takes it as it is (cleaning twice is not cleaning once)."""

    __slots__ = ()


class FixClipTokenizer(CLIPTokenizer):
    """CLIP's tokenizer with 248 tokens and with the cleaning that CLIP's training texts went through.

    Without that cleaning (ftfy, HTML entities twice, white space) the stock tokenizer gives other ids than
    open_clip for curly quotes, entities and mojibake. The text is lowercased by the backend, not here, so
    that mixed-case tokens of textual inversions are still found.

    Args:
        context_length: tokens of a full sequence, start and end included.
        clean_text: False gives exactly the ids of the stock `CLIPTokenizer`.
        **kwargs: of `CLIPTokenizer`; a stock folder's `model_max_length` gives way to `context_length`.
    """

    def __init__(
        self,
        vocab: str | dict[str, int] | None = None,
        merges: str | list[Any] | None = None,
        unk_token: str = "<|endoftext|>",
        bos_token: str = "<|startoftext|>",
        eos_token: str = "<|endoftext|>",
        pad_token: str = "<|endoftext|>",
        context_length: int = 248,
        clean_text: bool = True,
        **kwargs: Any,
    ):
        if context_length < 3:
            raise ValueError(f"context_length={context_length}: at least 3 (start, one token, end)")
        if vocab is None:  # transformers would go on with a vocabulary of no words
            where = kwargs.get("name_or_path") or "tokenizer"
            raise ValueError(
                f'{where}: no tokenizer files there; a Stable Diffusion model keeps them in subfolder="tokenizer"'
            )
        kwargs["model_max_length"] = context_length
        # A pad token that is an ordinary piece of the vocabulary ("!" in Stable Diffusion 2) must not become
        # a special token: every "!" of a prompt would turn into padding.
        plain_pad = str(pad_token) not in (str(unk_token), str(bos_token), str(eos_token))
        if plain_pad and clean_text:
            added = kwargs.get("added_tokens_decoder") or {}
            kwargs["added_tokens_decoder"] = {
                index: token for index, token in added.items() if str(token) != str(pad_token)
            }
        super().__init__(
            vocab=vocab,
            merges=merges,
            unk_token=unk_token,
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=eos_token if plain_pad and clean_text else pad_token,
            context_length=context_length,
            clean_text=clean_text,
            **kwargs,
        )
        self.context_length = context_length
        self.clean_text = clean_text
        if clean_text:
            self.pad_token = str(pad_token)
            # ftfy has composed the text already; composing again after the entities would differ from CLIP.
            self._tokenizer.normalizer = normalizers.Lowercase()
            self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="removed", invert=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any) -> Any:
        """Stock loading, which takes built-in names too; `model_max_length` is another name of `context_length`."""
        if "model_max_length" in kwargs:
            kwargs.setdefault("context_length", kwargs.pop("model_max_length"))
        name, kwargs = builtin.resolve_component(pretrained_model_name_or_path, "tokenizer", kwargs)
        return super().from_pretrained(name, *args, **kwargs)

    @classmethod
    def from_stock(cls, tokenizer: CLIPTokenizer, context_length: int = 248) -> "FixClipTokenizer":
        """The same vocabulary and added tokens for texts of `context_length` tokens."""
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            return cls.from_pretrained(folder, context_length=context_length)

    def clean(self, text: str) -> CleanText:
        """The text as CLIP's training saw it, in its original case: ftfy, entities, white space.

        Names of textual inversions stay as they are, as "x’s", which were "x's" otherwise, and would not be found.
        """
        if isinstance(text, CleanText):
            return text
        if not self.clean_text:
            return CleanText(text)
        parts = [_clean(part) if name is None else name for part, name in self._cut_at_names(text)]
        parts[0] = parts[0].lstrip()
        parts[-1] = parts[-1].rstrip()
        return CleanText("".join(parts))

    def _cut_at_names(self, text: str) -> Iterator[tuple[str, str | None]]:
        """(text, None) and (text, its name) in turn, for the names of added tokens that cleaning would change.

        A name is found in whatever case, white space and composition of accents, as the stock tokenizer finds it.
        """
        added = [token.content for token in self.added_tokens_decoder.values() if not token.special]
        hidden = {name: _name_pattern(name) for name in added if _clean(name).strip() != name and name.strip()}
        if not hidden:
            yield text, None
            return
        text, end = unicodedata.normalize("NFC", text), 0
        for match, name in _find_names(hidden, text):
            yield text[end : match.start()], None
            yield match[0], name
            end = match.end()
        yield text[end:], None

    # -- textual inversions of several vectors: added tokens NAME, NAME_1, NAME_2, ... --------------------------

    def inversion_ids(self, token_id: int) -> list[int]:
        """Ids of all vectors of the textual inversion whose first vector is `token_id`; [token_id] for other tokens."""
        added = self.added_tokens_decoder
        if token_id not in added:
            return [token_id]
        ids, name, known = [token_id], added[token_id].content, self.added_tokens_encoder
        while f"{name}_{len(ids)}" in known:
            ids.append(known[f"{name}_{len(ids)}"])
        return ids

    def expand_inversions(self, text: str) -> str:
        """The text with NAME NAME_1 NAME_2 ... for every NAME of a textual inversion, in whatever case it is typed.

        diffusers does so for the exact spelling only. A name whose other vectors follow it already stays as it is.
        """
        added, vectors, patterns = self.added_tokens_decoder, {}, {}
        for token_id, token in added.items():
            names = [added[index].content for index in self.inversion_ids(token_id)]
            pattern = re.escape(token.content)
            if len(names) > 1:
                pattern += r"(?!_\d)(?!\s+" + re.escape(names[1]) + ")"
            vectors[token.content], patterns[token.content] = names, pattern
        parts, end = [], 0
        for match, name in _find_names(patterns, text):
            parts += [text[end : match.start()], " ".join(vectors[name]) if len(vectors[name]) > 1 else match[0]]
            end = match.end()
        return "".join([*parts, text[end:]])

    def convert_ids_to_tokens(self, ids: int | list[int], skip_special_tokens: bool = False) -> Any:
        """Pieces of the vocabulary; added tokens in their own case, which the stock method lowers."""
        if isinstance(ids, int):
            added = self.added_tokens_decoder.get(ids)
            return super().convert_ids_to_tokens(ids) if added is None else added.content
        kept = [int(i) for i in ids if not (skip_special_tokens and int(i) in self.all_special_ids)]
        return [self.convert_ids_to_tokens(index) for index in kept]

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs: Any
    ) -> list[str]:
        """Pieces of the vocabulary, added tokens in their own case: diffusers looks for textual inversions in them."""
        ids = self._encode_plus(text, pair, add_special_tokens=add_special_tokens, **kwargs)["input_ids"]
        return self.convert_ids_to_tokens(ids)

    def _decode(self, token_ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> str:
        """Stock decoding, with added tokens in their own case and with spaces around them."""
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        specials = set(self.all_special_ids)
        added = {i: token.content for i, token in self.added_tokens_decoder.items() if i not in specials}
        if not added.keys() & set(ids):
            return super()._decode(token_ids, skip_special_tokens=skip_special_tokens, **kwargs)
        pieces: list[str] = []
        run: list[int] = []
        for index in [*ids, None]:
            if index is not None and index not in added:
                run.append(index)
                continue
            if run:
                pieces.append(super()._decode(run, skip_special_tokens=skip_special_tokens, **kwargs).strip())
            pieces += [added[index]] if index is not None else []
            run = []
        return " ".join(pieces)

    def _encode_plus(self, text: Any, text_pair: Any = None, **kwargs: Any) -> Any:
        if not kwargs.get("is_split_into_words"):
            text = _map_text(self._prepare, text)
            text_pair = _map_text(self._prepare, text_pair)
        # Texts longer than one pass are this project's daily bread, not worth transformers' warning.
        return super()._encode_plus(text=text, text_pair=text_pair, **{**kwargs, "verbose": False})

    def _prepare(self, text: str) -> str:
        return text if isinstance(text, CleanText) else self.expand_inversions(self.clean(text))


def _clean(text: str) -> str:
    """A piece of a text, cleaned; white space at its ends becomes one space."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    text = re.sub(r"\s+", " ", text)
    if "Σ" in text:
        # The backend lowercases letter by letter and misses the final sigma. İ alone changes length.
        lower = text.replace("İ", "I").lower()
        text = "".join(low if char == "Σ" else char for char, low in zip(text, lower, strict=True))
    return text


def _name_pattern(name: str) -> str:
    """Regular expression of a name with any white space where it has some."""
    return r"\s+".join(re.escape(part) for part in re.split(r"\s+", unicodedata.normalize("NFC", name)))


def _find_names(patterns: dict[str, str], text: str) -> Iterator[tuple[re.Match[str], str]]:
    """Where names stand in a text, from left to right, each given by its pattern; of two at one place the longer one,
    which is what the backend reads there."""
    names = sorted(patterns, key=len, reverse=True)
    one_of = re.compile("|".join(f"({patterns[name]})" for name in names), re.IGNORECASE)
    for match in one_of.finditer(text):
        yield match, names[(match.lastindex or 1) - 1]


def _map_text(function: Any, text: Any) -> Any:
    if isinstance(text, str):
        return function(text)
    if isinstance(text, (list, tuple)):
        return type(text)(_map_text(function, item) for item in text)
    return text


# What model_index.json records; independent of how the package is cut into files.
FixClipTokenizer.__module__ = "fixclip_diffusion"
