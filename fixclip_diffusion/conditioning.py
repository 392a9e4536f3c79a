"""How a prompt of any length is read: which of its tokens enter which pass of the text encoder, and which hidden states
of which pass become `prompt_embeds`.

    PromptTokens --Conditioning.lay_out--> Layout --text encoder--> hidden states of each pass --Layout.join--> embeds

A prompt of 100 tokens, start and end included, is cut by `stock` (1 pass, 77 hidden states), split by `chunks` (2
passes, 154 hidden states), read in overlapping windows by `overlap` (2 passes, 100 hidden states) and at once by
`one_pass` (1 pass, 100 hidden states, or 248 with the encoder's own padding). Whoever asks "which hidden state is of
which token" reads the Layout. This file needs torch alone.

Shapes: n tokens of the prompt without start and end, N passes, P positions of a pass, L rows of the embeds, D width.
"""

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

CLIP_CONTEXT_LENGTH = 77
WINDOW_STRIDE = 35  # tokens between the starts of two overlapping windows
SPECIAL_TOKENS = 2  # start and end of a pass
PADDINGS = ("keep", "mask")


class Break(IntEnum):
    """How good a place behind a token is for the end of a pass; a pass ends at the best one that it reaches."""

    NEVER = 0  # between the vectors of one textual inversion, or the bytes of one character
    INSIDE_WORD = 1
    WORD = 2
    CLAUSE = 3
    SENTENCE = 4
    ALWAYS = 5  # A1111's BREAK


@dataclass(frozen=True)
class PromptTokens:
    """A prompt as n tokens, without start and end.

    Attributes:
        text: the characters that `spans` refer to.
        ids: n token ids.
        spans: n pairs (start, end) of characters; the vectors of a textual inversion share one.
        breaks: n values of `Break`, for the place behind each token.
        weights: n prompt weights, 1.0 for ordinary text; see `prompt_weights`.
    """

    text: str
    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    breaks: tuple[int, ...]
    weights: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Context:
    """What a text encoder and its tokenizer can take in one pass.

    Attributes:
        length: positions of a pass, start and end included: 77 of a stock CLIP, 248 of FIX-CLIP and Long-CLIP.
        short_length: 77 where the original position embeddings are there and read texts of up to 77 tokens, else 0.
        start_id, end_id, pad_id: special tokens.
        padding: what becomes of the positions behind a text of more than `short_length` tokens that is read in one
            pass: "keep" fills the pass up with pad tokens, and the UNet reads their hidden states too; "mask" ends the
            embeds with the text.
    """

    length: int
    short_length: int
    start_id: int
    end_id: int
    pad_id: int
    padding: str = "mask"

    def __post_init__(self) -> None:
        if self.padding not in PADDINGS:
            raise ValueError(f"padding={self.padding!r}: valid are {', '.join(PADDINGS)}")


@dataclass(frozen=True)
class Layout:
    """Which token is read where, for one prompt.

    Attributes:
        ids_NP: token ids of the passes.
        token_NP: number of the prompt's token at each position, counted from 0; -1 for start, end and padding.
        source_L: the position n * P + p whose hidden state becomes row l of the embeds.
        weight_NP: prompt weight of each position; 1.0 for start, end and padding.
    """

    ids_NP: Tensor
    token_NP: Tensor
    source_L: Tensor
    weight_NP: Tensor

    def __len__(self) -> int:
        """L, rows of the embeds."""
        return len(self.source_L)

    @property
    def token_L(self) -> Tensor:
        """Number of the token that each row of the embeds is the hidden state of, -1 for start, end and padding."""
        return self.token_NP.flatten()[self.source_L]

    @property
    def num_read(self) -> int:
        """Tokens of the prompt that are read; those behind them are dropped (every conditioning drops at the end)."""
        return int(self.token_NP.max()) + 1 if self.token_NP.numel() else 0

    @property
    def is_weighted(self) -> bool:
        return bool((self.weight_NP != 1).any())

    def join(self, states_NPD: Tensor) -> Tensor:
        """Hidden states of the passes (N, P, D) to rows of the embeds (L, D)."""
        return states_NPD.flatten(0, 1)[self.source_L.to(states_NPD.device)]

    def put(self, rows_LD: Tensor, states_NPD: Tensor) -> Tensor:
        """Hidden states of the passes (N, P, D) with these rows of the embeds (L, D) where `join` reads them."""
        source_L = self.source_L.to(states_NPD.device)
        return states_NPD.flatten(0, 1).index_copy(0, source_L, rows_LD).unflatten(0, states_NPD.shape[:2])

    def pass_tokens(self) -> list[tuple[int, int]]:
        """First token and the one behind the last, of each pass; (0, 0) for a pass without any."""
        found = [row[row >= 0] for row in self.token_NP]
        return [(int(row[0]), int(row[-1]) + 1) if len(row) else (0, 0) for row in found]


