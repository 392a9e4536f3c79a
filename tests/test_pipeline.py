"""FixClipStableDiffusionPipeline against the stock pipeline, on tiny real models."""

import json
import logging
import pickle
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import tiny
import tiny_adapter
import torch
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    MultiControlNetModel,
    PipelineQuantizationConfig,
    QuantoConfig,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel

from fixclip_diffusion import (
    FixClipStableDiffusionPipeline,
    FixClipStableDiffusionXLPipeline,
    FixClipTextEncoder,
    FixClipTokenizer,
    TextAdapter,
)
from fixclip_diffusion.conditioning import ALIASES, CONDITIONINGS
from fixclip_diffusion.families import STABLE_DIFFUSION, STABLE_DIFFUSION_XL
from fixclip_diffusion.loading import load_components
from fixclip_diffusion.state_mask import mask_empty_states, state_mask
from fixclip_diffusion.tiny import clip_text_config, unet

SHORT = "A red horse near a boat"
LONG = tiny.sentences(14)  # 78..248 tokens
VERY_LONG = tiny.sentences(60)  # more than 2 * 248 tokens


def picture(pipe, prompt=None, seed=1, **kwargs):
    batch = len(prompt) if isinstance(prompt, list) else 1
    pipe.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(seed + i) for i in range(batch * kwargs.get("num_images_per_prompt", 1))]
    settings = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np", "generator": generator}
    return pipe(prompt, **{**settings, **kwargs}).images


class SkippableTextModel(torch.nn.Module):
    """The stock encoder with the attribute that diffusers' clip_skip looks for (diffusers#14124)."""

    def __init__(self, text_model):
        super().__init__()
        self.text_model, self.config = text_model, text_model.config
        self.dtype, self.device = text_model.dtype, text_model.device

    def forward(self, *args, **kwargs):
        return self.text_model(*args, **kwargs)


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def folder(request, base_folders):
    return base_folders[request.param]


@pytest.fixture(scope="module")
def stock(folder):
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    assert type(pipe.text_encoder) is CLIPTextModel
    pipe.text_encoder = SkippableTextModel(pipe.text_encoder)
    return pipe


@pytest.fixture(scope="module")
def ours(folder):
    return FixClipStableDiffusionPipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def trained_encoder(tmp_path_factory):
    """An encoder of 248 positions that is not a stretched one, as training leaves it."""
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("trained")
    CLIPTextModel(clip_text_config(max_position_embeddings=248, bos_token_id=49406)).save_pretrained(path)
    return path


# Short prompts: bit-identical to stock.


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompt": SHORT},
        {"prompt": SHORT, "negative_prompt": "bad, blurry"},
        {"prompt": SHORT, "guidance_scale": 1.0},
        {"prompt": [SHORT, "a cat"], "negative_prompt": ["bad", ""]},
        {"prompt": ["a", "b c", "d"], "num_images_per_prompt": 2},
        {"prompt": SHORT, "negative_prompt": "bad", "clip_skip": 1},
        {"prompt": [SHORT, "a cat"], "clip_skip": 2},
        {"prompt": "word " * 75, "negative_prompt": "word " * 75},
        {"prompt": ""},
    ],
    ids=lambda arguments: "-".join(arguments) + f"-{len(str(arguments))}",
)
def test_short_prompts_are_bit_identical_to_stock(stock, ours, arguments):
    assert np.array_equal(picture(ours, **arguments), picture(stock, **arguments))


def test_stock_conditioning_is_bit_identical_to_stock_for_long_prompts_too(stock, ours):
    for arguments in ({"prompt": LONG}, {"prompt": VERY_LONG, "negative_prompt": LONG}):
        expected = picture(stock, **arguments)
        assert np.array_equal(picture(ours, **arguments, conditioning="stock"), expected)
        assert not np.array_equal(picture(ours, **arguments), expected)


# Long prompts, read by every conditioning.


@contextmanager
def read_by(pipe, name):
    pipe.conditioning = name
    try:
        yield pipe
    finally:
        pipe.conditioning = None


def states(pipe, prompt, negative=None, **kwargs):
    return pipe.encode_prompt(prompt, "cpu", 1, True, negative, **kwargs)


@pytest.fixture(params=CONDITIONINGS)
def any_way(ours, request):
    """The pipeline, reading by each conditioning in turn."""
    with read_by(ours, request.param) as pipe:
        yield pipe


