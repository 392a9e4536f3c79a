"""Prompts of any length to the embeds that a UNet reads; every pipeline, training and report goes through here.

    texts --tokenize_prompt--> tokens --Conditioning.lay_out--> Layout --text encoders--> hidden states --join--> embeds

Shapes: B prompts, N passes, P positions of a pass, L rows of the embeds, D width, E width of the pooled vector.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fixclip_diffusion.adapter import TextAdapter
from fixclip_diffusion.conditioning import (
    Conditioning,
    Context,
    Layout,
    PromptTokens,
    choose_conditioning,
    empty_layout,
)
from fixclip_diffusion.families import TextEncoding, lora_scale_of
from fixclip_diffusion.prompt_tokens import tokenize_prompt
from fixclip_diffusion.prompt_weights import check_syntax, weigh
from fixclip_diffusion.text_encoder import text_lengths
from fixclip_diffusion.token_report import TokenReport, report_of

logger = logging.getLogger(__name__)

PASSES_AT_ONCE = 64  # bounds memory: 64 passes of 77 tokens
Encode = Callable[[Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class PromptEmbeds:
    """What the UNet reads of B prompts.

    Attributes:
        embeds_BLD: hidden states, of several text encoders side by side; rows behind a prompt's own are 0.
        pooled_BE: the first pass's pooled vector, None without one. For a text that one pass reads it is that of the
            whole text; else it is what stock diffusers (with a cut) and compel give.
        layouts: B rows of one layout for each text encoder.
    """

    embeds_BLD: Tensor
    pooled_BE: Tensor | None
    layouts: tuple[tuple[Layout, ...], ...]


class PromptEncoder:
    """Text encoders, a conditioning and a syntax of prompt weights.

    Args:
        encodings: the text encoders with their tokenizers.
        conditioning: how prompts are read; by default as the first encoder says, or in one pass where that cannot be
            done with another one.
        weights: syntax of prompt weights, "a1111" or "compel"; None takes prompts literally.

    Raises:
        ValueError: an unknown conditioning or syntax, or one that an encoder cannot be read by.
    """

    def __init__(
        self,
        encodings: Sequence[TextEncoding],
        conditioning: str | Conditioning | None = None,
        weights: str | None = None,
    ):
        self.encodings = tuple(encodings)
        self.conditioning = choose_conditioning(conditioning, [item.encoder.config for item in self.encodings])
        self.weights = check_syntax(weights)
        for encoding in self.encodings:
            self.conditioning.check(encoding.context)

    def tokens(self, prompt: str, number: int = 0) -> PromptTokens:
        """The prompt as tokens of text encoder `number`."""
        return tokenize_prompt(self.encodings[number].tokenizer, prompt, self.weights)

    def lay_out(self, prompt: str, number: int = 0) -> Layout:
        """Which token of the prompt text encoder `number` reads where."""
        return self.conditioning.lay_out(self.tokens(prompt, number), self.encodings[number].context)

    def report(self, prompt: str, number: int = 0) -> TokenReport:
        """What becomes of the prompt in text encoder `number`."""
        tokens, encoding = self.tokens(prompt, number), self.encodings[number]
        layout, adapter = self.conditioning.lay_out(tokens, encoding.context), encoding.encoder.config.adapter
        return report_of(tokens, layout, self.conditioning, encoding.context, adapter)

    def encode(
        self,
        prompts: Sequence[Sequence[str]],
        device: torch.device | str | None = None,
        clip_skip: int | None = None,
        lora_scale: float | None = None,
        beside_long: Sequence[bool] | None = None,
    ) -> PromptEmbeds:
        """Embeds of B prompts.

        Args:
            prompts: B texts for each text encoder; all encoders read the first list if there is one only.
            device: where the passes run; by default where each encoder is.
            clip_skip: see `TextEncoding`.
            lora_scale: factor of the text encoders' LoRA layers.
            beside_long: B values, whether a text is the negative prompt of one that takes more than 77 tokens: see
                `TextAdapter`, short_texts. By default none is.

        Raises:
            ValueError: a prompt that is no text or cannot be parsed, too large a clip_skip, or lists of unequal
                lengths.
        """
        lists = list(prompts) if len(prompts) > 1 else [prompts[0]] * len(self.encodings)
        if len({len(texts) for texts in lists}) != 1:
            raise ValueError(f"prompts for the text encoders differ in number: {[len(texts) for texts in lists]}")
        beside = [False] * len(lists[0]) if beside_long is None else list(beside_long)
        columns: list[list[Layout]] = []
        states: list[list[Tensor]] = []
        pooled_BE: Tensor | None = None
        with lora_scale_of([encoding.encoder for encoding in self.encodings], lora_scale):
            for number, (encoding, texts) in enumerate(zip(self.encodings, lists, strict=True)):
                layouts = [self.lay_out(text, number) for text in texts]
                rows, pooled = self._encode(encoding, layouts, device, clip_skip, beside)
                columns.append(layouts)
                states.append(rows)
                pooled_BE = pooled if pooled is not None else pooled_BE
        _warn_of_unequal_tokens(lists, columns)
        embeds = [pad_sequence(rows, batch_first=True) for rows in states]
        longest = max(part.shape[1] for part in embeds)
        embeds_BLD = torch.cat([pad_states(part, longest) for part in embeds], dim=-1)
        return PromptEmbeds(embeds_BLD, pooled_BE, tuple(zip(*columns, strict=True)))

    def _encode(
        self,
        encoding: TextEncoding,
        layouts: Sequence[Layout],
        device: torch.device | str | None,
        clip_skip: int | None,
        beside_long: Sequence[bool],
    ) -> tuple[list[Tensor], Tensor | None]:
        """Rows (L, D) of each prompt and pooled vectors (B, E)."""
        encoder = encoding.encoder
        adapter = getattr(encoder, "adapter", None)
        if adapter is None:
            return self._encode_each(encoding, layouts, device, clip_skip)
        groups: dict[str, list[int]] = {"rows": [], "windows": [], "pass": []}
        for number, (layout, beside) in enumerate(zip(layouts, beside_long, strict=True)):
            groups[_acts_on(adapter, layout, beside)].append(number)
        contexts = {"rows": encoder.adapter_left_out, "windows": encoder.reading_windows, "pass": nullcontext}
        rows: list[Tensor] = [torch.empty(0)] * len(layouts)
        pooled: list[Tensor] = [torch.empty(0)] * len(layouts)
        has_pooled = False
        for name, members in groups.items():
            chosen = [layouts[number] for number in members]
            with contexts[name]():
                joint = adapter if name == "rows" else None
                found, found_pooled = self._encode_each(encoding, chosen, device, clip_skip, joint)
            for place, number in enumerate(members):
                rows[number] = found[place]
                if found_pooled is not None:
                    pooled[number], has_pooled = found_pooled[place], True
        return rows, torch.stack(pooled) if has_pooled else None

    def _encode_each(
        self,
        encoding: TextEncoding,
        layouts: Sequence[Layout],
        device: torch.device | str | None,
        clip_skip: int | None,
        adapter: TextAdapter | None = None,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Rows and pooled vectors as `_encode`; the adapter reads the joined rows, and prompt weights come after it."""
        if not layouts:
            return [], None
        context = encoding.context

        def encode(ids_NP: Tensor, mask_NP: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
            to = device or encoding.encoder.device
            return encoding(ids_NP.to(to), None if mask_NP is None else mask_NP.to(to), clip_skip)

        def adapted(layout: Layout, states_NPD: Tensor) -> Tensor:
            return states_NPD if adapter is None else adapt_rows(adapter, states_NPD, layout, context.end_id)

        passes, pooled = encode_passes(encode, layouts, context, _hides_padding(encoding.encoder))
        rows = []
        for layout, plain_NPD in zip(layouts, passes, strict=True):
            states_NPD = adapted(layout, plain_NPD)
            if self.weights is not None and layout.is_weighted:
                empty = empty_layout(context, states_NPD.shape[1])
                with encoding.encoder.read_as_long():  # it has a state for each place of the prompt
                    empty_PD = adapted(empty, encode(empty.ids_NP)[0])[0]
                states_NPD = weigh(
                    states_NPD, layout, self.weights, lambda *x, own=layout: adapted(own, encode(*x)[0]), empty_PD
                )
            rows.append(layout.join(states_NPD))
        return rows, None if pooled is None else torch.stack(pooled)


def _warn_of_unequal_tokens(lists: Sequence[Sequence[str]], columns: Sequence[Sequence[Layout]]) -> None:
    """Say so where two text encoders split the same text into other tokens: rows of the embeds then hold the hidden
    states of different words."""
    for texts, layouts in zip(lists[1:], columns[1:], strict=True):
        for text, first, text_here, here in zip(lists[0], columns[0], texts, layouts, strict=True):
            if text == text_here and first.num_read != here.num_read:
                logger.warning(
                    "%r has %d tokens for the first text encoder and %d for another: was a textual inversion loaded "
                    "into one of them only? load_textual_inversion takes text_encoder= and tokenizer=",
                    text[:80],
                    first.num_read,
                    here.num_read,
                )


def _acts_on(adapter: TextAdapter, layout: Layout, beside_long: bool) -> str:
    """What of a prompt an adapter reads: the joined "rows" of its embeds, its "windows" one by one, or one "pass", if
    at all, as the encoder decides (`TextAdapter`, short_texts)."""
    if len(layout.ids_NP) > 1:
        return "rows" if adapter.config["scope"] == "text" else "windows"
    is_guidance = beside_long and not layout.num_read and not adapter.config["short_texts"]
    return "rows" if is_guidance else "pass"


def adapt_rows(adapter: TextAdapter, states_NPD: Tensor, layout: Layout, end_id: int) -> Tensor:
    """Hidden states (N, P, D) of a prompt's passes; those that become rows of its embeds went through an adapter of
    the scope "text", as they are joined."""
    text_L = positions_of_text(layout.ids_NP, end_id).flatten()[layout.source_L].bool().to(states_NPD.device)
    return layout.put(adapter(layout.join(states_NPD)[None], text_L[None])[0], states_NPD)


def positions_of_text(ids_NP: Tensor, end_id: int) -> Tensor:
    """(N, P) int64: 1 for the text of each pass, start and end included, 0 for the padding behind it."""
    place_1P = torch.arange(ids_NP.shape[1])[None]
    return (place_1P < text_lengths(ids_NP, end_id)[:, None]).long()


def _hides_padding(encoder: Any) -> bool:
    """Whether a pass is read as if nothing were behind its text: not by adapters of version 0.1 that attend to it."""
    adapter = getattr(encoder, "adapter", None)
    return adapter is None or adapter.config["kind"] == "mlp" or adapter.config["mask_padding"]


def encode_passes(
    encode: Encode, layouts: Sequence[Layout], context: Context, hides_padding: bool = True
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Hidden states (N, P, D) of each layout's passes, and the pooled vector (E,) of each one's first pass.

    Passes of up to 77 positions run together and longer ones run together, `PASSES_AT_ONCE` at a time. Causal attention
    hides the padding from the text, so that each pass gives what it would give alone. Where an adapter does not, only
    passes of the same size run together.

    Args:
        encode: ids (N, P) to hidden states (N, P, D) and pooled vectors (N, E) or None.
        layouts: of the prompts.
        context: of the text encoder.
        hides_padding: whether states do not depend on what stands behind a text.
    """
    states: list[Tensor] = [torch.empty(0)] * len(layouts)
    pooled: list[Tensor] = []
    order: list[int] = []
    sizes = [layout.ids_NP.shape[1] for layout in layouts]
    kinds = [int(size > context.short_length) if hides_padding else size for size in sizes]
    for kind in sorted(set(kinds)):
        members = [number for number, own in enumerate(kinds) if own == kind]
        size = max(sizes[number] for number in members)
        ids_NP = torch.cat([_padded(layouts[number].ids_NP, size, context.pad_id) for number in members])
        outputs = [encode(part_NP) for part_NP in ids_NP.split(PASSES_AT_ONCE)]
        counts = [len(layouts[number].ids_NP) for number in members]
        for number, part in zip(members, torch.cat([out[0] for out in outputs]).split(counts), strict=True):
            states[number] = part[:, : sizes[number]]
        if outputs[0][1] is not None:
            pooled += [part[0] for part in torch.cat([cast(Tensor, out[1]) for out in outputs]).split(counts)]
            order += members
    return states, [pooled[order.index(number)] for number in range(len(layouts))] if pooled else None


def _padded(ids_NP: Tensor, size: int, pad_id: int) -> Tensor:
    return torch.nn.functional.pad(ids_NP, (0, size - ids_NP.shape[1]), value=pad_id)


def pad_states(states_BLD: Tensor, length: int) -> Tensor:
    """Rows of zeros behind the states, up to `length` rows."""
    return torch.nn.functional.pad(states_BLD, (0, 0, 0, length - states_BLD.shape[1]))
