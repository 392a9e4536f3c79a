"""LoRAs beside clean weights: what is saved loads again, in our pipeline and in stock diffusers, and draws the same."""

import contextlib
import json
import logging
import shutil

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model
from tiny_scenes import write_model

from fixclip_diffusion import FixClipStableDiffusionPipeline, TextAdapter
from fixclip_diffusion.evaluation.generate import Drawing, Painter, parse_system
from fixclip_diffusion.evaluation.prompts import Prompt
from fixclip_diffusion.lora import without_lora_layers

FAST = {"num_inference_steps": 2, "width": 32, "height": 32}


def picture(pipe, **kwargs):
    pipe.set_progress_bar_config(disable=True)
    return np.asarray(pipe("a red star", generator=torch.Generator().manual_seed(1), **FAST, **kwargs).images[0])


def add_random_lora(pipe, name, **config):
    """A LoRA of UNet and text encoder whose every weight is random."""
    torch.manual_seed(sum(map(ord, name)))
    targets = {"unet": ["to_q", "to_v"], "text_encoder": ["q_proj", "v_proj"]}
    for component, modules in targets.items():
        model = getattr(pipe, component)
        inject_adapter_in_model(LoraConfig(target_modules=modules, **config), model, name)
        model._hf_peft_config_loaded = True
        for key, parameter in model.named_parameters():
            if f".{name}." in key:
                torch.nn.init.normal_(parameter, std=0.3)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("builtin") / "scenes")


def test_a_whole_model_is_saved_and_loaded_with_its_lora(model, tmp_path):
    pipe = FixClipStableDiffusionPipeline.from_pretrained(model, encoder=model / "encoder")
    expected = picture(pipe)
    pipe.save_pretrained(tmp_path / "mini")
    assert np.array_equal(picture(pipe), expected), "saving leaves the pipeline as it was"
    assert np.array_equal(picture(FixClipStableDiffusionPipeline.from_pretrained(tmp_path / "mini")), expected)
    plain = DiffusionPipeline.from_pretrained(tmp_path / "mini")
    assert type(plain) is FixClipStableDiffusionPipeline
    assert np.array_equal(picture(plain), expected), "the class that model_index.json names, with its LoRA"
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "mini")
    assert FixClipStableDiffusionPipeline.from_pipe(stock).get_list_adapters() == {}, "what a stock pipeline has"
    pipe.disable_lora()
    assert np.array_equal(picture(stock), picture(pipe))
    stock.load_lora_weights(tmp_path / "mini", subfolder="lora", weight_name="fixclip.safetensors")
    assert np.array_equal(picture(stock), expected)


@pytest.mark.parametrize("active", [["one"], ["one", "two"], []])
def test_scales_and_what_acts_are_kept(sd1, tmp_path, active):
    pipe = FixClipStableDiffusionPipeline.from_pretrained(sd1)
    add_random_lora(pipe, "one", r=4, lora_alpha=2)
    add_random_lora(pipe, "two", r=2, lora_alpha=2, use_rslora=True)
    pipe.set_adapters(active or ["one"], [0.5, 0.25][: len(active) or 1])
    if not active:
        pipe.disable_lora()
    expected = picture(pipe)
    pipe.save_pretrained(tmp_path)
    recorded = json.loads((tmp_path / "model_index.json").read_text())["_loras"]
    assert [name for name, item in recorded.items() if item["active"]] == active
    again = FixClipStableDiffusionPipeline.from_pretrained(tmp_path)
    np.testing.assert_allclose(picture(again), expected, atol=1)
    again.save_pretrained(tmp_path / "twice")
    assert json.loads((tmp_path / "twice" / "model_index.json").read_text())["_loras"] == recorded


def test_another_pipeline_with_a_lora_of_the_text_encoder_is_saved_as_ours(sd1, tmp_path):
    pipe = FixClipStableDiffusionPipeline.from_pretrained(sd1)
    add_random_lora(pipe, "style")
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    with pytest.raises(ValueError, match=r"save it in a pipeline of fixclip_diffusion, .*Pipeline.from_pipe\(pipe\)"):
        other.save_pretrained(tmp_path / "other")
    FixClipStableDiffusionPipeline.from_pipe(other).save_pretrained(tmp_path / "ours")
    assert np.array_equal(picture(FixClipStableDiffusionPipeline.from_pretrained(tmp_path / "ours")), picture(pipe))


def test_a_fused_lora_is_in_the_weights_and_not_beside_them(sd1, tmp_path):
    pipe = FixClipStableDiffusionPipeline.from_pretrained(sd1)
    add_random_lora(pipe, "one", r=4)
    pipe.fuse_lora()
    expected = picture(pipe)
    pipe.save_pretrained(tmp_path)
    assert not (tmp_path / "lora").exists()
    assert np.array_equal(picture(FixClipStableDiffusionPipeline.from_pretrained(tmp_path)), expected)