def test_an_untrained_encoder_overlaps_its_windows_and_a_trained_one_reads_in_one_pass(ours, folder, trained_encoder):
    assert ours.conditioning == "overlap"
    trained = FixClipStableDiffusionPipeline.from_pretrained(folder, encoder=trained_encoder)
    assert trained.conditioning == "one_pass"
    for name in ("stock", "chunks", "overlap"):
        with pytest.raises(ValueError, match=f"'{name}' needs the original 77 .* use conditioning='one_pass'"):
            picture(trained, LONG, conditioning=name)
    assert trained.conditioning == "one_pass", "a failed call leaves the pipeline as it was"


def test_words_behind_token_77_count_unless_it_is_stock(stock, any_way):
    other = LONG.replace("number 13", "number 12")
    assert other != LONG
    assert np.array_equal(picture(stock, LONG), picture(stock, other))
    equal = any_way.conditioning == "stock"
    assert np.array_equal(picture(any_way, LONG), picture(any_way, other)) == equal
    negative = [picture(any_way, "a", negative_prompt=text) for text in (LONG, other)]
    assert np.array_equal(*negative) == equal


TEXTS = {"short": SHORT, "long": LONG, "very long": VERY_LONG, "empty": ""}


@torch.no_grad()
@pytest.mark.parametrize("clip_skip", [None, 0, 1])
def test_every_row_of_the_embeds_is_a_state_of_its_token(any_way, stock, clip_skip):
    """Row by row against passes of the encoder that are laid out here by hand."""
    encoder = any_way.text_encoder

    def encode(ids):
        model = stock.text_encoder if len(ids) <= 77 else encoder
        if clip_skip is None:
            return model(torch.tensor([ids]))[0][0]
        hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-(clip_skip + 1)]
        return model.text_model.final_layer_norm(hidden)[0]

    for text in TEXTS.values():
        embeds = any_way.encode_prompt(text, "cpu", 1, False, clip_skip=clip_skip)[0][0]
        layout = any_way.prompt_encoder.lay_out(text)
        whole = any_way.tokenizer(text).input_ids
        start, words, end = whole[0], whole[1:-1], whole[-1]
        assert len(embeds) == len(layout)
        if len(whole) <= 77:
            padding = [any_way.tokenizer.pad_token_id] * (77 - len(whole))
            assert torch.equal(embeds, encode([*whole, *padding]))
            continue
        rows = 0
        for row, token in enumerate(layout.token_L.tolist()):
            if token < 0:
                continue
            rows += 1
            first, last = next(r for r in layout.pass_tokens() if r[0] <= token < r[1])
            if any_way.conditioning == "overlap":
                first = next(s for s in range(0, 1000, 35) if token < s + 75)
                last = first + 75
            place = token - first + 1
            piece = [start, *words[first:last], end]
            # What is read of a pass of 78 tokens and more takes the long positions.
            torch.testing.assert_close(embeds[row], encode(piece)[place], rtol=1e-4, atol=1e-5)
        assert rows == (75 if any_way.conditioning == "stock" else len(words)), "every token once"


def test_lengths_of_embeds(ours):
    num_tokens = len(ours.tokenizer(LONG).input_ids)
    expected = {"stock": 77, "chunks": 2 * 77, "overlap": num_tokens, "one_pass": num_tokens}
    for name, length in expected.items():
        with read_by(ours, name):
            assert states(ours, LONG)[0].shape == (1, length, 32)
            assert states(ours, SHORT)[0].shape == (1, 77, 32)


@pytest.mark.parametrize("negative", ["bad", LONG, VERY_LONG])
def test_neither_half_of_guidance_is_cut(any_way, negative):
    """Each half holds its own rows, and zeros behind them."""
    for prompt in (SHORT, LONG, VERY_LONG):
        halves = states(any_way, prompt, negative)
        assert halves[0].shape == halves[1].shape
        for text, half in zip((prompt, negative), halves, strict=True):
            own = any_way.encode_prompt(text, "cpu", 1, False)[0]
            torch.testing.assert_close(half[:, : own.shape[1]], own)
            assert not half[:, own.shape[1] :].any()
    assert picture(any_way, prompt, negative_prompt=negative).shape == (1, 16, 16, 3)


def test_a_text_goes_on_behind_an_end_token_that_is_written_in_it(any_way):
    """Captions by a language model may hold one; stock CLIP reads on behind it, too."""
    first, rest = LONG[:100], LONG[100:]
    found = any_way.encode_prompt(f"{first} <|endoftext|> {rest}", "cpu", 1, False)[0][0]
    assert found.any(-1).all()
    assert (len(found) > 77) == (any_way.conditioning != "stock")


