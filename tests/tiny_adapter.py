"""Recipes, data and models for training a tiny adapter."""

import json

import pytest
import tiny
import torch
from PIL import Image

from fixclip_core.training.recipe import load_recipe
from fixclip_diffusion.adapter_training.recipe import AdapterRecipe

COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0))
RECIPE = """\
seed: 3
model: {{base: "{base}"}}
adapter: {{hidden_width: 16}}
objectives: {{snr_gamma: 5.0, short_share: 0.5, weight_short: 0.5, weight_states: 0.1}}
data: {{source: "{data}", workers: 0, resolution: 16}}
captions: {{short_caption: first_sentence}}
optim: {{lr: 1e-2, lr_new: 1e-2, warmup_steps: 0}}
train: {{steps: 4, batch_size: 4, precision: fp32, max_skipped_steps: 3}}
samples: {{prompts: [], steps: 2}}
output: {{folder: "{folder}", log_every: 1, save_every: 2, keep_last: 3}}
"""


@pytest.fixture(autouse=True)
def without_onednn():
    """oneDNN compiles each convolution anew for each batch size, which takes tiny models most of their time."""
    with torch.backends.mkldnn.flags(enabled=False):
        yield


def caption(number, sentences=9):
    """About 90 tokens, another for each number."""
    return f"Picture {number} is here. {tiny.sentences(sentences)}"


def write_data(folder, count=12, sentences=9):
    """A manifest of small pictures with long captions."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        Image.new("RGB", (20 + number, 24), COLOURS[number % 4]).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "long": caption(number, sentences)})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "data.jsonl"


def write_recipe(path, base, data):
    path.write_text(RECIPE.format(base=base, data=data, folder=path.with_suffix("")))
    return path


def read(path, *overrides):
    return load_recipe(AdapterRecipe, path, overrides)


def no_adapter(states, text):
    """In place of an adapter: changes nothing."""
    return states


@torch.no_grad()
def randomize(adapter, std=0.2, seed=0):
    """Weights that do something: a new adapter is the identity."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return adapter
