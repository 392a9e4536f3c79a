"""The adapter's losses against plain formulas, in values and gradients."""

import contextlib
import dataclasses

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from tiny_adapter import randomize, without_onednn  # noqa: F401
from torch import nn

from fixclip_diffusion import TextAdapter
from fixclip_diffusion.adapter_training.objectives import (
    CaptionStates,
    Denoiser,
    Features,
    adapter_losses,
    draw,
    noise_target,
    snr_weight,
)
from fixclip_diffusion.adapter_training.objectives.step import adapted_embeds
from fixclip_diffusion.adapter_training.recipe import ObjectivesSection
from fixclip_diffusion.state_mask import mask_empty_states
from fixclip_diffusion.tiny import WIDTH, unet

SHORT, LONG = 5, 12


@pytest.fixture(scope="module")
def tiny_unet():
    torch.manual_seed(1)
    model = unet().requires_grad_(False).eval()
    mask_empty_states(model)
    return model


def one_pass(states, lengths, text=None):
    """Captions (B, T, D) of one pass of `lengths` states each, all of them text unless said otherwise."""
    place, length = torch.arange(states.shape[1])[None], torch.tensor(lengths)
    own = place < length[:, None]
    text = length if text is None else torch.tensor(text)
    return CaptionStates(
        states=states * own[..., None],
        text=torch.where(own, (place < text[:, None]).long(), -1),
        source=torch.where(own, place, -1),
        size=length,
    )


@pytest.fixture(params=["epsilon", "v_prediction"])
def denoiser(request, tiny_unet):
    torch.manual_seed(2)
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", prediction_type=request.param)
    empty = one_pass(torch.randn(1, SHORT, WIDTH), [SHORT], [2])
    return Denoiser(tiny_unet, scheduler, 0.18, 0.05, empty, torch.randn(1, SHORT, WIDTH))


def make_features(count=4, seed=0):
    """The last sample's short caption does not fit the teacher, the first one's long caption is short."""
    torch.manual_seed(seed)
    short = [SHORT] * (count - 1) + [LONG]
    states = torch.randn(2, count, LONG, WIDTH)
    has_gap = (torch.arange(count) > 0)[:, None] & (torch.arange(LONG) < 10)  # the first caption has no plain wording
    return Features(
        mean=torch.randn(count, 4, 8, 8),
        logvar=torch.randn(count, 4, 8, 8) - 2,
        long=one_pass(states[0], [SHORT] + [LONG] * (count - 1), [4] + [10] * (count - 1)),
        short=one_pass(states[1], short),
        teacher=torch.randn(count, SHORT, WIDTH),
        teacher_fits=torch.tensor(short) == SHORT,
        seeds=torch.arange(100, 100 + count),
        keys=[str(i) for i in range(count)],
        skipped=[],
        windows=torch.randn(count, LONG, WIDTH),
        windows_known=torch.rand(count, LONG, generator=torch.Generator().manual_seed(seed)) < 0.8,
        windows_gap=torch.rand(count, LONG, generator=torch.Generator().manual_seed(seed)) * has_gap,
    )


def identity(states, text):
    """An adapter that changes nothing."""
    return states


NO_SHORT = {"short_share": 0.0, "weight_short": 0.0, "weight_prediction": 0.0, "weight_states": 0.0}


def section(**changes):
    values = {"weight_long": 1.3, "weight_short": 0.7, "weight_prediction": 0.9, "weight_states": 0.4}
    values |= {"weight_windows": 0.6, "weight_plain": 0.8}
    values |= {"short_share": 0.5, "caption_dropout": 0.3, "noise_draws": 3, "snr_gamma": 5.0}
    return ObjectivesSection(**{**values, **changes})