def test_each_prompt_of_a_batch_is_drawn_as_if_alone(any_way):
    """Whatever the lengths of the others and of the negative prompts."""
    prompts, negatives = [SHORT, VERY_LONG, LONG, "a cat"], ["bad", LONG, "", VERY_LONG]
    together = picture(any_way, prompts, negative_prompt=negatives)
    for number, (prompt, negative) in enumerate(zip(prompts, negatives, strict=True)):
        alone = picture(any_way, prompt, seed=1 + number, negative_prompt=negative)
        np.testing.assert_allclose(together[number], alone[0], rtol=0, atol=1e-5)


def test_a_trained_encoder_draws_each_prompt_of_a_batch_as_if_alone(folder, trained_encoder, tmp_path):
    """With padding masked, as an export says: one pass of as many rows as each prompt has tokens."""
    encoder = FixClipTextEncoder.from_pretrained(trained_encoder)
    encoder.config.padding = "mask"
    encoder.save_pretrained(tmp_path)
    pipe = FixClipStableDiffusionPipeline.from_pretrained(folder, encoder=tmp_path)
    assert pipe.prompt_encoder.encodings[0].context.padding == "mask"
    prompts = [SHORT, LONG, tiny.sentences(9)]
    together = picture(pipe, prompts, negative_prompt="bad")
    for number, prompt in enumerate(prompts):
        alone = picture(pipe, prompt, seed=1 + number, negative_prompt="bad")
        np.testing.assert_allclose(together[number], alone[0], rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"kind": "mlp"},
        {"kind": "attention"},  # as in version 0.1: it attends to padding
        {"kind": "attention", "mask_padding": True},
        {"kind": "attention", "mask_padding": True, "scope": "text"},
        {"kind": "attention", "mask_padding": True, "scope": "text", "rotary": True, "causal_heads": 2},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_no_row_of_a_batch_depends_on_another_behind_any_adapter(any_way, options):
    encoder, prompts = any_way.text_encoder, [SHORT, LONG, tiny.sentences(9), VERY_LONG]
    encoder.set_adapter_module(tiny_adapter.randomize(TextAdapter(32, num_heads=4, hidden_width=16, **options)))
    try:
        together = any_way.encode_prompt(prompts, "cpu", 1, False)[0]
        for number, prompt in enumerate(prompts):
            alone = any_way.encode_prompt(prompt, "cpu", 1, False)[0][0]
            torch.testing.assert_close(together[number, : len(alone)], alone, rtol=1e-5, atol=1e-5)
            assert not together[number, len(alone) :].any()
    finally:
        encoder.set_adapter_module(None)


def test_without_the_mask_a_batch_would_matter(ours):
    """The test above can fail. In float64, where a masked row is worth nothing, and a prompt alone is what it is."""
    unet = UNet2DConditionModel.from_config(ours.unet.config)
    unet.load_state_dict(ours.unet.state_dict())
    unet.double()
    embeds = ours.encode_prompt([SHORT, LONG], "cpu", 1, False)[0].double()
    sample = torch.zeros(2, 4, 8, 8, dtype=torch.float64)
    plain = unet(sample, 1, embeds)[0]
    mask_empty_states(unet)
    mask_empty_states(unet)
    assert len(unet._forward_pre_hooks) == 1
    alone = unet(sample[:1], 1, embeds[:1, :77])[0]
    torch.testing.assert_close(unet(sample, 1, embeds)[0][:1], alone, rtol=0, atol=1e-10)
    assert (plain[:1] - alone).abs().max() > 1e-3
    assert torch.equal(unet(sample[1:], 1, embeds[1:])[0], unet(sample[1:], 1, embeds[1:].clone())[0])


def test_where_the_mask_is_put(ours):
    """On the UNet as it is called, compiled or not; on each block of a ControlNet, or of several, that attends."""
    unet = UNet2DConditionModel.from_config(ours.unet.config)
    compiled = torch.compile(unet)
    mask_empty_states(compiled)
    nets = [ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16)) for _ in range(2)]
    mask_empty_states(MultiControlNetModel(nets))
    compiled_net = torch.compile(nets[0])
    mask_empty_states(compiled_net)
    assert not compiled_net._forward_pre_hooks, "a ControlNet takes no mask itself"
    assert len(compiled._forward_pre_hooks) == 1
    assert not any(part._forward_pre_hooks for part in unet.modules())
    for net in nets:
        hooked = [name for name, part in net.named_modules() if part._forward_pre_hooks]
        assert hooked == ["down_blocks.1", "mid_block"]
        assert all(len(net.get_submodule(name)._forward_pre_hooks) == 1 for name in hooked)


