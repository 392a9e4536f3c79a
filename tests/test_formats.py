"""Checkpoints in one file, encoders in one file, and pipelines made of other pipelines."""

import json
import warnings

import numpy as np
import pytest
import tiny
import torch
from diffusers import (
    AutoencoderKL,
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from fixclip_core.weights.text_encoder import CONFIG_FIELDS, CONFIG_KEY
from fixclip_diffusion import (
    FixClipStableDiffusionPipeline,
    FixClipStableDiffusionXLPipeline,
    FixClipTextEncoder,
    TextAdapter,
)
from fixclip_diffusion.families import STABLE_DIFFUSION
from fixclip_diffusion.loading import load_own_encoder
from fixclip_diffusion.prompt_reader import PromptReader
from fixclip_diffusion.tiny import WIDTH, clip_text_config, stable_diffusion_xl, unet

SHORT, LONG = "A red horse near a boat", tiny.sentences(14)
NO_CHECK = {"safety_checker": None, "requires_safety_checker": False}


def picture(pipe, prompt, **kwargs):
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "output_type": "np", "generator": torch.Generator().manual_seed(1)}
    return pipe(prompt, **{**settings, **kwargs}).images


def drawn(pipe, prompt):
    return picture(pipe, prompt, height=16, width=16)


def text_state(model, prefix):
    """Weights as the files have them: `text_model.` behind a prefix."""
    names = model.state_dict().items()
    return {
        prefix + (name if name.startswith("text_") else f"text_model.{name}"): tensor.contiguous()
        for name, tensor in names
    }


def described(model):
    """What files of this project say of themselves; heads of tiny encoders are not 64 wide, as all real ones are."""
    return {CONFIG_KEY: json.dumps({name: getattr(model.config, name) for name in CONFIG_FIELDS})}


def checkpoint(path, model, prefix="cond_stage_model.transformer."):
    others = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(2), "first_stage_model.x": torch.zeros(2)}
    save_file(text_state(model, prefix) | others, path, described(model))
    return path


@pytest.fixture(scope="module")
def stock(sd1):
    return StableDiffusionPipeline.from_pretrained(sd1, **NO_CHECK)


def parts_of(folder):
    """UNet and VAE in diffusers' layout: their single-file conversion is diffusers' own."""
    return {
        "unet": UNet2DConditionModel.from_pretrained(folder, subfolder="unet"),
        "vae": AutoencoderKL.from_pretrained(folder, subfolder="vae"),
        "config": str(folder),
        **NO_CHECK,
    }


@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
def test_a_checkpoint_in_one_file(sd1, stock, tmp_path, kind):
    path = checkpoint(tmp_path / "model.safetensors", stock.text_encoder)
    if kind == "ckpt":
        state = text_state(stock.text_encoder, "cond_stage_model.transformer.")
        path = tmp_path / "model.ckpt"
        torch.save({"state_dict": state | {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(2)}}, path)
        with pytest.raises(ValueError, match="num_attention_heads"):  # a pickle brings no description of tiny heads
            FixClipStableDiffusionPipeline.from_single_file(path, **parts_of(sd1))
        return
    pipe = FixClipStableDiffusionPipeline.from_single_file(path, **parts_of(sd1))
    expected = FixClipStableDiffusionPipeline.from_pretrained(sd1)
    assert pipe.conditioning == "overlap"
    for prompt in (SHORT, LONG):
        assert np.array_equal(drawn(pipe, prompt), drawn(expected, prompt))
    assert np.array_equal(drawn(pipe, SHORT), drawn(stock, SHORT))
    adapter = TextAdapter(WIDTH)
    other = FixClipStableDiffusionPipeline.from_single_file(
        path, adapter=adapter, conditioning="chunks", **parts_of(sd1)
    )
    assert other.text_encoder.adapter is adapter
    assert other.conditioning == "chunks"


