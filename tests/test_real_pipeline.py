"""pipelines/real/run.py: every step on tiny stand-ins under the real names, from a local hub."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import tiny as texts
import torch
import typer
from hub import serve
from PIL import Image
from tiny_clips import tiny_transformers_clip
from transformers import CLIPImageProcessor, CLIPProcessor, CLIPTextModel

from fixclip_diffusion import tiny

ROOT = Path(__file__).parents[1]
VOCABULARY = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}
CAPTIONS = 4


def clip(folder):
    """In transformers' format, 77 tokens."""
    tiny_transformers_clip(77, **VOCABULARY).save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"the same weights once more, which nobody needs")
    size = {"shortest_edge": 32}, {"height": 32, "width": 32}
    images = CLIPImageProcessor(size=size[0], crop_size=size[1])
    CLIPProcessor(images, texts.clip_tokenizer()).save_pretrained(folder)


def long_clip(folder):
    """As it is published: a .pt file with two tables of 248 positions, of which the second holds the trained rows."""
    import open_clip

    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
        "text_cfg": {"context_length": 248, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 3},
    }
    torch.manual_seed(1)
    state = open_clip.CLIP(**config, quick_gelu=True).state_dict()
    state["positional_embedding"] = torch.randn(248, 64) * 0.3
    state["positional_embedding_res"] = torch.randn(248, 64) * 0.3
    folder.mkdir()
    torch.save(state, folder / "longclip-L.pt")


def urban(folder, tmp):
    """A zip with image/N.jpg and caption/N.txt; the captions are long."""
    with zipfile.ZipFile(folder / "Urban1k.zip", "w") as file:
        for number in range(CAPTIONS):
            Image.effect_noise((40, 36), 40 + 20 * number).convert("RGB").save(tmp / "x.jpg")
            file.write(tmp / "x.jpg", f"Urban1k/image/{number}.jpg")
            file.writestr(f"Urban1k/caption/{number}.txt", texts.sentences(10 + number)[5 * number :])


def with_safety_checker(folder):
    """The published pipeline names one, whose weights the script does not download."""
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "config.json").write_text("{}")
    (folder / "safety_checker" / "model.safetensors").write_bytes(b"no weights")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repositories")
    clip(folder / "clip")
    long_clip(folder / "long")
    tokenizer = texts.clip_tokenizer(pad_token="<|endoftext|>")
    sd = tiny.stable_diffusion(tokenizer)
    torch.manual_seed(2)
    sd.register_modules(
        text_encoder=CLIPTextModel(tiny.clip_text_config(hidden_size=64, num_attention_heads=1)),
        unet=tiny.unet(cross_attention_dim=64),
    )
    sd.save_pretrained(folder / "sd")
    with_safety_checker(folder / "sd")
    tiny.stable_diffusion_xl(tokenizer, texts.clip_tokenizer(pad_token="!")).save_pretrained(folder / "xl")
    (folder / "urban").mkdir()
    urban(folder / "urban", folder)
    names = {
        "openai/clip-vit-large-patch14": "clip", "BeichenZhang/LongCLIP-L": "long",
        "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd", "stabilityai/stable-diffusion-xl-base-1.0": "xl",
        "BeichenZhang/Urban1k": "urban",
    }  # fmt: skip
    with serve({name: folder / own for name, own in names.items()}) as server:
        yield server


# Two runs of a script that imports everything, and three models.
pytestmark = pytest.mark.slow


@pytest.fixture
def real(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "pipelines" / "real"))
    import run

    return run


