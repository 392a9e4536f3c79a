"""Hub names, with the real hub client against a local server (the client reads its endpoint at import)."""

import json
import os
import subprocess
import sys

import pytest
import torch
from diffusers import StableDiffusionPipeline
from hub import serve
from tiny_checkpoint import save_checkpoint, text_state
from transformers import CLIPTextModel

from fixclip_core.weights.text_encoder import CONFIG_KEY
from fixclip_diffusion import FixClipStableDiffusionPipeline, TextAdapter
from fixclip_diffusion.tiny import clip_text_config

SCRIPT = """
import json, sys
import numpy as np
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
import tiny
from fixclip_diffusion import FixClipStableDiffusionPipeline, FixClipTextEncoder, FixClipTokenizer

LONG = tiny.sentences(14)
results = {}

def states(pipe, prompt=LONG):
    return pipe.encode_prompt(prompt, "cpu", 1, False)[0]

stock = FixClipStableDiffusionPipeline.from_pretrained("someone/tiny-sd")
local = FixClipStableDiffusionPipeline.from_pretrained(sys.argv[1])
results["stock base"] = torch.equal(states(stock), states(local))

saved = [cls.from_pretrained("someone/tiny-fixclip")
         for cls in (FixClipStableDiffusionPipeline, DiffusionPipeline, StableDiffusionPipeline)]
expected = FixClipStableDiffusionPipeline.from_pretrained(sys.argv[2])

def equal_one_pass(embeds):
    # A stock pipeline pads to 248 tokens; zeros stand behind the text.
    wanted = states(expected)
    return torch.allclose(embeds[:, : wanted.shape[1]], wanted, atol=1e-5) and not embeds[:, wanted.shape[1] :].any()

for pipe in (*saved[:2], expected):
    pipe.conditioning = "one_pass"
results["saved pipeline"] = [equal_one_pass(states(pipe)) for pipe in saved]
results["classes"] = [type(pipe).__name__ for pipe in saved]

parts = FixClipStableDiffusionPipeline.from_pretrained(
    "someone/tiny-sd", encoder="someone/long-clip", adapter="someone/tiny-adapter")
results["encoder and adapter"] = [parts.text_encoder.short_context_length, parts.text_encoder.adapter is not None]
encoder = FixClipTextEncoder.from_pretrained("someone/tiny-fixclip", subfolder="text_encoder")
tokenizer = FixClipTokenizer.from_pretrained("someone/tiny-fixclip", subfolder="tokenizer")
ids = tokenizer([LONG], padding="max_length", return_tensors="pt").input_ids
results["components"] = equal_one_pass(encoder(ids)[0])

def message(*args, **kwargs):
    try:
        FixClipStableDiffusionPipeline.from_pretrained(*args, **kwargs)
    except ValueError as error:
        return str(error)

from fixclip_diffusion import FixClipStableDiffusionXLPipeline
from fixclip_diffusion.auto import load_pipeline

folder, single = sys.argv[1], FixClipStableDiffusionPipeline.from_single_file
configs = {"config": folder, "safety_checker": None, "requires_safety_checker": False}
url = "https://huggingface.co/someone/files/blob/main/files/sd.safetensors"
configs["tokenizer"] = StableDiffusionPipeline.from_pretrained(folder).tokenizer
found = {}
for name, loads in (("sd", (single, load_pipeline)), ("long", (single,))):
    wanted = single(sys.argv[3] + "/files/" + name + ".safetensors", **configs)
    urls = [url.replace("sd.", name + "."), url.replace("blob", "resolve")]
    pipes = [load(url, **configs) for load, url in zip(loads, urls)]
    found[name] = [torch.equal(states(pipe), states(wanted)) for pipe in pipes]
    found[name].append(pipes[0].text_encoder.short_context_length)
results["single files"] = found

def file_message(url, kind=FixClipStableDiffusionPipeline):
    try:
        kind.from_single_file(url, config=folder)
    except ValueError as error:
        return str(error)

results["other family"] = file_message(url, FixClipStableDiffusionXLPipeline)
results["no file"] = file_message(url.replace("sd.", "no."))
results["a VAE"] = file_message(
    "https://huggingface.co/someone/tiny-sd/blob/main/vae/diffusion_pytorch_model.safetensors")
from fixclip_cli.models import ModelOptions, check_names
from fixclip_diffusion.prompt_reader import PromptReader

check_names(ModelOptions(url))
local = sys.argv[3] + "/files/sd.safetensors"
results["tokens"] = [str(PromptReader.from_pretrained(name).report("a red horse " * 40)) for name in (url, local)]
try:
    single(local)
except ValueError as error:
    results["no layout"] = str(error)
results["unknown"] = message("someone/nothing")
results["wide"] = message("someone/other-sd", encoder="someone/wide")

import os
from pathlib import Path

# An adapter's repository is not the base's: it has no such revision, but lies in the same cache.
cache = Path(os.environ["HF_HOME"]) / "other"
options = {"revision": "v2", "cache_dir": str(cache)}
FixClipStableDiffusionPipeline.from_pretrained("someone/again-sd", adapter="someone/again-adapter", **options)
xl = FixClipStableDiffusionXLPipeline.from_pretrained
xl(sys.argv[4], adapter="someone/xl-adapter", add_watermarker=False, **options)
pairs = (FixClipStableDiffusionPipeline, stock, "again-adapter"), (FixClipStableDiffusionXLPipeline,
         xl(sys.argv[4], add_watermarker=False), "xl-adapter")
adapted = [kind.from_pipe(pipe, adapter="someone/" + name, cache_dir=str(cache), local_files_only=True)
           for kind, pipe, name in pairs]
results["from_pipe"] = [pipe.text_encoder.adapter is not None for pipe in adapted]
results["revisions"] = {name: sorted(file.name for file in (cache / ("models--someone--" + name) / "refs").iterdir())
                        for name in ("again-sd", "again-adapter", "xl-adapter")}
read = PromptReader.from_pretrained(sys.argv[4], adapter="someone/xl-adapter")
results["adapter read"] = read.adapter is not None and read.adapter["conditioning"]
print("RESULTS " + json.dumps(results))
"""


