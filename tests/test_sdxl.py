"""FixClipStableDiffusionXLPipeline against the stock pipeline, on tiny real models."""

import copy
import json
import shutil

import numpy as np
import pytest
import tiny
import tiny_refiner
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from command_line import run
from compel import Compel, ReturnedEmbeddingsType
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.modular_pipelines import StableDiffusionXLAutoBlocks
from fixclip_app.jobs import Settings, generate
from fixclip_app.model import DemoModel, ModelChoice
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from fixclip_cli import models
from fixclip_cli.pictures import save_png
from fixclip_diffusion import (
    FixClipStableDiffusionPipeline,
    FixClipStableDiffusionXLPipeline,
    FixClipTextEncoder,
    FixClipTextEncoderWithProjection,
    TextAdapter,
)
from fixclip_diffusion.adapter_training.features import write_attention_out
from fixclip_diffusion.auto import load_pipeline, pipeline_class
from fixclip_diffusion.conditioning import CONDITIONINGS
from fixclip_diffusion.evaluation.generate import Drawing, Painter, parse_system
from fixclip_diffusion.evaluation.prompts import Prompt
from fixclip_diffusion.modular import FixClipStableDiffusionXLTextStep
from fixclip_diffusion.prompt_encoder import adapt_rows, positions_of_text
from fixclip_diffusion.state_mask import mask_empty_states
from fixclip_diffusion.tiny import clip_text_config, unet

SHORT = "A red horse near a boat"
LONG = tiny.sentences(14)
VERY_LONG = tiny.sentences(40)


@pytest.fixture(scope="module")
def folder(sdxl):
    return sdxl


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def stock(folder):
    return quiet(StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False))


@pytest.fixture(scope="module")
def shared(folder):
    return quiet(FixClipStableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False))


@pytest.fixture
def ours(shared):
    yield shared
    shared.conditioning = None


def picture(pipe, prompt=None, seed=1, **kwargs):
    batch = len(prompt) if isinstance(prompt, list) else 1
    count = batch * kwargs.get("num_images_per_prompt", 1)
    generator = [torch.Generator().manual_seed(seed + i) for i in range(count)]
    settings = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np", "generator": generator}
    return pipe(prompt, **{**settings, **kwargs}).images


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompt": SHORT},
        {"prompt": SHORT, "negative_prompt": "bad, blurry"},
        {"prompt": SHORT, "negative_prompt": ""},
        {"prompt": SHORT, "prompt_2": "a green house", "negative_prompt": "bad", "negative_prompt_2": "ugly"},
        {"prompt": SHORT, "guidance_scale": 1.0},
        {"prompt": [SHORT, "a cat"], "negative_prompt": ["bad", "x"], "clip_skip": 1},
        {"prompt": ["a", "b c"], "num_images_per_prompt": 2},
        {"prompt": "word " * 75, "negative_prompt": "word " * 75},
        {"prompt": ""},
    ],
    ids=lambda arguments: "-".join(arguments) + f"-{len(str(arguments))}",
)
def test_short_prompts_are_bit_identical_to_stock(stock, ours, arguments):
    assert np.array_equal(picture(ours, **arguments), picture(stock, **arguments))


@pytest.mark.parametrize("zeros", [True, False])
def test_empty_negative_prompts_are_zeros_where_the_base_says_so(stock, ours, zeros):
    for pipe in (stock, ours):
        pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
    try:
        assert np.array_equal(picture(ours, SHORT), picture(stock, SHORT))
        negative = ours.encode_prompt(LONG)[1]
        assert negative.any() != zeros
    finally:
        for pipe in (stock, ours):
            pipe.register_to_config(force_zeros_for_empty_prompt=True)


def test_stock_conditioning_is_stock_for_long_prompts_too(stock, ours):
    arguments = {"prompt": LONG, "negative_prompt": VERY_LONG}
    expected = picture(stock, **arguments)
    assert np.array_equal(picture(ours, **arguments, conditioning="stock"), expected)
    assert not np.array_equal(picture(ours, **arguments), expected)


@torch.no_grad()
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("clip_skip", [None, 1])
def test_both_encoders_are_aligned_token_by_token(ours, conditioning, clip_skip):
    """Each half of a row is the hidden state of the same token, as the encoder alone gives it for its pass."""
    ours.conditioning = conditioning
    embeds, _, pooled, _ = ours.encode_prompt(LONG, clip_skip=clip_skip)
    layouts = [ours.prompt_encoder.lay_out(LONG, number) for number in (0, 1)]
    assert torch.equal(layouts[0].token_L, layouts[1].token_L)
    assert torch.equal(layouts[0].source_L, layouts[1].source_L)
    start = 0
    for number, encoder in enumerate((ours.text_encoder, ours.text_encoder_2)):
        layout, width = layouts[number], encoder.config.hidden_size
        states = encoder(layout.ids_NP, output_hidden_states=True).hidden_states[-(clip_skip or 0) - 2]
        torch.testing.assert_close(embeds[0, :, start : start + width], layout.join(states), rtol=1e-4, atol=1e-5)
        start += width
    assert start == embeds.shape[-1] == ours.unet.config.cross_attention_dim
    wanted = ours.text_encoder_2(layouts[1].ids_NP[:1]).text_embeds
    torch.testing.assert_close(pooled, wanted, rtol=1e-4, atol=1e-5)


def test_the_pads_are_the_tokenizers_own(ours):
    pads = [ours.prompt_encoder.lay_out(SHORT, number).ids_NP[0, -1] for number in (0, 1)]
    assert [int(pad) for pad in pads] == [49407, 0]


