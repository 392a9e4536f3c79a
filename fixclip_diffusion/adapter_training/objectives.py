"""What the adapter learns from: noise prediction and the base's windows on long captions, the base on short ones.

Every draw is a latent, a noise, a timestep and one caption of a sample, all decided by the sample's seed:

- long: |UNet(x_t, t, A(f(long))) - target|^2, the loss that Stable Diffusion was trained with (UNet frozen);
- short: the same with the short caption;
- prediction: |UNet(x_t, t, A(f(short))) - UNet(x_t, t, g(short))|^2, where g is the base's own encoder;
- states: |A(f(short)) - g(short)|^2, where g has 77 tokens, and 0 for what f has behind them;
- windows: |A(f(long)) - w(long)|^2, where w is g's state of a token in its window of 77, which the UNet understands,
  and 0 for padding. It needs no UNet, so a run of it alone is a cheap start for the others.

A is the adapter and f the encoder to adapt. A draw drops its caption with probability `caption_dropout` and then
reads the empty one, for teacher and student alike, because guidance needs the unconditional prediction too.

Shape letters: B samples, R draws, C latent channels, H, W latent height and width, T tokens, S the base's 77 tokens,
D width.
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
from fixclip_diffusion.text_encoder import join_overlapping

HIGH_NOISE_FROM = 0.6
PREDICTION_TYPES = ("epsilon", "v_prediction")


@dataclass(frozen=True)
class Features:
    """A batch as the frozen models see it; what a cache holds.

    Attributes:
        mean, logvar: (B, C, H, W) of the latents' Gaussian, before scaling.
        long, short: (B, T, D) states of the encoder without adapter; rows past the own length are 0.
        long_length, short_length: (B,) states, as many as the pipeline would give: 77 where the encoder
            kept its original positions and the caption fits, else 248; or 77 a window, see `BaseSection.long_prompt`.
        teacher: (B, S, D) states of the short captions by the base's own encoder.
        teacher_fits: (B,) whether the short caption fits into its 77 tokens.
        seeds: (B,) decide all draws.
        windows: (B, T, D) states of the long captions' tokens by the base's own encoder, in windows, at the places
            that the tokens have in `long`; None where the objectives do not read them.
        long_tokens, short_tokens: (B,) tokens of the captions; None but for overlapping windows, which are joined.
    """

    mean: Tensor
    logvar: Tensor
    long: Tensor
    short: Tensor
    long_length: Tensor
    short_length: Tensor
    teacher: Tensor
    teacher_fits: Tensor
    seeds: Tensor
    keys: list[str]
    skipped: list[Skipped]
    windows: Tensor | None = None
    long_tokens: Tensor | None = None
    short_tokens: Tensor | None = None

    def __len__(self) -> int:
        return len(self.seeds)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Features":
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        mapped: dict[str, Any] = {name: function(v) for name, v in values.items() if isinstance(v, Tensor)}
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
        empty: {tokens a pass: (1, T, D)} states of the empty caption by the encoder without adapter.
        empty_teacher: (1, S, D) the same by the base's own encoder.
        base_unet: what to compute the base's predictions in, e.g. a context that switches the LoRA off.
        window: states that the adapter sees at a time, as the pipeline encodes window by window; 0: all.
        joined: states that overlapping windows of several become, see `join_overlapping`; 0: windows do not overlap.
    """

    unet: Any
    scheduler: DDPMScheduler
    scaling_factor: float
    shift_factor: float
    empty: dict[int, Tensor]
    empty_teacher: Tensor
    base_unet: Callable[[], AbstractContextManager[Any]] = nullcontext
    window: int = 0
    joined: int = 0

    def empty_caption(self, length: int) -> Tensor:
        """(1, length, D) states of the empty caption; those of several windows repeat one's, as in the pipeline."""
        if length in self.empty:
            return self.empty[length]
        window = min(self.empty)
        return self.empty[window].repeat(1, length // window, 1)

    def predict(self, noisy_RCHW: Tensor, timestep_R: Tensor, states_RTD: Tensor) -> Tensor:
        dtype = self.unet.dtype
        return self.unet(noisy_RCHW.to(dtype), timestep_R, states_RTD.to(dtype)).sample.float()


@dataclass(frozen=True)
class Draws:
    """R draws of a batch's samples, see the top of this file; `sample` is the number of a draw's sample."""

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


def adapter_losses(
    adapter: Callable[[Tensor], Tensor], features: Features, denoiser: Denoiser, objectives: ObjectivesSection
) -> dict[str, Tensor]:
    """Named losses of a batch; "loss" is their weighted sum, the only one to minimise.

    Each is a sum over its draws divided by their expected number, R * short_share or R * (1 - short_share). So
    its weight does not depend on the mix, and the parts of a split batch add up exactly.

    Returns:
        "loss" and, as far as they have a weight, "loss_long", "loss_short", "loss_prediction", "loss_states" and
        "loss_windows". Where the UNet runs at all, loss_long is there and, with a short_share, loss_short: they say
        how long and short captions fare.
    """
    rows = draw(features, denoiser, objectives)
    noisy = denoiser.scheduler.add_noise(rows.latents, rows.noise, rows.timestep)
    target = noise_target(denoiser.scheduler, rows.latents, rows.noise, rows.timestep)
    weight_R = snr_weight(denoiser.scheduler, rows.timestep, objectives.snr_gamma)
    length_R = torch.where(rows.short, features.short_length[rows.sample], features.long_length[rows.sample])

    long_share, short_share = 1 - objectives.short_share, objectives.short_share
    share = {"long": long_share, "windows": long_share * (1 - objectives.caption_dropout)}
    sums = {name: weight_R.new_zeros(()) for name in _names(objectives)}
    for length in sorted(set(length_R.tolist())):
        chosen = (length_R == length).nonzero()[:, 0]
        first, caption_R = _captions(rows, chosen)
        adapted_RTD = _adapted(adapter, _states(features, denoiser, rows, first, length), denoiser.window)[caption_R]
        if denoiser.joined and length > denoiser.window:
            adapted_RTD = _join(adapted_RTD, features, denoiser, rows, chosen)
        short_R = rows.short[chosen]
        if "windows" in sums:
            named = ~short_R & ~rows.dropped[chosen]
            tokens = adapted_RTD.shape[1]
            wanted_RTD = _wide(cast(Tensor, features.windows)[rows.sample[chosen[named]], :tokens].float(), tokens)
            sums["windows"] = sums["windows"] + _mean_square(adapted_RTD[named].float() - wanted_RTD).sum()
        if objectives.reads_noise:
            predicted = denoiser.predict(noisy[chosen], rows.timestep[chosen], adapted_RTD)
            error_R = weight_R[chosen] * _mean_square(predicted - target[chosen])
            sums["long"] = sums["long"] + error_R[~short_R].sum()
            if "short" in sums:
                sums["short"] = sums["short"] + error_R[short_R].sum()
        taught = short_R & (rows.dropped[chosen] | features.teacher_fits[rows.sample[chosen]])
        if not objectives.is_taught or not taught.any():
            continue
        those = chosen[taught]
        teacher_RSD = _teacher_states(features, denoiser, rows, those)
        if "prediction" in sums:
            with torch.no_grad(), denoiser.base_unet():
                wanted = denoiser.predict(noisy[those], rows.timestep[those], teacher_RSD)
            difference_R = weight_R[those] * _mean_square(predicted[taught] - wanted)
            sums["prediction"] = sums["prediction"] + difference_R.sum()
        if "states" in sums:
            tokens = adapted_RTD.shape[1]
            wanted_RTD = _wide(teacher_RSD[:, :tokens].float(), tokens)
            sums["states"] = sums["states"] + _mean_square(adapted_RTD[taught].float() - wanted_RTD).sum()
    losses = {name: total / (len(rows.sample) * share.get(name, short_share)) for name, total in sums.items()}
    weights = {name: getattr(objectives, f"weight_{name}") for name in losses}
    total = torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()
    return {"loss": total} | {f"loss_{name}": loss for name, loss in losses.items()}


def _names(objectives: ObjectivesSection) -> list[str]:
    names = []
    if objectives.reads_noise:
        names = ["long", "short"] if objectives.reads_short else ["long"]
    if objectives.reads_short:
        names += [name for name in ("prediction", "states") if getattr(objectives, f"weight_{name}")]
    return [*names, "windows"] if objectives.reads_windows else names


def _captions(rows: Draws, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """One draw of each caption among the chosen, and the number of every chosen draw's caption, (R,).

    Draws of one caption read the same states, so the adapter is run once for all of them.
    """
    caption_R = torch.where(rows.dropped[chosen], -1, 2 * rows.sample[chosen] + rows.short[chosen].long())
    captions, number_R = caption_R.unique(return_inverse=True)
    return chosen.new_zeros(len(captions)).scatter_reduce(0, number_R, chosen, "amin", include_self=False), number_R


def _adapted(adapter: Callable[[Tensor], Tensor], states_RTD: Tensor, window: int) -> Tensor:
    if not window:
        return adapter(states_RTD)
    states_RWTD = states_RTD.unflatten(1, (-1, window))
    return adapter(states_RWTD.flatten(0, 1)).unflatten(0, states_RWTD.shape[:2]).flatten(1, 2)


def _join(adapted_RSD: Tensor, features: Features, denoiser: Denoiser, rows: Draws, chosen: Tensor) -> Tensor:
    """Overlapping windows one behind the other, (R, S, D), to what the UNet reads, (R, denoiser.joined, D)."""
    sample, size, length = rows.sample[chosen], denoiser.window, denoiser.joined
    long, short = cast(Tensor, features.long_tokens), cast(Tensor, features.short_tokens)
    tokens_R = torch.where(rows.short[chosen], short[sample], long[sample])
    joined = join_overlapping(adapted_RSD.unflatten(1, (-1, size)), tokens_R, length)
    # The pipeline repeats the empty text's states where the prompt has more.
    empty = adapted_RSD[:, :size].repeat(1, -(-length // size), 1)[:, :length]
    return torch.where(rows.dropped[chosen, None, None], empty, joined)


def _states(features: Features, denoiser: Denoiser, rows: Draws, chosen: Tensor, length: int) -> Tensor:
    """(R, length, D) states of the chosen draws' captions, without adapter."""
    sample = rows.sample[chosen]
    long, short = (_wide(states[sample, :length], length) for states in (features.long, features.short))
    states = torch.where(rows.short[chosen, None, None], short, long)
    return torch.where(rows.dropped[chosen, None, None], denoiser.empty_caption(length).to(states), states)


def _wide(states: Tensor, length: int) -> Tensor:
    """States of at least `length` tokens, 0 where there was none."""
    missing = length - states.shape[1]
    return torch.nn.functional.pad(states, (0, 0, 0, missing)) if missing > 0 else states


def _teacher_states(features: Features, denoiser: Denoiser, rows: Draws, chosen: Tensor) -> Tensor:
    states = features.teacher[rows.sample[chosen]]
    return torch.where(rows.dropped[chosen, None, None], denoiser.empty_teacher.to(states), states)


def _mean_square(difference: Tensor) -> Tensor:
    return difference.square().flatten(1).mean(1)


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
