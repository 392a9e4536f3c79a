"""One step's draws with their embeds; what every objective reads."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from fixclip_diffusion.adapter_training.objectives.draws import CaptionStates, Denoiser, Draws, Features
from fixclip_diffusion.conditioning import CLIP_CONTEXT_LENGTH, SPECIAL_TOKENS


@dataclass
class Step:
    """R draws of a batch.

    Attributes:
        draws, features, denoiser: see there.
        embeds: (R, L, D) what the UNet reads: adapted hidden states, 0 behind a caption's own rows.
        length: (R,) rows of each.
        noisy, target: (R, C, H, W) noisy latents, and what the UNet is to predict.
        weight: (R,) of each draw's noise prediction.
        pooled: (R, E) pooled vector of each draw's caption, or None.
    """

    draws: Draws
    features: Features
    denoiser: Denoiser
    embeds: Tensor
    length: Tensor
    noisy: Tensor
    target: Tensor
    weight: Tensor
    pooled: Tensor | None = None

    @cached_property
    def predicted(self) -> Tensor:
        """(R, C, H, W); the UNet runs once, for the first objective that asks."""
        return self.denoiser.predict(self.noisy, self.draws.timestep, self.embeds, self.pooled, self.time_ids)

    @property
    def time_ids(self) -> Tensor | None:
        """(R, 6) of each draw's picture, or None."""
        return None if self.features.time_ids is None else self.features.time_ids[self.draws.sample]

    @cached_property
    def taught(self) -> Tensor:
        """Numbers of the draws whose caption the base's own encoder reads whole: short ones that fit, and the empty
        one."""
        fits_R = self.draws.dropped | self.features.teacher_fits[self.draws.sample]
        return (self.draws.short & fits_R).nonzero()[:, 0]

    @cached_property
    def teacher(self) -> Tensor:
        """(taught draws, 77, D) hidden states of the base's own encoder."""
        rows = self.taught
        states = self.features.teacher[self.draws.sample[rows]]
        return torch.where(self.draws.dropped[rows, None, None], self.denoiser.empty_teacher.to(states), states)

    @cached_property
    def long_draws(self) -> Tensor:
        """Numbers of the draws that read a long caption."""
        return (~self.draws.short & ~self.draws.dropped).nonzero()[:, 0]

    @cached_property
    def window_difference(self) -> Tensor:
        """(long draws, L, D) embeds minus the same tokens' hidden states by the base's own encoder, in windows."""
        assert self.features.windows is not None
        rows = self.long_draws
        wanted_RLD = as_long(self.features.windows[self.draws.sample[rows]].float(), self.embeds.shape[1])
        return self.embeds[rows].float() - wanted_RLD

    @cached_property
    def taught_predictions(self) -> Tensor:
        """(taught draws, C, H, W) what the base predicts of them: without gradient, adapter and LoRA."""
        rows, pooled, time_ids = self.taught, self.features.teacher_pooled, self.time_ids
        empty = self.denoiser.empty_teacher_pooled
        if pooled is not None and empty is not None and time_ids is not None:
            pooled = pooled[self.draws.sample[rows]]
            pooled = torch.where(self.draws.dropped[rows, None], empty.to(pooled), pooled)
            time_ids = time_ids[rows]
        with torch.no_grad(), self.denoiser.base_unet():
            noisy, timestep = self.noisy[rows], self.draws.timestep[rows]
            return self.denoiser.predict(noisy, timestep, self.teacher, pooled, time_ids)


class Objective(Protocol):
    """A term of the loss: its name in the recipe (`weight_NAME`) and in the log, and its sum over the draws it is
    about."""

    name: str

    def __call__(self, step: Step) -> Tensor: ...


def as_long(states_RLD: Tensor, length: int) -> Tensor:
    """The states cut or filled up with zeros to `length` rows."""
    return torch.nn.functional.pad(states_RLD, (0, 0, 0, length - states_RLD.shape[1]))


def mean_square(difference: Tensor) -> Tensor:
    """(R,) mean over all but the first dimension."""
    return difference.square().flatten(1).mean(1)


def mean_square_of_rows(difference_RLD: Tensor, length_R: Tensor, known_RL: Tensor | None = None) -> Tensor:
    """(R,) mean over D and over the first `length` rows of each draw, those that are False in `known` left out."""
    used_RL = torch.arange(difference_RLD.shape[1], device=length_R.device) < length_R[:, None]
    used_RL = used_RL if known_RL is None else used_RL & known_RL
    sum_R = (difference_RLD.square() * used_RL[..., None]).flatten(1).sum(1)
    return sum_R / (used_RL.sum(1) * difference_RLD.shape[-1])