@torch.no_grad()
def test_pooled_vectors_are_those_of_stock_and_compel_for_several_passes_and_of_the_whole_text_for_one(stock, ours):
    cut = stock.encode_prompt(LONG)[2]
    compel = Compel(
        tokenizer=[stock.tokenizer, stock.tokenizer_2],
        text_encoder=[stock.text_encoder, stock.text_encoder_2],
        returned_embeddings_type=ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED,
        requires_pooled=[False, True],
        truncate_long_prompts=False,
    )
    torch.testing.assert_close(compel(LONG)[1], cut, rtol=1e-4, atol=1e-5)
    pooled = {}
    for name in CONDITIONINGS:
        ours.conditioning = name
        pooled[name] = ours.encode_prompt(LONG)[2]
    torch.testing.assert_close(pooled["stock"], cut, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pooled["overlap"], cut, rtol=1e-4, atol=1e-5)
    # The end-of-text state of the first window, which here ends at a sentence before token 77.
    first = ours.prompt_encoder.__class__(ours.prompt_encoder.encodings, "chunks").lay_out(LONG, 1).ids_NP[:1]
    torch.testing.assert_close(pooled["chunks"], ours.text_encoder_2(first).text_embeds, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(pooled["chunks"], cut, atol=0.1)
    other = LONG.replace("number 13", "number 12")
    ours.conditioning = "one_pass"
    assert not torch.allclose(ours.encode_prompt(other)[2], pooled["one_pass"]), "the last sentence counts"


@torch.no_grad()
def test_one_pass_of_more_than_248_tokens_has_the_pooled_vector_of_its_first_pass(ours):
    ours.conditioning = "one_pass"
    passes_NP = ours.prompt_encoder.lay_out(VERY_LONG, 1).ids_NP
    assert len(passes_NP) == 2
    embeds, _, pooled, _ = ours.encode_prompt(VERY_LONG)
    torch.testing.assert_close(pooled, ours.text_encoder_2(passes_NP[:1]).text_embeds, rtol=1e-4, atol=1e-5)
    other = ours.encode_prompt(VERY_LONG.replace("number 39", "number 38"))
    torch.testing.assert_close(other[2], pooled, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(other[0], embeds, atol=1e-3), "what stands in the second pass is in the embeds alone"


def test_unequal_second_prompts(ours):
    for prompt, second in ((LONG, SHORT), (SHORT, LONG)):
        embeds, negative, _, _ = ours.encode_prompt(prompt, second, negative_prompt="bad")
        assert embeds.shape == negative.shape
        assert embeds.shape[1] == len(ours.prompt_encoder.lay_out(LONG))
        assert picture(ours, prompt, prompt_2=second).shape == (1, 16, 16, 3)
    with pytest.raises(ValueError, match=r"prompts for the text encoders differ in number: \[2, 1\]"):
        ours.encode_prompt(["a", "b"], ["c"])


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_each_prompt_of_a_batch_is_drawn_as_if_alone(ours, conditioning):
    prompts, negatives = [SHORT, VERY_LONG, LONG], ["bad", LONG, "x"]
    together = picture(ours, prompts, negative_prompt=negatives, conditioning=conditioning)
    for number, (prompt, negative) in enumerate(zip(prompts, negatives, strict=True)):
        alone = picture(ours, prompt, seed=1 + number, negative_prompt=negative, conditioning=conditioning)
        np.testing.assert_allclose(together[number], alone[0], rtol=0, atol=1e-5)


def test_trained_encoders_draw_each_prompt_of_a_batch_as_if_alone(folder, tmp_path):
    """With 248 positions and masked padding, as an export says: one pass of as many rows as each prompt has tokens."""
    encoders = {}
    for name, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
        config = CLIPTextConfig.from_pretrained(folder, subfolder=name, max_position_embeddings=248)
        config.padding = "mask"
        kind(config).save_pretrained(tmp_path / name)
        encoders[name.removeprefix("text_")] = tmp_path / name
    pipe = quiet(FixClipStableDiffusionXLPipeline.from_pretrained(folder, **encoders, add_watermarker=False))
    assert {encoding.context.padding for encoding in pipe.prompt_encoder.encodings} == {"mask"}
    prompts = [SHORT, LONG, tiny.sentences(9)]
    together = picture(pipe, prompts, negative_prompt="bad")
    for number, prompt in enumerate(prompts):
        alone = picture(pipe, prompt, seed=1 + number, negative_prompt="bad")
        np.testing.assert_allclose(together[number], alone[0], rtol=0, atol=1e-5)
    embeds = pipe.encode_prompt(prompts)[0]
    num_tokens = [len(pipe.tokenizer(prompt).input_ids) for prompt in prompts]
    assert [int(own.any(-1).sum()) for own in embeds] == num_tokens


def test_weights(ours):
    for syntax, prompt in (("a1111", f"{LONG} A (red:1.5) cat"), ("compel", f"{LONG} A (red)1.5 cat")):
        plain = picture(ours, f"{LONG} A red cat")
        assert not np.array_equal(picture(ours, prompt, weights=syntax), plain)
        assert np.array_equal(picture(ours, f"{LONG} A red cat", weights=syntax), plain)


def adapter_of(width, seed, scope="window"):
    torch.manual_seed(seed)
    adapter = TextAdapter(width, "attention", num_heads=4, mask_padding=True, scope=scope)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return adapter


def test_adapters_of_both_encoders_act_on_the_states_that_the_unet_reads(ours, folder, tmp_path):
    """Saved inside the encoders, so that stock loading keeps them; the pooled vector stays the base's."""
    pair = (adapter_of(32, 0), adapter_of(48, 1))
    pipe = quiet(FixClipStableDiffusionXLPipeline.from_pretrained(folder, adapter=pair, add_watermarker=False))
    plain, adapted = ours.encode_prompt(LONG), pipe.encode_prompt(LONG)
    assert not torch.allclose(plain[0], adapted[0])
    assert torch.equal(plain[2], adapted[2])
    encoder, layout = pipe.text_encoder, pipe.prompt_encoder.lay_out(LONG)
    with torch.no_grad():
        before = ours.text_encoder(layout.ids_NP, output_hidden_states=True).hidden_states[-2]
        text = torch.arange(77)[None] < (layout.ids_NP == encoder.config.eos_token_id).int().argmax(1)[:, None] + 1
        wanted = layout.join(pair[0](before, text))
    torch.testing.assert_close(adapted[0][0, :, :32], wanted, rtol=1e-4, atol=1e-4)
    pipe.save_pretrained(tmp_path / "saved")
    for part, adapter in zip(("text_encoder", "text_encoder_2"), pair, strict=True):
        adapter.save_pretrained(tmp_path / "adapter" / part)
    expected = picture(pipe, LONG)
    again = quiet(FixClipStableDiffusionXLPipeline.from_pretrained(tmp_path / "saved", add_watermarker=False))
    assert np.array_equal(picture(again, LONG), expected)
    plainly = quiet(DiffusionPipeline.from_pretrained(tmp_path / "saved", add_watermarker=False))
    assert type(plainly) is FixClipStableDiffusionXLPipeline
    assert np.array_equal(picture(plainly, LONG), expected)
    by_folder = FixClipStableDiffusionXLPipeline.from_pretrained(
        folder, adapter=tmp_path / "adapter", add_watermarker=False
    )
    assert np.array_equal(picture(quiet(by_folder), LONG), expected)
    swapped = StableDiffusionXLPipeline(**{**pipe.components, "add_watermarker": False})
    stock = StableDiffusionXLPipeline.from_pretrained(tmp_path / "saved", add_watermarker=False)
    assert stock.text_encoder.adapter is not None
    assert stock.text_encoder_2.adapter is not None
    for one, other in zip(stock.encode_prompt(LONG), swapped.encode_prompt(LONG), strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
@pytest.mark.parametrize("scope", ["window", "text"])
def test_adapters_act_on_clip_skip_too(ours, folder, scope):
    """In one pass and in several; in a stock pipeline of the same components, too."""
    pair = (adapter_of(32, 0, scope), adapter_of(48, 1, scope))
    pipe = FixClipStableDiffusionXLPipeline.from_pretrained(folder, adapter=pair, add_watermarker=False)
    for prompt in (SHORT, LONG):
        layouts = [pipe.prompt_encoder.lay_out(prompt, number) for number in (0, 1)]
        wanted = []
        for adapter, layout, encoder in zip(pair, layouts, (ours.text_encoder, ours.text_encoder_2), strict=True):
            states = encoder(layout.ids_NP, output_hidden_states=True).hidden_states[-3]
            text = positions_of_text(layout.ids_NP, encoder.config.eos_token_id).bool()
            if scope == "text" and len(text) > 1:
                states = adapt_rows(adapter, states, layout, encoder.config.eos_token_id)
            else:
                states = adapter(states, text)
            wanted.append(layout.join(states))
        embeds = pipe.encode_prompt(prompt, clip_skip=1)[0]
        torch.testing.assert_close(embeds[0], torch.cat(wanted, dim=-1), rtol=1e-4, atol=1e-4)
    stock = StableDiffusionXLPipeline(**{**pipe.components, "add_watermarker": False})
    read = stock.encode_prompt(LONG, clip_skip=1)[0]
    pipe.conditioning = "one_pass"
    embeds = pipe.encode_prompt(LONG, clip_skip=1)[0]
    torch.testing.assert_close(read[:, : embeds.shape[1]], embeds, rtol=1e-4, atol=1e-4)
    assert not read[:, embeds.shape[1] :].any()


def test_too_large_a_clip_skip_is_named(ours):
    num_layers = ours.text_encoder.config.num_hidden_layers
    assert ours.encode_prompt(SHORT, clip_skip=num_layers - 1)[0].any()
    with pytest.raises(ValueError, match=f"clip_skip={num_layers}: this text encoder has {num_layers - 1} layers to"):
        ours.encode_prompt(SHORT, clip_skip=num_layers)


@pytest.mark.parametrize("clip_skip", [None, 1])
def test_stock_pipelines_read_248_tokens_with_both_components_swapped(folder, ours, clip_skip):
    """Short prompts keep stock's states; behind the text stand zeros."""
    pipe = quiet(StableDiffusionXLPipeline(**{**ours.components, "add_watermarker": False}))
    embeds = pipe.encode_prompt(SHORT, clip_skip=clip_skip)[0]
    assert embeds.shape[1] == 248
    torch.testing.assert_close(embeds[:, :77], ours.encode_prompt(SHORT, clip_skip=clip_skip)[0], rtol=1e-4, atol=1e-5)
    assert not embeds[:, 77:].any()
    assert picture(pipe, LONG).shape == (1, 16, 16, 3)


def test_a_long_encoder_beside_a_stock_one_is_one_clear_error(stock, ours):
    parts = {**stock.components, "text_encoder": ours.text_encoder, "tokenizer": ours.tokenizer}
    with pytest.raises(ValueError, match="text_encoder_2 is a CLIPTextModelWithProjection and tokenizer_2 a CLIPTok"):
        FixClipStableDiffusionXLPipeline(**parts, add_watermarker=False)


@pytest.mark.parametrize("kind", [StableDiffusionXLPipeline, StableDiffusionXLImg2ImgPipeline])
@pytest.mark.parametrize(
    ("exchanged", "message"),
    [
        (
            ("text_encoder", "tokenizer"),
            r"text_encoder is given 248 tokens, and text_encoder_2 \(CLIPTextModelWithProjection\) with tokenizer_2 "
            r"\(CLIPTokenizer\) reads 77: .* Give the pipeline a FixClipTextEncoderWithProjection as text_encoder_2",
        ),
        (
            ("text_encoder_2", "tokenizer_2"),
            r"text_encoder_2 is given 248 tokens, and text_encoder \(CLIPTextModel\) with tokenizer \(CLIPTokenizer\) "
            "reads 77: .* Give the pipeline a FixClipTextEncoder as text_encoder and a FixClipTokenizer of 248 tokens",
        ),
        (
            ("text_encoder", "text_encoder_2", "tokenizer"),
            r"text_encoder_2 \(FixClipTextEncoderWithProjection\) with tokenizer_2 \(CLIPTokenizer\) reads 77",
        ),
    ],
)
def test_stock_pipelines_with_encoders_of_two_lengths_say_what_to_exchange(stock, ours, kind, exchanged, message):
    """A short prompt, too: torch's own message would be that sizes of tensors must match."""
    parts = {**stock.components, **{name: getattr(ours, name) for name in exchanged}}
    with pytest.raises(ValueError, match=message):
        kind(**parts, add_watermarker=False).encode_prompt(SHORT)


def test_encoders_that_read_equally_many_tokens_stand_beside_each_other(stock, ours):
    """Ours with the stock tokenizer; and no other pipeline is taken for the one that calls."""
    pipe = StableDiffusionXLPipeline(
        **{**stock.components, "text_encoder": ours.text_encoder, "add_watermarker": False}
    )
    torch.testing.assert_close(pipe.encode_prompt(LONG)[0], stock.encode_prompt(LONG)[0], rtol=1e-4, atol=1e-5)
    pipe.register_modules(tokenizer=ours.tokenizer)
    ids = pipe.tokenizer(LONG, padding="max_length", return_tensors="pt").input_ids
    assert pipe.text_encoder(ids).last_hidden_state.shape == (1, 248, 32)


def test_bad_bases_and_encoders(folder, sd1, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"is a StableDiffusionXLPipeline, not a Stable Diffusion 1\.x or 2\.x .*auto\.load_pipeline takes",
    ):
        FixClipStableDiffusionPipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match="is a StableDiffusionPipeline, not a Stable Diffusion XL model: it has no"):
        FixClipStableDiffusionXLPipeline.from_pretrained(sd1)
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "base").symlink_to(sd1)
    for name in (str(tmp_path / "whole"), "builtin:scenes"):
        with pytest.raises(
            ValueError, match=rf"base '{name}' is a StableDiffusionPipeline, .*auto\.load_pipeline takes"
        ):
            FixClipStableDiffusionXLPipeline.from_pretrained(name)
    with pytest.raises(ValueError, match=r"encoders are 48 \(text_encoder\) \+ 48 \(text_encoder_2\) = 96 wide"):
        FixClipStableDiffusionXLPipeline.from_pretrained(folder, encoder=folder / "text_encoder_2")
    with pytest.raises(ValueError, match="expected text_encoder/ or text_encoder_2/ in it, each an adapter"):
        FixClipStableDiffusionXLPipeline.from_pretrained(folder, adapter=tmp_path)
    with pytest.raises(ValueError, match="adapter of width 48 on a text encoder of width 32"):
        FixClipStableDiffusionXLPipeline.from_pretrained(folder, adapter=(adapter_of(48, 0), None))


def test_parts_of_another_base_are_named_before_anything_large_is_read(folder, sd1, ours, tmp_path, monkeypatch):
    """Adapters, encoders and bases of another kind; no weights of the base are read before the error."""
    adapter_of(32, 0).save_pretrained(tmp_path / "one")
    adapter_folder(tmp_path / "two")
    adapter_of(40, 0).save_pretrained(tmp_path / "wide" / "text_encoder")
    without = tmp_path / "without"
    shutil.copytree(folder, without)
    index = json.loads((without / "model_index.json").read_text())
    (without / "model_index.json").write_text(json.dumps(index | {"text_encoder_2": [None, None]}))
    xl, sd = FixClipStableDiffusionXLPipeline.from_pretrained, FixClipStableDiffusionPipeline.from_pretrained
    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", lambda *args, **kwargs: pytest.fail("read"))
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *args, **kwargs: pytest.fail("read"))
    for load, message in (
        (lambda: xl(folder, adapter=tmp_path / "one"), r"it is one adapter, of Stable Diffusion 1\.x or 2\.x"),
        (lambda: xl(folder, adapter=tmp_path / "two" / "text_encoder"), "one of a pair: name the folder around it"),
        (lambda: sd(sd1, adapter=tmp_path / "two"), "there: adapters of Stable Diffusion XL's text encoders"),
        (
            lambda: xl(folder, adapter=tmp_path / "wide"),
            "text_encoder: adapter .* of width 40 on a text encoder of width 32: it was",
        ),
        (lambda: xl(without), "there is no text_encoder_2, and Stable Diffusion XL needs both text encoders"),
        (lambda: xl(folder, encoder=folder / "vae"), "it is of the class AutoencoderKL"),
        (lambda: xl(folder, encoder_2=next((folder / "unet").glob("*.safetensors"))), "in this file, it is a UNet"),
        (lambda: load_pipeline(next((folder / "vae").glob("*.safetensors"))), "in this file, it is a VAE"),
    ):
        with pytest.raises(ValueError, match=message):
            load()


