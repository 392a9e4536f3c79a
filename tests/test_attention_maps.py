"""Heat maps against attention written out plainly, and previews against the schedulers' own predictions."""

import numpy as np
import pytest
import tiny
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from fixclip_diffusion import FixClipStableDiffusionPipeline, FixClipStableDiffusionXLPipeline
from fixclip_diffusion.attention_maps import layer_size, record_attention, record_sentences, sentence_positions
from fixclip_diffusion.conditioning import CONDITIONINGS
from fixclip_diffusion.preview import watch_steps

LONG = tiny.sentences(14)
VERY_LONG = tiny.sentences(40)


@pytest.fixture(scope="module")
def pipes(base_folders):
    pipes = {kind: FixClipStableDiffusionPipeline.from_pretrained(folder) for kind, folder in base_folders.items()}
    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)
    return pipes


@pytest.fixture
def pipe(pipes):
    yield pipes["sd1"]
    pipes["sd1"].conditioning = None


def draw(pipe, prompt, **kwargs):
    settings = {"num_inference_steps": 2, "width": 16, "height": 16, "output_type": "np"}
    settings |= {"generator": torch.Generator().manual_seed(0)}
    return pipe(prompt, **{**settings, **kwargs}).images


def plain_maps(calls, weights_TS, latent_size, batch_size):
    """The definition: softmax(q k / sqrt(d)) head by head, summed over the states of a group, averaged.

    The prompt is the longest text of its batch here, so that all of its states are its own.
    """
    maps = []
    for attention, queries, states in calls:
        heads = []
        for q_ND, k_TD in zip(attention.to_q(queries)[-batch_size:], attention.to_k(states)[-batch_size:], strict=True):
            width = q_ND.shape[-1] // attention.heads
            parts = [slice(h * width, (h + 1) * width) for h in range(attention.heads)]
            shares = [torch.softmax(q_ND[:, part] @ k_TD[:, part].T / width**0.5, dim=-1) for part in parts]
            heads.append(torch.stack(shares).mean(0) @ weights_TS)
        size = layer_size(queries.shape[1], latent_size)
        small = torch.stack(heads).mT.unflatten(-1, size)
        maps.append(torch.nn.functional.interpolate(small, latent_size, mode="bilinear"))
    return torch.stack(maps).mean(0)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize(
    ("guidance", "num_images", "size"), [(7.5, 1, (16, 16)), (1.0, 1, (16, 16)), (7.5, 2, (32, 16))]
)
@torch.no_grad()
def test_maps_are_the_plain_attention(pipe, guidance, num_images, size, conditioning):
    pipe.conditioning = conditioning
    width, height = size
    latent_size = (height // pipe.vae_scale_factor, width // pipe.vae_scale_factor)
    weights_TS = torch.rand(pipe.token_report(LONG).num_states, 3)
    calls, hooks = [], []
    for name, module in pipe.unet.named_modules():
        if name.endswith("attn2"):
            hooks.append(
                module.register_forward_hook(
                    lambda module, args, kwargs, _: calls.append((module, args[0], kwargs["encoder_hidden_states"])),
                    with_kwargs=True,
                )
            )
    with record_attention(pipe.unet, lambda _: weights_TS, latent_size, num_images) as recorder:
        draw(
            pipe,
            LONG,
            guidance_scale=guidance,
            num_images_per_prompt=num_images,
            width=width,
            height=height,
            generator=[torch.Generator().manual_seed(i) for i in range(num_images)],
        )
    for hook in hooks:
        hook.remove()
    assert len(calls) >= 2 * 3, "two steps of at least three layers"
    expected = plain_maps(calls, weights_TS, latent_size, num_images)
    assert recorder.maps().shape == (num_images, 3, *latent_size)
    torch.testing.assert_close(recorder.maps(), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("prompt", ["A cat. A dog.", LONG, VERY_LONG])
def test_recording_leaves_the_picture_alone_and_reads_every_sentence(pipe, prompt, conditioning):
    plain = draw(pipe, prompt, conditioning=conditioning)
    with record_sentences(pipe, prompt, 16, 16) as recorder:
        recorded = draw(pipe, prompt, conditioning=conditioning)
    assert np.array_equal(plain, recorded)
    maps_SHW = recorder.maps()[0]
    assert len(maps_SHW) == prompt.count(".")
    read = maps_SHW.flatten(1).amax(1) > 0
    if conditioning != "stock" or prompt.startswith("A cat"):
        assert read.all(), "a sentence behind token 77 or 248 has its map too"
    else:
        assert read[0]
        assert not read[-1], "a sentence that is not read has none"
    assert maps_SHW.sum(0).max() <= 1 + 1e-5, "the rest went to start, end and padding"
    assert not any(module._forward_hooks for module in pipe.unet.modules())


@torch.no_grad()
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("prompt", ["", "One cat.", LONG, VERY_LONG])
def test_each_sentence_has_the_states_of_its_own_tokens(pipe, prompt, conditioning):
    """A sentence whose words are changed changes its own states, and in causal passes some of those behind, alone."""
    pipe.conditioning = conditioning
    sentences = sentence_positions(pipe.prompt_encoder, prompt)
    layout = pipe.prompt_encoder.lay_out(prompt)
    ids = layout.ids_NP.flatten()[layout.source_L]
    for sentence in sentences:
        decoded = pipe.tokenizer.decode([int(ids[row]) for row in sentence.positions])
        said = sentence.text.lower().replace(" ", "")
        assert (
            said.startswith(decoded.replace(" ", "")) if conditioning == "stock" else said == decoded.replace(" ", "")
        )
    if len(sentences) > 1:
        first = pipe.encode_prompt(prompt, "cpu", 1, False)[0][0]
        other = pipe.encode_prompt(prompt.replace("number 3.", "number 4."), "cpu", 1, False)[0][0]
        changed = {row for row in range(len(first)) if not torch.equal(first[row], other[row])}
        assert changed & set(sentences[3].positions)
        assert not changed & {row for sentence in sentences[:3] for row in sentence.positions}


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_repeated_sentences_have_positions_of_their_own(pipe, conditioning):
    pipe.conditioning = conditioning
    sentences = sentence_positions(pipe.prompt_encoder, " ".join(["A red ball lies here."] * 60))
    positions = [state for sentence in sentences for state in sentence.positions]
    assert len(sentences) == 60
    assert positions == sorted(set(positions))
    assert max(positions) == 75 if conditioning == "stock" else max(positions) >= 60 * 6


@pytest.mark.parametrize(
    ("positions", "latents", "expected"), [(64, (8, 8), (8, 8)), (15, (9, 6), (5, 3)), (12, (12, 16), (3, 4))]
)
def test_layer_size(positions, latents, expected):
    assert layer_size(positions, latents) == expected


def test_layer_size_of_something_else():
    with pytest.raises(ValueError, match="a layer of 7 positions"):
        layer_size(7, (8, 8))


def test_nothing_recorded(pipe):
    with record_sentences(pipe, "A cat.", 16, 16) as recorder:
        pass
    with pytest.raises(ValueError, match="no cross-attention was recorded"):
        recorder.maps()


def test_hooks_go_when_drawing_fails(pipe):
    with pytest.raises(RuntimeError, match="stop"), record_sentences(pipe, "A cat.", 16, 16), watch_steps(pipe):
        raise RuntimeError("stop")
    assert not any(module._forward_hooks for module in pipe.unet.modules())


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_previews_are_the_schedulers_own_prediction(pipes, kind, scheduler, guidance):
    pipe = pipes[kind]
    before, pipe.scheduler = pipe.scheduler, scheduler.from_config(pipe.scheduler.config, timestep_spacing="leading")
    step, expected, seen = pipe.scheduler.step, [], []

    def spy(*args, return_dict=True, **kwargs):
        output = step(*args, **kwargs)
        expected.append(output.pred_original_sample)
        return (output.prev_sample,)

    def remember(_pipe, index, timestep, tensors):
        seen.append(preview.clean_latents())
        return tensors

    pipe.scheduler.step = spy
    try:
        with watch_steps(pipe) as preview:
            draw(pipe, "A cat.", guidance_scale=guidance, num_inference_steps=4, callback_on_step_end=remember)
    finally:
        pipe.scheduler = before
    assert len(seen) == 4
    for ours, theirs in zip(seen, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_a_preview_before_the_first_step(pipe):
    with watch_steps(pipe) as preview, pytest.raises(ValueError, match="no step has run yet"):
        preview.image()


def test_the_preview_is_a_small_picture(pipe):
    with watch_steps(pipe) as preview:
        draw(pipe, "A cat.", width=32, height=16)
        assert preview.image(longest=8).size == (8, 4)


@torch.no_grad()
def test_the_preview_of_a_vae_that_overflows_in_half_precision(sdxl):
    """As that of Stable Diffusion XL: the last preview is the final picture, not a black one."""
    load = FixClipStableDiffusionXLPipeline.from_pretrained
    pipe = load(sdxl, dtype=torch.float16, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.post_quant_conv.weight.mul_(3e4)
    with watch_steps(pipe) as preview:
        final = draw(pipe, "A cat.", output_type="pil")[0]
        image = preview.image()
    assert pipe.vae.dtype == torch.float16
    assert np.asarray(final).std() > 5
    np.testing.assert_allclose(np.asarray(image, dtype=float), np.asarray(final, dtype=float), atol=4)
