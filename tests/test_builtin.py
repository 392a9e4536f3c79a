"""The embedded model: its names, on a stand-in of the same layout, and its weights where this copy has them."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import run
from diffusers import StableDiffusionPipeline
from PIL import Image
from tiny_scenes import write_model

from fixclip_core import builtin, scenes
from fixclip_diffusion import (
    FixClipStableDiffusionPipeline,
    FixClipTextEncoder,
    FixClipTokenizer,
    TextAdapter,
    demo,
)
from fixclip_diffusion.adapter_training import trainer as train
from fixclip_diffusion.adapter_training.features import write_attention_out
from fixclip_diffusion.evaluation.generate import Drawing, System

# What the embedded weights must reach: objects right, of the nine of the demo's third prompt, one of which another's
# sentence colours.
RIGHT_AT_LEAST = {"overlap + adapter": 8, "overlapping windows": 5}
SIZE_AT_MOST = 49e6  # bytes; what a wheel compresses them to is held to less in test_release.py
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


def test_the_name_loads_the_base_with_the_adapter_on_its_overlapping_windows(embedded, caplog):
    pipe = FixClipStableDiffusionPipeline.from_pretrained("builtin:scenes")
    assert not caplog.messages
    assert (pipe.conditioning, pipe.text_encoder.short_context_length) == ("overlap", 77)
    assert not pipe.get_list_adapters()
    assert {p.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters()} == {torch.float32}
    by_hand = FixClipStableDiffusionPipeline.from_pretrained(embedded / "base", adapter=embedded / "overlap_adapter")
    for one in (by_hand, FixClipStableDiffusionPipeline.from_pretrained(embedded)):
        assert np.array_equal(picture(pipe), picture(one))
    pipe.text_encoder.set_adapter_module(None)
    assert not np.array_equal(picture(pipe), picture(by_hand))


def test_its_encoder_comes_with_its_adapter_and_lora(embedded, tmp_path, caplog):
    pipe = FixClipStableDiffusionPipeline.from_pretrained("builtin:scenes", encoder="builtin:scenes/encoder")
    assert not caplog.messages
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
    # A folder of the same layout loads in the same way, and one without overlap_adapter/ by its own name.
    load = FixClipStableDiffusionPipeline.from_pretrained
    assert np.array_equal(picture(load(embedded, encoder=embedded / "encoder")), picture(by_hand))
    without = shutil.copytree(embedded, tmp_path / "scenes", ignore=shutil.ignore_patterns("overlap_adapter"))
    assert np.array_equal(picture(load(without)), picture(by_hand))


def test_parts_are_read_wherever_a_folder_is(embedded):
    pipe = FixClipStableDiffusionPipeline.from_pretrained(
        "builtin:scenes/base", encoder="builtin:scenes/encoder", adapter="builtin:scenes/adapter"
    )
    assert not pipe.get_list_adapters()
    pipe.load_lora_weights("builtin:scenes/lora")
    whole = FixClipStableDiffusionPipeline.from_pretrained("builtin:scenes", adapter="builtin:scenes/adapter")
    assert np.array_equal(picture(pipe), picture(whole)), "who names the adapter names its encoder"
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
    assert (pipe.text_encoder.short_context_length, pipe.get_list_adapters()) == (77, {})
    pipe = load("builtin:scenes", encoder="builtin:scenes/encoder", adapter=adapter)
    assert pipe.text_encoder.adapter.config["hidden_width"] == 8
    assert pipe.get_list_adapters() == {"unet": ["fixclip"]}
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
    pipe = FixClipStableDiffusionPipeline.from_pretrained(copy, encoder=copy / "encoder")
    assert pipe.text_encoder.adapter is not None
    assert not pipe.get_list_adapters()


def test_stock_diffusers_draws_the_same_from_the_base(embedded):
    stock = StableDiffusionPipeline.from_pretrained(builtin.resolve("builtin:scenes/base"))
    ours = FixClipStableDiffusionPipeline.from_pretrained("builtin:scenes/base")
    assert np.array_equal(picture(stock), picture(ours, conditioning="stock"))
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


def test_training_takes_the_parts(embedded):
    section = train.BaseSection(base="builtin:scenes/base", encoder="builtin:scenes/encoder")
    frozen = train.load_frozen(section)
    assert frozen.encodings[0].context.short_length == 0
    assert frozen.teachers[0].context.short_length == 77
    with pytest.raises(ValueError, match="'builtin:scenes' is a whole model, and one of its parts is needed"):
        train.load_frozen(train.BaseSection(base="builtin:scenes"))


def test_a_wheel_holds_every_file(model, tmp_path):
    """Built from a copy with the stand-in in place, without network."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    skip = shutil.ignore_patterns("__pycache__", "scenes")
    for package in ("fixclip_core", "fixclip_diffusion", "fixclip_cli"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=skip)
    shutil.copytree(model, tmp_path / "fixclip_diffusion" / "builtin" / "scenes")
    (tmp_path / "fixclip_diffusion" / "builtin" / "scenes" / "README.md").write_text("The model card.\n")
    code = "from setuptools import build_meta; build_meta.build_wheel('.')"
    built = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "would be ignored" not in built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    files = [file for file in (tmp_path / "fixclip_diffusion").rglob("*") if file.is_file()]
    assert {str(file.relative_to(tmp_path)) for file in files} <= set(zipfile.ZipFile(wheel).namelist())
    assert len(files) > 20


