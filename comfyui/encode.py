"""Prompts of any length through a CLIP object of ComfyUI, by its public calls alone.

    clip.tokenize -> (token, weight, word) -> PromptTokens -> Layout -> windows of (token, weight)
        -> clip.encode_from_tokens -> hidden states of each window -> adapter -> Layout.join -> conditioning

What ComfyUI does inside (LoRA on the CLIP, clip skip, textual inversions, offloading) stays as it is.

Shapes: N windows, P positions of a window, L rows of the conditioning, D width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import decoders
from torch import Tensor

from fixclip_diffusion.adapter import TextAdapter, check_fits
from fixclip_diffusion.conditioning import (
    CLIP_CONTEXT_LENGTH,
    CONDITIONINGS,
    SPECIAL_TOKENS,
    Conditioning,
    Context,
    Layout,
    PromptTokens,
    get_conditioning,
)
from fixclip_diffusion.prompt_tokens import places_to_break
from fixclip_diffusion.token_report import TokenReport, report_of

AUTO = "auto"
CHOICES = [AUTO, *CONDITIONINGS]
KEYS = ("l", "h", "g")  # text encoders, in the order of their features: 1.x and XL, 2.x, XL
END_OF_WORD = "</w>"
HALF = "\ufffd"  # what a part of a character is decoded to
INVERSION = "[embedding]"  # stands for a textual inversion in reports

Entry = tuple[Any, float]  # a token of ComfyUI, its id or the vector of a textual inversion, and its weight


@dataclass(frozen=True)
class Reading:
    """A prompt in one text encoder of a CLIP object.

    Attributes:
        tokens: n tokens; the id of a textual inversion's vector is 0 here.
        entries: n tokens as ComfyUI has them.
        context: of the text encoder.
        conditioning: how it reads the prompt.
        layout: which token enters which window.
    """

    tokens: PromptTokens
    entries: list[Entry]
    context: Context
    conditioning: Conditioning
    layout: Layout

    @property
    def is_short(self) -> bool:
        """Whether it is read as ComfyUI reads it, in one window of the text encoder's own positions."""
        return len(self.layout.ids_NP) == 1 and self.layout.ids_NP.shape[1] <= self.context.short_length

    @property
    def num_rows(self) -> int:
        """Rows that the other encoder of Stable Diffusion XL must have too; a pass of 248 is cut behind its text."""
        if self.context.short_length or len(self.layout.ids_NP) > 1:
            return len(self.layout)
        return len(self.tokens) + SPECIAL_TOKENS

    def windows(self, weighted: bool) -> list[list[Entry]]:
        """N windows of P tokens, all weights 1 unless `weighted`."""
        layout, found = self.layout, []
        for ids, numbers in zip(layout.ids_NP.tolist(), layout.token_NP.tolist(), strict=True):
            row: list[Entry] = []
            for token_id, number in zip(ids, numbers, strict=True):
                token, weight = self.entries[number] if number >= 0 else (token_id, 1.0)
                row.append((token, weight if weighted else 1.0))
            found.append(row + [(self.context.pad_id, 1.0)] * (self.context.length - len(row)))
        return found

    def empty_window(self) -> list[Entry]:
        context = self.context
        ids = [context.start_id, context.end_id] + [context.pad_id] * (context.length - SPECIAL_TOKENS)
        return [(token_id, 1.0) for token_id in ids]


def encode_prompt(
    clip: Any,
    text: str,
    conditioning: str = AUTO,
    adapter: TextAdapter | None = None,
    long_clip: Any = None,
    adapter_2: TextAdapter | None = None,
) -> list[list[Any]]:
    """A prompt as conditioning: entries of hidden states (1, L, D) and {"pooled_output": its first window's, ...}.

    It is one entry but for a CLIP object with hooks that change in the course of sampling, which gives one for each
    part of the steps, as *CLIP Text Encode* does.

    Args:
        clip: CLIP object of Stable Diffusion 1.x, 2.x or XL.
        text: any length, in ComfyUI's syntax of weights and textual inversions.
        conditioning: a name in `CONDITIONINGS`, or "auto": the adapter's, else "one_pass" for a CLIP of more than 77
            positions and "overlap" for others.
        adapter: on the hidden states of the text encoder of its width.
        long_clip: CLIP object of more than 77 positions that reads what does not fit into 77 tokens; the rest is then
            read by `clip`, without the adapter.
        adapter_2: on the other one of Stable Diffusion XL's two text encoders, in either order.

    Raises:
        ValueError: no CLIP object or another kind, a conditioning that it cannot be read by, or an adapter that does
            not fit.
    """
    clip, readings, adapters = _choose(clip, text, conditioning, (adapter, adapter_2), long_clip)
    acting = {key: item for key, item in adapters.items() if item.config["short_texts"] or not readings[key].is_short}
    if long_clip is not None and clip is not long_clip:
        acting = {}
    return _encode(clip, readings, acting)


