"""Checkpoints in one file, encoders in one file, and pipelines made of other pipelines."""

import json
import shutil
import warnings

import numpy as np
import open_clip
import pytest
import tiny
import torch
from accelerate import cpu_offload
from command_line import run
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from peft import LoraConfig
from PIL import Image
from safetensors.torch import save_file
from tiny_checkpoint import save_checkpoint, text_state
from tiny_clips import full_vocabulary_clip
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from fixclip_core.model.fixclip import FixClip
from fixclip_core.weights.text_encoder import CONFIG_FIELDS, CONFIG_KEY
from fixclip_core.weights.write import export
from fixclip_diffusion import (
    FixClipStableDiffusionPipeline,
    FixClipStableDiffusionXLPipeline,
    FixClipTextEncoder,
    TextAdapter,
)
from fixclip_diffusion.families import STABLE_DIFFUSION
from fixclip_diffusion.loading import encoder_class, load_own_encoder
from fixclip_diffusion.prompt_reader import PromptReader
from fixclip_diffusion.state_mask import mask_empty_states
from fixclip_diffusion.tiny import clip_text_config, stable_diffusion, stable_diffusion_xl, train_tokenizer, unet

SHORT, LONG = "A red horse near a boat", tiny.sentences(14)
NO_CHECK = {"safety_checker": None, "requires_safety_checker": False}


def picture(pipe, prompt, **kwargs):
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "output_type": "np", "generator": torch.Generator().manual_seed(1)}
    return pipe(prompt, **{**settings, **kwargs}).images


def drawn(pipe, prompt):
    return picture(pipe, prompt, height=16, width=16)


def described(model):
    """What files of this project say of themselves: a width of 64 does not tell the activation, as real ones do."""
    return {CONFIG_KEY: json.dumps({name: getattr(model.config, name, None) for name in CONFIG_FIELDS})}


SD1, SD2 = "cond_stage_model.transformer.", "cond_stage_model.model."


def tokenizer(pad_token="<|endoftext|>"):
    """Of the words in these tests; loading CLIP's own takes a second each time."""
    return train_tokenizer([SHORT, LONG], 700, pad_token)


def text_config(**changes):
    """Heads of 64, as all CLIPs that Stable Diffusion reads have them: weights do not tell how many there are."""
    size = len(tokenizer())
    ids = {"vocab_size": size, "bos_token_id": size - 2, "eos_token_id": size - 1}
    return clip_text_config(**{**ids, "hidden_size": 64, "num_attention_heads": 1, **changes})


def checkpoint(path, pipe, model=None):
    """A whole Stable Diffusion 1 in one file, with another text encoder than its own if one is given."""
    return save_checkpoint(path, pipe, text_state(pipe.text_encoder if model is None else model, SD1))


def xl_checkpoint(path, pipe):
    first = text_state(pipe.text_encoder, "conditioner.embedders.0.transformer.")
    return save_checkpoint(
        path, pipe, first | text_state(pipe.text_encoder_2, "conditioner.embedders.1.model.", "open_clip")
    )


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    pipe = stable_diffusion(tokenizer())
    torch.manual_seed(5)
    # 2: the legacy value of Stable Diffusion 1.5
    pipe.text_encoder = CLIPTextModel(text_config(eos_token_id=2)).eval()
    pipe.unet = unet(cross_attention_dim=64)
    folder = tmp_path_factory.mktemp("sd1")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stock(sd1):
    return StableDiffusionPipeline.from_pretrained(sd1, **NO_CHECK)