# -- the commands --------------------------------------------------------------------------------------------


def test_generate_with_the_whole_model(embedded, tmp_path):
    result = run("generate", PROMPT, "--base", "builtin:scenes", "--steps", 2, "--seed", 1, "-o", tmp_path / "a.png")
    assert result.exit_code == 0, result.output
    image = Image.open(tmp_path / "a.png")
    assert np.array_equal(np.asarray(image), picture(FixClipStableDiffusionPipeline.from_pretrained("builtin:scenes")))
    assert json.loads(image.text["fixclip"])["base"] == "builtin:scenes"
    # Stock and chunks need the base's own encoder.
    result = run("generate", PROMPT, "--base", "builtin:scenes", "--steps", 2, "--compare", "-o", tmp_path / "b.png")
    assert result.exit_code == 0, result.output
    assert run("tokens", PROMPT, "--base", "builtin:scenes").output == run("tokens", PROMPT, "--base", embedded).output
    result = run("generate", PROMPT, "--base", "builtin:scene", "-o", tmp_path)
    assert result.exit_code == 2
    assert "there is no such built-in model; there are builtin:scenes, builtin:scenes/base" in result.output


def test_evaluation_with_the_whole_model(embedded, tmp_path):
    default = tmp_path / "default"
    options = ["--steps", 1, "--guidance", 3, "-o"]
    result = run("evaluate-images", "scenes:1", "--base", "builtin:scenes", *options, default)
    assert result.exit_code == 0, result.output
    options += [tmp_path]
    systems = json.loads((default / "report.json").read_text())["settings"]["systems"]
    assert [system["name"] for system in systems] == ["stock", "chunks", "overlap", "one_pass", "overlap+adapter"]
    assert (systems[-1]["encoder"], systems[-1]["adapter"]) == (None, "builtin:scenes/overlap_adapter")
    named = ["--base", "builtin:scenes", "--encoder", "builtin:scenes/encoder"]
    result = run("evaluate-images", "scenes:1", *named, *options)
    assert result.exit_code == 0, result.output
    systems = json.loads((tmp_path / "report.json").read_text())["settings"]["systems"]
    assert [system["name"] for system in systems] == [
        "stock",
        "chunks",
        "overlap",
        "one_pass",
        "one_pass+adapter",
        "one_pass+adapter+lora",
    ]
    assert systems[-1]["lora"] == "builtin:scenes/lora"
    parts = "encoder=builtin:scenes/encoder,adapter=builtin:scenes/adapter,lora=builtin:scenes/lora"
    again = run("evaluate-images", "scenes:1", "--base", "builtin:scenes/base", "--system", f"all:{parts}", *options)
    assert again.exit_code == 0, again.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["judges"]["checker"]["systems"]) == ["all"]
    files = [tmp_path / "images" / name / "00000-seed0.png" for name in ("one_pass+adapter+lora", "all")]
    assert np.array_equal(*(np.asarray(Image.open(file)) for file in files))