def test_a_lora_that_is_fused_into_one_component_is_kept_for_the_other(sd1, tmp_path):
    pipe = FixClipStableDiffusionPipeline.from_pretrained(sd1)
    add_random_lora(pipe, "one", r=4)
    pipe.fuse_lora(components=["unet"])
    expected = picture(pipe)
    pipe.save_pretrained(tmp_path)
    again = FixClipStableDiffusionPipeline.from_pretrained(tmp_path)
    assert again.get_list_adapters() == {"text_encoder": ["one"]}
    np.testing.assert_allclose(picture(again), expected, atol=1)


def test_what_peft_leaves_of_a_deleted_lora_is_not_saved(sd1, tmp_path):
    pipe = FixClipStableDiffusionPipeline.from_pretrained(sd1)
    expected = picture(pipe)
    add_random_lora(pipe, "one", r=4)
    pipe.delete_adapters("one")
    pipe.save_pretrained(tmp_path)
    assert np.array_equal(picture(FixClipStableDiffusionPipeline.from_pretrained(tmp_path)), expected)


def test_other_weights_in_other_blocks_are_refused(sd1, tmp_path):
    pipe = FixClipStableDiffusionPipeline.from_pretrained(sd1)
    add_random_lora(pipe, "one", r=4)
    pipe.set_adapters("one", {"unet": {"down": 0.5, "mid": 1.0, "up": 0.1}, "text_encoder": 1.0})
    with pytest.raises(ValueError, match="LoRA 'one' has other weights in other blocks"):
        pipe.save_pretrained(tmp_path)


def test_layers_come_back_after_an_error(sd1):
    pipe = FixClipStableDiffusionPipeline.from_pretrained(sd1)
    add_random_lora(pipe, "one", r=4)
    expected, keys = picture(pipe), set(pipe.unet.state_dict())
    with contextlib.suppress(ZeroDivisionError), without_lora_layers([pipe.unet, pipe.text_encoder]):
        assert not any("lora" in key or "base_layer" in key for key in pipe.unet.state_dict())
        raise ZeroDivisionError
    assert set(pipe.unet.state_dict()) == keys
    assert np.array_equal(picture(pipe), expected)


def test_an_own_lora_acts_beside_that_of_the_model(model, tmp_path):
    pipe = FixClipStableDiffusionPipeline.from_pretrained(model, encoder=model / "encoder")
    shutil.copytree(model / "lora", tmp_path / "style")
    pipe.set_adapters("fixclip", 0.7)
    pipe.load_lora_weights(tmp_path / "style", adapter_name="style")
    both = picture(pipe)
    assert pipe.get_active_adapters() == ["fixclip", "style"]
    # The same LoRA twice, with 0.7 and with 1.
    single = FixClipStableDiffusionPipeline.from_pretrained(model, encoder=model / "encoder")
    single.set_adapters("fixclip", 1.7)
    np.testing.assert_allclose(both, picture(single), atol=1)


def test_an_adapter_for_another_encoder_is_told(model, caplog):
    load = FixClipStableDiffusionPipeline.from_pretrained
    with caplog.at_level(logging.WARNING, logger="fixclip_diffusion"):
        load(model)
        load(model, encoder=model / "encoder", dtype=torch.float16)
        assert not caplog.messages
        load(model / "base", adapter=model / "adapter")
        load(model / "base", adapter=TextAdapter.from_pretrained(model / "adapter"))  # in memory, too
    assert caplog.messages == 2 * [
        f"adapter {model / 'adapter'} was made for another text encoder than {model / 'base'}: "
        "pictures may be worse than without it"
    ]


def test_saved_loras_belong_to_the_encoder_and_need_a_unet(sd1, tmp_path, caplog):
    pipe = FixClipStableDiffusionPipeline.from_pretrained(sd1)
    add_random_lora(pipe, "one", r=4)
    pipe.save_pretrained(tmp_path)
    encoder = FixClipStableDiffusionPipeline.from_pretrained(sd1).text_encoder
    other = FixClipStableDiffusionPipeline.from_pretrained(tmp_path, encoder=encoder)
    assert other.get_list_adapters() == {}
    assert np.array_equal(picture(other), picture(FixClipStableDiffusionPipeline.from_pretrained(sd1)))
    assert not caplog.records
    DiffusionPipeline.from_pretrained(tmp_path, unet=None)
    assert "saved with LoRAs, which do not act: there is no UNet" in caplog.text