def configs_of(folder):
    """Where diffusers finds the sizes of UNet and VAE, and the tokenizer; else it asks the hub for a base's."""
    return {"config": str(folder), **NO_CHECK}


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_a_checkpoint_in_one_file(sd1, stock, tmp_path, suffix):
    path = checkpoint(tmp_path / f"model.{suffix}", stock)
    pipe = FixClipStableDiffusionPipeline.from_single_file(path, **configs_of(sd1))
    expected = FixClipStableDiffusionPipeline.from_pretrained(sd1)
    assert pipe.conditioning == "overlap"
    for prompt in (SHORT, LONG):
        assert np.array_equal(drawn(pipe, prompt), drawn(expected, prompt))
    assert np.array_equal(drawn(pipe, SHORT), drawn(stock, SHORT))
    theirs = StableDiffusionPipeline.from_single_file(str(path), **configs_of(sd1))  # the file is one that stock reads
    assert np.array_equal(drawn(pipe, SHORT), drawn(theirs, SHORT))
    adapter = TextAdapter(64)
    other = FixClipStableDiffusionPipeline.from_single_file(
        path, adapter=adapter, conditioning="chunks", **configs_of(sd1)
    )
    assert other.text_encoder.adapter is not None
    assert other.conditioning == "chunks"


def test_stable_diffusion_2_in_one_file(tmp_path):
    """Its files hold ViT-H in open_clip's layout with a layer that is not read; converted ones lack it."""
    torch.manual_seed(7)
    deep = CLIPTextModel(text_config(hidden_act="gelu", num_hidden_layers=24, pad_token_id=0)).eval()
    pipe = stable_diffusion(tokenizer("!"), "sd2")
    pipe.unet = unet(cross_attention_dim=64)
    pipe.text_encoder = cut(deep, 23)
    folder = tmp_path / "folder"
    pipe.save_pretrained(folder)
    expected = FixClipStableDiffusionPipeline.from_pretrained(folder)
    wanted = {prompt: drawn(expected, prompt) for prompt in (SHORT, LONG)}
    for model in (pipe.text_encoder, deep):
        path = save_checkpoint(tmp_path / "model.safetensors", pipe, text_state(model, SD2, "open_clip"))
        one_file = FixClipStableDiffusionPipeline.from_single_file(path, **configs_of(folder))
        assert one_file.text_encoder.config.num_hidden_layers == 23
        assert one_file.tokenizer.pad_token_id == 0
        for prompt in (SHORT, LONG):
            assert np.array_equal(drawn(one_file, prompt), wanted[prompt])
        own = load_own_encoder(str(path), STABLE_DIFFUSION.towers[0])
        assert own.config.num_hidden_layers == 23
    theirs = StableDiffusionPipeline.from_single_file(str(path), **configs_of(folder))
    assert np.array_equal(drawn(theirs, SHORT), wanted[SHORT])
    # A whole ViT-H in its place is cut alike.
    deep.save_pretrained(tmp_path / "deep")
    other = FixClipStableDiffusionPipeline.from_single_file(path, encoder=tmp_path / "deep", **configs_of(folder))
    assert np.array_equal(drawn(other, LONG), wanted[LONG])


def cut(model, layers):
    """The text model's first layers."""
    config = type(model.config)(**{**model.config.to_dict(), "num_hidden_layers": layers})
    shorter = CLIPTextModel(config).eval()
    shorter.load_state_dict({name: model.state_dict()[name] for name in shorter.state_dict()})
    return shorter


def encoder_file(path, model, prefix=""):
    save_file(text_state(model, prefix), path, described(model))
    return path


@pytest.mark.parametrize("positions", [77, 248])
def test_another_encoder_beside_a_checkpoint_in_one_file(sd1, stock, tmp_path, positions):
    """Whatever the file's own is: one of 248 positions, which stock diffusers cannot load, is not read."""
    torch.manual_seed(8)
    own = CLIPTextModel(text_config(max_position_embeddings=positions)).eval()
    path = checkpoint(tmp_path / "model.safetensors", stock, own)
    model = CLIPTextModel(text_config()).eval()
    model.save_pretrained(tmp_path / "folder")
    expected = FixClipStableDiffusionPipeline.from_pretrained(sd1, encoder=tmp_path / "folder")
    file = encoder_file(tmp_path / "encoder.safetensors", model)
    for given in (tmp_path / "folder", file, FixClipTextEncoder.from_pretrained(tmp_path / "folder")):
        pipe = FixClipStableDiffusionPipeline.from_single_file(path, encoder=given, **configs_of(sd1))
        assert np.array_equal(drawn(pipe, LONG), drawn(expected, LONG))
    with pytest.raises(ValueError, match="either encoder= or text_encoder="):
        FixClipStableDiffusionPipeline.from_single_file(path, encoder=file, text_encoder=model, **configs_of(sd1))
    pipe = FixClipStableDiffusionPipeline.from_single_file(path, text_encoder=model, **configs_of(sd1))
    assert np.array_equal(drawn(pipe, LONG), drawn(expected, LONG))