def caption_states(draws: Draws, features: Features, denoiser: Denoiser) -> tuple[CaptionStates, Tensor]:
    """Each caption that some draw reads, once, and the number (R,) of every draw's caption among them."""
    caption_R = torch.where(draws.dropped, -1, 2 * draws.sample + draws.short.long())
    captions_C, number_R = caption_R.unique(return_inverse=True)
    count = len(features)
    everyone = CaptionStates.cat(
        [features.long, features.short, denoiser.empty.map(lambda t: t.to(features.seeds.device))]
    )
    is_short = captions_C % 2
    rows_C = torch.where(captions_C < 0, 2 * count, captions_C // 2 + count * is_short)
    return everyone[rows_C], number_R


def short_texts_left_out(captions: CaptionStates) -> CaptionStates:
    """The captions, of which an adapter is to act on the empty one and on those that one pass of up to 77 positions
    cannot read."""
    fits_C = (captions.text >= 0).sum(1) <= CLIP_CONTEXT_LENGTH
    has_words_C = (captions.text == 1).sum(1) > SPECIAL_TOKENS
    return replace(captions, text=captions.text.masked_fill((fits_C & has_words_C)[:, None], -1))


def adapted_embeds(
    adapter: Callable[..., Tensor], captions: CaptionStates, masks: bool, scope: str = "window"
) -> tuple[Tensor, Tensor]:
    """Hidden states through the adapter, and joined: embeds (C, L, D), and the length (C,) of each.

    Args:
        adapter: hidden states (N, P, D) and the text's positions (N, P) to hidden states.
        captions: C captions.
        masks: whether the adapter leaves padding out; else it must see passes of their own length only.
        scope: "window": the adapter reads pass by pass; "text": what all passes of a caption are joined to.
    """
    if scope == "text":
        embeds_CLD, source_CL = joined(captions.states, captions.source)
        text_CL = captions.text.gather(1, source_CL.clamp(min=0)) * (source_CL >= 0)
        adapted_CLD = adapter(embeds_CLD, text_CL > 0).to(embeds_CLD.dtype) * (source_CL >= 0)[..., None]
        has_text_C11 = (text_CL > 0).any(1)[:, None, None]
        return torch.where(has_text_C11, adapted_CLD, embeds_CLD), (source_CL >= 0).sum(1)
    states_CSD = torch.zeros_like(captions.states)
    sizes = sorted(set(captions.size.tolist()))
    groups = [captions.size == size for size in sizes] if not masks else [captions.size > 0]
    for group_C in groups:
        members = group_C.nonzero()[:, 0]
        part, size = captions[members], int(captions.size[members].max())
        # One pass of a caption has its own length; several have the length of them all. No adapter acts on some.
        acted_C = (part.text >= 0).sum(1)
        single_C = (part.size == acted_C) | (acted_C == 0)
        if masks and not bool((single_C | (part.size == size)).all()):
            return adapted_embeds(adapter, captions, masks=False)
        states_MSD, text_MS = part.states, part.text
        missing = -states_MSD.shape[1] % size
        states_MSD = torch.nn.functional.pad(states_MSD, (0, 0, 0, missing))
        text_MS = torch.nn.functional.pad(text_MS, (0, missing), value=-1)
        states_NPD, text_NP = (x.unflatten(1, (-1, size)).flatten(0, 1) for x in (states_MSD, text_MS))
        read_N = (text_NP >= 0).any(1)
        adapted_NPD = states_NPD.clone()
        adapted_NPD[read_N] = adapter(states_NPD[read_N], text_NP[read_N] > 0).to(adapted_NPD.dtype)
        adapted_MSD = adapted_NPD.unflatten(0, (len(members), -1)).flatten(1, 2)[:, : captions.states.shape[1]]
        states_CSD = states_CSD.index_copy(0, members, adapted_MSD)
    embeds_CLD, source_CL = joined(states_CSD, captions.source)
    return embeds_CLD, (source_CL >= 0).sum(1)


def joined(states_CSD: Tensor, source_CS: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of embeds (C, L, D) that `source` picks from the hidden states, 0 behind a caption's own, and (C, L) of
    `source` for them."""
    source_CL = source_CS[:, : int((source_CS >= 0).sum(1).max())]
    embeds_CLD = states_CSD.gather(1, source_CL.clamp(min=0)[..., None].expand(-1, -1, states_CSD.shape[-1]))
    return embeds_CLD * (source_CL >= 0)[..., None], source_CL