def test_a_call_with_rows_in_use_everywhere_is_left_alone(ours):
    assert state_mask(torch.ones(2, 5, 3)) is None
    assert state_mask(torch.zeros(2, 5, 3)) is None, "an empty prompt of zeros is one in use"
    states_BLD = torch.ones(2, 5, 3)
    states_BLD[0, 1] = 0
    assert state_mask(states_BLD) is None, "a row of zeros before others is in use"
    states_BLD[1, 3:] = 0
    assert state_mask(states_BLD).tolist() == [[True] * 5, [True] * 3 + [False] * 2]


def test_inference_mode_draws_the_same_and_its_embeds_serve_outside(ours):
    expected = picture(ours, LONG)
    with torch.inference_mode():
        assert np.array_equal(picture(ours, LONG), expected)
        positive, negative = states(ours, LONG)
    assert np.array_equal(picture(ours, prompt_embeds=positive, negative_prompt_embeds=negative), expected)


def test_a_unet_that_has_drawn_can_be_pickled(ours):
    embeds = ours.encode_prompt([SHORT, LONG], "cpu", 1, False)[0]
    sample = torch.zeros(2, 4, 8, 8)
    picture(ours, [SHORT, LONG])
    again = pickle.loads(pickle.dumps(ours.unet))
    mask_empty_states(again)
    assert len(again._forward_pre_hooks) == 1
    with torch.no_grad():
        assert torch.equal(again(sample, 1, embeds)[0], ours.unet(sample, 1, embeds)[0])


def test_conditioning_of_one_call_and_of_the_pipeline(ours, folder, tmp_path):
    by_call = picture(ours, VERY_LONG, conditioning="chunks")
    assert ours.conditioning == "overlap"
    pipe = FixClipStableDiffusionPipeline.from_pretrained(folder, conditioning="chunks")
    assert np.array_equal(picture(pipe, VERY_LONG), by_call)
    pipe.save_pretrained(tmp_path)
    assert FixClipStableDiffusionPipeline.from_pretrained(tmp_path).conditioning == "chunks"
    assert len({picture(ours, LONG, conditioning=name).tobytes() for name in CONDITIONINGS}) == len(CONDITIONINGS)


@pytest.mark.parametrize("made_by", ["from_pretrained", "from_pipe"])
def test_what_is_given_decides_how_prompts_are_read_and_not_what_was_saved(folder, trained_encoder, tmp_path, made_by):
    first = FixClipStableDiffusionPipeline.from_pretrained(folder, conditioning="chunks")
    first.save_pretrained(tmp_path)
    make = getattr(FixClipStableDiffusionPipeline, made_by)
    source = tmp_path if made_by == "from_pretrained" else first
    adapter = TextAdapter(32, conditioning="overlap")
    encoder = FixClipTextEncoder.from_pretrained(trained_encoder)
    for given, expected in (
        ({}, "chunks"),
        ({"adapter": None}, "chunks"),
        ({"adapter": adapter}, "overlap"),
        ({"encoder": trained_encoder}, "one_pass"),
        ({"encoder": encoder}, "one_pass"),
        ({"text_encoder": encoder}, "one_pass"),
        ({"adapter": adapter, "conditioning": "chunks"}, "chunks"),
    ):
        pipe = make(source, **given)
        assert pipe.conditioning == expected
        pipe.save_pretrained(tmp_path / "again")
        assert FixClipStableDiffusionPipeline.from_pretrained(tmp_path / "again").conditioning == expected
    assert first.conditioning == "chunks"


@pytest.mark.parametrize(("old", "new"), ALIASES.items())
def test_names_of_version_0_1(ours, folder, tmp_path, old, new):
    with pytest.warns(FutureWarning, match=f"long_prompt='{old}' is now conditioning='{new}'"):
        by_old = picture(ours, LONG, long_prompt=old)
    assert np.array_equal(by_old, picture(ours, LONG, conditioning=new))
    ours.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "conditioning": None, "long_prompt": old}))
    with pytest.warns(FutureWarning):
        assert FixClipStableDiffusionPipeline.from_pretrained(tmp_path).conditioning == new
    for given in CONDITIONINGS:
        assert FixClipStableDiffusionPipeline.from_pretrained(tmp_path, conditioning=given).conditioning == given
    with pytest.raises(ValueError, match=r"give conditioning= alone"):
        FixClipStableDiffusionPipeline.from_pretrained(folder, conditioning=new, long_prompt=old)


