"""Prompt weights: the syntaxes of A1111 and compel, and what a weight does to hidden states.

Shapes: N passes, P positions, D width.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fixclip_diffusion.conditioning import Layout

SYNTAXES = ("a1111", "compel")
LITERAL = "literal"  # no syntax, where None stands for the one that was set before


@dataclass(frozen=True)
class Fragment:
    """A piece of a prompt with one weight; `ends_pass` where a BREAK follows it."""

    text: str
    weight: float = 1.0
    ends_pass: bool = False


def check_syntax(weights: str | None) -> str | None:
    """A syntax's name; None for "literal" and for None.

    Raises:
        ValueError: there is no such syntax.
    """
    if weights is None or weights == LITERAL:
        return None
    if weights not in SYNTAXES:
        raise ValueError(f"weights={weights!r}: valid are {', '.join(map(repr, (*SYNTAXES, LITERAL)))}")
    return weights


def parse_weights(text: str, weights: str | None) -> list[Fragment]:
    """Cut a text into fragments of one weight each; the syntax itself is left out of their texts.

    Args:
        text: the prompt.
        weights: "a1111": `(word)` is 1.1, `[word]` 1/1.1, `(word:1.3)` 1.3, nested ones multiply, a backslash takes the
            next bracket literally, and BREAK between words begins a new pass. "compel": `word+`, `word--`, `(two
            words)1.3`.
            None or "literal": all of it literally.

    Raises:
        ValueError: an unknown syntax; compel is not installed, cannot parse the text, or is asked for a blend, a
            conjunction, a cross-attention swap or a LoRA, which are not weights.
    """
    weights = check_syntax(weights)
    if weights is None:
        return [Fragment(text)]
    return (_parse_a1111(text) if weights == "a1111" else _parse_compel(text)) or [Fragment("")]


# -- syntax of A1111 -----------------------------------------------------------------------------------------

_A1111_TOKEN = re.compile(
    r"(?P<literal>\\[()\[\]\\])"
    r"|(?P<open>[(\[])"
    r"|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)"
    r"|(?P<close>[)\]])"
    r"|(?P<BREAK>\bBREAK\b)"
    r"|(?P<text>[^\\()\[\]:B]+|.)",
    re.DOTALL,
)
_ROUND, _SQUARE = 1.1, 1 / 1.1


def _parse_a1111(text: str) -> list[Fragment]:
    """One pass over the characters; a bracket's factor is applied to all pieces behind it when it closes."""
    pieces: list[tuple[str, float]] = []
    breaks: set[int] = set()  # a BREAK stands before the piece of this number
    opened: list[tuple[str, int]] = []  # bracket, first piece inside

    def close(bracket: str, factor: float) -> bool:
        if not opened or opened[-1][0] != bracket:
            return False
        _, first = opened.pop()
        pieces[first:] = [(piece, weight * factor) for piece, weight in pieces[first:]]
        return True

    for match in _A1111_TOKEN.finditer(text):
        kind, said = match.lastgroup, match.group()
        if kind == "literal":
            pieces.append((said[1], 1.0))
        elif kind == "open":
            opened.append((said, len(pieces)))
        elif kind == "weight" and opened and opened[-1][0] == "(":
            close("(", float(match["weight"]))
        elif kind == "close":
            closed = close("(", _ROUND) if said == ")" else close("[", _SQUARE)
            if not closed:
                pieces.append((said, 1.0))
        elif kind == "BREAK":
            breaks.add(len(pieces))
        else:
            pieces.append((said, 1.0))
    # As in A1111, a bracket that is never closed counts to the end of the text.
    while opened:
        bracket = opened[-1][0]
        close(bracket, _ROUND if bracket == "(" else _SQUARE)
    return _merged(pieces, breaks)


def _merged(pieces: list[tuple[str, float]], breaks: set[int]) -> list[Fragment]:
    """Neighbours of one weight as one fragment; white space around a BREAK goes with it."""
    fragments: list[Fragment] = []
    for number, (text, weight) in enumerate(pieces):
        if number in breaks and fragments:
            fragments[-1] = Fragment(fragments[-1].text.rstrip() + " ", fragments[-1].weight, ends_pass=True)
            text = text.lstrip()
        last = fragments[-1] if fragments else None
        if last is not None and last.weight == weight and not last.ends_pass:
            fragments[-1] = Fragment(last.text + text, weight)
        else:
            fragments.append(Fragment(text, weight))
    return fragments


# -- syntax of compel ----------------------------------------------------------------------------------------