def plain_losses(adapter, features, denoiser, objectives):
    """One draw at a time, nothing batched, formulas written out."""
    scheduler, model = denoiser.scheduler, denoiser.unet
    sums = dict.fromkeys(("long", "short", "prediction", "states", "windows", "plain"), torch.zeros(()))
    total = 0
    for i, seed in enumerate(features.seeds.tolist()):
        generator = torch.Generator().manual_seed(seed)
        spread, noise = (torch.randn(objectives.noise_draws, 4, 8, 8, generator=generator) for _ in range(2))
        uniform = torch.rand(4, objectives.noise_draws, generator=generator, dtype=torch.float64)
        for r in range(objectives.noise_draws):
            total += 1
            low = 0.6 if uniform[1, r] < objectives.high_noise_share else 0.0
            t = min(int(1000 * (low + (1 - low) * uniform[0, r])), 999)
            latents = features.mean[i] + torch.exp(features.logvar[i] / 2) * spread[r]
            latents = (latents - denoiser.shift_factor) * denoiser.scaling_factor
            alpha = scheduler.alphas_cumprod[t]
            noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise[r]
            snr = alpha / (1 - alpha)
            if scheduler.config.prediction_type == "epsilon":
                target, weight = noise[r], torch.minimum(snr, torch.tensor(5.0)) / snr
            else:
                target = alpha.sqrt() * noise[r] - (1 - alpha).sqrt() * latents
                weight = torch.minimum(snr, torch.tensor(5.0)) / (snr + 1)
            weight = weight if objectives.snr_gamma else 1.0
            short = bool(uniform[2, r] < objectives.short_share)
            dropped = bool(uniform[3, r] < objectives.caption_dropout)
            caption, row = (denoiser.empty, 0) if dropped else (features.short if short else features.long, i)
            length = int(caption.size[row])
            adapted = adapter(caption.states[row : row + 1, :length], caption.text[row : row + 1, :length] > 0)
            predicted = model(noisy[None], t, adapted).sample[0]
            name = "short" if short else "long"
            sums[name] = sums[name] + weight * (predicted - target).pow(2).mean()
            if not short and not dropped:
                known = features.windows_known[i, :length]
                sums["windows"] = sums["windows"] + (adapted[0] - features.windows[i, :length])[known].pow(2).mean()
                gap = features.windows_gap[i, :length]
                if gap.any():
                    error = (adapted[0] - features.windows[i, :length]).pow(2).mean(-1)
                    sums["plain"] = sums["plain"] + (gap * error).sum() / features.windows_gap[i].sum()
            if short and (dropped or features.teacher_fits[i]):
                teacher = denoiser.empty_teacher if dropped else features.teacher[i : i + 1]
                wanted = model(noisy[None], t, teacher).sample[0]
                sums["prediction"] = sums["prediction"] + weight * (predicted - wanted).pow(2).mean()
                wanted = torch.cat([teacher[:, :length], torch.zeros(1, max(0, length - SHORT), WIDTH)], dim=1)
                sums["states"] = sums["states"] + (adapted - wanted).pow(2).mean()
    shares = {"long": 0.5, "windows": 0.5 * 0.7, "plain": 0.5 * 0.7} | dict.fromkeys(
        ("short", "prediction", "states"), 0.5
    )
    losses = {name: value / (total * shares[name]) for name, value in sums.items()}
    return losses, sum(getattr(objectives, f"weight_{name}") * value for name, value in losses.items())


@pytest.mark.parametrize(
    ("kind", "mask", "options"),
    [
        ("attention", False, {}),
        ("attention", True, {}),
        ("mlp", False, {"snr_gamma": None, "high_noise_share": 0.5, "noise_draws": 1}),
    ],
)
def test_losses_and_gradients_are_those_of_the_formulas(denoiser, kind, mask, options):
    sizes = {"hidden_width": 8, "num_layers": 1, "num_heads": 4, "max_tokens": LONG, "mask_padding": mask}
    adapter = randomize(TextAdapter(WIDTH, kind, **sizes))
    features, objectives = make_features(), section(**options)
    rows = draw(features, denoiser, objectives)
    if not options:
        mixed = (rows.short, rows.dropped, ~rows.short & rows.dropped, rows.short & rows.dropped)
        assert all(0 < part.sum() < len(part) for part in mixed)

    losses = adapter_losses(adapter, features, denoiser, objectives)
    losses["loss"].backward()
    gradients = [p.grad.clone() for p in adapter.parameters()]
    adapter.zero_grad()
    expected, total = plain_losses(adapter, features, denoiser, objectives)
    total.backward()
    assert {k.removeprefix("loss_"): v.item() for k, v in losses.items() if k != "loss"} == pytest.approx(
        {k: v.item() for k, v in expected.items()}, rel=1e-4
    )
    torch.testing.assert_close(losses["loss"], total, rtol=1e-4, atol=1e-6)
    for ours, parameter in zip(gradients, adapter.parameters(), strict=True):
        assert ours.abs().max() > 0
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-3, atol=1e-5)