def test_prompt_embeds(ours):
    positive, negative = states(ours, LONG, "bad")
    expected = picture(ours, LONG, negative_prompt="bad")
    actual = picture(ours, prompt_embeds=positive, negative_prompt_embeds=negative)
    assert np.array_equal(actual, expected)
    # One half as states, the other as text, in all combinations of lengths.
    assert np.array_equal(picture(ours, prompt_embeds=positive, negative_prompt="bad"), expected)
    assert np.array_equal(picture(ours, LONG, negative_prompt_embeds=negative), expected)
    short, _ = ours.encode_prompt(SHORT, "cpu", 1, False)
    assert np.array_equal(picture(ours, prompt_embeds=short), picture(ours, SHORT))
    for text in (LONG, VERY_LONG):
        halves = ours.encode_prompt(None, "cpu", 1, True, text, prompt_embeds=short)
        assert halves[0].shape == halves[1].shape
        assert torch.equal(halves[0][:, :77], short)
        assert not halves[0][:, 77:].any()


@pytest.mark.parametrize("num_images", [1, 3])
def test_num_images_per_prompt_and_clip_skip_of_long_prompts(any_way, num_images):
    images = picture(any_way, [LONG, VERY_LONG], num_images_per_prompt=num_images, clip_skip=1)
    assert images.shape == (2 * num_images, 16, 16, 3)
    skipped, unskipped = states(any_way, LONG, LONG, clip_skip=1)
    assert not torch.equal(skipped, unskipped), "stock diffusers reads negative prompts without clip_skip"


# Save and load.


@pytest.mark.parametrize("reader", [FixClipStableDiffusionPipeline, DiffusionPipeline, StableDiffusionPipeline])
@pytest.mark.parametrize("kind", ["mlp", "attention", None])
def test_save_and_load_matrix(folder, tmp_path, reader, kind):
    adapter = None
    if kind:
        adapter = TextAdapter(32, kind, num_heads=4)
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    pipe = FixClipStableDiffusionPipeline.from_pretrained(folder, adapter=adapter)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["text_encoder"] == ["fixclip_diffusion", "FixClipTextEncoder"]
    assert index["tokenizer"] == ["fixclip_diffusion", "FixClipTokenizer"]
    again = reader.from_pretrained(tmp_path)
    assert isinstance(again.text_encoder, FixClipTextEncoder)
    assert isinstance(again.tokenizer, FixClipTokenizer)
    if reader is StableDiffusionPipeline:  # pads every prompt to 248 tokens, whatever the class of the encoder
        pipe = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    assert np.array_equal(picture(again, LONG, negative_prompt="bad"), picture(pipe, LONG, negative_prompt="bad"))
    if reader is not StableDiffusionPipeline:
        assert type(again) is FixClipStableDiffusionPipeline
        assert np.array_equal(picture(again, SHORT), picture(pipe, SHORT))


def test_trained_encoder_and_adapter_from_folders(sd1, trained_encoder, tmp_path):
    adapter = TextAdapter(32)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    adapter.save_pretrained(tmp_path / "adapter")
    plain = FixClipStableDiffusionPipeline.from_pretrained(sd1, encoder=trained_encoder)
    adapted = FixClipStableDiffusionPipeline.from_pretrained(sd1, encoder=trained_encoder, adapter=tmp_path / "adapter")
    assert plain.text_encoder.short_context_length == 0
    assert states(plain, SHORT)[0].shape[1] == 248, "a trained encoder reads everything at 248 positions"
    torch.testing.assert_close(states(adapted, LONG)[0], adapter(states(plain, LONG)[0]))
    adapted.save_pretrained(tmp_path / "pipe")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "pipe")
    assert np.array_equal(picture(again, LONG), picture(adapted, LONG))
    with pytest.raises(ValueError, match="conditioning='chunks' needs the original 77"):
        picture(plain, LONG, long_prompt="windows_77")