@dataclass(frozen=True)
class Pass:
    """Tokens first..stop-1 in one pass of `size` positions, padded behind the end token; rows `read` are kept."""

    first: int
    stop: int
    size: int
    read: range


def _layout(tokens: PromptTokens, passes: Sequence[Pass], context: Context, pad_id: int) -> Layout:
    width = max(item.size for item in passes)
    ids_NP = torch.full((len(passes), width), pad_id)
    token_NP = torch.full((len(passes), width), -1)
    weight_NP = torch.ones(len(passes), width)
    source: list[int] = []
    for row, item in enumerate(passes):
        count = item.stop - item.first
        ids = [context.start_id, *tokens.ids[item.first : item.stop], context.end_id]
        ids_NP[row, : count + SPECIAL_TOKENS] = torch.tensor(ids)
        token_NP[row, 1 : count + 1] = torch.arange(item.first, item.stop)
        weight_NP[row, 1 : count + 1] = torch.tensor(tokens.weights[item.first : item.stop])
        source += [row * width + position for position in item.read]
    return Layout(ids_NP, token_NP, torch.tensor(source), weight_NP)


def empty_layout(context: Context, size: int) -> Layout:
    """The empty prompt in a pass of `size` positions, each a row of the embeds."""
    empty = PromptTokens("", (), (), (), ())
    return _layout(empty, [Pass(0, 0, size, range(size))], context, context.pad_id)


@dataclass(frozen=True)
class Conditioning:
    """A way to read prompts of any length; a value, in the registry `CONDITIONINGS` under its name.

    A subclass says in `passes` what becomes of a text that does not fit into 77 tokens. One that fits is read in a
    pass of 77 with its padding, as stock diffusers does, by every conditioning, if the encoder has its original
    positions.
    """

    name: ClassVar[str]
    summary: ClassVar[str]  # of what it does with a text that does not fit
    unit: ClassVar[str]  # what a pass is called in reports
    needs_short: ClassVar[bool] = True  # reads with the original 77 positions

    def check(self, context: Context) -> None:
        """Refuse an encoder that this conditioning cannot use.

        Raises:
            ValueError: the encoder has no original positions.
        """
        if self.needs_short and not context.short_length:
            raise ValueError(
                f"conditioning={self.name!r} needs the original {CLIP_CONTEXT_LENGTH} position embeddings, and this "
                f"text encoder reads every text with its {context.length} trained ones: use conditioning='one_pass'"
            )

    def lay_out(self, tokens: PromptTokens, context: Context) -> Layout:
        """Passes for a prompt, and which of their hidden states become the embeds.

        Raises:
            ValueError: see `check`.
        """
        self.check(context)
        segments = _segments(tokens)
        layouts = [self._lay_out_segment(part, context) for part in segments]
        if len(layouts) == 1:
            return layouts[0]
        return _concatenated(layouts, [len(part) for part in segments], context)

    def _lay_out_segment(self, tokens: PromptTokens, context: Context) -> Layout:
        num = len(tokens) + SPECIAL_TOKENS
        if num <= context.short_length:
            size = context.short_length
            return _layout(tokens, [Pass(0, len(tokens), size, range(size))], context, context.pad_id)
        return self.passes(tokens, context)

    def passes(self, tokens: PromptTokens, context: Context) -> Layout:
        raise NotImplementedError


@dataclass(frozen=True)
class Stock(Conditioning):
    """Stock diffusers: what does not fit into 77 tokens is dropped."""

    name = "stock"
    summary = "cut at 77 tokens, as stock diffusers does"
    unit = "pass of 77"

    def passes(self, tokens: PromptTokens, context: Context) -> Layout:
        size = context.short_length
        return _layout(tokens, [Pass(0, size - SPECIAL_TOKENS, size, range(size))], context, context.pad_id)


@dataclass(frozen=True)
class Chunks(Conditioning):
    """Windows of 77 one behind the other, each read by itself and with its padding: what compel and A1111 do.

    A window ends at a sentence if it can, else at a clause, else at a word. 160 tokens in windows of 75, 70 and 15
    become 3 x 77 = 231 rows.
    """

    name = "chunks"
    summary = "read in windows of 77 tokens one behind the other, as compel and A1111 do"
    unit = "window of 77"

    def passes(self, tokens: PromptTokens, context: Context) -> Layout:
        size = context.short_length
        ranges = split(tokens, size - SPECIAL_TOKENS)
        return _layout(tokens, [Pass(a, b, size, range(size)) for a, b in ranges], context, context.pad_id)


