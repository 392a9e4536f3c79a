"""Noise prediction, the loss that Stable Diffusion was trained with: |UNet(x_t, t, A(f(caption))) - target|^2.

A is the adapter and f the text encoder to adapt; x_t (R, C, H, W) are noisy latents of R draws at timesteps t (R,).
"""

from typing import Any, cast

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from fixclip_diffusion.adapter_training.objectives.step import Step, mean_square

PREDICTION_TYPES = ("epsilon", "v_prediction")


class LongDenoising:
    """Draws that read the long caption."""

    name = "long"

    def __call__(self, step: Step) -> Tensor:
        error_R = step.weight * mean_square(step.predicted - step.target)
        return error_R[~step.draws.short].sum()


class ShortDenoising:
    """Draws that read the short caption."""

    name = "short"

    def __call__(self, step: Step) -> Tensor:
        error_R = step.weight * mean_square(step.predicted - step.target)
        return error_R[step.draws.short].sum()


def noise_target(scheduler: DDPMScheduler, latents: Tensor, noise: Tensor, timestep_R: Tensor) -> Tensor:
    """What the UNet is to predict: the noise, or the velocity sqrt(a_t) noise - sqrt(1 - a_t) latents.

    Raises:
        ValueError: the scheduler's prediction type is neither.
    """
    kind = cast(Any, scheduler.config).prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(latents, noise, timestep_R)
    raise ValueError(f"prediction_type {kind!r} of the base's scheduler: valid are {', '.join(PREDICTION_TYPES)}")


def snr_weight(scheduler: DDPMScheduler, timestep_R: Tensor, gamma: float | None) -> Tensor:
    """Weights of min-SNR, or 1: min(snr, gamma) / snr for the noise, min(snr, gamma) / (snr + 1) for the velocity.

    snr = a_t / (1 - a_t); both are the loss on the clean latents with weight min(snr, gamma) (Hang et al. 2023).
    """
    if gamma is None:
        return torch.ones(len(timestep_R), device=timestep_R.device)
    alpha_R = scheduler.alphas_cumprod.to(timestep_R.device)[timestep_R]
    snr_R = alpha_R / (1 - alpha_R)
    if cast(Any, scheduler.config).prediction_type == "epsilon":
        return (gamma / snr_R).clamp(max=1)  # so written it is right for snr = 0 too
    return snr_R.clamp(max=gamma) / (snr_R + 1)