def report_prompt(
    clip: Any,
    text: str,
    conditioning: str = AUTO,
    adapter: TextAdapter | None = None,
    long_clip: Any = None,
    adapter_2: TextAdapter | None = None,
) -> TokenReport:
    """What becomes of the prompt in the first text encoder of the CLIP object that reads it.

    Args and errors as `encode_prompt`.
    """
    reader, readings, adapters = _choose(clip, text, conditioning, (adapter, adapter_2), long_clip)
    reading = next(iter(readings.values()))
    config = next((item.config for item in adapters.values()), None)
    if config and long_clip is not None and reader is not long_clip:
        config = {**config, "short_texts": False}  # `clip` reads short prompts without the adapter
    return report_of(reading.tokens, reading.layout, reading.conditioning, reading.context, config)


def _choose(
    clip: Any, text: str, conditioning: str, given: tuple[TextAdapter | None, ...], long_clip: Any
) -> tuple[Any, dict[str, Reading], dict[str, TextAdapter]]:
    """(CLIP object that reads the prompt, {key: the prompt there}, {key: adapter of that text encoder})."""
    if clip is None:
        raise ValueError("there is no CLIP: this checkpoint has no text encoder; load one with CLIPLoader")
    if long_clip is not None:
        _check_long(long_clip)
        readings = read_prompt(clip, text, "stock")
        if all(len(item.tokens) + SPECIAL_TOKENS <= CLIP_CONTEXT_LENGTH for item in readings.values()):
            return clip, readings, _by_encoder(clip, readings, given)
        clip = long_clip
    readings = read_prompt(clip, text, conditioning, next((adapter for adapter in given if adapter), None))
    return clip, readings, _by_encoder(clip, readings, given)


def read_prompt(clip: Any, text: str, conditioning: str, adapter: TextAdapter | None = None) -> dict[str, Reading]:
    """{key: the prompt in that text encoder}; see `encode_prompt`."""
    rows = clip.tokenize(text, return_word_ids=True)
    if not rows or not set(rows) <= set(KEYS):
        raise ValueError(
            f"a CLIP object with the text encoders {', '.join(rows)}: long prompts are read by those of Stable "
            "Diffusion 1.x, 2.x and XL (l, h, g); use ComfyUI's own node for this model"
        )
    empty = clip.tokenize("")
    contexts = {key: _context(empty[key][0]) for key in KEYS if key in rows}
    is_long = max(context.length for context in contexts.values()) > CLIP_CONTEXT_LENGTH
    readings = {}
    for key, context in contexts.items():
        tokens, entries = _tokens(clip, text, rows[key])
        how = _conditioning(conditioning, adapter, context, is_long)
        readings[key] = Reading(tokens, entries, context, how, how.lay_out(tokens, context))
    return readings


def _context(row: list[Entry]) -> Context:
    """Of a text encoder, from the tokens of an empty prompt: start, end and padding."""
    length, (start_id, end_id, pad_id) = len(row), (entry[0] for entry in row[:3])
    return Context(length, length if length <= CLIP_CONTEXT_LENGTH else 0, start_id, end_id, pad_id, "keep")


def _conditioning(name: str, adapter: TextAdapter | None, context: Context, is_long: bool) -> Conditioning:
    if name == AUTO:
        name = (adapter.config["conditioning"] if adapter else None) or ("one_pass" if is_long else "overlap")
    how = get_conditioning(name)
    if how.needs_short or context.length > CLIP_CONTEXT_LENGTH:
        return how
    if not is_long:
        raise ValueError(
            f"conditioning={how.name!r} needs a CLIP of more than 77 positions, and this one has {context.length}: "
            "load a long clip_l with CLIPLoader or DualCLIPLoader, or use conditioning='overlap'"
        )
    return get_conditioning("overlap")  # the second text encoder of Stable Diffusion XL beside a long first one