@pytest.fixture(scope="module")
def with_lora(sd1, tmp_path_factory):
    """A saved pipeline with a LoRA on UNet and text encoder."""
    pipe = FixClipStableDiffusionPipeline.from_pretrained(sd1)
    add_random_lora(pipe, "one", r=4)
    pipe.set_adapters("one", 0.5)
    pipe.save_pretrained(folder := tmp_path_factory.mktemp("with_lora"))
    return folder


@pytest.mark.parametrize("reader", [FixClipStableDiffusionPipeline, DiffusionPipeline])
def test_without_a_text_encoder_the_unets_lora_acts(with_lora, reader, caplog):
    pipe = FixClipStableDiffusionPipeline.from_pretrained(with_lora)
    embeds, negative = pipe.encode_prompt("a red star", "cpu", 1, True)
    expected = picture(pipe)
    other = reader.from_pretrained(with_lora, text_encoder=None, tokenizer=None)
    other.set_progress_bar_config(disable=True)
    image = other(
        prompt_embeds=embeds, negative_prompt_embeds=negative, generator=torch.Generator().manual_seed(1), **FAST
    ).images[0]
    np.testing.assert_allclose(np.asarray(image), expected, atol=1)
    assert not caplog.records


@pytest.mark.parametrize("reader", [FixClipStableDiffusionPipeline, DiffusionPipeline])
def test_a_unet_of_another_pipeline_lends_its_lora_and_the_text_encoder_gets_its_own(with_lora, reader):
    pipe = FixClipStableDiffusionPipeline.from_pretrained(with_lora)
    expected = picture(pipe)
    again = reader.from_pretrained(with_lora, unet=pipe.unet)
    assert again.get_list_adapters() == {"unet": ["one"], "text_encoder": ["one"]}
    np.testing.assert_allclose(picture(again), expected, atol=1)


def test_every_system_of_a_comparison_has_the_bases_lora(with_lora):
    painter = Painter(str(with_lora))
    drawing = Drawing(steps=2, size=32, guidance_scale=5.0, batch_size=1)
    systems = [parse_system(f"{name}:conditioning=overlap") for name in ("first", "second")]
    first, second = (painter.draw(system, [Prompt("a red star")], drawing)[0][0] for system in systems)
    assert np.array_equal(np.asarray(first), np.asarray(second))
    alone = np.asarray(Painter(str(with_lora)).draw(systems[1], [Prompt("a red star")], drawing)[0][0])
    assert np.array_equal(np.asarray(second), alone)


@pytest.mark.parametrize("has_own_encoder", [False, True])
def test_loras_of_a_unet_that_is_given_stay(sd1, with_lora, has_own_encoder):
    """The base's own goes with another encoder, that of the caller acts on."""
    theirs = FixClipStableDiffusionPipeline.from_pretrained(sd1)
    unet_alone = FixClipStableDiffusionPipeline.from_pretrained(sd1)
    for pipe in (theirs, unet_alone):
        add_random_lora(pipe, "mine", r=2)
    encoder = FixClipStableDiffusionPipeline.from_pretrained(sd1).text_encoder
    unet_alone.text_encoder = encoder
    expected = picture(unet_alone)
    own = {} if has_own_encoder else {"encoder": encoder}
    pipe = FixClipStableDiffusionPipeline.from_pretrained(with_lora, unet=theirs.unet, **own)
    if has_own_encoder:
        assert set(pipe.get_list_adapters()["unet"]) == {"mine", "one"}
        assert set(pipe.unet.active_adapters()) == {"mine", "one"}
    else:
        assert pipe.get_list_adapters() == {"unet": ["mine"]}
        np.testing.assert_allclose(picture(pipe), expected, atol=1)


def test_nothing_is_said_of_loras_where_nothing_is_known_of_them(with_lora, sd1, caplog):
    """A name that is in another cache; and `from_pretrained` of our class, which loads LoRAs once."""
    pipe = FixClipStableDiffusionPipeline.from_pretrained(sd1)
    pipe.register_to_config(_name_or_path="someone/in-another-cache")
    assert not caplog.records
    pipe.register_to_config(_name_or_path=str(with_lora))
    assert pipe.get_list_adapters() == {"unet": ["one"], "text_encoder": ["one"]}
    pipe = FixClipStableDiffusionPipeline.from_pretrained(sd1)
    shutil.copytree(with_lora, broken := with_lora.with_name("broken"))
    shutil.rmtree(broken / "lora")
    pipe.register_to_config(_name_or_path=str(broken))
    assert "was saved with LoRAs, which could not be loaded" in caplog.text
    caplog.clear()
    with pytest.raises(ValueError, match="LoRA 'one' of "):
        FixClipStableDiffusionPipeline.from_pretrained(broken)
    assert not caplog.records