def test_a_bases_own_encoder_comes_alone_from_folder_and_file(sd1, stock, tmp_path):
    """As a teacher in training and as the page's comparison need it: without the adapter that a folder holds."""
    path = checkpoint(tmp_path / "model.safetensors", stock)
    adapted = FixClipStableDiffusionPipeline.from_pretrained(sd1, adapter=TextAdapter(64), **NO_CHECK)
    adapted.save_pretrained(tmp_path / "adapted")
    wanted = FixClipStableDiffusionPipeline.from_pretrained(sd1).text_encoder.state_dict()
    for base in (sd1, path, tmp_path / "adapted"):
        encoder = load_own_encoder(str(base), STABLE_DIFFUSION.towers[0])
        assert encoder.adapter is None
        found = encoder.state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_base_that_was_trained_with_248_positions_is_used_as_trained(sd1, tmp_path):
    """Such as xllsd16-v1: in one file, in a folder, and as a stock pipeline. Nothing is stretched; prompts of any
    length are read in one pass, by the one table of positions that there is."""
    torch.manual_seed(3)
    trained = CLIPTextModel(text_config(max_position_embeddings=248)).eval()
    other = StableDiffusionPipeline.from_pretrained(sd1, text_encoder=trained, **NO_CHECK)
    other.tokenizer.model_max_length = 248
    other.save_pretrained(tmp_path / "folder")
    path = checkpoint(tmp_path / "long.safetensors", other)
    ids = other.tokenizer([LONG, SHORT], padding="max_length", return_tensors="pt").input_ids
    for pipe in (
        FixClipStableDiffusionPipeline.from_single_file(path, **configs_of(sd1)),
        FixClipStableDiffusionPipeline.from_pretrained(tmp_path / "folder"),
        FixClipStableDiffusionPipeline.from_pipe(other),
    ):
        encoder = pipe.text_encoder
        assert (encoder.context_length, encoder.short_context_length) == (248, 0)
        table = "text_model.embeddings.position_embedding.weight"
        assert torch.equal(encoder.state_dict()[table], trained.state_dict()[table.removeprefix("text_model.")])
        assert pipe.conditioning == "one_pass"
        with torch.no_grad():
            assert torch.equal(pipe.encode_prompt([LONG, SHORT], "cpu", 1, False)[0], trained(ids)[0])
        assert np.array_equal(drawn(pipe, SHORT), drawn(other, SHORT)), "stock pads to 248 tokens, too"
        report = pipe.token_report(LONG)
        assert (report.conditioning, len(report.passes), report.cut) == ("one_pass", 1, None)
        assert report.num_tokens > 77
        assert PromptReader.from_pretrained(str(tmp_path / "folder")).report(LONG) == report


def test_an_encoder_alone_in_one_file(sd1, stock, tmp_path):
    torch.manual_seed(4)
    model = CLIPTextModel(text_config()).eval()
    model.save_pretrained(tmp_path / "folder")
    expected = FixClipStableDiffusionPipeline.from_pretrained(sd1, encoder=tmp_path / "folder")
    for prefix in ("", "clip_l.transformer.", "model."):
        path = encoder_file(tmp_path / "encoder.safetensors", model, prefix)
        pipe = FixClipStableDiffusionPipeline.from_pretrained(sd1, encoder=path)
        assert np.array_equal(drawn(pipe, LONG), drawn(expected, LONG))
        swapped = FixClipStableDiffusionPipeline.from_pipe(stock, encoder=path)
        assert np.array_equal(drawn(swapped, LONG), drawn(expected, LONG))


def long_clip(model):
    """As Long-CLIP stores positions: rows 0..19 of one table count, and 20..247 of the other."""
    state = text_state(model, "", "open_clip")
    table = state["positional_embedding"]
    first, rest = torch.full_like(table, 7.0), torch.full_like(table, -7.0)
    first[:20], rest[20:] = table[:20], table[20:]
    return state | {"positional_embedding": first, "positional_embedding_res": rest}