def single_files(base, folder):
    """Whole checkpoints in one file: of `base`, and of a base that was trained with 248 positions."""
    pipe = StableDiffusionPipeline.from_pretrained(base)
    folder.mkdir(parents=True)
    long = CLIPTextModel(clip_text_config(max_position_embeddings=248, eos_token_id=49407))
    for name, model in (("sd", pipe.text_encoder), ("long", long)):
        metadata = {CONFIG_KEY: json.dumps({"num_attention_heads": model.config.num_attention_heads})}
        text = text_state(model, "cond_stage_model.transformer.")
        save_checkpoint(folder / f"{name}.safetensors", pipe, text, metadata)


@pytest.fixture(scope="module")
def outcome(base_folders, sdxl, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    adapter = TextAdapter(32)
    torch.nn.init.normal_(adapter.blocks[0].fc2.weight)
    adapter.save_pretrained(folder / "adapter")
    for part, width in (("text_encoder", 32), ("text_encoder_2", 48)):
        TextAdapter(width, conditioning="chunks").save_pretrained(folder / "xl_adapter" / part)
    pipe = FixClipStableDiffusionPipeline.from_pretrained(base_folders["sd1"], adapter=adapter)
    pipe.save_pretrained(folder / "fixclip")
    CLIPTextModel(clip_text_config(max_position_embeddings=248)).save_pretrained(folder / "long")
    CLIPTextModel(clip_text_config(hidden_size=64)).save_pretrained(folder / "wide")
    single_files(base_folders["sd1"], folder / "single" / "files")
    repositories = {
        "someone/tiny-sd": base_folders["sd1"],
        "someone/other-sd": base_folders["sd1"],
        "someone/tiny-fixclip": folder / "fixclip",
        "someone/long-clip": folder / "long",
        "someone/tiny-adapter": folder / "adapter",
        "someone/wide": folder / "wide",
        "someone/xl-adapter": folder / "xl_adapter",
        "someone/again-sd": base_folders["sd1"],
        "someone/again-adapter": folder / "adapter",
        "someone/files": folder / "single",
    }
    with serve(repositories) as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "0"}
        environment |= {"PYTHONPATH": os.path.dirname(__file__), "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, base_folders["sd1"], folder / "fixclip", folder / "single", sdxl],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.split("RESULTS ")[1])
    return results, hub.downloads


def test_a_stock_model_from_the_hub(outcome):
    assert outcome[0]["stock base"]


def test_a_pipeline_whose_index_names_our_components(outcome):
    assert outcome[0]["saved pipeline"] == [True, True, True]
    assert outcome[0]["classes"] == [
        "FixClipStableDiffusionPipeline",
        "FixClipStableDiffusionPipeline",
        "StableDiffusionPipeline",
    ]


def test_encoder_adapter_and_single_components(outcome):
    assert outcome[0]["encoder and adapter"] == [0, True]
    assert outcome[0]["components"]


def test_an_adapter_is_looked_for_in_the_bases_cache_and_not_in_its_revision(outcome):
    results, _ = outcome
    assert results["revisions"] == {"again-sd": ["v2"], "again-adapter": ["main"], "xl-adapter": ["main"]}
    assert results["from_pipe"] == [True, True]
    assert results["adapter read"] == "chunks"


def test_a_checkpoint_in_one_file_by_its_url(outcome):
    """As the file itself, and downloaded once."""
    results, downloads = outcome
    assert results["single files"] == {
        "sd": [True, True, 77],
        "long": [True, 0],
    }
    assert downloads.count("someone/files/files/sd.safetensors") == 1
    assert results["tokens"][0] == results["tokens"][1]
    assert "no such public repository on the hub" in results["no layout"]
    assert results["no layout"].endswith("or give config=FOLDER of a model of the same kind")
    assert "blob/main/files/sd.safetensors' is not of Stable Diffusion XL" in results["other family"]
    assert "files/no.safetensors' could not be fetched: the repository has no such file" in results["no file"]
    assert "there is no text encoder in this file, it is a VAE" in results["a VAE"]


def test_errors_come_before_weights_are_downloaded(outcome):
    results, downloads = outcome
    assert "base 'someone/nothing'" in results["unknown"]
    assert "64 wide, but the UNet's cross-attention takes 32" in results["wide"]
    fetched = [file for file in downloads if file.startswith(("someone/other-sd", "someone/wide"))]
    assert fetched
    assert all(file.endswith(".json") for file in fetched)


def test_nothing_is_downloaded_twice(outcome):
    downloads = [file for file in outcome[1] if file.endswith(".safetensors")]
    assert len(downloads) == len(set(downloads))
    assert "someone/tiny-sd/unet/diffusion_pytorch_model.safetensors" in downloads
