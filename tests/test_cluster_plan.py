"""`fixclip train encoder RECIPE --plan`: every figure by hand from those that it says it comes from."""

import json
import re

import command_line
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fixclip_core.training.encoder import plan
from fixclip_core.training.encoder.recipe import EncoderRecipe
from fixclip_core.training.encoder.trainer import EncoderTrainer, build_clip
from fixclip_core.training.recipe import load_recipe

CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
RECIPE = """\
model: {{name: "local-dir:{clip}", num_prompts: 2, num_groups: 2, first_group: 1}}
data: {{source: "{source}", image_root: {root}}}
train: {{epochs: 3, batch_size: {batch_size}, precision: fp32}}
output: {{folder: "{folder}"}}
"""


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**CLIP).state_dict(), folder / "open_clip_model.safetensors")
    preprocess = {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP, "preprocess_cfg": preprocess}))
    return folder


@pytest.fixture
def recipe_file(clip_folder, tmp_path):
    def write(source="missing.jsonl", root="null", batch_size=2048):
        path = tmp_path / "recipe.yaml"
        fields = {"clip": clip_folder, "source": source, "root": root, "batch_size": batch_size}
        path.write_text(RECIPE.format(**fields, folder=tmp_path / "run"))
        return str(path)

    return write


def planned(*arguments):
    result = command_line.run("train", "encoder", *arguments, "--plan")
    assert result.exit_code == 0, result.output
    return {line.split("  ")[0]: line for line in result.stdout.splitlines()}


@pytest.mark.parametrize("gpus", [64, 256])
def test_the_plan_of_many_gpus_by_hand(recipe_file, tmp_path, gpus):
    """30 million samples that are not at hand; 500 samples/s a GPU, as the user measured."""
    given = {"gpus": gpus, "samples": 30_000_000, "samples-per-second": 500, "sample-kb": 110, "price": 2.5}
    rows = planned(recipe_file(), *(f"--{name}={value}" for name, value in given.items()))
    steps, own = 3 * (30_000_000 // 2048), 2048 // gpus
    hours = steps * 2048 / (gpus * 500) / 3600
    assert f"{steps:,} of 2,048 = {gpus} x {own}" in rows["steps"]
    assert f"{gpus * 500:,} samples/s" in rows["all GPUs"]
    megabytes = {64: "3,520", 256: "14,080"}[gpus]
    assert f"{gpus * 500:,} samples/s, {megabytes} MB/s " in rows["storage"]
    assert " 110 KB a sample, given" in rows["storage"]
    assert f"{hours:.1f} hours, {hours * gpus:.0f} GPU hours" in rows["time"]
    recipe = load_recipe(EncoderRecipe, recipe_file(), [])
    trained = sum(parameter.numel() for parameter in build_clip(recipe).parameters())
    assert f"{2 * 4 * trained / (own / 500) / 1e9:.2f} GB/s in and out of each GPU" in rows["network"]
    assert f"{hours * gpus * 2.5:.0f} " in rows["cost"]
    assert "500 samples/s" in rows["one GPU"]
    assert rows["one GPU"].endswith("given")
    assert "a sample" not in rows
    assert "measured here on a JPEG of 640 x 480" in rows["cores"]
    assert "of 80 GiB of a GPU" in rows["memory"]
    assert f"{own} samples at a time" in rows["memory"]
    assert not (tmp_path / "run").exists()


def test_without_a_measured_rate_it_is_counted_and_said_to_be_an_estimate(recipe_file):
    rows = planned(recipe_file(), "--gpus", "8", "--samples", "100000", "--gpu", "a100", "--utilisation", "0.5")
    assert "50% (assumed) of 312 TFLOP/s of an a100 (data sheet); NOT MEASURED" in rows["one GPU"]
    assert "counted: forward and backward of 4 samples" in rows["a sample"]
    assert "100 KB a sample, assumed: give --sample-kb" in rows["storage"]
    assert "unknown" in rows["cost"]


def test_data_at_hand_is_measured(recipe_file, tmp_path):
    rows = []
    for number in range(40):
        Image.effect_noise((40, 30), 20 + number).convert("RGB").save(tmp_path / f"{number}.png")
        rows.append(json.dumps({"image": f"{number}.png", "long": f"A picture of noise, number {number}. It is grey."}))
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    recipe = recipe_file(tmp_path / "data.jsonl", tmp_path, batch_size=8)
    found = planned(recipe, "--gpus", "2", "--samples-per-second", "9")
    sizes = [(tmp_path / f"{number}.png").stat().st_size for number in range(40)]
    assert re.match(r"samples +40 +counted in ", found["samples"])
    low, high = min(sizes) / 1e3, max(sizes) / 1e3
    kilobytes = float(found["storage"].split(" KB a sample")[0].rsplit(" ", 1)[1])
    assert low - 0.5 <= kilobytes <= high + 0.5
    assert "measured here on 24 of the data" in found["cores"]
    assert "15 of 8 = 2 x 4" in found["steps"]


def test_operations_are_those_of_the_layers(recipe_file, clip_folder, tmp_path):
    """Plain fine-tuning of one sample against a count by hand of the matrix products."""
    overrides = ["method=finetune", "data.source=scenes", "data.stop=8", "data.image_root=null"]
    recipe = load_recipe(EncoderRecipe, recipe_file(batch_size=4), overrides)
    trainer = EncoderTrainer(plan._probe_recipe(recipe, plan.Cluster(1), str(tmp_path / "x"))).prepare()
    flops, _ = plan.count_flops(trainer)
    batch = trainer._first_batch()
    image = tower(tokens=17, width=32, first=3 * 8 * 8 * 32 * 16, embed=16)
    lengths = (batch.long_ids != 0).sum(1).tolist()
    text = sum(tower(tokens=length, width=16, first=0, embed=16) for length in lengths) / len(lengths)
    # Pieces are padded to their longest text, and the loss is one small product: a few percent.
    assert flops == pytest.approx(3 * (image + text), rel=0.08)


def tower(tokens, width, first, embed):
    """Operations of one forward pass; the last of two layers computes keys and values of all, the rest of one token."""
    whole = 2 * tokens * width * (3 * width + width + 8 * width) + 4 * tokens**2 * width
    last = 2 * tokens * width * 2 * width + 2 * width * (width + width + 8 * width) + 4 * tokens * width
    return 2 * first + whole + last + 2 * width * embed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpus", "64"), "--gpus is of --plan"),
        (("--plan", "--gpus", "48", "--samples", "9000"), "it must be a multiple of the number of GPUs, 48"),
        (("--plan", "--gpu", "tpu", "--samples", "9000"), "gpu 'tpu': valid are h100, h200, a100, l40s, rtx4090"),
        (("--plan", "--smoke"), "--smoke does not act beside --plan"),
        (("--plan", "--samples", "900"), "900 samples do not fill one step of train.batch_size=2048"),
        (("--plan", "--samples-per-second", "3", "--utilisation", "0.3"), "--utilisation does not act beside"),
        (("--plan",), "missing.jsonl"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_named(recipe_file, arguments, message):
    result = command_line.run("train", "encoder", recipe_file(), *arguments)
    assert result.exit_code != 0
    assert message in str(result.output)


def test_an_adapter_has_no_such_plan():
    result = command_line.run("train", "adapter", "builtin:vit_l14_stable_diffusion", "--plan")
    assert "--plan is for the encoder; --dry-run prints what an adapter's training needs" in str(result.output)