@pytest.fixture(scope="module")
def outcome(hub, tmp_path_factory):
    """Two runs into the same folder; before the second a picture and the mark of its step are gone."""
    folder = tmp_path_factory.mktemp("real")
    environment = {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    out = folder / "out"
    command = [sys.executable, ROOT / "pipelines/real/run.py", "-o", out, "--prompts", "2", "--steps", "1", "--partial"]
    command += ["--device", "cpu"]

    def run():
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    first = run()
    (out / "images" / "XL-chunks" / "1.png").unlink()
    (out / "draw.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    again = run()
    return out, first, again, before, list(hub.downloads)


def test_every_step_runs_and_the_report_has_a_verdict_for_each(outcome):
    out, first, _, _, _ = outcome
    assert "| parity    |  yes |" in first
    assert "| retrieval |   NO |" in first  # a stand-in has not the published recall
    assert "PARTIAL: 4 of 1000 images" in first
    assert "sentence_after" in first
    scored = json.loads((out / "score.json").read_text())["result"]["behind"]
    assert set(scored) == set(json.loads((out / "draw.json").read_text())["result"])
    report = (out / "report.md").read_text()
    compared = json.loads((out / "parity.json").read_text())["result"]
    names = {row["what"] for row in compared}
    assert len(names) == 8
    assert all(name in report for name in names)
    text = [row for row in compared if row["what"] == "CLIP text: open_clip's layers"]
    assert [row["layer"] for row in text] == ["0", "1", "features"]
    assert all(row["largest"] > 0.1 for row in compared)
    assert (out / "pictures" / "report.html").is_file()


def test_every_conditioning_of_both_models_draws(outcome):
    out, *_ = outcome
    drawn = json.loads((out / "draw.json").read_text())["result"]
    names = [f"{model}-{name}" for model in ("SD", "XL") for name in ("stock", "chunks", "overlap", "one_pass")]
    assert drawn == dict.fromkeys(sorted([*names, "SD-long-clip"]), 2)
    first = {(out / "images" / name).glob("1*.png").__next__().read_bytes() for name in drawn}
    assert len(first) == len(drawn)


def test_a_second_run_goes_on_where_it_was(outcome):
    out, _, again, before, downloads = outcome
    assert again.startswith("download   done\nparity     done\nretrieval  done\ndraw ")
    assert re.search(r"^report +\d+ s$", again, re.MULTILINE)  # anew, of what there is now
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    assert {path for path in after if after[path] != before.get(path)} == {out / "images" / "XL-chunks" / "1.png"}
    weights = [name for name in downloads if name.endswith((".safetensors", ".pt", ".zip", ".bin"))]
    assert len(weights) == len(set(weights)) == 10


def test_twenty_prompts_unless_told_otherwise(real):
    assert inspect.signature(real.main).parameters["prompts"].default == 20


def test_recalls_are_held_to_half_a_point_of_the_published_ones(real):
    assert real.is_within((68.2, 53.3), real.PUBLISHED["CLIP"])
    assert not real.is_within((68.1, 52.8), real.PUBLISHED["CLIP"])
    assert not real.is_within((82.7, 86.7), real.PUBLISHED["Long-CLIP"])


def test_a_folder_goes_on_with_the_options_it_was_begun_with(real, tmp_path):
    """Steps that are done would not heed others."""
    settings = real.Settings(tmp_path, 20, 30, 7.0, False, "cpu")
    real.keep_settings(settings)
    real.keep_settings(replace(settings, device="cuda"))
    for name, value in (("prompts", 5), ("steps", 50), ("guidance", 3.0), ("partial", True)):
        with pytest.raises(typer.BadParameter, match=rf"{name}={value}: .* was begun with {getattr(settings, name)}"):
            real.keep_settings(replace(settings, **{name: value}))


def test_windows_must_beat_stock_behind_token_77(real):
    figures = {"SD-stock": 0.2, "SD-chunks": 0.21, "SD-overlap": 0.22, "SD-one_pass": 0.1, "SD-long-clip": 0.1}
    figures |= {"XL-stock": 0.2, "XL-chunks": 0.23, "XL-overlap": 0.21}
    assert real.below_stock(figures) == []
    assert real.below_stock({**figures, "XL-stock": 0.21}) == ["XL-overlap"]
    assert real.below_stock({**figures, "SD-stock": 0.3}) == ["SD-chunks", "SD-overlap"]
    assert real.below_stock({}) == ["SD-chunks", "SD-overlap", "XL-chunks", "XL-overlap"]  # nothing was measured


def test_a_layer_that_differs_is_named(outcome, tmp_path, real):
    out, *_ = outcome
    for name in ("parity", "retrieval", "draw", "score"):
        shutil.copy(out / f"{name}.json", tmp_path)
    rows = json.loads((tmp_path / "parity.json").read_text())
    rows["result"][1]["difference"] = 0.01 * rows["result"][1]["largest"]
    (tmp_path / "parity.json").write_text(json.dumps(rows))
    verdicts = real.write_report(real.Settings(tmp_path, 2, 1, 7.0, True, "cpu"))
    assert verdicts.keys() == {"parity", "retrieval", "draw", "score"}
    assert (verdicts["parity"], verdicts["retrieval"], verdicts["draw"]) == (False, False, True)
    assert "NO, first in layer 1" in (tmp_path / "report.md").read_text()
    with pytest.raises(ValueError, match=r"download\.json is missing: run the step download first"):
        real.parity(real.Settings(tmp_path, 2, 1, 7.0, True, "cpu"))