def _parse_compel(text: str) -> list[Fragment]:
    try:
        from compel.prompt_parser import Blend, FlattenedPrompt, PromptParser
        from compel.prompt_parser import Fragment as CompelFragment
    except ModuleNotFoundError as error:
        raise ValueError("weights='compel' needs the package compel: pip install 'fixclip[compel]'") from error
    try:
        parsed = PromptParser().parse_conjunction(text)
    except PromptParser.ParsingException as error:
        raise ValueError(f"weights='compel': {error}") from error
    parts = parsed.prompts
    plain = len(parts) == 1 and isinstance(parts[0], FlattenedPrompt) and not parsed.lora_weights
    if isinstance(parts[0], Blend):
        plain = False
    children = parts[0].children if plain else []
    if not plain or not all(isinstance(child, CompelFragment) for child in children):
        raise ValueError(
            f"weights='compel': {text!r} asks for more than weights (.blend, .and, .swap or withLora); make its embeds "
            "with compel itself (Compel(tokenizer=pipe.tokenizer, text_encoder=pipe.text_encoder)) and pass "
            "prompt_embeds"
        )
    # compel reads its fragments one by one, so that they need a space between them only for the eye.
    return [Fragment(child.text + " " * (child is not children[-1]), float(child.weight)) for child in children]


# -- what a weight does --------------------------------------------------------------------------------------

Encode = Callable[[Tensor, Tensor | None], Tensor]


def weigh(states_NPD: Tensor, layout: Layout, syntax: str, encode: Encode, empty_PD: Tensor) -> Tensor:
    """Hidden states (N, P, D) with the prompt's weights, by the rule of the syntax's own tool.

    a1111: every state is multiplied by its weight w, and each pass by the number that restores its mean over all
    states: z' = w z * mean(z) / mean(w z), as A1111 does by default.

    compel: z' = e + w (z - e), where e (P, D) are the states of the empty prompt. For each fragment f of weight w < 1
    the prompt is read once more with f hidden from attention, z_f, and the result is the mean of z' and all z_f',
    weighted 1 and tan((1 - w) pi / 2): for w = 0.5 half of each, for w = 0 the prompt without f.

    Args:
        states_NPD: of the layout's passes.
        layout: its ids and weights.
        syntax: "a1111" or "compel".
        encode: ids (N, P) and attention mask (N, P) or None to hidden states (N, P, D).
        empty_PD: states of the empty prompt, in a pass of the same size.
    """
    weight_NP1 = layout.weight_NP[..., None].to(states_NPD)
    if syntax == "a1111":
        weighted_NPD = states_NPD * weight_NP1
        mean_N, weighted_mean_N = states_NPD.mean((1, 2)), weighted_NPD.mean((1, 2))
        restoring_N = torch.where(weighted_mean_N == 0, 1, mean_N / weighted_mean_N)  # no number restores a mean from 0
        restored_NPD = weighted_NPD * restoring_N[:, None, None]
        return torch.where((weight_NP1 != 1).any(1, keepdim=True), restored_NPD, states_NPD)

    def scaled(z_NPD: Tensor) -> Tensor:
        empty_PD_ = empty_PD.to(z_NPD)
        return torch.where(weight_NP1 == 1, z_NPD, empty_PD_ + weight_NP1 * (z_NPD - empty_PD_))

    total_NPD, factors = scaled(states_NPD), 1.0
    for first, stop, weight in _weak_fragments(layout):
        hidden_NP = (layout.token_NP >= first) & (layout.token_NP < stop)
        without_NPD = scaled(encode(layout.ids_NP, (~hidden_NP).long()))
        factor = math.tan((1 - max(weight, 1e-5)) * math.pi / 2)
        total_NPD, factors = total_NPD + factor * without_NPD, factors + factor
    return total_NPD / factors


def _weak_fragments(layout: Layout) -> list[tuple[int, int, float]]:
    """(first token, the one behind the last, weight) of each run of tokens of one weight below 1."""
    weight_of: dict[int, float] = {}
    for token, weight in zip(layout.token_NP.flatten().tolist(), layout.weight_NP.flatten().tolist(), strict=True):
        if token >= 0:
            weight_of[token] = weight
    runs: list[tuple[int, int, float]] = []
    for token in sorted(weight_of):
        weight = weight_of[token]
        if runs and runs[-1][1] == token and runs[-1][2] == weight:
            runs[-1] = (runs[-1][0], token + 1, weight)
        else:
            runs.append((token, token + 1, weight))
    return [run for run in runs if run[2] < 1]
