"""Every Python and shell block of README and docs runs as written, in the order of its page, on the embedded model.

A page's blocks share their names and a working folder. Names of real models become built-in ones (`REPLACED`), a
page's placeholders what `PLACES` says. Training commands read their recipe and overrides and train nothing, by
`--recipe-diff`. A block that needs the network, a GPU or real weights has `<!-- not run: why -->` on the line before
it; `make` and `pip` lines, which set up environments, are left out.
"""

import json
import re
import shlex
from pathlib import Path

import pytest
import tiny
import tiny_clips
import tiny_refiner
import tiny_transformers
import torch
from command_line import run
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image

from fixclip_core import builtin, scenes
from fixclip_core.weights.read import ClipCheckpoint
from fixclip_core.weights.write import write_diffusers, write_open_clip
from fixclip_diffusion.adapter_training.trainer import add_lora, save_lora
from fixclip_diffusion.tiny import stable_diffusion_xl

ROOT = Path(__file__).parents[1]
PAGES = {
    page.relative_to(ROOT).as_posix(): page for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
BLOCK = re.compile(r"(?P<mark><!--[^\n]*-->\n)?^```(?P<language>python|bash|sh)\n(?P<code>.*?)^```$", re.M | re.S)
NOT_RUN = re.compile(r"<!-- not run: \S.* -->\n")
SET_UP = ("make", "pip")

pytestmark = pytest.mark.skipif(not builtin.is_available(), reason="this copy has no embedded weights")

REPLACED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": str(builtin.FOLDER / "scenes" / "base"),
    '.to("cuda")': "",
    # Tiny ones with random weights, made in the working folder.
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stabilityai/stable-diffusion-xl-refiner-1.0": "refiner",
    "stabilityai/stable-diffusion-3.5-medium": "sd3",
    "black-forest-labs/FLUX.1-dev": "flux",
}
# What each page's capital letters stand for, and what its snippets take as given.
PLACES = {
    "README.md": {
        "runs/vit_l14_stable_diffusion": "fixclip",
        "--short-weights stable-diffusion-v1-5/stable-diffusion-v1-5": "--short-weights its_base",
    },
    "docs/adapter.md": {
        "RECIPE": "builtin:vit_l14_stable_diffusion",
        "BASE": "builtin:scenes/base",
        "OUT": "builtin:scenes/encoder",
        "runs/.../adapter": "builtin:scenes/adapter",
        "runs/.../lora": "lora",
    },
    "docs/diffusers.md": {"prompt, prompt_2=": "prompt, num_inference_steps=2, prompt_2="},
    "docs/sd3_flux.md": {"pipe(prompt)": "pipe(prompt, num_inference_steps=2, height=16, width=16)"},
    "docs/index.md": {"fixclip demo": "fixclip demo --steps 2", '="blurry"': '="blurry", num_inference_steps=2'},
    "docs/tutorials/sdxl.md": {"pipe(prompt)": "pipe(prompt, num_inference_steps=2, height=64, width=64)"},
    "docs/tutorials/measure.md": {"--steps 20": "--steps 2"},
    "docs/tutorials/train_encoder.md": {"runs/own_data": "fixclip"},
    "docs/training.md": {"RECIPE": "builtin:vit_b16_sharegpt4v"},
    "docs/evaluation.md": {"MODEL": "fixclip", "DATA": "captions.jsonl", "FOLDER": "classes"},
    "docs/weights.md": {"SOURCE": "clip", "OUTPUT": "converted", "RUN": "fixclip", "EVERYTHING": "all", "HALF": "half"},
}


def blocks(page):
    """(line, language, code) of each block that is to run."""
    text = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        if not NOT_RUN.fullmatch(found["mark"] or ""):
            yield text.count("\n", 0, found.start("code")) + 1, found["language"], found["code"]


def replaced(code, places):
    """The code with built-in names; a placeholder in capitals is a whole word, any other text stands as it is."""
    for old, new in {**places, **REPLACED}.items():
        pattern = rf"\b{old}\b" if old.isupper() else re.escape(old)
        code = re.sub(pattern, lambda _, to=new: to, code)
    return code


def shell_commands(code):
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0].split("/")[-1] not in SET_UP:
            yield words