def test_the_adapter_runs_once_for_each_caption_whatever_the_number_of_draws(denoiser):
    features, seen = make_features(), []

    def count(states_RTD, text_RT):
        seen.append(len(states_RTD))
        return states_RTD

    adapter_losses(count, features, denoiser, section(noise_draws=64, caption_dropout=0.0))
    assert sum(seen) == 2 * len(features), "the long and the short caption of every sample"
    seen.clear()
    adapter_losses(count, features, denoiser, section(noise_draws=64))
    assert sum(seen) == 2 * len(features) + 1, "and the empty one"


def captions_of_passes(size, passes):
    """Captions of so many passes of 3 tokens of text and padding; rows of the embeds are the first 7 of text."""
    torch.manual_seed(4)
    states = torch.randn(4, 12, WIDTH)
    text = torch.full((4, 12), -1)
    source = torch.full((4, 7), -1)
    for row, number in enumerate(passes):
        text[row, : size * number] = torch.tensor([1, 1, 1, 0] * number)
        states[row, size * number :] = 0
        kept = [place for place in range(size * number) if place % size != 3][:7]
        source[row, : len(kept)] = torch.tensor(kept)
    return CaptionStates(states, text, source, torch.full((4,), size))


@pytest.mark.parametrize("max_tokens", [LONG, 4])
def test_the_adapter_of_the_scope_text_sees_the_joined_rows(max_tokens):
    """Values and gradients against each caption alone, joined by hand; behind `max_tokens` rows it begins anew."""
    passes = [1, 3, 2, 1]
    sizes = {"hidden_width": 8, "num_heads": 4, "max_tokens": max_tokens, "mask_padding": True, "scope": "text"}
    adapter = randomize(TextAdapter(WIDTH, "attention", **sizes))
    captions = captions_of_passes(4, passes)
    weight = torch.randn(4, 7, WIDTH)
    embeds, length = adapted_embeds(adapter, captions, True, "text")
    (embeds * weight).sum().backward()
    gradients = [p.grad.clone() for p in adapter.parameters()]
    adapter.zero_grad()
    total = torch.zeros(())
    for row, number in enumerate(passes):
        rows = torch.cat([captions.states[row, 4 * i : 4 * i + 3] for i in range(number)])[:7]
        pieces = [adapter(piece[None], torch.ones(1, len(piece)) > 0)[0] for piece in rows.split(max_tokens)]
        wanted = torch.cat(pieces)
        assert int(length[row]) == len(wanted)
        torch.testing.assert_close(embeds[row, : len(wanted)], wanted, rtol=1e-4, atol=1e-5)
        assert not embeds[row, len(wanted) :].any()
        total = total + (wanted * weight[row, : len(wanted)]).sum()
    total.backward()
    for ours, parameter in zip(gradients, adapter.parameters(), strict=True):
        assert ours.abs().max() > 0
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mask", [False, True])
def test_the_adapter_sees_one_pass_at_a_time(denoiser, mask):
    """Captions of one to three passes whose rows are joined out of order and overlapping, each by itself and by
    hand."""
    sizes = {"hidden_width": 8, "num_heads": 4, "max_tokens": LONG, "mask_padding": mask}
    adapter = randomize(TextAdapter(WIDTH, "attention", **sizes))
    size, passes = 4, [1, 3, 2, 1]
    captions = captions_of_passes(size, passes)
    states, text, source = captions.states, captions.text, captions.source
    features = dataclasses.replace(make_features(), long=captions)
    expected = []
    for row, number in enumerate(passes):
        parts = [
            adapter(
                states[row : row + 1, size * i : size * (i + 1)], text[row : row + 1, size * i : size * (i + 1)] > 0
            )
            for i in range(number)
        ]
        expected.append(torch.cat(parts, dim=1)[0, source[row][source[row] >= 0]])
    read = []

    class Reading(nn.Module):
        dtype = torch.float32

        def forward(self, noisy, timestep, states):
            read.append(states)
            return UNet2DConditionOutput(noisy)

    seeing = dataclasses.replace(denoiser, unet=Reading())
    only_long = section(**NO_SHORT, caption_dropout=0.0, weight_windows=0.0, weight_plain=0.0, noise_draws=1)
    adapter_losses(adapter, features, seeing, only_long)
    for row, wanted in enumerate(expected):
        torch.testing.assert_close(read[0][row, : len(wanted)], wanted, rtol=1e-4, atol=1e-5)
        assert not read[0][row, len(wanted) :].any()


