"""Stable Diffusion 3 and FLUX with our text encoders as their CLIPs; docs/sd3_flux.md has the same calls."""

import numpy as np
import pytest
import tiny
import tiny_transformers
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline

from fixclip_diffusion import FixClipTextEncoder, FixClipTextEncoderWithProjection, FixClipTokenizer

SHORT = "A red horse near a boat"
LONG = tiny.sentences(13)  # about 130 tokens
OTHER = LONG.replace("number 12", "number 4")  # another token behind the 77th
ROWS = 154


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd3")
    tiny_transformers.stable_diffusion_3(folder)
    parts = {
        part: FixClipTextEncoderWithProjection.from_pretrained(folder, subfolder=part, hidden_state="penultimate")
        for part in ("text_encoder", "text_encoder_2")
    }
    parts |= {
        part: FixClipTokenizer.from_pretrained(folder, subfolder=part, context_length=ROWS)
        for part in ("tokenizer", "tokenizer_2")
    }
    stock = StableDiffusion3Pipeline.from_pretrained(folder)
    return stock, StableDiffusion3Pipeline.from_pretrained(folder, **parts)


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux")
    tiny_transformers.flux(folder)
    encoder = FixClipTextEncoder.from_pretrained(folder, subfolder="text_encoder")
    tokenizer = FixClipTokenizer.from_pretrained(folder, subfolder="tokenizer")
    stock = FluxPipeline.from_pretrained(folder)
    return stock, FluxPipeline.from_pretrained(folder, text_encoder=encoder, tokenizer=tokenizer)


def picture(pipe, prompt):
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np", "max_sequence_length": 64}
    return pipe(prompt, **settings, generator=torch.Generator().manual_seed(0)).images


@torch.no_grad()
def test_stable_diffusion_3_reads_154_rows_of_both_clips(sd3):
    """Rows of L+G, zero behind the text, before those of T5; a short prompt's first 77 are stock's."""
    stock, ours = sd3
    arguments = {"prompt_2": None, "prompt_3": None, "do_classifier_free_guidance": False, "max_sequence_length": 64}
    before, _, before_pooled, _ = stock.encode_prompt(SHORT, **arguments)
    short, _, short_pooled, _ = ours.encode_prompt(SHORT, **arguments)
    assert before.shape == (1, 77 + 64, tiny_transformers.T5_WIDTH)
    assert short.shape == (1, ROWS + 64, tiny_transformers.T5_WIDTH)
    torch.testing.assert_close(short[:, :77], before[:, :77], rtol=1e-4, atol=1e-5)
    assert not short[:, 77:ROWS].any()
    torch.testing.assert_close(short[:, ROWS:], before[:, 77:])
    torch.testing.assert_close(short_pooled, before_pooled, rtol=1e-4, atol=1e-5)

    long, other = (ours.encode_prompt(text, **arguments) for text in (LONG, OTHER))
    assert long[0][0, 77:130].any()
    assert not torch.allclose(long[0][0, :ROWS], other[0][0, :ROWS], atol=1e-3)
    assert not torch.allclose(long[2], other[2], atol=1e-3), "the pooled vector is that of the whole text"
    cut, cut_other = (stock.encode_prompt(text, **arguments) for text in (LONG, OTHER))
    assert torch.equal(cut[0], cut_other[0])
    assert torch.equal(cut[2], cut_other[2])
    assert np.isfinite(picture(ours, LONG)).all()


@torch.no_grad()
def test_a_long_clip_beside_a_stock_one_in_stable_diffusion_3(sd3):
    """It pads for both to the length of the first tokenizer: an error if that is ours, else 77 rows of both."""
    stock, ours = sd3
    arguments = {"prompt_2": None, "prompt_3": None, "do_classifier_free_guidance": False, "max_sequence_length": 64}
    first = {"text_encoder": ours.text_encoder, "tokenizer": ours.tokenizer}
    with pytest.raises(ValueError, match=r"text_encoder is given 154 tokens, and text_encoder_2 \(CLIP.* reads 77: "):
        StableDiffusion3Pipeline(**{**stock.components, **first}).encode_prompt(SHORT, **arguments)
    second = {"text_encoder_2": ours.text_encoder_2, "tokenizer_2": ours.tokenizer_2}
    found = StableDiffusion3Pipeline(**{**stock.components, **second}).encode_prompt(SHORT, **arguments)[0]
    torch.testing.assert_close(found, stock.encode_prompt(SHORT, **arguments)[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_flux_reads_the_pooled_vector_of_the_whole_text(flux):
    """Of at most 77 tokens it is stock's; the rows of T5 are not ours."""
    stock, ours = flux
    arguments = {"prompt_2": None, "max_sequence_length": 64}
    for text in (SHORT, LONG):
        rows, pooled, _ = ours.encode_prompt(text, **arguments)
        stock_rows, stock_pooled, _ = stock.encode_prompt(text, **arguments)
        assert torch.equal(rows, stock_rows)
        assert torch.allclose(pooled, stock_pooled, rtol=1e-4, atol=1e-5) == (text is SHORT)
    assert not torch.allclose(pooled, ours.encode_prompt(OTHER, **arguments)[1], atol=1e-3)
    assert torch.equal(stock_pooled, stock.encode_prompt(OTHER, **arguments)[1])
    assert not np.array_equal(picture(ours, LONG), picture(ours, OTHER))
    assert np.array_equal(picture(stock, LONG), picture(stock, OTHER))
