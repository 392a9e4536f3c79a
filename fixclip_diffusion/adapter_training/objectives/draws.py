"""What a step of the adapter's training reads: features of a batch, and random draws from them.

Shape letters: B samples, R draws, C latent channels, H, W latent height and width, N passes, P positions of a pass,
S = N P positions of a caption, L rows of its embeds, D width of the UNet's embeds (all text encoders side by side), E
width of the pooled vector.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from fixclip_core.data.samples import Skipped
from fixclip_diffusion.adapter_training.recipe import ObjectivesSection

HIGH_NOISE_FROM = 0.6


@dataclass(frozen=True)
class CaptionStates:
    """Hidden states of B captions' passes, without adapter, and how they become embeds.

    Attributes:
        states: (B, S, D), passes one behind the other; 0 behind a caption's own.
        text: (B, S), 1 for the text of each pass, 0 for its padding, -1 where no adapter is to act: behind a caption's
            own passes, in the empty caption of a base whose UNet reads zeros for it, and in `short_texts_left_out`.
        source: (B, L), the position in `states` that each row of the embeds comes from, -1 behind a caption's own rows.
        size: (B,), positions P of each caption's passes.
        pooled: (B, E), the pooled vector of each caption's first pass; None where the UNet reads none.
    """

    states: Tensor
    text: Tensor
    source: Tensor
    size: Tensor
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.states)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors under the names NAME.states and so on, for a cache."""
        values = {f"{name}.{field.name}": getattr(self, field.name) for field in fields(self)}
        return {key: value for key, value in values.items() if value is not None}

    @classmethod
    def from_tensors(cls, name: str, tensors: dict[str, Tensor]) -> "CaptionStates":
        start = f"{name}."
        return cls(**{key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)})

    def map(self, function: Callable[[Tensor], Tensor]) -> "CaptionStates":
        values: dict[str, Tensor | None] = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: function(value) for name, value in values.items() if value is not None})

    def __getitem__(self, rows: Tensor) -> "CaptionStates":
        return self.map(lambda tensor: tensor[rows.to(tensor.device)])

    @staticmethod
    def cat(parts: "list[CaptionStates]") -> "CaptionStates":
        """All captions of several, filled up to the longest."""

        def joined(name: str, fill: int) -> Tensor:
            tensors = [getattr(part, name) for part in parts]
            longest = max(tensor.shape[1] for tensor in tensors)
            rows = []
            for tensor in tensors:
                missing = (0,) * (2 * (tensor.ndim - 2)) + (0, longest - tensor.shape[1])
                rows.append(torch.nn.functional.pad(tensor, missing, value=fill))
            return torch.cat(rows)

        sizes = torch.cat([part.size for part in parts])
        pooled = [part.pooled for part in parts if part.pooled is not None]
        pooled_BE = torch.cat(pooled) if pooled else None
        return CaptionStates(joined("states", 0), joined("text", -1), joined("source", -1), sizes, pooled_BE)


@dataclass(frozen=True)
class Features:
    """A batch as the frozen models see it; what a cache holds.

    Attributes:
        mean, logvar: (B, C, H, W) of the latents' Gaussian, before scaling.
        long, short: states of the captions by the encoder to adapt.
        teacher: (B, 77, D) hidden states of the short captions by the base's own encoder.
        teacher_fits: (B,) whether the short caption fits into its 77 tokens.
        seeds: (B,) decide all draws.
        windows: (B, L, D) for each row of the long captions' embeds the base's own encoder's hidden state of the same
            token, read in overlapping windows; None where the objectives do not read them.
        windows_known: (B, L) False for tokens that the teacher has not read, as it read the caption's plain wording.
        windows_gap: (B, L) mean squared difference to what the teacher makes of the caption as it stands; 0 where its
            hidden state is not known.
        teacher_pooled: (B, E) pooled vectors of the short captions by the base's own encoder, or None.
        time_ids: (B, 6) size of the picture, place of the crop, size of the crop, as Stable Diffusion XL's UNet reads
            them, for example (1080, 1920, 0, 398, 1024, 1024); None for other UNets.
    """

    mean: Tensor
    logvar: Tensor
    long: CaptionStates
    short: CaptionStates
    teacher: Tensor
    teacher_fits: Tensor
    seeds: Tensor
    keys: list[str]
    skipped: list[Skipped]
    windows: Tensor | None = None
    windows_known: Tensor | None = None
    windows_gap: Tensor | None = None
    teacher_pooled: Tensor | None = None
    time_ids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.seeds)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Features":
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        mapped: dict[str, Any] = {name: function(v) for name, v in values.items() if isinstance(v, Tensor)}
        mapped |= {name: v.map(function) for name, v in values.items() if isinstance(v, CaptionStates)}
        return replace(self, **mapped)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Features":
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Features":
        """Called by torch's DataLoader."""
        return self._map(lambda tensor: tensor.pin_memory())

    def split(self, size: int) -> Iterator["Features"]:
        """Consecutive parts of at most `size` samples."""
        for start in range(0, len(self), size):
            yield self._map(lambda tensor, start=start: tensor[start : start + size])  # type: ignore[misc]