def _check_long(clip: Any) -> None:
    length = max(len(rows[0]) for rows in clip.tokenize("").values())
    if length <= CLIP_CONTEXT_LENGTH:
        raise ValueError(f"long_clip has {length} positions: it needs more than 77, as a clip_l of Long-CLIP has")


def _tokens(clip: Any, text: str, rows: list[list[tuple[Any, float, int]]]) -> tuple[PromptTokens, list[Entry]]:
    """The prompt's tokens, with the text put together from them: ComfyUI's syntax is not in it any more."""
    groups: dict[int, list[Entry]] = {}  # a word in older cores, all between two weights in newer ones
    for token, weight, group in (item for row in rows for item in row):
        if group:
            groups.setdefault(group, []).append((token, weight))
    read, place = "", 0
    spans: list[tuple[int, int]] = []
    lower = "".join(low if len(low := letter.lower()) == 1 else letter for letter in text)  # as long as the text
    for word, inside in (word for group in groups.values() for word in _words(clip, [token for token, _ in group])):
        found = -1 if word == INVERSION else lower.find(word, place)
        gap = " "
        if found >= 0:
            gap, place = text[place:found], found + len(word)
            word = text[found:place]  # in its case
            gap = gap if gap.isspace() else " " * any(map(str.isspace, gap))
        read += gap if read else ""
        spans += [(len(read) + start, len(read) + end) for start, end in inside]
        read += word
    entries = [entry for group in groups.values() for entry in group]
    ids = tuple(token if isinstance(token, int) else 0 for token, _ in entries)
    breaks = tuple(places_to_break(read, spans))
    return PromptTokens(read, ids, tuple(spans), breaks, tuple(weight for _, weight in entries)), entries


def _words(clip: Any, tokens: list[Any]) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """Each word of a group, in lower case, and where its tokens stand in it; a textual inversion is one word."""
    if not all(isinstance(token, int) for token in tokens):
        yield INVERSION, [(0, len(INVERSION))] * len(tokens)
        return
    pieces: list[str] = []
    for _, piece in clip.tokenizer.untokenize([(token, 1.0) for token in tokens]):
        pieces.append(piece.removesuffix(END_OF_WORD))
        if piece.endswith(END_OF_WORD):
            yield _word(pieces)
            pieces = []
    if pieces:
        yield _word(pieces)


def _word(pieces: list[str]) -> tuple[str, list[tuple[int, int]]]:
    """Characters of a word, and those of each of its tokens, which share a character that they split."""
    until = [decoders.ByteLevel().decode(pieces[:number]) for number in range(len(pieces) + 1)]
    whole = [len(part.rstrip(HALF)) for part in until]
    ends = [count + part.endswith(HALF) for count, part in zip(whole[1:], until[1:], strict=True)]
    return until[-1], list(zip(whole[:-1], ends, strict=True))