def test_a_trained_encoder_with_the_bases_weights_draws_short_prompts_as_stock_does(
    folder, stock, trained_encoder, tmp_path
):
    encoder = FixClipTextEncoder.from_pretrained(trained_encoder)
    trained = FixClipStableDiffusionPipeline.from_pretrained(folder, encoder=trained_encoder)
    encoder.set_short_weights(stock.text_encoder)
    adapter = TextAdapter(32, short_texts=False)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    encoder.set_adapter_module(adapter)
    encoder.save_pretrained(path := tmp_path / "with_short_weights")
    pipe = FixClipStableDiffusionPipeline.from_pretrained(folder, encoder=path)
    assert pipe.text_encoder.adapter is not None
    for arguments in ({}, {"negative_prompt": "bad"}, {"clip_skip": 1}):
        assert np.array_equal(picture(pipe, SHORT, **arguments), picture(stock, SHORT, **arguments))
        assert not np.array_equal(picture(trained, SHORT, **arguments), picture(stock, SHORT, **arguments))
        assert not np.array_equal(picture(pipe, LONG, **arguments), picture(stock, LONG, **arguments))


def test_encoder_folder_with_a_tokenizer_beside_it(sd1, trained_encoder, tmp_path):
    shutil.copytree(trained_encoder, tmp_path / "export" / "text_encoder")
    pipe = FixClipStableDiffusionPipeline.from_pretrained(sd1, encoder=tmp_path / "export")
    expected = FixClipStableDiffusionPipeline.from_pretrained(sd1, encoder=trained_encoder)
    assert torch.equal(states(pipe, LONG)[0], states(expected, LONG)[0])


def test_sd2_drops_the_last_layer_of_a_whole_encoder(base_folders, tmp_path):
    config = clip_text_config(hidden_act="gelu", num_hidden_layers=4, bos_token_id=49406, eos_token_id=49407)
    CLIPTextModel(config).save_pretrained(tmp_path)
    pipe = FixClipStableDiffusionPipeline.from_pretrained(base_folders["sd2"], encoder=tmp_path)
    assert pipe.text_encoder.config.num_hidden_layers == 3
    assert pipe.text_encoder.config.hidden_act == "gelu"
    assert pipe.tokenizer.pad_token_id == 0


def test_components_of_a_stock_pipeline_in_memory(sd1):
    stock = StableDiffusionPipeline.from_pretrained(sd1)
    pipe = FixClipStableDiffusionPipeline.from_pretrained(sd1, text_encoder=stock.text_encoder, unet=stock.unet)
    assert pipe.unet is stock.unet
    assert np.array_equal(picture(pipe, SHORT), picture(stock, SHORT))


@pytest.mark.parametrize("xl", [False, True])
def test_text_encoders_go_where_the_other_parts_are_loaded_to(sd1, sdxl, xl):
    """The meta device stands for a GPU, as diffusers takes none that is not there."""
    family, base = (STABLE_DIFFUSION_XL, sdxl) if xl else (STABLE_DIFFUSION, sd1)
    parts = load_components(family, str(base), {}, {"text_encoder": TextAdapter(32)}, {"device_map": "meta"})
    for tower in family.towers:
        assert {part.device.type for part in parts[tower.encoder].parameters()} == {"meta"}
    with pytest.raises(ValueError, match=r"device_map='balanced': .* valid is one device, such as 'cuda'"):
        load_components(family, str(base), {}, {}, {"device_map": "balanced"})


@pytest.mark.parametrize("xl", [False, True])
def test_text_encoders_are_not_quantized_without_a_word(sd1, sdxl, xl):
    family, base = (STABLE_DIFFUSION_XL, sdxl) if xl else (STABLE_DIFFUSION, sd1)
    encoder, int8 = family.towers[-1].encoder, QuantoConfig("int8")
    backend = {"quant_backend": "bitsandbytes_8bit", "quant_kwargs": {"load_in_8bit": True}}

    def load(config, **kwargs):
        return load_components(family, str(base), {}, {}, {"quantization_config": config, **kwargs})

    unet_alone = PipelineQuantizationConfig(quant_mapping={"unet": int8})
    assert load(unet_alone)["quantization_config"] is unet_alone, "diffusers quantizes what it loads"
    for config in (
        PipelineQuantizationConfig(quant_mapping={"unet": int8, encoder: int8}),
        PipelineQuantizationConfig(**backend, components_to_quantize=["unet", encoder]),
        PipelineQuantizationConfig(**backend),
    ):
        with pytest.raises(ValueError, match=rf"for .*{encoder}, too: .* components_to_quantize=\['unet'\]"):
            load(config)
        loaded = {tower.encoder: None for tower in family.towers}
        assert load(config, **loaded)["quantization_config"] is config, "none is loaded"


# Bad input: one clear error, before anything expensive.


def refuse(message, *args, **kwargs):
    with pytest.raises(ValueError, match=message):
        FixClipStableDiffusionPipeline.from_pretrained(*args, **kwargs)


