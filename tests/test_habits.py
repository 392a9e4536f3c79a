"""What users of transformers and diffusers are used to, on our classes."""

import shutil

import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import AutoModel, AutoTokenizer

from fixclip_diffusion import (
    FixClipStableDiffusionPipeline,
    FixClipTextConfig,
    FixClipTextEncoder,
    FixClipTokenizer,
)

LONG = tiny.sentences(14)


@pytest.fixture(scope="module")
def saved(sd1, tmp_path_factory):
    """An encoder and its tokenizer in one folder."""
    folder = tmp_path_factory.mktemp("saved")
    FixClipTextEncoder.from_pretrained(sd1, subfolder="text_encoder").save_pretrained(folder)
    FixClipTokenizer.from_pretrained(sd1, subfolder="tokenizer").save_pretrained(folder)
    return folder


def test_auto_classes_read_what_was_saved(saved):
    encoder, tokenizer = AutoModel.from_pretrained(saved).eval(), AutoTokenizer.from_pretrained(saved)
    assert type(encoder) is FixClipTextEncoder
    assert type(tokenizer) is FixClipTokenizer
    clean = FixClipTokenizer.from_pretrained(saved)("A “red” cat & dog").input_ids
    assert tokenizer("A “red” cat &amp; dog").input_ids == clean
    ids = tokenizer([LONG], padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(encoder(ids)[0], FixClipTextEncoder.from_pretrained(saved).eval()(ids)[0])


def test_standard_arguments_of_from_pretrained(sd1, saved):
    for where in ({"subfolder": "text_encoder"}, {}):
        name = sd1 if where else saved
        encoder = FixClipTextEncoder.from_pretrained(name, attention_dropout=0.1, output_hidden_states=True, **where)
        assert encoder.config.attention_dropout == 0.1
        assert len(encoder.eval()(torch.tensor([[49406, 320, 49407]])).hidden_states) == 4
    config = FixClipTextConfig.from_pretrained(saved)
    config.padding = "keep"
    assert FixClipTextEncoder.from_pretrained(saved, config=config).config.padding == "keep"
    state = FixClipTextEncoder.from_pretrained(saved).state_dict()
    again = FixClipTextEncoder.from_pretrained(None, config=config, state_dict=state)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in state.items())


def test_a_typed_model_max_length_counts(sd1):
    tokenizer = FixClipTokenizer.from_pretrained(sd1, subfolder="tokenizer", model_max_length=100)
    assert tokenizer.context_length == tokenizer.model_max_length == 100
    assert len(tokenizer(LONG, truncation=True).input_ids) == 100


def test_modules_that_stay_whole_are_ours(saved):
    encoder = FixClipTextEncoder.from_pretrained(saved)
    names = {type(module).__name__ for module in encoder.modules()}
    whole = {"FixClipTextEmbeddings", "CLIPEncoderLayer"}
    assert whole <= names
    assert whole <= set(encoder._no_split_modules)  # transformers adds those of other towers


def test_an_encoder_with_lora_layers_is_not_saved_without_its_weights(saved, tmp_path):
    encoder = FixClipTextEncoder.from_pretrained(saved)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), encoder)
    encoder._hf_peft_config_loaded = True  # what transformers' add_adapter sets
    with pytest.raises(ValueError, match=r"has LoRA layers, .* save it in a pipeline of fixclip_diffusion"):
        encoder.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_errors_are_caught_as_transformers_users_catch_them(tmp_path):
    for kind in (OSError, ValueError):
        with pytest.raises(kind, match="nowhere"):
            FixClipTextEncoder.from_pretrained(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("with_encoder", [True, False])
def test_a_variant_that_not_every_component_has(sd1, tmp_path, with_encoder):
    """As in stock diffusers, a component without that variant is read from its plain file."""
    shutil.copytree(sd1, tmp_path / "base")
    for part in ("unet", *(["text_encoder"] if with_encoder else [])):
        (file,) = (tmp_path / "base" / part).glob("*.safetensors")
        file.rename(file.with_name(file.stem + ".fp16.safetensors"))
    pipe = FixClipStableDiffusionPipeline.from_pretrained(tmp_path / "base", variant="fp16")
    expected = FixClipStableDiffusionPipeline.from_pretrained(sd1)
    assert isinstance(pipe.text_encoder, FixClipTextEncoder)
    with torch.no_grad():
        found, wanted = (p.encode_prompt(LONG, "cpu", 1, False)[0] for p in (pipe, expected))
    assert np.array_equal(found, wanted)
