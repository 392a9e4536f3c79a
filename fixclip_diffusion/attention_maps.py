"""Which sentence of a prompt drew what: heat maps from the UNet's cross-attention.

Shapes: B images, S sentences, T text states, N positions of a layer (H x W of its feature map).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fixclip_core.data.captions import split_sentences
from fixclip_diffusion.prompt_encoder import PromptEncoder


@dataclass(frozen=True)
class Sentence:
    """A sentence of a cleaned prompt, and the rows of the embeds that are hidden states of its tokens."""

    text: str
    positions: tuple[int, ...]


def sentence_positions(encoder: PromptEncoder, prompt: str) -> list[Sentence]:
    """Find the rows of each sentence in the embeds of a prompt.

    Args:
        encoder: reads the prompt; the rows are those of its first text encoder.
        prompt: any text.

    Returns:
        The sentences in order; tokens that are not read (behind the cut of `stock`) have no row.
    """
    tokens = encoder.tokens(prompt)
    token_L = encoder.conditioning.lay_out(tokens, encoder.encodings[0].context).token_L.tolist()
    starts = [tokens.spans[token][0] if token >= 0 else -1 for token in token_L]
    return [
        Sentence(
            tokens.text[start:end].strip(),
            tuple(row for row, character in enumerate(starts) if start <= character < end),
        )
        for start, end in split_sentences(tokens.text)
    ]


class AttentionRecorder:
    """Sums what `record_attention` sees; read it after the pipeline has run."""

    def __init__(self, weights: Callable[[int], Tensor], latent_size: tuple[int, int], batch_size: int):
        self._weights = weights
        self._latent_size = latent_size
        self._batch_size = batch_size
        self._sum_BSHW: Tensor | None = None
        self._count = 0

    def maps(self) -> Tensor:
        """Share of attention that each position of the latents gave to each group of states, (B, S, H, W) from 0 to 1.

        The mean over heads, layers and steps; coarser layers are interpolated to the size of the latents.

        Raises:
            ValueError: no cross-attention ran while recording.
        """
        if self._sum_BSHW is None:
            raise ValueError("no cross-attention was recorded: run the pipeline inside `record_attention`")
        return self._sum_BSHW / self._count

    @torch.no_grad()
    def _add(self, attention: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        queries = args[0] if args else kwargs["hidden_states"]
        states_BTD = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
        if states_BTD is None:
            return
        # With guidance the batch holds the negative half first; only the prompt's half is of interest.
        queries, states_BTD = queries[-self._batch_size :], states_BTD[-self._batch_size :]
        if attention.norm_cross:
            states_BTD = attention.norm_encoder_hidden_states(states_BTD)
        query = attention.head_to_batch_dim(attention.to_q(queries))
        key = attention.head_to_batch_dim(attention.to_k(states_BTD))
        mask = kwargs.get("attention_mask")  # hides rows that only fill up a batch, see `state_mask`
        if mask is not None:
            mask = attention.prepare_attention_mask(mask[-self._batch_size :], key.shape[1], self._batch_size)
        share_BHNT = attention.get_attention_scores(query, key, mask).unflatten(0, (self._batch_size, -1))
        weights_TS = self._weights(states_BTD.shape[1]).to(share_BHNT)
        map_BSN = (share_BHNT.mean(1) @ weights_TS).transpose(1, 2).float()
        map_BSHW = map_BSN.unflatten(-1, layer_size(map_BSN.shape[-1], self._latent_size))
        map_BSHW = F.interpolate(map_BSHW, self._latent_size, mode="bilinear")
        self._sum_BSHW = map_BSHW if self._sum_BSHW is None else self._sum_BSHW + map_BSHW
        self._count += 1


def layer_size(num_positions: int, latent_size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a layer whose feature map is the latents' halved (rounding up) a number of times.

    Raises:
        ValueError: no number of halvings gives that many positions.
    """
    height, width = latent_size
    while height * width > num_positions and height * width > 1:
        height, width = -(-height // 2), -(-width // 2)
    if height * width != num_positions:
        raise ValueError(f"a layer of {num_positions} positions does not come from latents of {latent_size}")
    return height, width


@contextmanager
def record_attention(
    unet: nn.Module, weights: Callable[[int], Tensor], latent_size: tuple[int, int], batch_size: int = 1
) -> Iterator[AttentionRecorder]:
    """Record cross-attention while the block runs; what the UNet computes stays the same to the bit.

    Each cross-attention computes its probabilities a second time, which costs about one more matrix product
    of the layer and B x heads x N x T numbers of memory.

    Args:
        unet: a UNet of Stable Diffusion's kind (its cross-attentions are called `attn2`).
        weights: from T to weights (T, S): state t counts weights[t, s] towards map s.
        latent_size: height and width of the latents.
        batch_size: B, the number of pictures drawn at once.
    """
    recorder = AttentionRecorder(weights, latent_size, batch_size)
    hooks = [
        module.register_forward_hook(recorder._add, with_kwargs=True)
        for name, module in unet.named_modules()
        if name.endswith("attn2")
    ]
    try:
        yield recorder
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def record_sentences(
    pipe: Any, prompt: str, width: int, height: int, batch_size: int = 1
) -> Iterator[AttentionRecorder]:
    """Record one map per sentence of the prompt, in the order of `sentence_positions`.

    Args:
        pipe: a `FixClipStableDiffusionPipeline`, to be called with this prompt inside the block.
        prompt: the prompt; each of its sentences gets the sum over its tokens.
        width, height: of the picture, in pixels.
        batch_size: pictures drawn at once.
    """

    def weights(num_states: int) -> Tensor:
        # Asked for while the pipeline runs, so that the conditioning is that of the call.
        sentences = sentence_positions(pipe.prompt_encoder, prompt)
        weights_TS = torch.zeros(num_states, len(sentences))
        for index, sentence in enumerate(sentences):
            weights_TS[list(sentence.positions), index] = 1
        return weights_TS

    cached: dict[int, Tensor] = {}

    def cached_weights(num_states: int) -> Tensor:
        if num_states not in cached:
            cached[num_states] = weights(num_states)
        return cached[num_states]

    latent_size = (height // pipe.vae_scale_factor, width // pipe.vae_scale_factor)
    with record_attention(pipe.unet, cached_weights, latent_size, batch_size) as recorder:
        yield recorder