def run_command(words):
    """A command line in this process: `fixclip ...`, or a launcher of a training."""
    launcher = next((word for word in words if re.fullmatch(r"train_(encoder|adapter)\.py", word)), None)
    if launcher:
        kind = launcher.removeprefix("train_").removesuffix(".py")
        words = ["fixclip", "train", kind, *words[words.index(launcher) + 1 :]]
    assert words[0].split("/")[-1] == "fixclip", (
        f"cannot run {shlex.join(words)!r}: mark the block as not run, with why"
    )
    if words[1] == "train" and "--list" not in words:
        words = [word for word in words if word not in ("--smoke", "--dry-run")] + ["--recipe-diff"]
    if words[1] in ("generate", "tokens") and not {"--base", "--config"} & set(words):
        words += ["--base", "builtin:scenes"]  # for the real model that is the default
    result = run(*words[1:])
    assert result.exit_code == 0, f"{shlex.join(words)}\n{result.output}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with a manifest of scenes, a prompt, and a tiny CLIP as it is and as a FixClip."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "pipelines").symlink_to(ROOT / "pipelines")
    (folder / "a").mkdir()
    (folder / "classes").mkdir()
    rows = []
    for number in range(12):
        scene = scenes.scene_at(0, number, num_objects=9)
        image = Image.fromarray(scenes.render(scene).permute(1, 2, 0).numpy())
        image.save(folder / "a" / f"{number}.png")
        kind = folder / "classes" / ("red" if number % 2 else "blue")
        kind.mkdir(exist_ok=True)
        image.save(kind / f"{number}.png")
        captions = {"long": scenes.long_caption(scene, number).text, "short": scenes.short_caption(scene, number).text}
        rows.append(json.dumps({"image": f"a/{number}.png", **captions}))
    for name in ("captions.jsonl", "held_out.jsonl"):
        (folder / name).write_text("\n".join(rows) + "\n")
    unet = UNet2DConditionModel.from_pretrained(builtin.FOLDER / "scenes" / "base", subfolder="unet")
    state = {name: 0.01 * torch.randn_like(parameter) for name, parameter in add_lora(unet, 2).items()}
    save_lora(unet, state, folder / "lora")
    stable_diffusion_xl(tiny.clip_tokenizer(), tiny.clip_tokenizer(pad_token="!")).save_pretrained(folder / "sdxl")
    tiny_refiner.refiner_of(StableDiffusionXLPipeline.from_pretrained(folder / "sdxl")).save_pretrained(
        folder / "refiner"
    )
    tiny_transformers.stable_diffusion_3(folder / "sd3")
    tiny_transformers.flux(folder / "flux")
    (folder / "prompt.txt").write_text(json.loads(rows[0])["long"])
    (folder / "prompts.txt").write_text("\n".join(json.loads(row)["long"] for row in rows[:1]) + "\n")
    clip, config, preprocess = tiny_clips.full_vocabulary_clip(layers=4)
    checkpoint = ClipCheckpoint("", clip.state_dict(), config, {**preprocess, "resize_mode": "shortest"})
    write_open_clip(checkpoint, folder / "clip")
    write_diffusers(checkpoint, folder / "its_base")
    result = run("convert", folder / "clip", folder / "fixclip")
    assert result.exit_code == 0, result.output
    return folder


@pytest.mark.parametrize("name", PAGES)
def test_the_blocks_of_a_page_run_in_order(name, folder, monkeypatch):
    page = PAGES[name]
    monkeypatch.chdir(folder)
    prompt = (folder / "prompt.txt").read_text()
    names = {"prompt": prompt, "base": REPLACED["stable-diffusion-v1-5/stable-diffusion-v1-5"], "device": "cpu"}
    for line, language, code in blocks(page):
        code = replaced(code, PLACES.get(name, {}))
        if language == "python":
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)
        else:
            for words in shell_commands(code):
                run_command(words)


def test_a_mark_says_why():
    for name, page in PAGES.items():
        for found in BLOCK.finditer(page.read_text(encoding="utf-8")):
            mark = found["mark"] or ""
            assert "not run" not in mark or NOT_RUN.fullmatch(mark), f"{name}: {mark!r} says no reason"


def test_the_readme_is_for_newcomers():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 120