def openai(model, prefix=""):
    """Of a state dict of OpenAI's, which is told by a number beside the weights."""
    return text_state(model, prefix, "open_clip") | {f"{prefix}input_resolution": torch.tensor(224)}


ENCODER_FILES = {
    "Long-CLIP": lambda model, path, _: save_file(long_clip(model), path),
    "Long-CLIP under module. in a pickle": lambda model, path, _: torch.save(
        {"state_dict": {f"module.{name}": tensor for name, tensor in long_clip(model).items()}}, path
    ),
    "OpenAI": lambda model, path, _: save_file(openai(model), path),
    "state_dict": lambda model, path, _: torch.save({"state_dict": openai(model), "epoch": 3}, path),
    "model_state_dict": lambda model, path, _: torch.save({"model_state_dict": openai(model)}, path),
    "net": lambda model, path, _: torch.save({"net": openai(model)}, path),
    "module.": lambda model, path, _: save_file(openai(model, "module."), path),
    "clip_l.": lambda model, path, _: save_file(text_state(model, "clip_l.transformer."), path),
    "a whole Stable Diffusion 1": lambda model, path, stock: checkpoint(path, stock, model),
    "a whole Stable Diffusion 1 in a pickle": lambda model, path, stock: checkpoint(
        path.with_suffix(".ckpt"), stock, model
    ),
}


@pytest.mark.parametrize("kind", ENCODER_FILES)
def test_encoder_files_of_every_kind_as_they_are_and_converted(sd1, stock, tmp_path, kind):
    torch.manual_seed(4)
    model = CLIPTextModel(text_config(max_position_embeddings=248 if "Long" in kind else 77)).eval()
    model.save_pretrained(tmp_path / "folder")
    file = ENCODER_FILES[kind](model, tmp_path / "file.safetensors", stock) or tmp_path / "file.safetensors"
    done = run("convert", file, tmp_path / "converted")
    assert done.exit_code == 0, done.output
    expected, *found = (
        FixClipStableDiffusionPipeline.from_pretrained(sd1, encoder=given, unet=stock.unet, vae=stock.vae)
        for given in (tmp_path / "folder", file, tmp_path / "converted")
    )
    assert expected.conditioning == ("one_pass" if "Long" in kind else "overlap")
    for prompt in (SHORT, LONG):
        wanted = expected.encode_prompt(prompt, "cpu", 1, False)[0]
        for pipe in found:
            assert torch.equal(pipe.encode_prompt(prompt, "cpu", 1, False)[0], wanted)


def test_our_own_long_file_reads_as_the_exported_folder(sd1, stock, tmp_path):
    _, config, preprocess = full_vocabulary_clip()
    config["text_cfg"] |= {"vocab_size": len(tokenizer()), "heads": 1}
    model = FixClip.from_clip(open_clip.CLIP(**config), config, preprocess, num_groups=0)
    export(model, tmp_path / "out", ["clip_l", "diffusers"])
    file = tmp_path / "out" / "clip_l_long.safetensors"
    assert run("convert", file, tmp_path / "converted").exit_code == 0
    expected, *found = (
        FixClipStableDiffusionPipeline.from_pretrained(sd1, encoder=given, unet=stock.unet, vae=stock.vae)
        for given in (tmp_path / "out", file, tmp_path / "converted")
    )
    for prompt in (SHORT, LONG):
        wanted = expected.encode_prompt(prompt, "cpu", 1, False)[0]
        for pipe in found:
            assert pipe.text_encoder.config.padding == "mask"
            assert torch.equal(pipe.encode_prompt(prompt, "cpu", 1, False)[0], wanted)


def poisoned(file):
    """A safetensors file of a good header, and NaN for all numbers, which no reader of text encoders lets pass."""
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    file.write_bytes(content[:start] + b"\xff" * (len(content) - start))
    return file