@dataclass(frozen=True)
class Denoiser:
    """The frozen part of the loss.

    Attributes:
        unet: the UNet, frozen but for a LoRA.
        scheduler: noise schedule and prediction type of the base.
        scaling_factor, shift_factor: of the base's VAE.
        empty: states of the empty caption by the encoder to adapt, B = 1.
        empty_teacher: (1, 77, D) the same by the base's own encoder.
        base_unet: what to compute the base's predictions in, e.g. a context that switches the LoRA off.
        empty_teacher_pooled: (1, E) the empty caption's pooled vector by the base's own encoder, or None.
    """

    unet: Any
    scheduler: DDPMScheduler
    scaling_factor: float
    shift_factor: float
    empty: CaptionStates
    empty_teacher: Tensor
    base_unet: Callable[[], AbstractContextManager[Any]] = nullcontext
    empty_teacher_pooled: Tensor | None = None

    def predict(
        self,
        noisy_RCHW: Tensor,
        timestep_R: Tensor,
        embeds_RLD: Tensor,
        pooled_RE: Tensor | None = None,
        time_ids_R6: Tensor | None = None,
    ) -> Tensor:
        """The UNet's prediction in float32; it does not attend to rows of zeros, see `state_mask`.

        Pooled vectors and time ids are read by Stable Diffusion XL's UNet, and by no other.
        """
        dtype, added = self.unet.dtype, {}
        if pooled_RE is not None:
            added["added_cond_kwargs"] = {"text_embeds": pooled_RE.to(dtype), "time_ids": time_ids_R6}
        return self.unet(noisy_RCHW.to(dtype), timestep_R, embeds_RLD.to(dtype), **added).sample.float()


@dataclass(frozen=True)
class Draws:
    """R draws of a batch's samples: a latent, a noise, a timestep and a caption each.

    Attributes:
        sample: (R,) number of the draw's sample.
        latents, noise: (R, C, H, W), latents scaled as the UNet reads them.
        timestep: (R,).
        short: (R,) whether the short caption is read.
        dropped: (R,) whether the empty caption is read instead of either, for guidance.
    """

    sample: Tensor
    latents: Tensor
    noise: Tensor
    timestep: Tensor
    short: Tensor
    dropped: Tensor


def draw(features: Features, denoiser: Denoiser, objectives: ObjectivesSection) -> Draws:
    """Latents, noises, timesteps and captions of a batch, `noise_draws` for each sample.

    A sample's draws depend on its own seed alone, not on the rest of the batch or on the device.
    """
    device, draws = features.mean.device, objectives.noise_draws
    steps = int(cast(Any, denoiser.scheduler.config).num_train_timesteps)
    rows: list[tuple[Tensor, ...]] = []
    shape = (draws, *features.mean.shape[1:])
    for seed in features.seeds.tolist():
        generator = torch.Generator().manual_seed(seed)
        normal = [torch.randn(shape, generator=generator) for _ in range(2)]
        uniform_4R = torch.rand((4, draws), generator=generator, dtype=torch.float64)
        lowest_R = (uniform_4R[1] < objectives.high_noise_share) * HIGH_NOISE_FROM
        timestep_R = (steps * (lowest_R + (1 - lowest_R) * uniform_4R[0])).long().clamp(max=steps - 1)
        rows.append(
            (*normal, timestep_R, uniform_4R[2] < objectives.short_share, uniform_4R[3] < objectives.caption_dropout)
        )
    spread, noise, timestep, short, dropped = (torch.cat(parts).to(device) for parts in zip(*rows, strict=True))
    sample = torch.arange(len(features), device=device).repeat_interleave(draws)
    std = torch.exp(0.5 * features.logvar.float().clamp(-30, 20))
    latents = features.mean.float()[sample] + std[sample] * spread
    latents = (latents - denoiser.shift_factor) * denoiser.scaling_factor
    return Draws(sample, latents, noise, timestep, short, dropped)
