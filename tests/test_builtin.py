"""The embedded model: its names, on a stand-in of the same layout, and its weights where this copy has them."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny_scenes import write_model

from fixclip_core import scenes
from fixclip_diffusion import FixClipStableDiffusionPipeline, FixClipTextEncoder, FixClipTokenizer, TextAdapter, builtin

ROOT = Path(__file__).parents[1]
PROMPT = scenes.long_caption(scenes.sample_scene("a test", num_objects=9), 0).text
FAST = {"num_inference_steps": 2}


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The stand-in, a folder."""
    return write_model(tmp_path_factory.mktemp("embedded") / "scenes")


@pytest.fixture
def embedded(model, monkeypatch):
    """The stand-in under the name builtin:scenes."""
    monkeypatch.setattr(builtin, "FOLDER", model.parent)
    return model


def picture(pipe, **kwargs):
    pipe.set_progress_bar_config(disable=True)
    return np.asarray(pipe(PROMPT, generator=torch.Generator().manual_seed(1), **FAST, **kwargs).images[0])


# -- names ---------------------------------------------------------------------------------------------------


def test_the_name_loads_the_whole_model(embedded):
    pipe = FixClipStableDiffusionPipeline.from_pretrained("builtin:scenes")
    assert pipe.text_encoder.context_length == 248
    assert pipe.text_encoder.short_context_length == 0
    assert pipe.text_encoder.adapter is not None
    assert pipe.get_list_adapters() == {"unet": ["fixclip"]}
    assert {p.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters()} == {torch.float32}
    by_hand = FixClipStableDiffusionPipeline.from_pretrained(
        embedded / "base", encoder=embedded / "encoder", adapter=embedded / "adapter"
    )
    without_lora = picture(by_hand)
    by_hand.load_lora_weights(embedded / "lora")
    assert picture(pipe).shape == (72, 72, 3)
    assert np.array_equal(picture(pipe), picture(by_hand))
    assert not np.array_equal(picture(pipe), without_lora)
    pipe.disable_lora()
    assert np.array_equal(picture(pipe), without_lora)
    # A folder of the same layout loads in the same way.
    assert np.array_equal(picture(FixClipStableDiffusionPipeline.from_pretrained(embedded)), picture(by_hand))


def test_parts_are_read_wherever_a_folder_is(embedded):
    pipe = FixClipStableDiffusionPipeline.from_pretrained(
        "builtin:scenes/base", encoder="builtin:scenes/encoder", adapter="builtin:scenes/adapter"
    )
    assert not pipe.get_list_adapters()
    pipe.load_lora_weights("builtin:scenes/lora")
    assert np.array_equal(picture(pipe), picture(FixClipStableDiffusionPipeline.from_pretrained("builtin:scenes")))
    encoder = FixClipTextEncoder.from_pretrained("builtin:scenes/encoder", dtype=torch.float32)
    assert all(map(torch.equal, encoder.parameters(), FixClipTextEncoder.from_pretrained(
        "builtin:scenes/encoder", subfolder="text_encoder", dtype=torch.float32).parameters()))  # fmt: skip
    assert FixClipTextEncoder.from_pretrained("builtin:scenes/base").short_context_length == 77
    for part in ("base", "encoder"):
        tokenizer = FixClipTokenizer.from_pretrained(f"builtin:scenes/{part}")
        assert tokenizer(PROMPT).input_ids == pipe.tokenizer(PROMPT).input_ids
    assert TextAdapter.from_pretrained("builtin:scenes/adapter").config == pipe.text_encoder.adapter.config