def test_parts_of_a_batch_add_up(denoiser):
    features, objectives = make_features(5), section()
    adapter = randomize(TextAdapter(WIDTH, hidden_width=8))
    whole = adapter_losses(adapter, features, denoiser, objectives)
    parts = [(len(p) / 5, adapter_losses(adapter, p, denoiser, objectives)) for p in features.split(2)]
    for name, value in whole.items():
        torch.testing.assert_close(sum(share * losses[name] for share, losses in parts), value, rtol=1e-4, atol=1e-6)


def test_an_adapter_that_changes_nothing_keeps_the_base(denoiser):
    """Where the encoder's short states are the teacher's, the identity has no distillation loss; a change has."""
    features = make_features()
    alike = dataclasses.replace(features, short=one_pass(features.teacher, [SHORT] * 4), teacher_fits=torch.ones(4) > 0)
    denoiser = dataclasses.replace(denoiser, empty=one_pass(denoiser.empty_teacher, [SHORT]))
    losses = adapter_losses(identity, alike, denoiser, section())
    assert losses["loss_states"] == 0
    assert losses["loss_prediction"] < 1e-12
    changed = adapter_losses(lambda states, text: states + 0.1, alike, denoiser, section())
    assert changed["loss_states"] > 0.001
    assert changed["loss_prediction"] > 1e-9


def test_only_losses_that_count_are_computed(denoiser):
    features = make_features()
    only_long = adapter_losses(identity, features, denoiser, section(**NO_SHORT))
    assert set(only_long) == {"loss", "loss_long", "loss_windows", "loss_plain"}
    no_teacher = {"weight_states": 0.0, "weight_prediction": 0.0, "weight_windows": 0.0, "weight_plain": 0.0}
    without = adapter_losses(identity, features, denoiser, section(**no_teacher))
    assert set(without) == {"loss", "loss_long", "loss_short"}


def test_states_are_learnt_without_a_unet(denoiser):
    """Nothing but text states is read, and the losses are those beside noise prediction."""
    features = make_features()
    adapter = randomize(TextAdapter(WIDTH, hidden_width=8))
    every = adapter_losses(adapter, features, denoiser, section())
    no_noise = {"weight_long": 0.0, "weight_short": 0.0, "weight_prediction": 0.0}
    no_latents = torch.zeros(4, 4, 1, 1)
    without = adapter_losses(
        adapter,
        dataclasses.replace(features, mean=no_latents, logvar=no_latents),
        dataclasses.replace(denoiser, unet=None),
        section(**no_noise, caption_dropout=0.0),
    )
    assert set(without) == {"loss", "loss_states", "loss_windows", "loss_plain"}
    total = 0.4 * without["loss_states"] + 0.6 * without["loss_windows"] + 0.8 * without["loss_plain"]
    torch.testing.assert_close(without["loss"], total)
    rows = torch.arange(LONG)[None, :, None] < features.long.size[:, None, None]
    wanted = dataclasses.replace(features, long=dataclasses.replace(features.long, states=features.windows * rows))
    alike = adapter_losses(identity, wanted, denoiser, section())
    assert alike["loss_windows"] == 0 < every["loss_windows"]
    assert alike["loss_plain"] == 0 < every["loss_plain"]