def test_loras_of_another_base_are_one_clear_error(folder, sd1):
    """Of UNet and text encoder; the pipeline stays as it was."""
    pipe = quiet(FixClipStableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False))
    before = picture(pipe, SHORT)
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    of_sd = {f"{name}.lora_A.weight": torch.randn(2, 32), f"{name}.lora_B.weight": torch.randn(32, 2)}
    with pytest.raises(ValueError, match=r"LoRA in memory: it was made for another base: .* this one 80"):
        pipe.load_lora_weights(of_sd)
    assert np.array_equal(picture(pipe, SHORT), before)
    name = "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj"
    of_xl = {f"{name}.lora_A.weight": torch.randn(2, 48), f"{name}.lora_B.weight": torch.randn(48, 2)}
    with pytest.raises(ValueError, match=r"it has layers of text_encoder_2, which Stable Diffusion 1"):
        FixClipStableDiffusionPipeline.from_pretrained(sd1).load_lora_weights(of_xl)


@pytest.mark.parametrize("which", ["bigG", "CLIP-L"])
def test_round_trip_of_the_encoder_with_projection(stock, tmp_path, which):
    """bigG of Stable Diffusion XL, and CLIP-L with its projection, as Stable Diffusion 3 has it."""
    source = stock.text_encoder_2 if which == "bigG" else CLIPTextModelWithProjection(clip_text_config()).eval()
    encoder = FixClipTextEncoderWithProjection.from_clip(source, hidden_state="penultimate")
    encoder.save_pretrained(tmp_path)
    again = FixClipTextEncoderWithProjection.from_pretrained(tmp_path)
    assert again.config.hidden_state == "penultimate"
    state, state_again = encoder.state_dict(), again.state_dict()
    assert state.keys() == state_again.keys()
    assert all(torch.equal(state[name], state_again[name]) for name in state)
    ids = torch.randint(0, 49000, (2, 77))
    ids[:, -1] = encoder.config.eos_token_id
    for ours, theirs in zip(encoder(ids).to_tuple(), source(ids).to_tuple(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="a CLIPTextModel has no text projection"):
        FixClipTextEncoderWithProjection.from_clip(stock.text_encoder)
    with pytest.raises(ValueError, match="made for hidden_state='penultimate', and this base reads 'last'"):
        FixClipTextEncoder.from_pretrained(tmp_path, hidden_state="last")


def test_generate_and_tokens_take_the_base_without_another_option(folder, ours, tmp_path):
    options = ["--base", folder, "--steps", "2", "--size", "16", "--seed", "1"]
    result = run("generate", LONG, *options, "-o", tmp_path / "a.png")
    assert result.exit_code == 0, result.output
    assert "conditioning 'overlap'" in result.output
    wanted = picture(ours, LONG, guidance_scale=7.5, output_type="pil")[0]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(wanted))
    sheet = run("generate", LONG, *options, "--compare", "-o", tmp_path / "b.png")
    assert sheet.exit_code == 0, sheet.output
    assert "132 tokens" in run("tokens", LONG, "--base", folder).output