def _encode(clip: Any, readings: dict[str, Reading], adapters: dict[str, TextAdapter]) -> list[list[Any]]:
    """All windows in one call; those of Stable Diffusion XL's two encoders are as many rows, as ComfyUI cuts them."""
    # Weights come behind an adapter, with one window more: the empty text's, which they count from.
    weigh_here = {key: key in adapters and item.layout.is_weighted for key, item in readings.items()}
    windows = {
        key: item.windows(weighted=not weigh_here[key]) + [item.empty_window()] * weigh_here[key]
        for key, item in readings.items()
    }
    rows = max(len(part) * readings[key].context.length for key, part in windows.items())
    for key, item in readings.items():
        missing = -(-rows // item.context.length) - len(windows[key])
        windows[key] += [item.empty_window()] * missing
    return [[_join(clip, readings, adapters, cond[0]), more] for cond, more in _states(clip, windows)]


def _states(clip: Any, windows: dict[str, list[list[Entry]]]) -> list[list[Any]]:
    """The states (1, rows, D) of all windows end to end and what belongs to them, such as hooks of the CLIP object."""
    if hasattr(clip, "encode_from_tokens_scheduled"):
        return clip.encode_from_tokens_scheduled(windows)
    cond, pooled = clip.encode_from_tokens(windows, return_pooled=True)  # cores of 2024 and before
    return [[cond, {"pooled_output": pooled}]]


def _join(clip: Any, readings: dict[str, Reading], adapters: dict[str, TextAdapter], cond_LD: Tensor) -> Tensor:
    """Hidden states (1, L, D) of the prompt from those of its windows."""
    length = max(item.num_rows for item in readings.values()) if len(readings) > 1 else None
    parts = []
    for (key, item), part_LD in zip(readings.items(), _split(clip, readings, cond_LD), strict=True):
        size, count = item.context.length, len(item.layout.ids_NP)
        weigh_here = key in adapters and item.layout.is_weighted
        states_NPD = part_LD[: len(part_LD) // size * size].unflatten(0, (-1, size))
        states_NPD = states_NPD[: count + weigh_here, : item.layout.ids_NP.shape[1]]
        if key in adapters:
            states_NPD = _adapt(adapters[key], states_NPD, item.layout, weigh_here)
        rows_LD = item.layout.join(states_NPD[:count])[:length]
        parts.append(rows_LD if length is None else _filled(rows_LD, length))
    return torch.cat(parts, dim=-1)[None]


@torch.no_grad()
def _adapt(adapter: TextAdapter, states_NPD: Tensor, layout: Layout, weighted: bool) -> Tensor:
    """Adapted states of the windows; with weights, those of the adapted states: z -> empty + weight (z - empty)."""
    check_fits(adapter.config, width=states_NPD.shape[-1])
    length_N = (layout.token_NP >= 0).sum(1) + SPECIAL_TOKENS
    if weighted:
        length_N = torch.cat([length_N, torch.tensor([SPECIAL_TOKENS])])
    text_NP = torch.arange(states_NPD.shape[1]) < length_N[:, None]
    adapter, text_NP = adapter.to(states_NPD.device, states_NPD.dtype), text_NP.to(states_NPD.device)
    if adapter.config["scope"] == "text":
        states_NPD = _adapt_joined(adapter, states_NPD, text_NP, layout)
    else:
        states_NPD = adapter(states_NPD, text_NP)
    if not weighted:
        return states_NPD
    empty_1PD = states_NPD[-1:]
    weight_NP1 = layout.weight_NP[..., None].to(states_NPD)
    changed_NPD = empty_1PD + weight_NP1 * (states_NPD[:-1] - empty_1PD)
    return torch.where(weight_NP1 == 1, states_NPD[:-1], changed_NPD)


def _adapt_joined(adapter: TextAdapter, states_NPD: Tensor, text_NP: Tensor, layout: Layout) -> Tensor:
    """The windows' states, those that become rows of the embeds adapted as one sequence; a further window by itself."""
    own_NPD, further_NPD = states_NPD[: len(layout.ids_NP)], states_NPD[len(layout.ids_NP) :]
    text_L = text_NP.flatten()[layout.source_L.to(text_NP.device)]
    rows_LD = adapter(layout.join(own_NPD)[None], text_L[None])[0]
    further = [
        adapter(states[None], text[None]) for states, text in zip(further_NPD, text_NP[len(own_NPD) :], strict=True)
    ]
    return torch.cat([layout.put(rows_LD, own_NPD), *further])


def _by_encoder(
    clip: Any, readings: dict[str, Reading], given: tuple[TextAdapter | None, ...]
) -> dict[str, TextAdapter]:
    """{key: adapter} by the text encoders' widths; a single encoder's is checked when its states are there.

    Raises:
        ValueError: two adapters are for the same text encoder.
    """
    first, *others = readings
    found: dict[str, TextAdapter] = {}
    for adapter in given:
        if adapter is None:
            continue
        width = adapter.config["width"]
        key = first if not others or width == _first_width(clip, first) else others[0]
        if key in found:
            raise ValueError(f"both adapters are for the text encoder {key!r} (width {width}): connect one of them")
        found[key] = adapter
    return found


def _first_width(clip: Any, key: str) -> int:
    return getattr(clip.tokenizer, f"clip_{key}").embedding_size


def _split(clip: Any, readings: dict[str, Reading], cond_LD: Tensor) -> list[Tensor]:
    """The features of each text encoder."""
    if len(readings) == 1:
        return [cond_LD]
    width = _first_width(clip, next(iter(readings)))
    return [cond_LD[:, :width], cond_LD[:, width:]]


def _filled(rows_LD: Tensor, length: int) -> Tensor:
    """Rows of zeros behind, where the other text encoder has more."""
    return torch.nn.functional.pad(rows_LD, (0, 0, 0, length - len(rows_LD)))