@dataclass(frozen=True)
class Overlap(Conditioning):
    """Windows of 77 that begin every 35 tokens; each token's hidden state is taken from the first window that holds it.

    There at least 40 tokens stand before it, or all there are, so no sentence is cut, and what a state tells of its
    place does not depend on where sentences end. The start's state is the first window's, the end's the last one's: a
    prompt of 160 tokens, start and end included, takes 4 windows and becomes 160 rows.
    """

    name = "overlap"
    summary = "read in windows of 77 tokens that overlap, one hidden state for each token"
    unit = "overlapping window of 77"

    def passes(self, tokens: PromptTokens, context: Context) -> Layout:
        size = context.short_length
        passes: list[Pass] = []
        read_until = 0
        for first, stop in overlapping(tokens, size - SPECIAL_TOKENS, WINDOW_STRIDE):
            begin = 0 if not passes else 1 + read_until - first
            end = 1 + stop - first + (stop == len(tokens))
            passes.append(Pass(first, stop, size, range(begin, end)))
            read_until = stop
        # What pads the last window is never read, and causal attention hides it from what is.
        return _layout(tokens, passes, context, context.end_id)


@dataclass(frozen=True)
class OnePass(Conditioning):
    """All positions of the encoder at once; a text of more than 248 tokens in passes that end as those of `chunks`
    do."""

    name = "one_pass"
    summary = "read in one pass"
    unit = "pass"
    needs_short = False

    def passes(self, tokens: PromptTokens, context: Context) -> Layout:
        passes = []
        for first, stop in split(tokens, context.length - SPECIAL_TOKENS):
            num = stop - first + SPECIAL_TOKENS
            size = context.length if context.padding == "keep" else num
            passes.append(Pass(first, stop, size, range(size)))
        return _layout(tokens, passes, context, context.pad_id)


CONDITIONINGS: dict[str, Conditioning] = {item.name: item for item in (Stock(), Chunks(), Overlap(), OnePass())}
# Names of version 0.1. "truncate" dropped what lies behind token 248; that text is read now.
ALIASES = {
    "truncate_77": "stock",
    "windows_77": "chunks",
    "overlap_77": "overlap",
    "windows": "one_pass",
    "truncate": "one_pass",
}


def get_conditioning(name: "str | Conditioning") -> Conditioning:
    """The conditioning of that name, new or of version 0.1; a value is passed through.

    Raises:
        ValueError: there is none of that name.
    """
    if isinstance(name, Conditioning):
        return name
    if name == "windows":
        _warn_of_windows()
    found = CONDITIONINGS.get(ALIASES.get(name, name))
    if found is None:
        raise ValueError(f"conditioning={name!r}: valid are {', '.join(CONDITIONINGS)}")
    return found


@cache
def _warn_of_windows() -> None:
    logger.warning(
        "conditioning='windows' is version 0.1's name of 'one_pass'; windows of 77 tokens are 'overlap' or 'chunks'"
    )


def default_conditioning(config: Any) -> str:
    """The name of the conditioning for a text encoder where none is given: the one place where this is chosen.

    That of its adapter, else the encoder's own, which training writes into its configuration, else `overlap` for an
    untrained encoder of 77 tokens and `one_pass` for one that was trained for more.

    Args:
        config: configuration of a text encoder, stock (`CLIPTextConfig`) or `FixClipTextConfig`.
    """
    adapter = getattr(config, "adapter", None) or {}
    named = adapter.get("conditioning") or getattr(config, "conditioning", None)
    return named or ("overlap" if short_length(config) else "one_pass")


def choose_conditioning(name: "str | Conditioning | None", configs: Sequence[Any]) -> Conditioning:
    """The conditioning of that name; for None that of the first text encoder, or one pass where another one has not the
    original positions that it needs.

    Args:
        name: see `get_conditioning`.
        configs: of a base's text encoders, see `default_conditioning`.

    Raises:
        ValueError: there is none of that name.
    """
    chosen = get_conditioning(name or default_conditioning(configs[0]))
    if name is None and chosen.needs_short and not all(short_length(config) for config in configs):
        return get_conditioning("one_pass")
    return chosen


def short_length(config: Any) -> int:
    """Tokens up to which a text encoder has its original position embeddings: 77, or 0 if it has none.

    Args:
        config: see `default_conditioning`.
    """
    if short_model := getattr(config, "short_text_model", None):
        return int(short_model["max_position_embeddings"])
    length = int(config.max_position_embeddings)
    return int(getattr(config, "short_position_embeddings", length if length <= CLIP_CONTEXT_LENGTH else 0))