def test_a_bases_own_encoder_comes_alone_from_folder_and_file(sd1, stock, tmp_path):
    """As a teacher in training and as the page's comparison need it: without the adapter that a folder holds."""
    path = checkpoint(tmp_path / "model.safetensors", stock.text_encoder)
    adapted = FixClipStableDiffusionPipeline.from_pretrained(sd1, adapter=TextAdapter(WIDTH), **NO_CHECK)
    adapted.save_pretrained(tmp_path / "adapted")
    wanted = FixClipStableDiffusionPipeline.from_pretrained(sd1).text_encoder.state_dict()
    for base in (sd1, path, tmp_path / "adapted"):
        encoder = load_own_encoder(str(base), STABLE_DIFFUSION.towers[0])
        assert encoder.adapter is None
        found = encoder.state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_checkpoint_that_was_trained_with_248_positions_is_used_as_trained(sd1, tmp_path):
    torch.manual_seed(3)
    trained = CLIPTextModel(clip_text_config(max_position_embeddings=248, bos_token_id=49406, eos_token_id=49407))
    path = checkpoint(tmp_path / "long.safetensors", trained.eval())
    pipe = FixClipStableDiffusionPipeline.from_single_file(path, **parts_of(sd1))
    assert pipe.text_encoder.short_context_length == 0
    assert pipe.conditioning == "one_pass"
    ids = pipe.tokenizer([LONG], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(pipe.encode_prompt(LONG, "cpu", 1, False)[0], trained(ids)[0])


def test_an_encoder_alone_in_one_file(sd1, stock, tmp_path):
    torch.manual_seed(4)
    model = CLIPTextModel(clip_text_config(bos_token_id=49406, eos_token_id=49407)).eval()
    model.save_pretrained(tmp_path / "folder")
    expected = FixClipStableDiffusionPipeline.from_pretrained(sd1, encoder=tmp_path / "folder")
    for prefix in ("", "clip_l.transformer.", "model."):
        path = tmp_path / "encoder.safetensors"
        save_file(text_state(model, prefix), path, described(model))
        pipe = FixClipStableDiffusionPipeline.from_pretrained(sd1, encoder=path)
        assert np.array_equal(drawn(pipe, LONG), drawn(expected, LONG))
        swapped = FixClipStableDiffusionPipeline.from_pipe(stock, encoder=path)
        assert np.array_equal(drawn(swapped, LONG), drawn(expected, LONG))


def test_files_of_another_kind_say_what_they_are(sd1, tmp_path):
    file = next((sd1 / "vae").glob("*.safetensors"))
    with pytest.raises(ValueError, match=r"no CLIP text encoder in this file, it is .*VAE"):
        FixClipStableDiffusionPipeline.from_pretrained(sd1, encoder=file)
    wide = CLIPTextModel(clip_text_config(hidden_size=64))
    save_file(text_state(wide, ""), tmp_path / "wide.safetensors", described(wide))
    with pytest.raises(ValueError, match="the text encoder is 64 wide, but the UNet's cross-attention takes 32"):
        FixClipStableDiffusionPipeline.from_pretrained(sd1, encoder=tmp_path / "wide.safetensors")


def test_pipelines_of_one_another(sd1, stock):
    ours = FixClipStableDiffusionPipeline.from_pipe(stock)
    expected = FixClipStableDiffusionPipeline.from_pretrained(sd1)
    assert ours.unet is stock.unet
    assert type(stock.text_encoder) is CLIPTextModel, "the other pipeline keeps its own"
    for prompt in (SHORT, LONG):
        assert np.array_equal(drawn(ours, prompt), drawn(expected, prompt))
    again = FixClipStableDiffusionPipeline.from_pipe(ours, conditioning="chunks")
    assert again.text_encoder is ours.text_encoder
    assert again.conditioning == "chunks"
    back = StableDiffusionImg2ImgPipeline.from_pipe(ours)
    assert isinstance(back.text_encoder, FixClipTextEncoder)
    assert picture(back, LONG, image=Image.new("RGB", (16, 16)), num_inference_steps=4).shape == (1, 16, 16, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        there_and_back = FixClipStableDiffusionPipeline.from_pipe(StableDiffusionImg2ImgPipeline.from_pipe(again))
    assert there_and_back.conditioning == "chunks"
    assert isinstance(FixClipStableDiffusionPipeline.from_pipe(back).text_encoder, FixClipTextEncoder)


def test_a_lora_of_another_width_is_refused_in_one_line(stock):
    pipe = FixClipStableDiffusionPipeline.from_pipe(stock)
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    weights = {f"{layer}.lora_A.weight": torch.zeros(2, 7), f"{layer}.lora_B.weight": torch.zeros(7, 2)}
    with pytest.raises(
        ValueError, match=r"it was made for another base: \S*attn1\.to_q\S* has the shape \[\d, 7\], here"
    ) as error:
        pipe.load_lora_weights(weights)
    assert len(str(error.value)) < 300


def test_what_another_pipeline_has_stays_as_it_is(sd1, stock):
    """An adapter acts in the new pipeline alone, and no dtype changes unless one is named."""
    ours = FixClipStableDiffusionPipeline.from_pretrained(sd1)
    adapter = TextAdapter(WIDTH)
    torch.nn.init.normal_(adapter.blocks[-1].fc2.weight)
    adapted = FixClipStableDiffusionPipeline.from_pipe(ours, adapter=adapter)
    assert ours.text_encoder.adapter is None
    assert adapted.unet is ours.unet
    assert not np.array_equal(drawn(adapted, LONG), drawn(ours, LONG))
    assert np.array_equal(drawn(ours, LONG), drawn(FixClipStableDiffusionPipeline.from_pipe(stock), LONG))
    ours.text_encoder.half()
    mixed = FixClipStableDiffusionPipeline.from_pipe(ours)
    assert (mixed.text_encoder.dtype, mixed.unet.dtype) == (torch.float16, torch.float32)
    ours.to(torch.float16)
    assert FixClipStableDiffusionPipeline.from_pipe(ours).unet.dtype == ours.vae.dtype == torch.float16
    assert FixClipStableDiffusionPipeline.from_pipe(ours, dtype=torch.float32).unet.dtype == torch.float32


def with_lora(pipe):
    """LoRAs on the text encoders, one loaded after the other, both of them acting."""
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        for name in ("text_encoder", "text_encoder_2"):
            if getattr(pipe, name, None) is not None:
                getattr(pipe, name).add_adapter(config, adapter_name=f"style{seed}")
    pipe.set_adapters(["style0", "style1"], [0.7, 1.5])
    return pipe


def test_loras_of_another_pipelines_text_encoders_go_on_acting(sd1, xl):
    for source, kind, ours in (
        (sd1, StableDiffusionPipeline, FixClipStableDiffusionPipeline),
        (xl, StableDiffusionXLPipeline, FixClipStableDiffusionXLPipeline),
    ):
        options = NO_CHECK if source is sd1 else {"add_watermarker": False}
        one = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        plain = kind.from_pretrained(source, **options)
        before = plain.encode_prompt(SHORT, **one)[0]
        loaded = with_lora(plain)
        expected = plain.encode_prompt(SHORT, **one)[0]
        pipe = ours.from_pipe(loaded)
        found = pipe.encode_prompt(SHORT, **one)[0]
        assert not torch.allclose(before, expected, atol=1e-3)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        assert pipe.get_list_adapters() == loaded.get_list_adapters()
        pipe.unload_lora_weights()
        found = pipe.encode_prompt(SHORT, **one)[0]
        torch.testing.assert_close(found, before, rtol=0, atol=1e-6)
        assert loaded.get_active_adapters() == ["style0", "style1"], "the other pipeline keeps its own"


def test_an_encoder_of_more_layers_is_cut_to_the_bases_own(sd1, stock, tmp_path):
    """Stable Diffusion 2 reads the penultimate layer of ViT-H: its own encoder lacks the last one."""
    torch.manual_seed(6)
    own = stock.text_encoder.config.num_hidden_layers
    deep = CLIPTextModel(clip_text_config(bos_token_id=49406, eos_token_id=49407, num_hidden_layers=own + 1)).eval()
    deep.save_pretrained(tmp_path / "folder")
    save_file(text_state(deep, ""), tmp_path / "deep.safetensors", described(deep))
    expected = FixClipStableDiffusionPipeline.from_pretrained(sd1, encoder=tmp_path / "folder")
    assert expected.text_encoder.config.num_hidden_layers == own
    for given in (tmp_path / "folder", tmp_path / "deep.safetensors"):
        for pipe in (
            FixClipStableDiffusionPipeline.from_pretrained(sd1, encoder=given),
            FixClipStableDiffusionPipeline.from_pipe(stock, encoder=given),
        ):
            assert torch.equal(
                pipe.encode_prompt(LONG, "cpu", 1, False)[0], expected.encode_prompt(LONG, "cpu", 1, False)[0]
            )


def test_what_cannot_be_a_checkpoint_is_named_before_anything_is_read(sd1, stock, xl, tmp_path):
    path = checkpoint(tmp_path / "model.safetensors", stock.text_encoder)
    big = tmp_path / "xl.safetensors"
    pipe = StableDiffusionXLPipeline.from_pretrained(xl, add_watermarker=False)
    state = text_state(pipe.text_encoder, "conditioner.embedders.0.transformer.")
    save_file(state | text_state(pipe.text_encoder_2, "conditioner.embedders.1.model."), big)
    vae = next((sd1 / "vae").glob("*.safetensors"))
    one, two = FixClipStableDiffusionPipeline, FixClipStableDiffusionXLPipeline
    for load, message in (
        (lambda: one.from_single_file(big), "is of Stable Diffusion XL, and FixClipStableDiffusionPipeline is for"),
        (lambda: two.from_single_file(path), "is not of Stable Diffusion XL, and FixClipStableDiffusionXLPipeline is"),
        (lambda: one.from_single_file(vae), "there is no text encoder in this file, it is .*VAE"),
        (lambda: one.from_single_file("no-such.safetensors"), "'no-such.safetensors' is neither a file here nor a URL"),
        (lambda: one.from_single_file(sd1), "is a folder; from_pretrained loads folders"),
        (lambda: one.from_pretrained(path), "is a file, and a folder or a hub name is needed; from_single_file loads"),
        (lambda: one.from_single_file(path, condtioning="chunks"), "unknown argument condtioning=: did you mean cond"),
        (lambda: one.from_pipe(stock, encodr=path), "unknown argument encodr=: did you mean encoder="),
    ):
        with pytest.raises(ValueError, match=message):
            load()
    pipe = one.from_pipe(stock)
    for name in ("conditoning", "weigths"):
        with pytest.raises(ValueError, match=f"unknown argument {name}=: did you mean"):
            picture(pipe, LONG, height=16, width=16, **{name: "chunks"})


def test_dtype_of_a_checkpoint_in_one_file(sd1, stock, tmp_path):
    path = checkpoint(tmp_path / "model.safetensors", stock.text_encoder)
    for options, expected in (({}, torch.float32), ({"torch_dtype": torch.float16}, torch.float16)):
        pipe = FixClipStableDiffusionPipeline.from_single_file(path, **parts_of(sd1), **options)
        assert pipe.text_encoder.dtype == expected


def test_reports_of_files(sd1, stock, xl, tmp_path):
    """No weights are loaded, and the answer is the pipeline's."""
    path = checkpoint(tmp_path / "model.safetensors", stock.text_encoder)
    alone = tmp_path / "encoder.safetensors"
    save_file(text_state(stock.text_encoder, ""), alone, described(stock.text_encoder))
    expected = FixClipStableDiffusionPipeline.from_pipe(stock).token_report(LONG)
    assert PromptReader.from_pretrained(str(path)).report(LONG) == expected
    assert PromptReader.from_pretrained(str(sd1), encoder=str(alone)).report(LONG) == expected
    pipe = StableDiffusionXLPipeline.from_pretrained(xl, add_watermarker=False)
    big = tmp_path / "xl.safetensors"
    state = text_state(pipe.text_encoder, "conditioner.embedders.0.transformer.")
    save_file(state | text_state(pipe.text_encoder_2, "conditioner.embedders.1.model."), big)
    expected = FixClipStableDiffusionXLPipeline.from_pipe(pipe).token_report(LONG)
    assert PromptReader.from_pretrained(str(big)).report(LONG) == expected
    with pytest.raises(ValueError, match=r"no CLIP text encoder in this file, it is .*VAE"):
        PromptReader.from_pretrained(str(sd1), encoder=str(next((sd1 / "vae").glob("*.safetensors"))))


def test_auto_pipelines(sd1, tmp_path):
    ours = FixClipStableDiffusionPipeline.from_pretrained(sd1)
    ours.save_pretrained(tmp_path)
    blank, mask = Image.new("RGB", (16, 16)), Image.new("L", (16, 16), 255)
    for auto, kind, inputs in (
        (AutoPipelineForText2Image, FixClipStableDiffusionPipeline, {"height": 16, "width": 16}),
        (AutoPipelineForImage2Image, StableDiffusionImg2ImgPipeline, {"image": blank, "num_inference_steps": 4}),
        (AutoPipelineForInpainting, StableDiffusionInpaintPipeline, {"image": blank, "mask_image": mask}),
    ):
        for pipe in (auto.from_pipe(ours), auto.from_pretrained(tmp_path, **NO_CHECK)):
            assert type(pipe) is kind
            assert isinstance(pipe.text_encoder, FixClipTextEncoder)
            assert picture(pipe, LONG, **({"num_inference_steps": 3} | inputs)).shape[0] == 1


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    """With heads of 64, as the files of real ones have them."""
    pipe = stable_diffusion_xl(tiny.clip_tokenizer(), tiny.clip_tokenizer(pad_token="!"))
    ids = {"bos_token_id": 49406, "eos_token_id": 49407, "intermediate_size": 64}
    torch.manual_seed(5)
    first = CLIPTextModel(clip_text_config(**ids, hidden_size=768, num_attention_heads=12, num_hidden_layers=2))
    config = clip_text_config(**ids, hidden_size=1280, num_attention_heads=20, num_hidden_layers=2, projection_dim=24)
    config.hidden_act = "gelu"
    second = CLIPTextModelWithProjection(config)
    pipe.text_encoder, pipe.text_encoder_2 = first.eval(), second.eval()
    pipe.unet = unet(**{**dict(pipe.unet.config), "cross_attention_dim": 2048})
    folder = tmp_path_factory.mktemp("xl")
    pipe.save_pretrained(folder)
    return folder


def test_stable_diffusion_xl_in_one_file_and_of_another_pipeline(xl, tmp_path):
    stock = StableDiffusionXLPipeline.from_pretrained(xl, add_watermarker=False)
    expected = FixClipStableDiffusionXLPipeline.from_pretrained(xl, add_watermarker=False)
    path = tmp_path / "xl.safetensors"
    state = text_state(stock.text_encoder, "conditioner.embedders.0.transformer.")
    save_file(state | text_state(stock.text_encoder_2, "conditioner.embedders.1.model."), path)
    parts = {name: part for name, part in parts_of(xl).items() if name not in NO_CHECK}
    one_file = FixClipStableDiffusionXLPipeline.from_single_file(path, **parts, add_watermarker=False)
    other = FixClipStableDiffusionXLPipeline.from_pipe(stock)
    for pipe in (one_file, other):
        for prompt in (SHORT, LONG):  # three copies of a UNet, whose tensors lie differently in memory
            np.testing.assert_allclose(drawn(pipe, prompt), drawn(expected, prompt), atol=1e-5)
    np.testing.assert_allclose(drawn(other, SHORT), drawn(stock, SHORT), atol=1e-5)
    back = AutoPipelineForImage2Image.from_pipe(other)
    assert type(back) is StableDiffusionXLImg2ImgPipeline
    image = Image.new("RGB", (16, 16))
    assert picture(back, LONG, image=image, num_inference_steps=4).shape == (1, 16, 16, 3)
