"""A prompt as the encoder sees it: how many tokens, where they stop being read, and the windows of a very long one."""

from dataclasses import dataclass

from fixclip_core.data.captions import split_clauses, split_sentences
from fixclip_diffusion.text_encoder import CLIP_CONTEXT_LENGTH, CleanText, FixClipTokenizer

SPECIAL_TOKENS = 2  # start and end

Span = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """One pass of the encoder: `text` is characters start..end of the report's text, num_tokens counts both ends."""

    text: str
    start: int
    end: int
    num_tokens: int


@dataclass(frozen=True)
class TokenReport:
    """What becomes of a prompt.

    Attributes:
        text: the prompt as it is read, cleaned like CLIP's training texts.
        num_tokens: its length in tokens, start and end included.
        context_length: tokens of one pass of this encoder.
        stock_cut: character of `text` at which a 77-token encoder stops reading, or None.
        context_cut: the same for one pass of this encoder, or None.
        windows: the passes that a prompt of this length takes with `long_prompt="windows"`.
    """

    text: str
    num_tokens: int
    context_length: int
    stock_cut: int | None
    context_cut: int | None
    windows: tuple[Window, ...]

    def __str__(self) -> str:
        return self.describe()

    def describe(self, long_prompt: str = "windows") -> str:
        """The report in words, for a pipeline in this `long_prompt` mode."""
        lines = [f"{self.num_tokens} tokens"]
        if self.stock_cut is not None:
            end = _quote(self.text[self.stock_cut :])
            lines.append(f"  a {CLIP_CONTEXT_LENGTH}-token encoder stops before: {end}")
        if self.context_cut is not None:
            end = _quote(self.text[self.context_cut :])
            what = "the rest is dropped" if long_prompt == "truncate" else f"read in {len(self.windows)} windows:"
            lines.append(f"  {self.context_length} tokens end before: {end}; {what}")
            if long_prompt != "truncate":
                lines += [
                    f"    {index}. {window.num_tokens} tokens, from {_quote(window.text)}"
                    for index, window in enumerate(self.windows, 1)
                ]
        elif self.stock_cut is not None:
            lines.append(f"  this one reads all of them: up to {self.context_length} in one pass")
        return "\n".join(lines)


def _quote(text: str, length: int = 48) -> str:
    text = text.strip()
    return repr(text if len(text) <= length else text[:length].rstrip() + "…")


def token_report(tokenizer: FixClipTokenizer, prompt: str, context_length: int | None = None) -> TokenReport:
    """Count and place the tokens of a prompt.

    Args:
        tokenizer: gives the ids.
        prompt: any text; a `CleanText` is taken as it is.
        context_length: tokens of one pass; the tokenizer's own by default.

    Raises:
        ValueError: the prompt is not text.
    """
    if not isinstance(prompt, str):
        raise ValueError(f"a prompt must be text, got {type(prompt).__name__}: {prompt!r}")
    context_length = context_length or tokenizer.context_length
    text = tokenizer.clean(prompt)
    spans = _token_spans(tokenizer, text)
    return TokenReport(
        text=str(text),
        num_tokens=len(spans) + SPECIAL_TOKENS,
        context_length=context_length,
        stock_cut=_cut(spans, CLIP_CONTEXT_LENGTH),
        context_cut=_cut(spans, context_length),
        windows=tuple(_windows(tokenizer, text, spans, context_length)),
    )


def split_windows(tokenizer: FixClipTokenizer, text: CleanText, context_length: int) -> list[CleanText]:
    """Cut a cleaned text into pieces of at most `context_length` tokens, start and end included.

    A piece ends at the last sentence end that fits, else at the last clause end, else at a word end, and
    inside a word only if the word alone is longer. The pieces lose nothing but white space.
    """
    spans = _token_spans(tokenizer, text)
    return [CleanText(window.text) for window in _windows(tokenizer, text, spans, context_length)]


def _token_spans(tokenizer: FixClipTokenizer, text: CleanText) -> list[Span]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return [(int(start), int(end)) for start, end in encoded["offset_mapping"]]


def _cut(spans: list[Span], context_length: int) -> int | None:
    room = context_length - SPECIAL_TOKENS
    return spans[room][0] if len(spans) > room else None


def _windows(tokenizer: FixClipTokenizer, text: CleanText, spans: list[Span], context_length: int) -> list[Window]:
    room = context_length - SPECIAL_TOKENS
    if len(spans) <= room:
        return [Window(str(text), 0, len(text), len(spans) + SPECIAL_TOKENS)]
    ends_by_preference: list[list[int]] = [
        [end for _, end in split_sentences(text)],
        [end for _, end in split_clauses(text)],
        [index + 1 for index, char in enumerate(text) if char.isspace()],
    ]
    windows: list[Window] = []
    first = 0
    while first < len(spans):
        stop = min(first + room, len(spans))
        while True:
            end = len(text) if stop == len(spans) else _best_end(ends_by_preference, spans, first, stop)
            start = spans[first][0] if windows else 0
            piece = CleanText(text[start:end].strip())
            # Cutting inside a word can change its pieces, so the piece is counted as it will be read.
            length = len(_token_spans(tokenizer, piece))
            if length <= room or stop == first + 1:
                break
            stop = max(first + 1, stop - (length - room))
        windows.append(Window(str(piece), start, end, length + SPECIAL_TOKENS))
        first = next((i for i in range(first, len(spans)) if spans[i][0] >= end), len(spans))
    return windows


def _best_end(ends_by_preference: list[list[int]], spans: list[Span], first: int, stop: int) -> int:
    """The last preferred character position behind token `first` at which the text up to token `stop` can end."""
    lowest, limit = spans[first][1], spans[stop][0]
    for ends in ends_by_preference:
        fitting = [end for end in ends if lowest <= end <= limit]
        if fitting:
            return fitting[-1]
    # Inside a word. The tokens of one character (the bytes of an emoji) share its span: stay on its border.
    return max(lowest, limit)