def test_encoder_without_its_tokenizer(sd1):
    stock = StableDiffusionPipeline.from_pretrained(sd1)
    encoder = FixClipTextEncoder.from_clip(stock.text_encoder)
    refuse("FixClipTextEncoder and tokenizer a CLIPTokenizer", sd1, text_encoder=encoder, tokenizer=stock.tokenizer)
    with pytest.raises(ValueError, match="needs FixClipTextEncoder and FixClipTokenizer together"):
        FixClipStableDiffusionPipeline(**{**stock.components, "text_encoder": encoder}, requires_safety_checker=False)


def test_tokenizer_of_another_length(sd1):
    tokenizer = FixClipTokenizer.from_pretrained(sd1, subfolder="tokenizer", context_length=100)
    refuse("reads 248 tokens and the tokenizer gives 100", sd1, tokenizer=tokenizer)


def test_encoder_of_another_width_is_found_in_the_configs(sd1, tmp_path):
    CLIPTextModel(clip_text_config(hidden_size=64)).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()  # would be an error of its own if it were read
    refuse("the text encoder is 64 wide, but the UNet's cross-attention takes 32", sd1, encoder=tmp_path)
    refuse(
        "the text encoder is 32 wide, but the UNet's cross-attention takes 16", sd1, unet=unet(cross_attention_dim=16)
    )


def test_unknown_base(tmp_path):
    refuse("neither a folder nor a hub name like owner/model", tmp_path / "nowhere")
    refuse("neither a folder nor a hub name like owner/model", "no-slash")
    refuse("is a folder without model_index.json", tmp_path)
    refuse("base 'someone/no-such-model'.*model_index.json could not be read", "someone/no-such-model")