def test_states_alone_have_a_gradient_where_no_draw_is_taught(denoiser):
    adapter = randomize(TextAdapter(WIDTH, hidden_width=8))
    others = dict.fromkeys(("long", "short", "prediction", "windows", "plain"), 0.0)
    only_states = section(**{f"weight_{name}": value for name, value in others.items()}, short_share=1e-9)
    losses = adapter_losses(adapter, make_features(), dataclasses.replace(denoiser, unet=None), only_states)
    losses["loss"].backward()
    assert losses["loss"] == 0
    assert not any(parameter.grad.any() for parameter in adapter.parameters())


def test_teacher_predictions_are_computed_without_the_lora_and_without_gradient(tiny_unet):
    """`base_unet` is entered around the teacher's predictions and nothing else."""
    calls, inside = [], []

    class Recording(nn.Module):
        dtype = torch.float32

        def forward(self, *args):
            calls.append((bool(inside), torch.is_grad_enabled()))
            return tiny_unet(*args)

    @contextlib.contextmanager
    def base_unet():
        inside.append(1)
        yield
        inside.pop()

    empty = one_pass(torch.zeros(1, SHORT, WIDTH), [SHORT])
    denoiser = Denoiser(Recording(), DDPMScheduler(), 1.0, 0.0, empty, torch.zeros(1, SHORT, WIDTH), base_unet)
    adapter_losses(identity, make_features(), denoiser, section())
    assert set(calls) == {(False, True), (True, False)}


def test_draws_depend_on_the_seed_alone(denoiser):
    features = make_features()
    whole = draw(features, denoiser, section())
    last = draw(list(features.split(1))[3], denoiser, section())
    for name in ("latents", "noise", "timestep", "short", "dropped"):
        assert torch.equal(getattr(whole, name)[9:], getattr(last, name))
    again = draw(dataclasses.replace(features, seeds=features.seeds + 10), denoiser, section())
    assert not torch.equal(again.noise, whole.noise)


def test_draws_have_the_shares_that_were_asked_for(denoiser):
    features = dataclasses.replace(
        make_features(1), mean=torch.full((1, 4, 8, 8), 2.0), logvar=torch.full((1, 4, 8, 8), -1.0)
    )
    rows = draw(features, denoiser, section(noise_draws=4000, short_share=0.25, high_noise_share=0.5))
    assert rows.short.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert rows.dropped.float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert (rows.timestep >= 600).float().mean().item() == pytest.approx(0.5 + 0.5 * 0.4, abs=0.03)
    assert rows.timestep.min() >= 0
    assert rows.timestep.max() <= 999
    latents = rows.latents / 0.18 + 0.05
    assert latents.mean().item() == pytest.approx(2.0, abs=0.02)
    assert latents.std().item() == pytest.approx(0.6065, abs=0.02)


def test_min_snr_with_zero_terminal_snr():
    """With alpha_T = 0 the ratio of the noise's weights is 0 / 0; its limit is 1."""
    timesteps = torch.tensor([0, 500, 999])
    for kind, last in (("epsilon", 1.0), ("v_prediction", 0.0)):
        scheduler = DDPMScheduler(prediction_type=kind, rescale_betas_zero_snr=True, beta_schedule="scaled_linear")
        scheduler.alphas_cumprod[-1] = 0
        weight = snr_weight(scheduler, timesteps, 5.0)
        assert torch.isfinite(weight).all()
        assert weight[-1] == last
        assert torch.equal(snr_weight(scheduler, timesteps, None), torch.ones(3))


def test_unknown_prediction_types_are_refused():
    with pytest.raises(ValueError, match=r"prediction_type 'sample' .* valid are epsilon, v_prediction"):
        noise_target(DDPMScheduler(prediction_type="sample"), *[torch.zeros(1, 1, 1, 1)] * 2, torch.zeros(1).long())