@pytest.fixture(scope="module")
def second_encoder(folder, tmp_path_factory):
    """One of 248 trained positions in place of bigG's."""
    path = tmp_path_factory.mktemp("second")
    config = CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder_2", max_position_embeddings=248)
    CLIPTextModelWithProjection(config).save_pretrained(path)
    return path


def test_the_command_line_takes_a_second_encoder(folder, ours, second_encoder, tmp_path):
    """`tokens` says that all is read in one pass; the others draw so."""
    named = ["--base", folder, "--encoder-2", second_encoder]
    assert "conditioning 'one_pass'" in run("tokens", LONG, *named).output
    assert "conditioning 'overlap'" in run("tokens", LONG, *named[:2]).output
    drawing = ["--steps", "2", "--size", "16", "--guidance", "5"]
    result = run("generate", LONG, *named, *drawing, "--seed", "1", "-o", tmp_path / "a.png")
    assert result.exit_code == 0, result.output
    pipe = FixClipStableDiffusionXLPipeline.from_pretrained(folder, encoder_2=second_encoder)
    wanted = np.asarray(picture(quiet(pipe), LONG, output_type="pil")[0])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), wanted)
    again = run("generate", "--config", tmp_path / "a.png", "-o", tmp_path / "b.png")
    assert again.exit_code == 0, again.output
    assert np.array_equal(np.asarray(Image.open(tmp_path / "b.png")), wanted)
    (tmp_path / "prompts.txt").write_text(f"{LONG}\n")
    adapter = ["--adapter", adapter_folder(tmp_path / "adapter")]
    result = run("evaluate-images", tmp_path / "prompts.txt", *named, *adapter, *drawing, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    settings = json.loads((tmp_path / "out" / "report.json").read_text())["settings"]
    assert [system["name"] for system in settings["systems"]] == [
        "stock", "chunks", "overlap", "one_pass", "one_pass+adapter",
    ]  # fmt: skip
    assert settings["systems"][-1]["encoder_2"] == str(second_encoder)


def adapter_folder(path):
    for part, width in (("text_encoder", 32), ("text_encoder_2", 48)):
        adapter_of(width, width).save_pretrained(path / part)
    return path


def test_evaluate_images_takes_the_base_without_another_option(folder, tmp_path):
    """Each system draws what its pipeline draws, the pooled vector and zeros for no negative prompt included."""
    adapter = adapter_folder(tmp_path / "adapter")
    adapted = quiet(FixClipStableDiffusionXLPipeline.from_pretrained(folder, adapter=adapter, add_watermarker=False))
    plain = quiet(FixClipStableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False))
    painter, drawing = Painter(str(folder)), Drawing(steps=2, size=16, guidance_scale=5.0, batch_size=2)
    for text, pipe in (("plain:conditioning=overlap", plain), (f"adapted:adapter={adapter}", adapted)):
        drawn = painter.draw(parse_system(text), [Prompt(LONG), Prompt(SHORT)], drawing)
        write_attention_out(pipe.unet, torch.device("cpu"))
        for prompt, (image,) in zip((LONG, SHORT), drawn, strict=True):
            wanted = picture(pipe, prompt, seed=0, output_type="pil")[0]
            assert np.array_equal(np.asarray(image), np.asarray(wanted))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{LONG}\n")
    systems = ["--system", "stock:conditioning=stock", "--system", f"adapted:adapter={adapter}"]
    options = ["--steps", "1", "--size", "16", *systems, "-o", tmp_path / "out"]
    result = run("evaluate-images", prompts, "--base", folder, *options)
    assert result.exit_code == 0, result.output


def test_the_page_takes_the_base_without_another_option(folder, ours, tmp_path):
    """All systems that it compares, with heat maps, and an adapter in both encoders that the others are without."""
    adapter = adapter_folder(tmp_path / "adapter")
    model = DemoModel(ModelChoice(base=str(folder), adapter=str(adapter)), "cpu")
    assert list(model.systems) == ["stock", "chunks", "overlap", "adapter"]
    assert model.token_report(LONG).num_tokens == ours.token_report(LONG).num_tokens
    adapted = quiet(FixClipStableDiffusionXLPipeline.from_pretrained(folder, adapter=adapter, add_watermarker=False))
    settings = {"prompt": LONG, "num_inference_steps": 2, "width": 16, "height": 16, "guidance_scale": 5.0}
    for name, system in model.systems.items():
        image, maps = model.draw(system, seed=1, on_step=lambda step: None, heat_maps=name == "adapter", **settings)
        pipe = adapted if name == "adapter" else ours
        options = {} if name == "adapter" else {"conditioning": name}
        wanted = picture(pipe, LONG, output_type="pil", **options)[0]
        np.testing.assert_allclose(np.asarray(image, dtype=float), np.asarray(wanted, dtype=float), atol=1)
        assert maps is None or maps.shape[0] >= 14