def renamed(conditioning: str | None, long_prompt: str | None) -> str | None:
    """`conditioning`, or `long_prompt`, its name in version 0.1, with a warning that says the new name.

    Raises:
        ValueError: both are given.
    """
    if long_prompt is None:
        return conditioning
    if conditioning is not None:
        raise ValueError(f"conditioning={conditioning!r} and long_prompt={long_prompt!r}: give conditioning= alone")
    name = get_conditioning(long_prompt).name
    change = ", which reads what lies behind token 248 too" if long_prompt == "truncate" else ""
    warnings.warn(f"long_prompt={long_prompt!r} is now conditioning={name!r}{change}", FutureWarning, stacklevel=3)
    return name


def split(tokens: PromptTokens, room: int) -> list[tuple[int, int]]:
    """Token ranges of at most `room` tokens, each ending at the best `Break` that it reaches; the last of equals."""
    ranges: list[tuple[int, int]] = []
    first = 0
    while len(tokens) - first > room:
        places = range(first, first + room)
        best = max(tokens.breaks[i] for i in places)
        # A textual inversion of more vectors than a pass holds has to be cut.
        stop = next(i for i in reversed(places) if tokens.breaks[i] == best) + 1 if best else first + room
        ranges.append((first, stop))
        first = stop
    return [*ranges, (first, len(tokens))] if first < len(tokens) or not ranges else ranges


def overlapping(tokens: PromptTokens, room: int, stride: int) -> list[tuple[int, int]]:
    """Token ranges of at most `room` tokens that begin every `stride` tokens, or a little earlier: no textual
    inversion is cut that a window can hold whole."""
    first, stop = 0, _whole(tokens, 0, min(room, len(tokens)))
    ranges = [(first, stop)]
    while stop < len(tokens):
        begin = _whole(tokens, first, first + stride)
        # A textual inversion of more than `stride` vectors is passed over whole.
        first = begin if _is_whole(tokens, begin) else min(stop, _next_whole(tokens, begin))
        later = _whole(tokens, first, min(first + room, len(tokens)))
        # Past one that the window before could not hold, begin where that window ended.
        if later <= stop:
            first, later = stop, _whole(tokens, stop, min(stop + room, len(tokens)))
        stop = later
        ranges.append((first, stop))
    return ranges


def _is_whole(tokens: PromptTokens, place: int) -> bool:
    """Whether a pass may end before token `place`."""
    return place == len(tokens) or tokens.breaks[place - 1] != Break.NEVER


def _whole(tokens: PromptTokens, first: int, stop: int) -> int:
    """The last place in first+1..stop where a pass may end; `stop` if there is none."""
    return next((place for place in range(stop, first, -1) if _is_whole(tokens, place)), stop)


def _next_whole(tokens: PromptTokens, place: int) -> int:
    return next(later for later in range(place, len(tokens) + 1) if _is_whole(tokens, later))


def _segments(tokens: PromptTokens) -> list[PromptTokens]:
    """The parts between BREAKs; spans still refer to the whole text."""
    ends = [i + 1 for i, level in enumerate(tokens.breaks) if level == Break.ALWAYS and i + 1 < len(tokens)]
    if not ends:
        return [tokens]
    per_token = [field.name for field in fields(PromptTokens) if field.name != "text"]
    return [
        replace(tokens, **{name: getattr(tokens, name)[a:b] for name in per_token})
        for a, b in zip([0, *ends], [*ends, len(tokens)], strict=True)
    ]


def _concatenated(layouts: Sequence[Layout], lengths: Sequence[int], context: Context) -> Layout:
    """One layout of the passes of all segments."""
    width = max(item.ids_NP.shape[1] for item in layouts)
    ids, tokens, weights, sources = [], [], [], []
    num_passes = num_tokens = 0
    for item, length in zip(layouts, lengths, strict=True):
        missing = (0, width - item.ids_NP.shape[1])
        ids.append(torch.nn.functional.pad(item.ids_NP, missing, value=context.pad_id))
        token_NP = torch.where(item.token_NP < 0, -1, item.token_NP + num_tokens)
        tokens.append(torch.nn.functional.pad(token_NP, missing, value=-1))
        weights.append(torch.nn.functional.pad(item.weight_NP, missing, value=1.0))
        row_L, place_L = item.source_L // item.ids_NP.shape[1], item.source_L % item.ids_NP.shape[1]
        sources.append((row_L + num_passes) * width + place_L)
        num_passes += len(item.ids_NP)
        num_tokens += length
    return Layout(torch.cat(ids), torch.cat(tokens), torch.cat(sources), torch.cat(weights))