def test_base_of_another_kind(sd1, tmp_path):
    index = json.loads((sd1 / "model_index.json").read_text())
    for changes, message in (
        ({"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}, "not a Stable Diffusion 1.x or 2.x"),
        ({"unet": None}, "it has no unet"),
    ):
        changed = {key: value for key, value in {**index, **changes}.items() if value is not None}
        (tmp_path / "model_index.json").write_text(json.dumps(changed))
        refuse(message, tmp_path)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_damaged_weights_are_named(sd1, tmp_path, part):
    base = tmp_path / "base"
    shutil.copytree(sd1, base)
    file = next((base / part).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:2000])
    refuse(f"{part}/{file.name} is damaged", base)
    shutil.rmtree(base / part)
    refuse(f"model_index.json names {part}, but there is no such folder", base)


def test_unknown_mode_and_prompts_that_are_no_text(sd1, ours):
    refuse("conditioning='chunk': valid are stock, chunks, overlap, one_pass", sd1, conditioning="chunk")
    refuse("weights='a1': valid are 'a1111', 'compel'", sd1, weights="a1")
    with pytest.raises(ValueError, match="conditioning='no': valid are"):
        ours("a", conditioning="no")
    with pytest.raises(ValueError, match="3 negative prompts for 2 prompts"):
        states(ours, ["a", "b"], ["x", "y", "z"])
    with pytest.raises(ValueError, match="a prompt must be a text or a list of texts, got \\[5\\]"):
        states(ours, [5])
    with pytest.raises(ValueError, match="a text or a list of texts, got \\[\\]"):
        ours([])
    with pytest.raises(ValueError, match="token_report takes one text, got NoneType"):
        ours.token_report(None)
    with pytest.raises(ValueError, match="clip_skip=20: this text encoder has 3 layers"):
        ours("a", clip_skip=20)
    refuse("unknown argument encodr=: did you mean encoder=", sd1, encodr="x")


@pytest.mark.parametrize("xl", [False, True])
@pytest.mark.parametrize("absent", ["never loaded", "set to None", "deleted", "stock"])
def test_text_encoders_that_are_not_there_or_stock_are_one_clear_error(sd1, sdxl, xl, absent):
    kind, base = (FixClipStableDiffusionXLPipeline, sdxl) if xl else (FixClipStableDiffusionPipeline, sd1)
    options = {"add_watermarker": False} if xl else {}
    pipe = kind.from_pretrained(base, **options)
    embeds = pipe.encode_prompt(LONG, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    towers = kind.family.towers
    parts = [part for tower in towers for part in (tower.encoder, tower.tokenizer)]
    message = "there is no text_encoder.* to read prompts with: pass prompt_embeds= and negative_prompt_embeds="
    if absent == "never loaded":
        pipe = kind.from_pretrained(base, **dict.fromkeys(parts), **options)
    elif absent == "stock":
        message = f"{towers[-1].encoder} is a CLIPTextModel.*: this pipeline needs FixClipTextEncoder.* from_pretrained"
        stock = DiffusionPipeline.from_pretrained(base)
        setattr(pipe, towers[-1].encoder, getattr(stock, towers[-1].encoder))
    else:
        for part in parts:
            setattr(pipe, part, None)
            if absent == "deleted":
                delattr(pipe, part)
    for use in (
        lambda: picture(pipe, LONG),
        lambda: pipe.token_report("x"),
        lambda: pipe.conditioning,
        lambda: pipe.prompt_encoder,
    ):
        with pytest.raises(ValueError, match=message):
            use()
    if absent in ("never loaded", "set to None"):
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        given = dict(zip(names, embeds, strict=False))
        assert picture(pipe, **given).shape == (1, 16, 16, 3)
        pooled = {"pooled_prompt_embeds": embeds[2]} if xl else {}
        with pytest.raises(ValueError, match=message):
            picture(pipe, prompt_embeds=embeds[0], negative_prompt="bad", **pooled)
        pipe.conditioning = "chunks"
        assert pipe.config.conditioning == "chunks"


def test_a_compiled_text_encoder_is_one(ours, folder):
    pipe = FixClipStableDiffusionPipeline.from_pretrained(folder)
    pipe.text_encoder = torch.compile(pipe.text_encoder, backend="eager")
    assert pipe.token_report(LONG) == ours.token_report(LONG)
    assert pipe.conditioning == "overlap"


def test_both_encoder_arguments(sd1):
    encoder = FixClipTextEncoder.from_pretrained(sd1, subfolder="text_encoder")
    refuse("either encoder= or text_encoder=", sd1, encoder=encoder, text_encoder=encoder)
    refuse("adapter= needs a text encoder", sd1, text_encoder=None, tokenizer=None, adapter=TextAdapter(32))


def test_a_stock_pipeline_that_reads_long_texts_at_once_is_told(sd1, caplog):
    ours = FixClipStableDiffusionPipeline.from_pretrained(sd1)
    other = StableDiffusionPipeline.from_pretrained(sd1, text_encoder=ours.text_encoder, tokenizer=ours.tokenizer)
    with caplog.at_level(logging.WARNING, logger="fixclip_diffusion"):
        for conditioning in CONDITIONINGS:  # as the user says
            with read_by(ours, conditioning) as pipe:
                states(pipe, LONG)
        other.encode_prompt(SHORT, "cpu", 1, False)
        assert not caplog.messages
        for _ in range(2):
            other.encode_prompt([SHORT, LONG], "cpu", 1, False)
    (message,) = caplog.messages
    assert all(part in message for part in ("tokens at once", "conditioning='overlap'", "prompt_embeds="))


def test_an_encoder_that_was_trained_for_one_pass_reads_it_without_a_word(sd1, trained_encoder, caplog):
    ours = FixClipStableDiffusionPipeline.from_pretrained(sd1, encoder=trained_encoder)
    other = StableDiffusionPipeline.from_pretrained(sd1, text_encoder=ours.text_encoder, tokenizer=ours.tokenizer)
    with caplog.at_level(logging.WARNING, logger="fixclip_diffusion"):
        other.encode_prompt(LONG, "cpu", 1, False)
    assert not caplog.messages


@torch.no_grad()
@pytest.mark.parametrize("made_by", ["from_pretrained", "from_pipe"])
def test_an_adapter_is_put_on_a_copy_of_the_encoder_that_was_given(folder, stock, made_by):
    """Whoever holds encoder and adapter, other pipelines among them, goes on with them as they were."""
    encoder = FixClipTextEncoder.from_clip(stock.text_encoder)
    adapter = TextAdapter(32)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    values = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    first = FixClipStableDiffusionPipeline.from_pretrained(folder, encoder=encoder)
    before = first.encode_prompt(LONG, "cpu", 1, False)[0]
    source = folder if made_by == "from_pretrained" else stock
    second = getattr(FixClipStableDiffusionPipeline, made_by)(source, encoder=encoder, adapter=adapter)
    second.text_encoder.to(torch.float16)
    assert next(second.text_encoder.adapter.parameters()).dtype == torch.float16
    assert torch.equal(first.encode_prompt(LONG, "cpu", 1, False)[0], before)
    assert first.text_encoder.adapter is encoder.adapter is encoder.config.adapter is None
    assert all(torch.equal(tensor, values[name]) for name, tensor in adapter.state_dict().items())
    assert encoder.dtype == torch.float32