BAD_ENCODERS = {
    "wide": (lambda: text_state(CLIPTextModel(text_config(hidden_size=128)), "clip_l."), "128 wide, but .* takes 64"),
    "LoRA": (
        lambda: {
            f"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_{end}.weight": torch.zeros(4) for end in ("up", "down")
        },
        "there is no CLIP text encoder in this file, it is a LoRA",
    ),
    "textual inversion": (lambda: {"emb_params": torch.zeros(2, 64)}, "in this file, it is a textual inversion"),
    "textual inversion for XL": (
        lambda: {"clip_l": torch.zeros(2, 64), "clip_g": torch.zeros(2, 128)},
        "in this file, it is a textual inversion",
    ),
}


@pytest.mark.parametrize("kind", BAD_ENCODERS)
def test_an_encoder_that_cannot_be_is_refused_by_its_header(sd1, stock, tmp_path, kind):
    make, message = BAD_ENCODERS[kind]
    save_file(make(), tmp_path / "encoder.safetensors")
    encoder = poisoned(tmp_path / "encoder.safetensors")
    base = shutil.copytree(sd1, tmp_path / "base")
    for file in base.rglob("*.safetensors"):
        poisoned(file)
    single = poisoned(checkpoint(tmp_path / "model.safetensors", stock))
    pipe = FixClipStableDiffusionPipeline
    for load, source in ((pipe.from_pretrained, base), (pipe.from_single_file, single), (pipe.from_pipe, stock)):
        with pytest.raises(ValueError, match=message):
            load(source, encoder=encoder)
    for source in (base, single):
        with pytest.raises(ValueError, match="NaN"):  # what happens where they are read
            load_own_encoder(str(source), STABLE_DIFFUSION.towers[0])


def test_an_adapter_of_another_width_is_refused_by_its_configuration(sd1, stock, tmp_path):
    TextAdapter(128).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "model.safetensors").unlink(missing_ok=True)
    single = poisoned(checkpoint(tmp_path / "model.safetensors", stock))
    pipe = FixClipStableDiffusionPipeline
    for load, source in ((pipe.from_pretrained, sd1), (pipe.from_single_file, single), (pipe.from_pipe, stock)):
        with pytest.raises(ValueError, match=r"adapter .*128"):
            load(source, adapter=tmp_path / "adapter")


def test_files_of_another_kind_say_what_they_are(sd1, tmp_path):
    file = next((sd1 / "vae").glob("*.safetensors"))
    with pytest.raises(ValueError, match=r"no CLIP text encoder in this file, it is .*VAE"):
        FixClipStableDiffusionPipeline.from_pretrained(sd1, encoder=file)
    wide = CLIPTextModel(text_config(hidden_size=128))
    encoder_file(tmp_path / "wide.safetensors", wide)
    with pytest.raises(ValueError, match="the text encoder is 128 wide, but the UNet's cross-attention takes 64"):
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