@pytest.mark.parametrize("negative", ["", "blurry"])
def test_the_page_draws_what_the_command_draws(folder, ours, tmp_path, negative):
    """Without a negative prompt stock diffusers has zeros for one; the picture's settings draw it again."""
    model = DemoModel(ModelChoice(base=str(folder)), "cpu")
    settings = Settings("a red star", negative, steps=2, guidance_scale=5.0, width=16, height=16, seed=1)
    events: list = []
    generate(settings, model, events.append)
    drawn = events[-1]
    wanted = picture(ours, "a red star", output_type="pil", negative_prompt=negative or None)[0]
    assert np.array_equal(np.asarray(drawn.image), np.asarray(wanted))
    save_png(drawn.image, tmp_path / "page.png", drawn.settings)
    result = run("generate", "--config", tmp_path / "page.png", "-o", tmp_path / "again.png")
    assert result.exit_code == 0, result.output
    assert np.array_equal(np.asarray(Image.open(tmp_path / "again.png")), np.asarray(wanted))


def test_the_page_takes_a_second_encoder(folder, ours, second_encoder):
    """What needs no training is read by the base's own encoders; the chosen one is a column of its own."""
    model = DemoModel(ModelChoice(base=str(folder), encoder_2=str(second_encoder)), "cpu")
    assert list(model.systems) == ["stock", "chunks", "overlap", "encoder"]
    assert model.systems["encoder"].options.encoder_2 == str(second_encoder)
    chosen = FixClipStableDiffusionXLPipeline.from_pretrained(folder, encoder_2=second_encoder, add_watermarker=False)
    settings = {"prompt": LONG, "num_inference_steps": 2, "width": 16, "height": 16, "guidance_scale": 5.0}
    for name, pipe in (("overlap", ours), ("encoder", quiet(chosen))):
        image, _ = model.draw(model.systems[name], seed=1, on_step=lambda step: None, heat_maps=False, **settings)
        wanted = picture(pipe, LONG, output_type="pil")[0]
        np.testing.assert_allclose(np.asarray(image, dtype=float), np.asarray(wanted, dtype=float), atol=1)


def test_the_class_is_found_by_the_base(folder, sd1, tmp_path):
    assert pipeline_class(folder) is FixClipStableDiffusionXLPipeline
    assert pipeline_class(sd1) is FixClipStableDiffusionPipeline
    assert pipeline_class("builtin:scenes") is FixClipStableDiffusionPipeline
    with pytest.raises(ValueError, match="there is no text encoder in this file, it is"):
        pipeline_class(next((sd1 / "vae").glob("*.safetensors")))
    with pytest.raises(ValueError, match=r"encoder_2='x': base .* has one text encoder"):
        load_pipeline(sd1, encoder_2="x")
    assert isinstance(load_pipeline(folder, add_watermarker=False), FixClipStableDiffusionXLPipeline)


# -- other workflows of Stable Diffusion XL ------------------------------------------------------------------


OTHER = LONG.replace("number 13", "number 12")  # its last sentence
EMBEDS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


def embeds_of(pipe, prompt, **arguments):
    return dict(zip(EMBEDS, pipe.encode_prompt(prompt, negative_prompt="bad", **arguments), strict=True))


def controlnet_of(unet):
    """With random weights in the layers that a new ControlNet has zeros in, so that it acts."""
    control = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))
    layers = (*control.controlnet_down_blocks, control.controlnet_mid_block, control.controlnet_cond_embedding.conv_out)
    for layer in layers:
        torch.nn.init.normal_(layer.weight, std=0.5)
    return control


def assert_as_stock_and_read_to_the_end(draw, stock, pipe, reader):
    """A short prompt gives stock's picture, and the last sentence of a long one changes ours; with embeds and without.

    The 248 rows of a stock pipeline are 77 of text and zeros that are passed over: the same but for rounding.
    """
    expected = draw(stock, prompt=SHORT, negative_prompt="bad")
    assert np.array_equal(draw(pipe, **embeds_of(reader, SHORT)), expected)
    np.testing.assert_allclose(draw(pipe, prompt=SHORT, negative_prompt="bad"), expected, atol=1e-5)
    by_prompt, by_embeds = (
        [draw(pipe, **arguments(text)) for text in (LONG, OTHER)]
        for arguments in (lambda text: {"prompt": text}, lambda text: embeds_of(reader, text))
    )
    assert np.abs(by_prompt[0] - by_prompt[1]).max() > 1e-3
    assert np.abs(by_embeds[0] - by_embeds[1]).max() > 1e-3
    assert np.abs(by_prompt[0] - by_embeds[0]).max() > 1e-3, "248 positions stretched, and overlapping windows"
    assert np.array_equal(draw(stock, prompt=LONG), draw(stock, prompt=OTHER))


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [
        (StableDiffusionXLImg2ImgPipeline, {}),
        (StableDiffusionXLInpaintPipeline, {"mask_image": Image.new("L", (16, 16), 255), "height": 16, "width": 16}),
        (StableDiffusionXLControlNetPipeline, {"height": 16, "width": 16}),
    ],
)
def test_image_to_image_inpainting_and_controlnet(stock, ours, kind, inputs):
    extra = {"controlnet": controlnet_of(stock.unet)} if kind is StableDiffusionXLControlNetPipeline else {}
    plain, pipe = (quiet(kind.from_pipe(each, **extra)) for each in (stock, ours))
    mask_empty_states(ours.unet)
    for model in extra.values():
        mask_empty_states(model)

    def draw(pipe, **arguments):
        settings = {"image": Image.new("RGB", (16, 16), "red"), "num_inference_steps": 4, "output_type": "np"}
        return pipe(**settings, **inputs, **arguments, generator=torch.Generator().manual_seed(0)).images

    assert_as_stock_and_read_to_the_end(draw, plain, pipe, ours)


def test_the_refiner_has_the_second_encoder_only(ours, folder):
    parts = {**ours.components, "text_encoder": None, "tokenizer": None}
    parts["unet"] = unet(**{**dict(ours.unet.config), "cross_attention_dim": 48})
    pipe = quiet(FixClipStableDiffusionXLPipeline(**parts, add_watermarker=False))
    stock = quiet(
        StableDiffusionXLPipeline(
            **{
                **parts,
                "text_encoder_2": CLIPTextModelWithProjection.from_pretrained(folder, subfolder="text_encoder_2"),
                "tokenizer_2": CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer_2"),
            },
            add_watermarker=False,
        )
    )
    assert np.array_equal(picture(pipe, SHORT), picture(stock, SHORT))
    assert pipe.encode_prompt(LONG)[0].shape[1] == len(pipe.prompt_encoder.lay_out(LONG))


def test_the_refiner_is_image_to_image_with_a_score_for_beauty(stock, tmp_path):
    """Of five time ids, as the real one: in both directions of `from_pipe`, and from a folder."""
    plain = tiny_refiner.refiner_of(stock)
    plain.save_pretrained(tmp_path)
    reader = FixClipStableDiffusionXLPipeline.from_pipe(quiet(plain))
    pipe = quiet(StableDiffusionXLImg2ImgPipeline.from_pipe(reader))
    mask_empty_states(pipe.unet)

    def draw(pipe, **arguments):
        settings = {"image": Image.new("RGB", (16, 16), "red"), "num_inference_steps": 4, "output_type": "np"}
        return pipe(**settings, **arguments, generator=torch.Generator().manual_seed(0)).images

    assert_as_stock_and_read_to_the_end(draw, plain, pipe, reader)
    assert not np.array_equal(draw(pipe, prompt=LONG, aesthetic_score=1.0), draw(pipe, prompt=LONG))
    loaded = FixClipStableDiffusionXLPipeline.from_pretrained(tmp_path)
    assert loaded.text_encoder is None
    for name, tensor in embeds_of(loaded, LONG).items():
        torch.testing.assert_close(tensor, embeds_of(reader, LONG)[name], rtol=0, atol=1e-5)


