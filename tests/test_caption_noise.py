"""pipelines/captions/noise.py at tiny size: captions with mistakes, a training on them, recalls, the results page."""

import json
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
from captions.noise import KINDS, main, recalls
from safetensors.torch import save_file
from scenes import report

ROOT = Path(__file__).parents[1]
CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
RECIPE = """\
seed: 0
model: {{name: "local-dir:{clip}", num_prompts: 2, num_groups: 2, first_group: 1}}
data: {{source: scenes, stop: 20, workers: 0}}
captions: {{short_caption: random_sentences}}
optim: {{lr: 1e-3, lr_new: 1e-2, warmup_steps: 1}}
train: {{steps: 2, batch_size: 4, precision: fp32}}
eval: {{source: scenes, stop: 6, every: 2, batch_size: 3}}
output: {{folder: unused, log_every: 1, save_every: 2}}
"""


def test_captions_training_and_table(tmp_path):
    clip = tmp_path / "clip"
    clip.mkdir()
    save_file(open_clip.CLIP(**CLIP).state_dict(), clip / "open_clip_model.safetensors")
    config = {"model_cfg": CLIP, "preprocess_cfg": {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}}
    (clip / "open_clip_config.json").write_text(json.dumps(config))
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(clip=clip))
    script = ROOT / "pipelines" / "captions" / "noise.py"
    command = [sys.executable, script, "--out", tmp_path / "out", "--recipe", tmp_path / "recipe.yaml"]
    command += ["--scenes", "16", "--seeds", "1", "--kind", "many_mistakes"]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "noise.json").read_text())["many_mistakes"]
    assert found["written"] == 16  # no filter is on
    assert found["mistakes"]["refusal"] == 0.05
    assert found["seeds"] == {"0": recalls(tmp_path / "out" / "many_mistakes" / "seed0")}
    assert len(found["seeds"]["0"]) == 4
    again = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=True)
    assert again.stdout.splitlines() == done.stdout.splitlines()[-2:]  # read from files: no training says anything
    assert again.stderr == ""


def test_the_table_of_the_results_page(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.noise_table() == "Not measured yet."
    seeds = {str(seed): dict.fromkeys(report.RECALLS, 0.5 + seed / 10) for seed in range(3)}
    kind = {"answers": {"accepted": 90, "refusal": 10}, "written": 38, "seeds": seeds}
    (tmp_path / "caption_noise.json").write_text(json.dumps({"many_mistakes_filtered": kind}))
    row = report.noise_table().splitlines()[2]
    assert row == "| many mistakes, filtered | 10.0% | 38 " + 4 * "| 0.600 ± 0.100 " + "|"


def test_kinds():
    assert {kind.name for kind in KINDS} == set(report.CAPTIONS)
    with pytest.raises(SystemExit, match="choose of true, "):
        main(kinds=["nonsense"])
