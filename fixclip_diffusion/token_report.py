"""What becomes of a prompt: its length in tokens, where a stock encoder stops, and the passes that read it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fixclip_diffusion.conditioning import (
    CLIP_CONTEXT_LENGTH,
    SPECIAL_TOKENS,
    Conditioning,
    Context,
    Layout,
    PromptTokens,
    get_conditioning,
)
from fixclip_diffusion.prompt_tokens import tokenize_prompt
from fixclip_diffusion.tokenizer import FixClipTokenizer

ADAPTED = {
    "text": "an adapter refines the hidden states, all of them together",
    "window": "an adapter refines the hidden states, one window at a time",
    "left out": f"the adapter leaves prompts of up to {CLIP_CONTEXT_LENGTH} tokens as they are",
}


@dataclass(frozen=True)
class ReadPass:
    """One pass of the encoder: it reads characters start..end of the report's text; num_tokens counts both ends."""

    text: str
    start: int
    end: int
    num_tokens: int


@dataclass(frozen=True)
class TokenReport:
    """What a conditioning makes of a prompt.

    Attributes:
        text: the prompt as it is read: cleaned like CLIP's training texts, without the syntax of prompt weights.
        num_tokens: its length in tokens, start and end included.
        conditioning: name of the conditioning.
        context_length: positions of the encoder.
        stock_cut: character of `text` at which a 77-token encoder stops reading; None if it reads all.
        cut: the same for this conditioning.
        passes: the passes of the encoder, which overlap with `overlap`.
        num_states: L, rows of the prompt's embeds.
        adapter: what an adapter sees at a time, the hidden states of the whole "text" or of one "window"; "left out":
            it leaves this prompt as it is; None: the encoder has none.
    """

    text: str
    num_tokens: int
    conditioning: str
    context_length: int
    stock_cut: int | None
    cut: int | None
    passes: tuple[ReadPass, ...]
    num_states: int
    adapter: str | None = None

    def __str__(self) -> str:
        return self.describe()

    def describe(self) -> str:
        """The report in words."""
        lines = [f"{self.num_tokens} tokens"]
        adapted = [] if self.adapter is None else [f"  {ADAPTED[self.adapter]}"]
        if self.stock_cut is None:
            return "\n".join(lines + adapted)
        lines.append(f"  a {CLIP_CONTEXT_LENGTH}-token encoder stops before: {_quote(self.text[self.stock_cut :])}")
        how = get_conditioning(self.conditioning)
        if self.cut is not None:
            lines.append(f"  conditioning {how.name!r}: {how.summary}; dropped from: {_quote(self.text[self.cut :])}")
        elif len(self.passes) == 1:
            lines.append(f"  conditioning {how.name!r}: {how.summary} of up to {self.context_length} tokens, all of it")
        else:
            lines.append(f"  conditioning {how.name!r}: {how.summary}; all of it, in {len(self.passes)}:")
            lines += [
                f"    {number}. {item.num_tokens} tokens, from {_quote(item.text)}"
                for number, item in enumerate(self.passes, 1)
            ]
        return "\n".join(lines + adapted)


def _quote(text: str, length: int = 48) -> str:
    text = text.strip()
    return repr(text if len(text) <= length else text[:length].rstrip() + "…")


def token_report(
    tokenizer: FixClipTokenizer,
    prompt: str,
    conditioning: str | Conditioning = "overlap",
    context: Context | None = None,
    weights: str | None = None,
    adapter: Mapping[str, Any] | None = None,
) -> TokenReport:
    """Count and place the tokens of a prompt.

    Args:
        tokenizer: gives the ids.
        prompt: any text; a `CleanText` is taken as it is.
        conditioning: how the prompt is read.
        context: of the encoder; by default an untrained one of the tokenizer's length, with its original positions.
        weights: syntax of prompt weights, see `prompt_weights.parse_weights`.
        adapter: configuration of the encoder's adapter, if it has one.

    Raises:
        ValueError: the prompt is not text, the weights cannot be parsed, or the encoder cannot be read that way.
    """
    tokens = tokenize_prompt(tokenizer, prompt, weights)
    if context is None:
        special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        context = Context(tokenizer.context_length, CLIP_CONTEXT_LENGTH, *special)
    how = get_conditioning(conditioning)
    return report_of(tokens, how.lay_out(tokens, context), how, context, adapter)


def report_of(
    tokens: PromptTokens,
    layout: Layout,
    conditioning: Conditioning,
    context: Context,
    adapter: Mapping[str, Any] | None = None,
) -> TokenReport:
    """The report of a prompt that is laid out already; see `token_report`."""
    room = CLIP_CONTEXT_LENGTH - SPECIAL_TOKENS
    passes = []
    for first, stop in layout.pass_tokens():
        start = tokens.spans[first][0] if first else 0
        end = len(tokens.text) if stop == len(tokens) else tokens.spans[stop - 1][1]
        passes.append(ReadPass(tokens.text[start:end].strip(), start, end, stop - first + SPECIAL_TOKENS))
    return TokenReport(
        text=tokens.text,
        num_tokens=len(tokens) + SPECIAL_TOKENS,
        conditioning=conditioning.name,
        context_length=context.length,
        stock_cut=_character(tokens, room),
        cut=_character(tokens, layout.num_read),
        passes=tuple(passes),
        num_states=len(layout),
        adapter=_adapter_sees(adapter, layout, context),
    )


def _adapter_sees(adapter: Mapping[str, Any] | None, layout: Layout, context: Context) -> str | None:
    """`TokenReport.adapter` for an adapter of this configuration."""
    if adapter is None:
        return None
    if len(layout.ids_NP) > 1:
        return str(adapter.get("scope", "window"))  # those of version 0.1 have no such fields
    is_short = layout.num_read + SPECIAL_TOKENS <= context.short_length
    return "left out" if is_short and not adapter.get("short_texts", True) else "text"


def _character(tokens: PromptTokens, number: int) -> int | None:
    """First character of token `number`; None behind the last token."""
    return tokens.spans[number][0] if number < len(tokens) else None