def test_textual_inversion_in_both_encoders(folder):
    pipe = quiet(FixClipStableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False))
    for tokenizer, encoder, width in (
        (pipe.tokenizer, pipe.text_encoder, 32),
        (pipe.tokenizer_2, pipe.text_encoder_2, 48),
    ):
        pipe.load_textual_inversion({"badHand": torch.randn(3, width)}, tokenizer=tokenizer, text_encoder=encoder)
    for number in (0, 1):
        ids = pipe.prompt_encoder.lay_out(f"{LONG} a badhand", number).ids_NP
        assert sorted(set(ids[ids >= 49408].tolist())) == [49408, 49409, 49410]
    assert picture(pipe, f"{LONG} a badhand").shape == (1, 16, 16, 3)


def test_a_textual_inversion_of_both_encoders_in_one_file(folder, tmp_path, caplog):
    """`clip_l` and `clip_g`, the usual format, by the pipeline and the command line."""
    vectors = {"clip_l": torch.randn(2, 32), "clip_g": torch.randn(2, 48)}
    save_file(vectors, tmp_path / "myStyle.safetensors")
    pipe = quiet(FixClipStableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False))
    with pytest.raises(ValueError, match="give token="):
        pipe.load_textual_inversion(tmp_path / "myStyle.safetensors")
    pipe.load_textual_inversion(tmp_path / "myStyle.safetensors", token="myStyle")
    for encoder, name in ((pipe.text_encoder, "clip_l"), (pipe.text_encoder_2, "clip_g")):
        assert torch.equal(encoder.get_input_embeddings().weight[-2:], vectors[name])
    picture(pipe, "a mystyle horse")
    assert "tokens for the first text encoder" not in caplog.text
    other = models.load_pipeline(models.ModelOptions(str(folder), embeddings=(str(tmp_path / "myStyle.safetensors"),)))
    assert np.array_equal(picture(quiet(other), "a mystyle horse"), picture(pipe, "a mystyle horse"))
    pipe.load_textual_inversion({"soleStyle": torch.randn(8, 32)})
    picture(pipe, "a solestyle horse")
    assert "'a solestyle horse' has 10 tokens for the first text encoder and " in caplog.text


@pytest.mark.parametrize("form", ["memory", "safetensors", "pt", "folder", "list", "a name for each vector"])
def test_every_form_of_an_inversion_goes_into_both_encoders(folder, tmp_path, form):
    """And out of both, and in again."""
    pipe = quiet(FixClipStableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False))
    vectors = {"clip_l": torch.randn(2, 32), "clip_g": torch.randn(2, 48)}
    other = {"clip_l": torch.randn(1, 32), "clip_g": torch.randn(1, 48)}
    save_file(vectors, tmp_path / "style.safetensors")
    torch.save(vectors, tmp_path / "style.pt")
    source, arguments = {
        "memory": (vectors, {"token": "<c>"}),
        "safetensors": (tmp_path / "style.safetensors", {"token": "<c>"}),
        "pt": (str(tmp_path / "style.pt"), {"token": "<c>"}),
        "folder": (tmp_path, {"token": "<c>", "weight_name": "style.safetensors"}),
        "list": ([tmp_path / "style.pt", other], {"token": ["<c>", "<d>"]}),
        "a name for each vector": (vectors, {"token": ["<c>", "<d>"]}),
    }[form]
    prompt = f"{LONG} a <C> horse"
    plain = pipe.encode_prompt(prompt)[0]
    for _ in range(2):
        pipe.load_textual_inversion(source, **arguments)
        for encoder, key in ((pipe.text_encoder, "clip_l"), (pipe.text_encoder_2, "clip_g")):
            expected = torch.cat([vectors[key], *([other[key]] if form == "list" else [])])
            assert torch.equal(encoder.get_input_embeddings().weight[49408:], expected)
        assert not torch.equal(pipe.encode_prompt(prompt)[0], plain)
        pipe.unload_textual_inversion()
        assert len(pipe.tokenizer) == len(pipe.tokenizer_2) == 49408
        torch.testing.assert_close(pipe.encode_prompt(prompt)[0], plain)


def test_an_inversion_that_one_of_both_encoders_cannot_take_changes_neither(folder):
    pipe = quiet(FixClipStableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False))
    good = {"clip_l": torch.randn(2, 32), "clip_g": torch.randn(2, 48)}
    pipe.load_textual_inversion({"<d>": torch.randn(1, 48)}, text_encoder=pipe.text_encoder_2)  # with its tokenizer
    assert [len(pipe.tokenizer), len(pipe.tokenizer_2)] == [49408, 49409]
    before = [encoder.get_input_embeddings().weight.clone() for encoder in (pipe.text_encoder, pipe.text_encoder_2)]
    for state, token, message in (
        ({**good, "clip_g": torch.randn(2, 40)}, "<c>", "width 32 . 40, and 32 . 48 is needed here"),
        ({**good, "clip_g": torch.full((2, 48), torch.nan)}, "<c>", "<c> holds NaN"),
        (good, "<d>", "the tokenizer has a token '<d>' already"),
        (good, "<D>", "cannot be told from '<d>'"),
        (torch.randn(2, 48), "<c>", "48, and 32 is needed here .*for the second text encoder give text_encoder= and"),
        (torch.randn(2, 24), "<c>", "width 24, and 32 is needed here"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.load_textual_inversion([good, state], token=["<good>", token])
    assert [len(pipe.tokenizer), len(pipe.tokenizer_2)] == [49408, 49409]
    for encoder, weight in zip((pipe.text_encoder, pipe.text_encoder_2), before, strict=True):
        assert torch.equal(encoder.get_input_embeddings().weight, weight)
    pipe.load_textual_inversion(good, token="<c>", tokenizer=pipe.tokenizer)  # the half of one text encoder
    assert [len(pipe.tokenizer), len(pipe.tokenizer_2)] == [49410, 49409]
    pipe.unload_textual_inversion("<c>")
    pipe.unload_textual_inversion("<d>")
    assert len(pipe.tokenizer) == len(pipe.tokenizer_2) == 49408


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (
            TextAdapter(32),
            "adapter=TextAdapter: Stable Diffusion XL takes a folder or a hub name of both adapters, or a",
        ),
        ((None, None, None), "adapter=tuple: Stable Diffusion XL takes a folder"),
        ({"text_encoder": None}, "adapter=dict: Stable Diffusion XL takes a folder"),
        ("/no/such/adapter", "adapter '/no/such/adapter' is neither a folder nor a hub name"),
        ((TextAdapter(40), None), "text_encoder: adapter of width 40 on a text encoder of width 32"),
        ([None, TextAdapter(32)], "text_encoder_2: adapter of width 32 on a text encoder of width 48"),
    ],
)
def test_what_is_no_adapter_of_both_encoders_is_named(folder, adapter, message):
    with pytest.raises(ValueError, match=message):
        FixClipStableDiffusionXLPipeline.from_pretrained(folder, adapter=adapter)


