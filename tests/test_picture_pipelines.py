"""Pictures by any diffusers pipeline, from a folder, by several processes, and after a kill."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import benchmark_folders
import numpy as np
import pytest
import tiny
import torch
from benchmark_demo.noisy_judge import NoisyJudge, completion, serving
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel
from typer.testing import CliRunner

from fixclip_cli.main import app
from fixclip_core import scenes
from fixclip_diffusion.adapter import TextAdapter
from fixclip_diffusion.evaluation.generate import Drawing, Painter, System, draw_missing, read_metadata, save_picture
from fixclip_diffusion.evaluation.prompts import Prompt, number_prompts, read_prompts
from fixclip_diffusion.tiny import WIDTH, clip_text_config, scheduler, unet, vae

ROOT = Path(__file__).parents[1]
DRAWING = Drawing(steps=1, guidance_scale=2.0, size=16, seed=5, num_seeds=2, batch_size=3)
PROMPTS = number_prompts([Prompt("A red horse."), Prompt("A blue boat.")])
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}


def sdxl(folder):
    """Two text encoders of 32 features each."""
    tokenizer = tiny.clip_tokenizer()
    StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(clip_text_config()),
        text_encoder_2=CLIPTextModelWithProjection(clip_text_config()),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet(
            cross_attention_dim=64,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=32 + 6 * 8,
        ),
        scheduler=scheduler(),
    ).save_pretrained(folder)


def flux(folder):
    tokenizer = tiny.clip_tokenizer()
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL(
            sample_size=16, in_channels=3, out_channels=3, block_out_channels=(4,), latent_channels=1,
            norm_num_groups=1, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5,
        ),
        text_encoder=CLIPTextModel(clip_text_config()),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(
            T5Config(vocab_size=49408, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        ),
        tokenizer_2=tokenizer,
        transformer=FluxTransformer2DModel(
            patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
        ),
    ).save_pretrained(folder)  # fmt: skip


@pytest.fixture(scope="module")
def scene_pictures(tmp_path_factory):
    """Right pictures of two scenes, as 00000.png and 00001.png."""
    folder = tmp_path_factory.mktemp("pictures")
    for prompt in read_prompts("scenes:2"):
        image = Image.fromarray(scenes.render(prompt.scene).permute(1, 2, 0).numpy())
        image.save(folder / f"{prompt.id}.png")
    return folder


@pytest.mark.parametrize(
    ("make", "kind"), [(None, StableDiffusionPipeline), (sdxl, StableDiffusionXLPipeline), (flux, FluxPipeline)]
)
def test_any_pipeline_draws_what_it_draws_by_itself(make, kind, sd1, tmp_path):
    folder = sd1
    if make is not None:
        folder = tmp_path / "model"
        make(folder)
    painter, system = Painter("not used"), System("other", pipeline=str(folder))
    painter.check(system)
    assert draw_missing(painter, system, PROMPTS, DRAWING, tmp_path / "out") == (4, 0)
    pipe = kind.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    seen = set()
    for prompt in PROMPTS:
        for seed in (5, 6):
            wanted = pipe(
                prompt.text, num_inference_steps=1, guidance_scale=2.0, width=16, height=16,
                generator=torch.Generator().manual_seed(seed),
            ).images[0]  # fmt: skip
            path = tmp_path / "out" / f"{prompt.id}-seed{seed}.png"
            found = np.asarray(Image.open(path)).astype(int)
            assert np.abs(found - np.asarray(wanted)).max() <= 1
            seen.add(found.tobytes())
            metadata = read_metadata(path)
            assert (metadata["prompt"], metadata["seed"]) == (prompt.text, seed)
            assert metadata["system"]["pipeline"] == str(folder)
    assert len(seen) == 4


def test_what_is_there_is_not_drawn_again_and_never_mixed(sd1, tmp_path):
    painter, system = Painter(str(sd1)), System("stock", conditioning="stock")
    assert draw_missing(painter, system, PROMPTS, DRAWING, tmp_path) == (4, 0)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "00000-seed6.png").unlink()
    (tmp_path / "00001-seed5.png").write_bytes(before["00001-seed5.png"][:100])  # damaged
    assert draw_missing(painter, system, PROMPTS, DRAWING, tmp_path) == (2, 2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    for changed, message in (
        (Drawing(**{**DRAWING.__dict__, "steps": 2}), r"00000-seed5\.png: drawn with another steps \(1 instead of 2\)"),
        (Drawing(**{**DRAWING.__dict__, "size": 24}), r"another size \(16 instead of 24\)"),
    ):
        with pytest.raises(ValueError, match=message):
            draw_missing(painter, system, PROMPTS, changed, tmp_path)
    other = number_prompts([Prompt("A green tree."), Prompt("A blue boat.")])
    with pytest.raises(ValueError, match=r"another prompt \('A red horse\.' instead of 'A green tree\.'\)"):
        draw_missing(painter, system, other, DRAWING, tmp_path)
    with pytest.raises(ValueError, match="drawn with another system"):
        draw_missing(painter, System("stock", pipeline=str(sd1)), PROMPTS, DRAWING, tmp_path)


def test_pictures_of_an_adapter_that_was_trained_on_are_not_its_own(sd1, tmp_path):
    """Under the same name, of other weights; pictures of version 0.2, which say nothing of weights, go on counting."""
    adapter = TextAdapter(WIDTH, "attention", num_heads=4)
    adapter.save_pretrained(tmp_path / "adapter")
    painter, system = Painter(str(sd1)), System("ours", adapter=str(tmp_path / "adapter"))
    folder = tmp_path / "out"
    assert draw_missing(painter, system, PROMPTS[:1], DRAWING, folder) == (2, 0)
    assert draw_missing(Painter(str(sd1)), system, PROMPTS[:1], DRAWING, folder) == (0, 2)
    (tmp_path / "adapter" / "checkpoints").mkdir()
    (tmp_path / "adapter" / "checkpoints" / "x.safetensors").write_bytes(b"of a training that goes on")
    assert draw_missing(Painter(str(sd1)), system, PROMPTS[:1], DRAWING, folder) == (0, 2)
    older = folder / "00000-seed5.png"
    metadata = read_metadata(older)
    assert set(metadata.pop("weights")) == {"adapter", "base"}
    save_picture(older, Image.open(older), metadata)
    with torch.no_grad():
        next(adapter.parameters()).add_(1)
    adapter.save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        ValueError, match=r"00000-seed6\.png: drawn with other weights of the adapter, which changed since; "
    ):
        draw_missing(Painter(str(sd1)), system, PROMPTS[:1], DRAWING, folder)


def test_what_is_no_pipeline_is_named(tmp_path):
    painter = Painter("not used")
    with pytest.raises(ValueError, match=r"system 'a': .* is no diffusers pipeline"):
        painter.check(System("a", pipeline=str(tmp_path)))
    with pytest.raises(ValueError, match="system 'a': no pictures in"):
        painter.check(System("a", pictures=str(tmp_path / "none")))


# -- the command ---------------------------------------------------------------------------------------------


def invoke(*arguments):
    result = CliRunner().invoke(app, ["evaluate-images", *map(str, arguments)])
    return result.exit_code, result.output


def test_pictures_made_elsewhere(scene_pictures, tmp_path):
    out = tmp_path / "out"
    options = ("scenes:2", "--pictures", f"mine={scene_pictures}", "-o", out)
    code, text = invoke(*options)
    assert code == 0, text
    assert "| mine   | 100.0 ± 0.0" in text
    assert "0 of 38" in text
    assert {p.name for p in out.iterdir()} == {"answers", "report.json", "report.md", "report.html", "sheet.png"}
    code, text = invoke("scenes:3", "--pictures", f"mine={scene_pictures}", "-o", tmp_path / "b")
    assert code == 2
    assert "pictures of 1 of 3 prompts are missing, e.g. of 00002; with --partial" in text
    code, text = invoke("scenes:3", "--pictures", f"mine={scene_pictures}", "--partial", "-o", tmp_path / "b")
    assert "66.7 ± 33.3" in text
    assert "Without an answer, counted 0: 19 picture missing" in text
    unanswered = json.loads((tmp_path / "b" / "report.json").read_text())["judges"]["checker"]["unanswered"]
    assert {row["prompt"] for row in unanswered} == {"00002"}
    code, text = invoke("--compare", out, tmp_path / "b")
    assert "2 prompts in common of 2 and 3" in text
    assert "Every prompt scores the same in both." in text


class Seer(NoisyJudge):
    """White is right and black is not: Yes or No, three or four, a score of 5 or 2."""

    def answer(self, picture, text, request):
        right = Image.open(io.BytesIO(picture)).convert("L").getpixel((1, 1)) > 128
        if "number alone" in text:
            return 200, completion("5" if right else "2")
        words = ("three", "four") if "How many" in text else ("Yes", "No")
        shares = dict(zip(words, (0.9, 0.1) if right else (0.2, 0.7), strict=True))
        return 200, completion(max(shares, key=shares.get), shares)


def tile(path, *colours):
    """One square, or a grid of four."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (8, 8), colours[0])
    for number, colour in enumerate(colours[1:], 1):
        image.paste(colour, (number % 2 * 4, number // 2 * 4, number % 2 * 4 + 4, number // 2 * 4 + 4))
    image.save(path)


def elsewhere(name, root):
    """Pictures as each benchmark names them: right ones but for one; options, ours in %, and official scores."""
    if name == "dpg":
        tile(root / "kitchen.png", "white", "white", "white", "white")
        tile(root / "harbour.png", "white", "black", "white", "white")
        # The kitchen is left out: its second question depends on the first, which DPG's scorer passes over.
        return ["--num", "4"], (100 + 75) / 2, {"DPG-Bench score": 75.0, "left out": ["kitchen"]}
    if name == "tiif":
        for kind in ("color", "negation"):
            for length in ("short", "long"):
                path = root / kind / "model" / f"{length}_description" / "0.png"
                tile(path, "black" if (kind, length) == ("color", "long") else "white")
        # Of the negation's two questions one is to be answered no, and a white picture answers yes.
        return [], (0 + 100 + 50 + 50) / 4, {"overall short": 0.75, "overall long": 0.25}
    if name == "longbench":
        tile(root / "0" / "step1" / "generated_image_0.jpg", "white")
        tile(root / "1" / "step1" / "generated_image_0.jpg", "black")
        return [], (100 + 25) / 2, {"average score of 5": 3.5}
    if name == "lgbench":
        tile(root / "7.png", "white")
        return [], 100.0, None
    tile(root / "a.png", "white")
    tile(root / "b.png", "black")
    paths = {"three red lobsters": "a.png", "a red lobster": "b.png"}
    (root / "paths.json").write_text(json.dumps(paths))
    return [], 50.0, {"AM": (90 + 20) / 2, "GM": (90 + 20) / 2, "answers of probability 0": 0}


@pytest.mark.parametrize("name", benchmark_folders.MAKERS)
def test_each_benchmark_from_its_folder_to_its_official_score(name, tmp_path):
    benchmark_folders.MAKERS[name](tmp_path / "benchmark")
    root = tmp_path / "pictures"
    options, ours, theirs = elsewhere(name, root)
    with serving(Seer()) as server:
        code, text = invoke(
            "--benchmark", name, tmp_path / "benchmark", "--judge", server.url, "--judge-model", "seer",
            "--pictures", f"a={root / 'paths.json' if name == 'geneval2' else root}", *options,
            *(["--official"] if theirs else []), "-o", tmp_path / "out",
        )  # fmt: skip
    assert code == 0, text
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    found = report["judges"]["seer"]
    assert 100 * found["systems"]["a"]["all"]["mean"] == pytest.approx(ours)
    assert found["unanswered"] == []
    for key, value in (theirs or {}).items():
        assert found["official"]["a"][key] == (value if isinstance(value, list) else pytest.approx(value)), key
    assert "official" in found or theirs is None
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count('src="data:image/webp') == len(report["prompts"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give PROMPTS or --benchmark NAME FOLDER"),
        (("scenes:1", "--benchmark", "dpg", "x"), "give PROMPTS or --benchmark NAME FOLDER"),
        (("scenes:1", "--compare", "a", "b"), "leave the prompts out"),
        (("--compare", "a", "b", "--steps", "3"), "--steps does not act beside --compare"),
        (("scenes:1", "--size", "16x24"), "give one number"),
        (("--benchmark", "dpg", "none"), "none: no such folder; dpg is a folder with dpg_bench.csv"),
        (("scenes:1", "--pipeline", "x", "--encoder", "y"), "--encoder does not act beside --pipeline"),
        (("scenes:1", "--pipeline", "a="), "expected NAME=SOURCE or SOURCE"),
        (("scenes:1", "--pipeline", "x", "--judge", "http://127.0.0.1:1/v1"), "1 --judge URLs and 0 --judge-model"),
        (("scenes:1", "--pipeline", "x", "--judge-model", "m"), "--judge-model is of a --judge"),
        (("scenes:1", "--pictures", "x", "--official"), "scenes has no official score; those of dpg, tiif"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, message):
    code, text = invoke(*arguments)
    assert (code, message in text) == (2, True), text


def test_a_killed_run_goes_on_in_two_processes(sd1, tmp_path):
    """kill -9 while it draws; then the same command by accelerate, which draws what is missing, judges and reports."""
    system = "stock:conditioning=stock"
    command = [
        "-m", "fixclip_cli", "evaluate-images", "scenes:3", "--base", str(sd1), "--system", system,
        "--steps", "2", "--size", "32", "--per-prompt", "2", "-o", str(tmp_path),
    ]  # fmt: skip
    images = tmp_path / "images" / "stock"
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 300
    while not images.is_dir() or len(list(images.glob("[!.]*.png"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path: path.read_bytes() for path in images.glob("[!.]*.png")}
    # --multi_gpu starts processes; ACCELERATE_USE_CPU keeps each on the CPU.
    launcher = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines",
        "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
    ]  # fmt: skip
    done = subprocess.run([*launcher, *command], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list(images.glob("[!.]*.png"))) == 6
    assert {path: path.read_bytes() for path in kept} == kept
    assert done.stdout.count("Judged by checker") == 1
    files = sorted((tmp_path / "answers" / "checker").glob("*.jsonl"))
    lines = [len(file.read_text().splitlines()) for file in files]
    assert lines == [2 * 2 * 19, 1 * 2 * 19]  # prompts 0 and 2, and prompt 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["judges"]["checker"]["systems"]["stock"]["unanswered"] == 0