# -- the demo ------------------------------------------------------------------------------------------------

SYSTEMS = ["stock cut at 77", "chunks of 77", "overlapping windows", "overlap + adapter"]


def test_demo(model, tmp_path):
    """Three prompts of nine objects, four systems and the ground truth; the sheet, the table and the verdicts."""
    result = run("demo", "--model", model, "--steps", 1, "--device", "cpu", "-o", tmp_path / "demo.png")
    assert result.exit_code == 0, result.output
    assert result.output.strip().endswith(str(tmp_path / "demo.png"))
    sheet = Image.open(tmp_path / "demo.png")
    assert sheet.width >= 5 * 216
    assert sheet.height >= 3 * 216
    assert result.output.count("[[stock stops here]]") == 3
    table = [line for line in result.output.splitlines() if re.search(r"\d+ of +\d+ .* of 3$", line)]
    assert [line[2:21].strip() for line in table] == [*SYSTEMS, "ground truth"]
    (before, all_before), (after, all_after), (background, all_backgrounds) = (
        map(int, found) for found in re.findall(r"(\d+) of +(\d+)", table[-1])
    )
    assert before == all_before
    assert after == all_after
    assert all_before + all_after == 27
    assert background == all_backgrounds == 3
    verdicts = re.findall(
        r"^  (before|across|after)  +(right|missing|wrong [a-z ]+: \w+ \w+)  +\w", result.output, re.M
    )
    assert len(verdicts) == 27
    assert sum(zone == "before" for zone, _ in verdicts) == all_before


def test_demo_of_an_own_prompt(model, tmp_path):
    own = "A red star is in the centre. A large blue ring is in the top left corner. Small. The background is white."
    options = ["--model", model, "--steps", 1, "-o", tmp_path]
    result = run("demo", "A large red star is in the centre. The background is white.", *options)
    assert result.exit_code == 0, result.output
    assert re.search(r"ground truth +1 of +1 +- +1 of 1", result.output)
    assert "Warning" not in result.stderr
    assert "[[stock stops here]]" not in result.output
    result = run("demo", "-", *options, input=own)
    assert "The checker cannot judge pictures of this prompt: centre: " in result.output
    assert Image.open(tmp_path / "demo-2.png").width < 5 * 216, "four systems, and no ground truth"
    result = run("demo", "A cat on a mat.", *options)
    assert result.exit_code == 0, result.output
    assert "Warning: the scenes world has no such words: cat, mat;" in result.stderr
    assert "device 'nonsense' cannot be used" in run("demo", "a", *options, "--device", "nonsense").stderr
    assert "cannot judge pictures of this prompt" in result.output


def test_demo_judges_every_object_where_its_sentence_lies(model):
    """A picture painted for the purpose: all that a stock encoder reads is right, and nothing else is there."""
    (prompt, *_) = demo.default_prompts()
    tokenizer = FixClipTokenizer.from_pretrained(model / "base", subfolder="tokenizer")
    whole = demo._judge(demo._truth(prompt), prompt, tokenizer)
    zones = dict(zip([item.place for item in prompt.scene.objects], whole.zones, strict=True))
    read = tuple(item for item in prompt.scene.objects if zones[item.place] == "before")
    picture = demo._truth(demo.Prompt("", scenes.Scene(prompt.scene.background, read)))
    half = demo._judge(picture, prompt, tokenizer)
    assert whole.count(True) == half.count(True) == (len(read), len(read))
    assert whole.count(False) == (9 - len(read), 9 - len(read))
    assert half.count(False) == (0, 9 - len(read))
    made = demo.Demo((prompt,), (), {"half": [half], "whole": [whole], "again": [whole], demo.TRUTH: [whole]})
    assert made.best == "again"
    assert "whole" not in demo.format_verdicts(made)
    lines = demo.format_verdicts(made).splitlines()[2:]
    assert [line.split()[0] for line in lines] == sorted(zones.values(), key=["before", "across", "after"].index)


