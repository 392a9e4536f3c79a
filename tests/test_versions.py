"""The ranges of transformers, diffusers, peft and accelerate in pyproject.toml are those that work together."""

import importlib.metadata
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from packaging.requirements import Requirement
from peft import LoraConfig

from fixclip_diffusion import FixClipStableDiffusionPipeline

ROOT = Path(__file__).parents[1]
STATED = [Requirement(line) for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]]
TOGETHER = ("transformers", "diffusers", "peft", "accelerate")


@pytest.fixture(scope="module", autouse=True)
def _installed_as_stated():
    """An environment that was made for other ranges tells nothing about these."""
    found = importlib.metadata.distributions(name="fixclip")
    installed = [item for item in found if item.read_text("RECORD") is not None]  # not what a build leaves in the clone
    if not installed:
        pytest.skip("the package is not installed here")
    made_for = [Requirement(line) for line in installed[0].requires or ()]
    differing = sorted(item.name for item in STATED if item not in made_for)
    if differing:
        pytest.skip(f"this environment was made for other ranges of {', '.join(differing)}: pip install -e '.[dev]'")


def test_what_is_installed_is_inside_the_ranges():
    for item in STATED:
        found = importlib.metadata.version(item.name)
        assert item.specifier.contains(found, prereleases=True), f"{item}, but {found} is installed"
    assert {item.name for item in STATED if item.specifier} >= set(TOGETHER)


@pytest.mark.parametrize("pipeline", [StableDiffusionPipeline, FixClipStableDiffusionPipeline])
def test_a_lora_of_transformers_own_integration_is_added_and_saved(sd1, tmp_path, pipeline):
    """peft's layers through transformers' and diffusers' methods, which ask for versions of one another."""
    pipe = pipeline.from_pretrained(sd1)
    pipe.set_progress_bar_config(disable=True)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    pipe.text_encoder.add_adapter(config, "style")
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "style")
    expected = draw(pipe)
    pipe.text_encoder.disable_adapters()
    assert not np.array_equal(draw(pipe), expected)
    pipe.text_encoder.enable_adapters()
    assert np.array_equal(draw(pipe), expected)
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "text_encoder").is_dir()
    if pipeline is FixClipStableDiffusionPipeline:
        again = pipeline.from_pretrained(tmp_path)
        np.testing.assert_allclose(draw(again), expected, atol=1e-5)


def draw(pipe):
    generator = torch.Generator().manual_seed(1)
    options = {"num_inference_steps": 1, "width": 16, "height": 16, "output_type": "np"}
    return pipe("a red cat", generator=generator, **options).images