def test_a_lora_of_another_width_is_refused_in_one_line(sd1):
    pipe = FixClipStableDiffusionPipeline.from_pretrained(sd1)
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
    adapter = TextAdapter(64)
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


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_encoder_that_is_named_goes_where_the_other_pipelines_own_is(sd1, tmp_path, kind):
    """The meta device stands for a GPU; weights that are offloaded are on it, too, and then it is no place."""
    stock = StableDiffusionPipeline.from_pretrained(sd1)
    encoder = sd1 / "text_encoder"
    if kind == "file":
        encoder = tmp_path / "encoder.safetensors"
        save_file(text_state(stock.text_encoder, ""), encoder, described(stock.text_encoder))
    cpu_offload(stock.text_encoder, "cpu")
    assert FixClipStableDiffusionPipeline.from_pipe(stock, encoder=encoder).text_encoder.device.type == "cpu"
    stock = StableDiffusionPipeline.from_pretrained(sd1).to("meta")
    assert FixClipStableDiffusionPipeline.from_pipe(stock, encoder=encoder).text_encoder.device.type == "meta"


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
    deep = CLIPTextModel(text_config(num_hidden_layers=own + 1)).eval()
    deep.save_pretrained(tmp_path / "folder")
    encoder_file(tmp_path / "deep.safetensors", deep)
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
    path = checkpoint(tmp_path / "model.safetensors", stock)
    pipe = StableDiffusionXLPipeline.from_pretrained(xl, add_watermarker=False)
    big = xl_checkpoint(tmp_path / "xl.safetensors", pipe)
    vae = next((sd1 / "vae").glob("*.safetensors"))
    one, two = FixClipStableDiffusionPipeline, FixClipStableDiffusionXLPipeline
    for load, message in (
        (lambda: one.from_single_file(big), "is of Stable Diffusion XL, and FixClipStableDiffusionPipeline is for"),
        (lambda: two.from_single_file(path), "is not of Stable Diffusion XL, and FixClipStableDiffusionXLPipeline is"),
        (lambda: one.from_single_file(vae), "there is no text encoder in this file, it is .*VAE"),
        (lambda: one.from_single_file("no-such.safetensors"), "'no-such.safetensors' is neither a file here nor a URL"),
        (lambda: one.from_single_file("someone/a/b.safetensors"), "b.safetensors' is neither a file here nor a URL"),
        (lambda: one.from_single_file("https://example.org/a/b/c.ckpt"), "URLs of huggingface.co alone are fetched"),
        (lambda: one.from_single_file("https://huggingface.co/a/b"), "is no URL of a model's file"),
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


def test_arguments_act_or_are_refused_however_a_pipeline_is_made(sd1, stock, tmp_path):
    path = checkpoint(tmp_path / "model.safetensors", stock)
    kind = FixClipStableDiffusionPipeline
    for load, source, options in (
        (kind.from_pretrained, sd1, {}),
        (kind.from_single_file, path, configs_of(sd1)),
        (kind.from_pipe, stock, {}),
    ):
        with pytest.warns(FutureWarning, match="long_prompt='windows_77' is now conditioning='chunks'"):
            assert load(source, long_prompt="windows_77", **options).conditioning == "chunks"
        with pytest.raises(ValueError, match="give conditioning= alone"):
            load(source, long_prompt="windows_77", conditioning="stock", **options)
        for given, name in (("x", "'x'"), (stock.text_encoder, "CLIPTextModel")):
            with pytest.raises(ValueError, match=f"encoder_2={name}: .* has one text encoder, which encoder= takes"):
                load(source, encoder_2=given, **options)
        assert load(source, encoder_2=None, **options).conditioning == "overlap"


def test_dtype_of_a_checkpoint_in_one_file(sd1, stock, tmp_path):
    path = checkpoint(tmp_path / "model.safetensors", stock)
    for options, expected in (({}, torch.float32), ({"torch_dtype": torch.float16}, torch.float16)):
        pipe = FixClipStableDiffusionPipeline.from_single_file(path, **configs_of(sd1), **options)
        assert pipe.text_encoder.dtype == expected


def test_reports_of_files(sd1, tmp_path):
    """No weights are loaded, and the answer is the pipeline's: by CLIP's own vocabulary."""
    plain, second = tiny.clip_tokenizer(), tiny.clip_tokenizer(pad_token="!")
    ids = {"vocab_size": len(plain), "bos_token_id": 49406, "eos_token_id": 49407}
    for kind, own in (("sd1", plain), ("sd2", second)):
        pipe = stable_diffusion(own, kind)
        pipe.unet = unet(cross_attention_dim=64)
        pipe.text_encoder = CLIPTextModel(text_config(**ids, hidden_act="quick_gelu" if kind == "sd1" else "gelu"))
        layout = ("transformers", SD1) if kind == "sd1" else ("open_clip", SD2)
        path = save_checkpoint(tmp_path / f"{kind}.safetensors", pipe, text_state(pipe.text_encoder, *layout[::-1]))
        expected = FixClipStableDiffusionPipeline.from_pipe(pipe).token_report(LONG)
        assert PromptReader.from_pretrained(str(path)).report(LONG) == expected
    alone = encoder_file(tmp_path / "encoder.safetensors", CLIPTextModel(text_config(**ids)))
    report = PromptReader.from_pretrained(str(tmp_path / "sd1.safetensors"), encoder=str(alone)).report(LONG)
    assert report == expected
    pipe = stable_diffusion_xl(plain, second)
    pipe.text_encoder = CLIPTextModel(text_config(**ids))
    pipe.text_encoder_2 = CLIPTextModelWithProjection(text_config(**ids, hidden_size=128, num_attention_heads=2))
    pipe.unet = unet(**{**dict(pipe.unet.config), "cross_attention_dim": 64 + 128})
    big = xl_checkpoint(tmp_path / "xl.safetensors", pipe)
    expected = FixClipStableDiffusionXLPipeline.from_pipe(pipe).token_report(LONG)
    assert PromptReader.from_pretrained(str(big)).report(LONG) == expected
    with pytest.raises(ValueError, match=r"no CLIP text encoder in this file, it is .*VAE"):
        PromptReader.from_pretrained(str(sd1), encoder=str(next((sd1 / "vae").glob("*.safetensors"))))


@pytest.mark.parametrize("family", ["sd1", "xl"])
def test_auto_pipelines(family, request, tmp_path):
    kind, options, image_to_image, inpaint = {
        "sd1": (
            FixClipStableDiffusionPipeline,
            NO_CHECK,
            StableDiffusionImg2ImgPipeline,
            StableDiffusionInpaintPipeline,
        ),
        "xl": (
            FixClipStableDiffusionXLPipeline,
            {"add_watermarker": False},
            StableDiffusionXLImg2ImgPipeline,
            StableDiffusionXLInpaintPipeline,
        ),
    }[family]
    ours = kind.from_pretrained(request.getfixturevalue(family), **options)
    ours.save_pretrained(tmp_path)
    blank, mask = Image.new("RGB", (16, 16)), Image.new("L", (16, 16), 255)
    for auto, wanted, inputs in (
        (AutoPipelineForText2Image, kind, {"height": 16, "width": 16}),
        (AutoPipelineForImage2Image, image_to_image, {"image": blank, "num_inference_steps": 4}),
        (AutoPipelineForInpainting, inpaint, {"image": blank, "mask_image": mask, "height": 16, "width": 16}),
    ):
        pictures = []
        for pipe in (auto.from_pipe(ours), auto.from_pretrained(tmp_path, **options)):
            assert type(pipe) is wanted
            for tower in kind.family.towers:
                assert isinstance(getattr(pipe, tower.encoder), encoder_class(tower))
            mask_empty_states(pipe.unet)  # else only a UNet that our pipeline has drawn with passes over the zeros
            pictures.append(picture(pipe, LONG, **({"num_inference_steps": 3} | inputs)))
        np.testing.assert_allclose(*pictures, atol=1e-5)
        if wanted is kind:
            np.testing.assert_allclose(pictures[0], picture(ours, LONG, num_inference_steps=3, **inputs), atol=1e-5)


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    pipe = stable_diffusion_xl(tokenizer(), tokenizer("!"))
    torch.manual_seed(5)
    pipe.text_encoder = CLIPTextModel(text_config()).eval()
    second = {"hidden_size": 128, "num_attention_heads": 2, "projection_dim": 24, "hidden_act": "gelu"}
    pipe.text_encoder_2 = CLIPTextModelWithProjection(text_config(**second)).eval()
    pipe.unet = unet(**{**dict(pipe.unet.config), "cross_attention_dim": 64 + 128})
    folder = tmp_path_factory.mktemp("xl")
    pipe.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_stable_diffusion_xl_in_one_file_and_of_another_pipeline(xl, tmp_path, suffix):
    options = {"add_watermarker": False}
    stock = StableDiffusionXLPipeline.from_pretrained(xl, **options)
    expected = FixClipStableDiffusionXLPipeline.from_pretrained(xl, **options)
    path = xl_checkpoint(tmp_path / f"xl.{suffix}", stock)
    one_file = FixClipStableDiffusionXLPipeline.from_single_file(path, config=str(xl), **options)
    other = FixClipStableDiffusionXLPipeline.from_pipe(stock)
    theirs = StableDiffusionXLPipeline.from_single_file(str(path), config=str(xl), **options)
    for pipe in (one_file, other):
        for prompt in (SHORT, LONG):  # three copies of a UNet, whose tensors lie differently in memory
            np.testing.assert_allclose(drawn(pipe, prompt), drawn(expected, prompt), atol=1e-5)
    for pipe in (stock, theirs):
        np.testing.assert_allclose(drawn(one_file, SHORT), drawn(pipe, SHORT), atol=1e-5)


def test_the_refiner_in_one_file(tmp_path):
    """It has the second text encoder alone, where Stable Diffusion XL's files have the first one."""
    pipe = stable_diffusion_xl(tokenizer(), tokenizer("!"))
    sizes = {"hidden_size": 1280, "num_attention_heads": 20, "num_hidden_layers": 2, "projection_dim": 24}
    second = CLIPTextModelWithProjection(text_config(**sizes, hidden_act="gelu")).eval()
    widths = {"cross_attention_dim": 1280, "projection_class_embeddings_input_dim": 24 + 5 * 8}
    parts = {**pipe.components, "text_encoder": None, "tokenizer": None, "text_encoder_2": second}
    parts["unet"] = unet(**{**dict(pipe.unet.config), **widths})
    refiner = StableDiffusionXLImg2ImgPipeline(**parts, requires_aesthetics_score=True, add_watermarker=False)
    refiner.save_pretrained(tmp_path / "folder")
    state = text_state(second, "conditioner.embedders.0.model.", "open_clip")
    path = save_checkpoint(tmp_path / "refiner.safetensors", refiner, state)
    options = {"add_watermarker": False}
    expected = FixClipStableDiffusionXLPipeline.from_pretrained(tmp_path / "folder", **options)
    found = FixClipStableDiffusionXLPipeline.from_single_file(path, config=str(tmp_path / "folder"), **options)
    assert found.text_encoder is None
    wanted, states = (
        pipe.encode_prompt(LONG, device="cpu", do_classifier_free_guidance=False) for pipe in (expected, found)
    )
    assert torch.equal(states[0], wanted[0])
    assert torch.equal(states[2], wanted[2])


def test_other_encoders_beside_stable_diffusion_xl_in_one_file(xl, tmp_path):
    options = {"add_watermarker": False}
    path = xl_checkpoint(tmp_path / "xl.safetensors", StableDiffusionXLPipeline.from_pretrained(xl, **options))
    torch.manual_seed(9)
    first = CLIPTextModel(text_config()).eval()
    second = {"hidden_size": 128, "num_attention_heads": 2, "projection_dim": 24, "hidden_act": "gelu"}
    second = CLIPTextModelWithProjection(text_config(**second)).eval()
    first.save_pretrained(tmp_path / "l")
    second.save_pretrained(tmp_path / "g")
    encoder_file(tmp_path / "clip_l.safetensors", first)
    save_file(text_state(second, "clip_g.transformer."), tmp_path / "clip_g.safetensors")
    load = FixClipStableDiffusionXLPipeline.from_single_file
    for places, files in (
        ({"encoder": "l"}, {"encoder": "clip_l.safetensors"}),
        ({"encoder_2": "g"}, {"encoder_2": "clip_g.safetensors"}),
        ({"encoder": "l", "encoder_2": "g"}, {"encoder": "clip_l.safetensors", "encoder_2": "clip_g.safetensors"}),
    ):
        given = [{name: tmp_path / place for name, place in chosen.items()} for chosen in (places, files)]
        expected = FixClipStableDiffusionXLPipeline.from_pretrained(xl, **given[0], **options)
        wanted = expected.encode_prompt(LONG, device="cpu", do_classifier_free_guidance=False)
        for chosen in given:
            pipe = load(path, config=str(xl), **chosen, **options)
            found = pipe.encode_prompt(LONG, device="cpu", do_classifier_free_guidance=False)
            assert torch.equal(found[0], wanted[0])  # states of both encoders
            assert torch.equal(found[2], wanted[2])  # the pooled vector, of the second one
    with pytest.raises(ValueError, match=r"128 \(text_encoder\) \+ 128 \(text_encoder_2\) = 256 wide.*takes 192"):
        load(path, encoder=tmp_path / "g")