def test_demo_draws_what_evaluate_images_draws(model):
    prompts = demo.default_prompts()[:1]
    drawing = Drawing(steps=2, guidance_scale=3.0, seed=5)
    shown = demo.draw(model, prompts, drawing)
    assert list(shown.rows) == [*SYSTEMS, "ground truth"]
    pipe = FixClipStableDiffusionPipeline.from_pretrained(model)
    write_attention_out(pipe.unet, torch.device("cpu"))  # as evaluate-images does; the fused one rounds otherwise
    wanted = pipe(
        prompts[0].text, num_inference_steps=2, guidance_scale=3.0, generator=torch.Generator().manual_seed(5)
    ).images[0]
    assert np.array_equal(np.asarray(shown.rows["overlap + adapter"][0].picture), np.asarray(wanted))
    assert len({own[0].picture.tobytes() for own in shown.rows.values()}) == len(SYSTEMS) + 1
    assert demo.systems_of(builtin.ModelParts("b"))[-1] == System("overlapping windows", conditioning="overlap")
    assert demo.systems_of(builtin.ModelParts("b", encoder="e", adapter="a"))[-1] == System("FIX-CLIP", "e", "a")


def test_demo_prompts_are_long_and_no_two_are_alike(model):
    prompts = demo.default_prompts()
    tokenizer = FixClipTokenizer.from_pretrained(model / "encoder", subfolder="tokenizer")
    assert len({prompt.text for prompt in prompts}) == 3
    for prompt in prompts:
        assert scenes.read_caption(prompt.text) == prompt.scene.described()
        assert len(prompt.scene.objects) == 9
        assert 77 < len(tokenizer(prompt.text).input_ids) <= 248


@pytest.mark.parametrize("name", ["builtin:scenes", "somewhere"])
def test_demo_without_a_model_is_one_clear_error(tmp_path, monkeypatch, name):
    monkeypatch.setattr(builtin, "FOLDER", tmp_path)
    result = run("demo", "--model", name, "-o", tmp_path)
    assert result.exit_code == 2
    message = "this copy of fixclip has no embedded model" if name == "builtin:scenes" else "neither builtin:scenes nor"
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


# -- the embedded weights ------------------------------------------------------------------------------------

needs_weights = pytest.mark.skipif(not builtin.is_available(), reason="this copy has no embedded weights")


@needs_weights
def test_embedded_files_are_few_and_small():
    files = [file for file in (builtin.FOLDER / "scenes").rglob("*") if file.is_file()]
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".txt", ".md"}
    assert sum(file.stat().st_size for file in files) <= SIZE_AT_MOST
    assert (builtin.FOLDER / "scenes" / "README.md").is_file()


@needs_weights
def test_embedded_weights_load_everywhere():
    pipe = FixClipStableDiffusionPipeline.from_pretrained("builtin:scenes")
    assert pipe.text_encoder.context_length == 248
    assert pipe.text_encoder.adapter is not None
    assert {p.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters()} == {torch.float32}
    # Loaded without a type, as users do: parts of two types would not draw.
    stock = StableDiffusionPipeline.from_pretrained(builtin.resolve("builtin:scenes/base"))
    ours = FixClipStableDiffusionPipeline.from_pretrained("builtin:scenes/base")
    assert np.array_equal(picture(stock), picture(ours, conditioning="stock"))


@needs_weights
def test_embedded_model_draws_what_is_asked():
    """The systems load with the fingerprints that they were trained with; those with adapters draw what is asked."""
    shown = demo.draw("builtin:scenes", demo.default_prompts()[2:])
    right = {name: own[0].count(True)[0] + own[0].count(False)[0] for name, own in shown.rows.items()}
    assert right[demo.TRUTH] == 9
    for name, least in RIGHT_AT_LEAST.items():
        assert right[name] >= least > right["stock cut at 77"], right
    assert right["overlap + adapter"] > right["overlapping windows"]
