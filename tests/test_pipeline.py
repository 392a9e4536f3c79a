"""FixClipStableDiffusionPipeline against the stock pipeline, on tiny real models."""

import json
import logging
import shutil

import numpy as np
import pytest
import tiny
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from transformers import CLIPTextModel

from fixclip_diffusion import FixClipStableDiffusionPipeline, FixClipTextEncoder, FixClipTokenizer, TextAdapter
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


def test_truncate_77_is_bit_identical_to_stock_for_long_prompts_too(stock, ours):
    for arguments in ({"prompt": LONG}, {"prompt": VERY_LONG, "negative_prompt": LONG}):
        expected = picture(stock, **arguments)
        assert np.array_equal(picture(ours, **arguments, long_prompt="truncate_77"), expected)
        assert not np.array_equal(picture(ours, **arguments), expected)


# Long prompts.


def states(pipe, prompt, negative=None, **kwargs):
    return pipe.encode_prompt(prompt, "cpu", 1, True, negative, **kwargs)


def test_78_to_248_tokens_take_one_pass_at_248_positions(ours):
    ids = ours.tokenizer([LONG], padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert ids.shape == (1, 248)
    positive, negative = states(ours, LONG)
    assert torch.equal(positive, ours.text_encoder(ids)[0])
    assert negative.shape == positive.shape


def test_words_behind_token_77_count(stock, ours):
    other = LONG.replace("number 13", "number 12")
    assert other != LONG
    assert np.array_equal(picture(stock, LONG), picture(stock, other))
    assert not np.array_equal(picture(ours, LONG), picture(ours, other))
    assert not np.array_equal(picture(ours, "a", negative_prompt=LONG), picture(ours, "a", negative_prompt=other))


@pytest.mark.parametrize(
    ("prompt", "negative", "length"),
    [
        (SHORT, "bad", 77),
        (LONG, "bad", 248),
        (SHORT, LONG, 248),
        (VERY_LONG, "bad", 3 * 248),
        (SHORT, VERY_LONG, 3 * 248),
        (LONG, VERY_LONG, 3 * 248),
    ],
)
def test_neither_half_of_guidance_is_cut(ours, prompt, negative, length):
    positive, negative_states = states(ours, prompt, negative)
    assert positive.shape == negative_states.shape == (1, length, 32)
    if length > 77:
        context = 248
        for text, half in ((prompt, positive), (negative, negative_states)):
            own = ours.encode_prompt(text, "cpu", 1, False, negative if length == 248 else None)[0]
            windows = own.shape[1] // context if own.shape[1] % context == 0 else 0
            assert torch.equal(half[:, : windows * context], own[:, : windows * context])
    assert picture(ours, prompt, negative_prompt=negative).shape == (1, 16, 16, 3)


def test_windows_are_the_states_of_their_texts(ours):
    windows = ours.token_report(VERY_LONG).windows
    assert len(windows) == 3
    positive, negative = states(ours, VERY_LONG, "bad")
    for index, window in enumerate(windows):
        ids = ours.tokenizer([window.text], padding="max_length", truncation=True, return_tensors="pt").input_ids
        assert torch.equal(positive[:, 248 * index : 248 * (index + 1)], ours.text_encoder(ids)[0])
    empty = ours.tokenizer([""], padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(negative[:, 248:496], ours.text_encoder(empty)[0])


def test_a_batch_of_mixed_lengths(ours):
    together, _ = states(ours, [SHORT, VERY_LONG, LONG])
    assert together.shape == (3, 3 * 248, 32)
    alone, _ = states(ours, VERY_LONG)
    torch.testing.assert_close(together[1:2], alone)


def test_truncate_quotes_what_it_drops(ours, caplog):
    with _diffusers_warnings(caplog):
        ours.encode_prompt(VERY_LONG, "cpu", 1, False)
        assert not caplog.records
        ours.long_prompt = "truncate"
        try:
            truncated, _ = ours.encode_prompt(VERY_LONG, "cpu", 1, False)
        finally:
            ours.long_prompt = "windows"
    assert truncated.shape[1] == 248
    ids = ours.tokenizer([VERY_LONG], padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(truncated, ours.text_encoder(ids)[0])
    assert "number 5 9" in caplog.text
    assert "248" in caplog.text


class _diffusers_warnings:  # noqa: N801
    """diffusers' loggers do not propagate, so caplog needs to be attached."""

    def __init__(self, caplog):
        self.caplog = caplog

    def __enter__(self):
        self.logger = logging.getLogger("diffusers")
        self.logger.addHandler(self.caplog.handler)
        self.level = self.logger.level
        self.logger.setLevel(logging.WARNING)

    def __exit__(self, *_):
        self.logger.removeHandler(self.caplog.handler)
        self.logger.setLevel(self.level)


def test_mode_of_one_call_and_of_the_pipeline(ours, folder, tmp_path):
    by_call = picture(ours, VERY_LONG, long_prompt="truncate")
    assert ours.long_prompt == "windows"
    pipe = FixClipStableDiffusionPipeline.from_pretrained(folder, long_prompt="truncate")
    assert np.array_equal(picture(pipe, VERY_LONG), by_call)
    pipe.save_pretrained(tmp_path)
    assert FixClipStableDiffusionPipeline.from_pretrained(tmp_path).long_prompt == "truncate"


def test_chunks_of_77(ours):
    ours.long_prompt = "windows_77"
    try:
        positive, negative = states(ours, LONG, "bad")
    finally:
        ours.long_prompt = "windows"
    assert positive.shape == negative.shape == (1, 2 * 77, 32)


def overlapping(ours, texts, **kwargs):
    ours.long_prompt = "overlap_77"
    try:
        return states(ours, texts, **kwargs)
    finally:
        ours.long_prompt = "windows"


@pytest.mark.parametrize("clip_skip", [None, 0, 1])
@torch.no_grad()
def test_overlapping_windows_of_77(ours, stock, clip_skip):
    """Token by token, each in a pass of the stock encoder's own; texts that fit are stock's, empty ones follow them."""

    def encode(ids):
        if clip_skip is None:
            return stock.text_encoder(ids)[0]
        hidden = stock.text_encoder(ids, output_hidden_states=True).hidden_states[-(clip_skip + 1)]
        return stock.text_encoder.text_model.final_layer_norm(hidden)

    for text, length in ((LONG, 248), (VERY_LONG, 3 * 248)):
        positive, negative = overlapping(ours, text, clip_skip=clip_skip)
        ids = ours.tokenizer(text).input_ids
        assert 77 < len(ids) <= length == positive.shape[1] == negative.shape[1]
        for place in range(len(ids)):
            start = next(s for s in range(0, 1000, 35) if place <= s + 75 or s + 77 >= len(ids))
            piece = torch.tensor([[ids[0], *ids[1:-1][start : start + 75], ids[-1]]])
            torch.testing.assert_close(positive[0, place], encode(piece)[0, place - start], rtol=1e-4, atol=1e-5)
        assert not positive[0, len(ids) :].any()
        empty = stock.encode_prompt("", "cpu", 1, False)[0]
        torch.testing.assert_close(negative, empty.repeat(1, 10, 1)[:, :length], rtol=1e-4, atol=1e-5)
    both, _ = overlapping(ours, [SHORT, LONG], clip_skip=clip_skip)
    alone, _ = overlapping(ours, LONG, clip_skip=clip_skip)
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-5)
    short, _ = overlapping(ours, SHORT, clip_skip=clip_skip)
    assert torch.equal(short, stock.encode_prompt(SHORT, "cpu", 1, False, clip_skip=clip_skip)[0])
    torch.testing.assert_close(both[:1, :77], short, rtol=1e-4, atol=1e-5)


def test_overlapping_windows_draw(ours):
    by_mode = {mode: picture(ours, LONG, long_prompt=mode) for mode in ("windows", "windows_77", "overlap_77")}
    assert len({image.tobytes() for image in by_mode.values()}) == 3
    assert np.array_equal(picture(ours, SHORT, long_prompt="overlap_77"), picture(ours, SHORT))


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


@pytest.mark.parametrize("num_images", [1, 3])
def test_num_images_per_prompt_and_clip_skip_of_long_prompts(ours, num_images):
    images = picture(ours, [LONG, VERY_LONG], num_images_per_prompt=num_images, clip_skip=1)
    assert images.shape == (2 * num_images, 16, 16, 3)
    skipped, unskipped = states(ours, LONG, LONG, clip_skip=1)
    ids = ours.tokenizer([LONG], padding="max_length", truncation=True, return_tensors="pt").input_ids
    hidden = ours.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
    assert torch.equal(skipped, ours.text_encoder.text_model.final_layer_norm(hidden))
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
    with pytest.raises(ValueError, match="long_prompt='windows_77' needs the original positions"):
        picture(plain, LONG, long_prompt="windows_77")


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
    refuse("long_prompt='chunks': valid are windows, truncate", sd1, long_prompt="chunks")
    with pytest.raises(ValueError, match="long_prompt='no': valid are"):
        ours("a", long_prompt="no")
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


def test_both_encoder_arguments(sd1):
    encoder = FixClipTextEncoder.from_pretrained(sd1, subfolder="text_encoder")
    refuse("either encoder= or text_encoder=", sd1, encoder=encoder, text_encoder=encoder)
    refuse("adapter= needs a text encoder", sd1, text_encoder=None, tokenizer=None, adapter=TextAdapter(32))