def test_what_is_named_beside_the_whole_model_wins(embedded, tmp_path):
    load = FixClipStableDiffusionPipeline.from_pretrained
    adapter = TextAdapter(32, hidden_width=8)
    pipe = load("builtin:scenes", adapter=adapter)
    assert pipe.text_encoder.adapter.config["hidden_width"] == 8
    assert pipe.get_list_adapters() == {"unet": ["fixclip"]}
    assert load("builtin:scenes", encoder="builtin:scenes/encoder").text_encoder.adapter is not None
    # Adapter and LoRA belong to the model's own encoder.
    other = FixClipTextEncoder.from_pretrained("builtin:scenes/base")
    other.save_pretrained(tmp_path)
    for options in ({"encoder": tmp_path}, {"encoder": other}, {"text_encoder": other}):
        pipe = load("builtin:scenes", **options)
        assert pipe.text_encoder.short_context_length == 77
        assert pipe.text_encoder.adapter is None
        assert not pipe.get_list_adapters()
    assert load("builtin:scenes", encoder=tmp_path, adapter="builtin:scenes/adapter").text_encoder.adapter is not None


def test_a_model_without_lora_loads_without(model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "scenes")
    shutil.rmtree(copy / "lora")
    pipe = FixClipStableDiffusionPipeline.from_pretrained(copy)
    assert pipe.text_encoder.adapter is not None
    assert not pipe.get_list_adapters()


def test_stock_diffusers_draws_the_same_from_the_base(embedded):
    stock = StableDiffusionPipeline.from_pretrained(builtin.resolve("builtin:scenes/base"))
    ours = FixClipStableDiffusionPipeline.from_pretrained("builtin:scenes/base")
    assert np.array_equal(picture(stock), picture(ours, long_prompt="truncate_77"))
    assert not np.array_equal(picture(stock), picture(ours))


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (lambda: FixClipStableDiffusionPipeline.from_pretrained("builtin:scene"), "there is no such built-in model"),
        (lambda: FixClipStableDiffusionPipeline.from_pretrained("builtin:scenes/unet"), "there are builtin:scenes, "),
        (lambda: FixClipTextEncoder.from_pretrained("builtin:scenes"), "is a whole model, and one of its parts"),
        (lambda: FixClipStableDiffusionPipeline.from_pretrained("builtin:scenes", encoder="builtin:x"), "'builtin:x'"),
        (lambda: TextAdapter.from_pretrained("builtin:"), "builtin:scenes/adapter, builtin:scenes/lora"),
        (lambda: builtin.resolve("builtin:../scenes/base"), "there is no such built-in model"),
    ],
)
def test_an_unknown_name_is_told_what_there_is(embedded, load, message):
    with pytest.raises(ValueError, match=message):
        load()


def test_a_copy_without_weights_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(builtin, "FOLDER", tmp_path)
    assert not builtin.is_available()
    with pytest.raises(ValueError, match="this copy of fixclip has no embedded model"):
        FixClipStableDiffusionPipeline.from_pretrained("builtin:scenes")


def test_other_names_stay_as_they_are(sd1):
    for name in ("stable-diffusion-v1-5/stable-diffusion-v1-5", str(sd1), "nowhere"):
        assert builtin.resolve(name) == name
        assert builtin.whole_model(name) is None
        assert builtin.base_of(name) == name


def test_a_wheel_holds_every_file(model, tmp_path):
    """Built from a copy with the stand-in in place, without network."""
    for name in ("pyproject.toml", "README.md", "LICENSE", "fixclip_cli.py"):
        shutil.copy(ROOT / name, tmp_path)
    skip = shutil.ignore_patterns("__pycache__", "scenes")
    for package in ("fixclip_core", "fixclip_diffusion"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=skip)
    shutil.copytree(model, tmp_path / "fixclip_diffusion" / "builtin" / "scenes")
    (tmp_path / "fixclip_diffusion" / "builtin" / "scenes" / "README.md").write_text("The model card.\n")
    code = "from setuptools import build_meta; build_meta.build_wheel('.')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    files = [file for file in (tmp_path / "fixclip_diffusion").rglob("*") if file.is_file()]
    assert {str(file.relative_to(tmp_path)) for file in files} <= set(zipfile.ZipFile(wheel).namelist())
    assert len(files) > 20
