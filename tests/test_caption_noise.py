"""pipelines/captions/noise.py at tiny size: captions with mistakes, a training on them, a table."""

import json
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
from captions.noise import KINDS, main, score, table
from safetensors.torch import save_file

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
    written = (tmp_path / "out" / "table.md").read_text()
    assert "| many mistakes | " in written
    assert written in done.stdout
    report = json.loads((tmp_path / "out" / "many_mistakes" / "captions" / "report.json").read_text())
    assert report["written"] == 16  # no filter is on
    assert f"{score(tmp_path / 'out' / 'many_mistakes' / 'seed0'):.3f}" in written


def test_the_table_has_means_and_spreads():
    assert table({"a_b": [0.1, 0.3], "c": [0.5]}).splitlines()[2:] == [
        "| a b | 0.200 | 0.100 |",
        "| c | 0.500 | 0.000 |",
    ]
    with pytest.raises(SystemExit, match="choose of true, "):
        main(kinds=["nonsense"])
    assert len({kind.name for kind in KINDS}) == len(KINDS)
