"""What the adapter learns from, one class a term: noise prediction, and the base as a teacher.

A draw is a latent, a noise, a timestep and one caption of a sample, all decided by the sample's seed. It drops its
caption with probability `caption_dropout` and then reads the empty one, for teacher and student alike, because guidance
needs the unconditional prediction too.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fixclip_diffusion.adapter_training.objectives.denoising import (
    LongDenoising,
    ShortDenoising,
    noise_target,
    snr_weight,
)
from fixclip_diffusion.adapter_training.objectives.distillation import Plain, Prediction, States, Windows
from fixclip_diffusion.adapter_training.objectives.draws import CaptionStates, Denoiser, Draws, Features, draw
from fixclip_diffusion.adapter_training.objectives.step import (
    Objective,
    Step,
    adapted_embeds,
    caption_states,
    short_texts_left_out,
)
from fixclip_diffusion.adapter_training.recipe import ObjectivesSection

__all__ = [
    "CaptionStates",
    "Denoiser",
    "Draws",
    "Features",
    "adapter_losses",
    "draw",
    "noise_target",
    "objectives_of",
    "snr_weight",
]


def objectives_of(section: ObjectivesSection) -> list[Objective]:
    """The terms that a recipe asks for. Where the UNet runs at all, both kinds of noise prediction are logged, whatever
    their weights: they say how long and short captions fare."""
    terms: list[Objective] = []
    if section.reads_noise:
        terms.append(LongDenoising())
        terms += [ShortDenoising()] if section.reads_short else []
    if section.reads_short:
        terms += [Prediction()] if section.weight_prediction else []
        terms += [States()] if section.weight_states else []
    terms += [Windows()] if section.weight_windows else []
    return [*terms, Plain()] if section.weight_plain else terms


def adapter_losses(
    adapter: Callable[..., Tensor], features: Features, denoiser: Denoiser, section: ObjectivesSection
) -> dict[str, Tensor]:
    """Named losses of a batch; "loss" is their weighted sum, the only one to minimise.

    Each is a sum over its draws divided by their expected number, R * short_share or R * (1 - short_share). So
    its weight does not depend on the mix, and the parts of a split batch add up exactly.

    Args:
        adapter: a `TextAdapter` or a function like it.
        features: of B samples.
        denoiser: the frozen models.
        section: weights and shares.
    """
    draws = draw(features, denoiser, section)
    captions, number_R = caption_states(draws, features, denoiser)
    config = getattr(adapter, "config", {"kind": "attention"})
    if not config.get("short_texts", True):
        captions = short_texts_left_out(captions)
    masks = config["kind"] == "mlp" or config.get("mask_padding", False)
    embeds_CLD, length_C = adapted_embeds(adapter, captions, masks, config.get("scope", "window"))
    step = Step(
        draws=draws,
        features=features,
        denoiser=denoiser,
        embeds=embeds_CLD[number_R],
        length=length_C[number_R],
        noisy=denoiser.scheduler.add_noise(draws.latents, draws.noise, draws.timestep),
        target=noise_target(denoiser.scheduler, draws.latents, draws.noise, draws.timestep),
        weight=snr_weight(denoiser.scheduler, draws.timestep, section.snr_gamma),
        pooled=None if captions.pooled is None else captions.pooled[number_R],
    )
    short_share, long_share = section.short_share, 1 - section.short_share
    read_share = long_share * (1 - section.caption_dropout)
    shares = {"long": long_share, "windows": read_share, "plain": read_share}
    losses: dict[str, Tensor] = {}
    for objective in objectives_of(section):
        losses[objective.name] = objective(step) / (len(draws.sample) * shares.get(objective.name, short_share))
    total = torch.stack([getattr(section, f"weight_{name}") * loss for name, loss in losses.items()]).sum()
    return {"loss": total} | {f"loss_{name}": loss for name, loss in losses.items()}