def test_both_encoders_of_another_folder_go_into_a_pipeline_in_memory(ours, folder):
    stock = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipe = quiet(FixClipStableDiffusionXLPipeline.from_pipe(stock, encoder=folder, encoder_2=folder))
    for one, other in zip(pipe.encode_prompt(LONG), ours.encode_prompt(LONG), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("made_by", ["from_pretrained", "from_pipe"])
def test_what_is_given_decides_how_prompts_are_read_and_not_what_was_saved(folder, tmp_path, made_by):
    first = FixClipStableDiffusionXLPipeline.from_pretrained(folder, conditioning="chunks", add_watermarker=False)
    first.save_pretrained(tmp_path)
    make = getattr(FixClipStableDiffusionXLPipeline, made_by)
    source = tmp_path if made_by == "from_pretrained" else first
    for given, expected in (
        ({}, "chunks"),
        ({"adapter": (None, None)}, "chunks"),
        ({"adapter": (TextAdapter(32, conditioning="one_pass"), None)}, "one_pass"),
        ({"encoder_2": folder}, "overlap"),
    ):
        assert make(source, **given).conditioning == expected


def test_embeds_without_their_pooled_vectors_are_refused(ours):
    positive, negative, pooled, _ = ours.encode_prompt(LONG, negative_prompt="bad")
    both = {"negative_prompt_embeds": negative, "negative_pooled_prompt_embeds": pooled}
    for negatives in ({}, {"negative_prompt": "bad"}, both):
        with pytest.raises(ValueError, match=r"^prompt_embeds= needs pooled_prompt_embeds= too; encode_prompt gives"):
            ours.encode_prompt(None, prompt_embeds=positive, **negatives)
    for given in ({"prompt": LONG}, {"prompt": None, "prompt_embeds": positive, "pooled_prompt_embeds": pooled}):
        with pytest.raises(ValueError, match="negative_prompt_embeds= needs negative_pooled_prompt_embeds= too"):
            ours.encode_prompt(**given, negative_prompt_embeds=negative)
        embeds = ours.encode_prompt(**given, negative_prompt_embeds=negative, do_classifier_free_guidance=False)[0]
        assert torch.equal(embeds, positive)


def test_a_pipeline_of_another_family_is_told_which_class_takes_it(ours, stock, sd1):
    one = StableDiffusionPipeline.from_pretrained(sd1)
    for kind, given, message in (
        (FixClipStableDiffusionPipeline, ours, "FixClipStableDiffusionXLPipeline is no pipeline of Stable Diffusion 1"),
        (FixClipStableDiffusionPipeline, stock, "StableDiffusionXLPipeline is no pipeline of Stable Diffusion 1.x or"),
        (FixClipStableDiffusionXLPipeline, one, "XL: it has no text_encoder_2, tokenizer_2"),
    ):
        with pytest.raises(ValueError, match=f"{message}.*; FixClipStableDiffusionPipeline.from_pipe takes"):
            kind.from_pipe(given)


def lora_targets(text_model):
    layers = range(len(text_model.encoder.layers))
    parts = ("q_proj", "out_proj")
    return [f"text_model.encoder.layers.{layer}.self_attn.{part}" for layer in layers for part in parts]


def lora_file_state(state, layout):
    """The tensors of a PEFT file under the names of the layout; kohya's are the original ones of the UNet's blocks."""
    if layout == "peft":
        return state
    renamed = {}
    for name, tensor in state.items():
        part, _, path = name.partition(".")
        down = path.endswith("lora_A.weight")
        layer = path.rpartition(".lora_")[0]
        if layout == "diffusers":
            kind = "lora" if part == "unet" else "lora_linear_layer"
            renamed[f"{part}.{layer}.{kind}.{'down' if down else 'up'}.weight"] = tensor
            continue
        layer = layer.replace("mid_block.attentions.0", "middle_block.1").replace(".", "_")
        place = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}[part]
        renamed[f"{place}_{layer}.lora_{'down' if down else 'up'}.weight"] = tensor
        renamed[f"{place}_{layer}.alpha"] = torch.tensor(2.0)
    return renamed


@pytest.mark.parametrize("layout", ["peft", "diffusers", "kohya"])
def test_lora_in_unet_and_both_encoders(folder, tmp_path, layout):
    pipe = quiet(FixClipStableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False))
    plain = picture(pipe, LONG)
    names = [
        *((f"text_encoder.{name}", 32) for name in lora_targets(pipe.text_encoder.text_model)),
        *((f"text_encoder_2.{name}", 48) for name in lora_targets(pipe.text_encoder_2.text_model)),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q", 32),
    ]
    generator = torch.Generator().manual_seed(3)
    state = {}
    for name, width in names:
        state[f"{name}.lora_A.weight"] = torch.randn(2, width, generator=generator)
        state[f"{name}.lora_B.weight"] = torch.randn(width, 2, generator=generator)
    save_file(lora_file_state(state, layout), tmp_path / "lora.safetensors")
    again = quiet(FixClipStableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False))
    again.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    with torch.no_grad():  # the same by hand: W + B A
        for name, _ in names:
            part, _, path = name.partition(".")
            layer = getattr(pipe, part).get_submodule(path)
            layer.weight += state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]
    wanted = picture(pipe, LONG)
    assert not np.allclose(wanted, plain, atol=1e-3)
    np.testing.assert_allclose(picture(again, LONG), wanted, atol=1e-4)
    no_lora = picture(again, LONG, cross_attention_kwargs={"scale": 0.0})
    np.testing.assert_allclose(no_lora, plain, atol=1e-5)
    again.unload_lora_weights()
    np.testing.assert_allclose(picture(again, LONG), plain, atol=1e-5)


@torch.no_grad()
def test_compel_with_our_components(ours):
    """Without weights the embeds of a stock pipeline with our components, of one pass; a weight changes its word."""
    compel = Compel(
        tokenizer=[ours.tokenizer, ours.tokenizer_2],
        text_encoder=[ours.text_encoder, ours.text_encoder_2],
        returned_embeddings_type=ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED,
        requires_pooled=[False, True],
    )
    one_pass = StableDiffusionXLPipeline(**{**ours.components, "add_watermarker": False})
    plain, plain_pooled = compel(f"{LONG} A red cat")
    wanted, _, wanted_pooled, _ = one_pass.encode_prompt(f"{LONG} A red cat")
    torch.testing.assert_close(plain, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain_pooled, wanted_pooled, rtol=1e-4, atol=1e-5)
    embeds, pooled = compel(f"{LONG} A red++ cat")
    assert embeds.shape == plain.shape == (1, 248, 80)
    changed = [word for word, row in enumerate((embeds - plain)[0].abs().amax(1)) if row > 1e-2]
    ids = ours.tokenizer(f"{LONG} A red cat").input_ids
    assert [ours.tokenizer.decode([ids[word]]).strip() for word in changed] == ["red"]
    assert changed[0] == len(ids) - 3, "the last of the red things, behind token 77"
    images = picture(
        ours,
        prompt_embeds=embeds,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=torch.zeros_like(embeds),
        negative_pooled_prompt_embeds=torch.zeros_like(pooled),
    )
    assert images.shape == (1, 16, 16, 3)


# -- IP-Adapter, offloading, saving --------------------------------------------------------------------------


def load_ip_adapter(pipe, seed=0):
    """An IP-Adapter of 4 image tokens with random weights, as its file holds them, and a tiny image encoder."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8,
        projection_dim=16,
    )  # fmt: skip
    size = {"height": 16, "width": 16}
    pipe.register_modules(
        image_encoder=CLIPVisionModelWithProjection(vision),
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size),
    )
    width = pipe.unet.config.cross_attention_dim
    names = [name for name in pipe.unet.attn_processors if name.endswith("attn2.processor")]
    layers = {}
    for number, name in enumerate(names):
        own = pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for part in ("k", "v"):
            layers[f"{2 * number + 1}.to_{part}_ip.weight"] = torch.randn(own, width)
    image = {"proj.weight": torch.randn(4 * width, 16), "proj.bias": torch.zeros(4 * width)}
    image |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    pipe.load_ip_adapter({"image_proj": image, "ip_adapter": layers}, subfolder="", weight_name="")
    return pipe


def test_ip_adapter(folder):
    """Short prompts as in stock, to the bit; long ones take the picture too, each in a batch as if alone."""
    stock = load_ip_adapter(quiet(StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)))
    ours = load_ip_adapter(quiet(FixClipStableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)))
    red, blue = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    expected = picture(stock, SHORT, ip_adapter_image=red)
    assert np.array_equal(picture(ours, SHORT, ip_adapter_image=red), expected)
    long = picture(ours, LONG, negative_prompt="bad", ip_adapter_image=red)
    assert np.isfinite(long).all()
    assert not np.allclose(long, picture(ours, LONG, negative_prompt="bad", ip_adapter_image=blue), atol=1e-3)
    both = picture(ours, [LONG, SHORT], negative_prompt=["bad", "bad"], ip_adapter_image=red)
    np.testing.assert_allclose(both[0], long[0], atol=1e-4)


def test_offloading(folder):
    """accelerate's hooks with the CPU as the device that work moves to: of whole models, and with weights on a meta
    device between the calls of both text encoders. A real GPU's memory is not shown here."""
    ours = quiet(FixClipStableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False))
    for encoder, width in ((ours.text_encoder, 32), (ours.text_encoder_2, 48)):
        encoder.set_adapter_module(adapter_of(width, 0))
    expected = [picture(ours, prompt) for prompt in (SHORT, LONG)]
    hook = None
    for name in ("unet", "vae"):
        _, hook = cpu_offload_with_hook(getattr(ours, name), "cpu", prev_module_hook=hook)
    for name in ("text_encoder", "text_encoder_2"):
        cpu_offload(getattr(ours, name), "cpu")
        assert next(getattr(ours, name).parameters()).device.type == "meta"
    for prompt, wanted in zip((SHORT, LONG), expected, strict=True):
        assert np.array_equal(picture(ours, prompt), wanted)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offload_to_a_gpu(folder, monkeypatch):
    """Text encoders with adapters go to the GPU and back, one after the other."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    ours = quiet(FixClipStableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False))
    for encoder, width in ((ours.text_encoder, 32), (ours.text_encoder_2, 48)):
        encoder.set_adapter_module(adapter_of(width, 0))
    expected = picture(ours, LONG)
    ours.enable_model_cpu_offload()
    np.testing.assert_allclose(picture(ours, LONG), expected, atol=1e-3)
    assert {part.device.type for part in (ours.text_encoder, ours.text_encoder_2, ours.unet)} == {"cpu"}


def test_a_saved_pipeline_is_the_same_one(folder, tmp_path):
    """With its conditioning and a LoRA; stock classes read the folder, too."""
    pipe = quiet(FixClipStableDiffusionXLPipeline.from_pretrained(folder, conditioning="chunks", add_watermarker=False))
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
    state = {f"{name}.lora_A.weight": torch.randn(2, 32), f"{name}.lora_B.weight": torch.randn(32, 2)}
    pipe.load_lora_weights(state, adapter_name="mine")
    expected = picture(pipe, LONG)
    pipe.save_pretrained(tmp_path / "saved")
    again = quiet(FixClipStableDiffusionXLPipeline.from_pretrained(tmp_path / "saved", add_watermarker=False))
    assert (again.conditioning, again.get_active_adapters()) == ("chunks", ["mine"])
    np.testing.assert_allclose(picture(again, LONG), expected, atol=1e-5)
    stock = StableDiffusionXLImg2ImgPipeline.from_pretrained(tmp_path / "saved", add_watermarker=False)
    assert isinstance(stock.text_encoder_2, FixClipTextEncoderWithProjection)
    assert stock.text_encoder_2.config.hidden_state == "penultimate"
    assert stock.tokenizer_2.model_max_length == 248


# -- modular diffusers ---------------------------------------------------------------------------------------


@pytest.fixture
def modular(shared):
    blocks = StableDiffusionXLAutoBlocks()
    blocks.sub_blocks["text_encoder"] = FixClipStableDiffusionXLTextStep()
    pipe = quiet(blocks.init_pipeline())
    pipe.update_components(**{name: part for name, part in shared.components.items() if part is not None})
    return pipe


def modular_picture(pipe, **inputs):
    settings = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np", "output": "images"}
    return pipe(**{**settings, **inputs, "generator": torch.Generator().manual_seed(1)})


@pytest.mark.parametrize("negative", [None, "bad"])
def test_a_modular_workflow_draws_what_the_pipeline_draws(modular, ours, negative):
    modular.guider.guidance_scale = 5.0
    for prompt, options in ((SHORT, {}), (LONG, {}), (LONG, {"conditioning": "chunks", "clip_skip": 1})):
        expected = picture(ours, prompt, negative_prompt=negative, **options)
        found = modular_picture(modular, prompt=prompt, negative_prompt=negative, **options)
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_other_modular_workflows_take_the_step(modular, ours):
    """Image to image, inpainting and ControlNet; the embeds are those of the pipeline."""
    blank, mask = Image.new("RGB", (16, 16)), Image.new("L", (16, 16), 255)
    wanted = ours.encode_prompt(LONG, negative_prompt="bad")
    modular.update_components(controlnet=controlnet_of(ours.unet))
    for inputs in ({"image": blank}, {"image": blank, "mask_image": mask}, {"control_image": blank}):
        arguments = {"prompt": LONG, "negative_prompt": "bad", **inputs, "num_inference_steps": 4, "strength": 0.5}
        assert np.isfinite(modular_picture(modular, **arguments)).all()
        state = modular(**arguments, height=16, width=16)
        for name, tensor in zip(EMBEDS, wanted, strict=True):
            torch.testing.assert_close(state.get(name), tensor)


def test_a_modular_workflow_with_a_controlnet_draws_what_the_pipeline_draws(modular, ours):
    """The step has the ControlNet pass over the zeros behind the short negative prompt."""
    control = controlnet_of(ours.unet)
    pipe = quiet(StableDiffusionXLControlNetPipeline.from_pipe(ours, controlnet=copy.deepcopy(control)))
    mask_empty_states(pipe.controlnet)
    modular.update_components(controlnet=control)
    modular.guider.guidance_scale = 5.0
    red, blue = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    found, other = (
        modular_picture(modular, prompt=LONG, negative_prompt="bad", control_image=image) for image in (red, blue)
    )
    np.testing.assert_allclose(found, picture(pipe, **embeds_of(ours, LONG), image=red), atol=1e-4)
    assert not np.allclose(found, other, atol=1e-3)


def test_a_modular_workflow_with_an_ip_adapter_draws_what_the_pipeline_draws(modular, folder):
    """Its feature extractor is modular diffusers' own by default; a tiny image encoder needs a smaller one."""
    pipe = load_ip_adapter(quiet(FixClipStableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)))
    modular.update_components(unet=pipe.unet, image_encoder=pipe.image_encoder)
    modular.register_components(feature_extractor=pipe.feature_extractor)
    modular.guider.guidance_scale = 5.0
    red, blue = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    found, other = (
        modular_picture(modular, prompt=LONG, negative_prompt="bad", ip_adapter_image=image) for image in (red, blue)
    )
    np.testing.assert_allclose(found, picture(pipe, LONG, negative_prompt="bad", ip_adapter_image=red), atol=1e-4)
    assert not np.allclose(found, other, atol=1e-3)


def test_the_modular_step_refuses_stock_components(modular, stock):
    modular.update_components(text_encoder=stock.text_encoder)
    with pytest.raises(ValueError, match="text_encoder is a CLIPTextModel and tokenizer a FixClipTokenizer"):
        modular_picture(modular, prompt=LONG)
