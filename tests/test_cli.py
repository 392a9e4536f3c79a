"""The command line, on tiny real models."""

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tiny
import torch
import typer
from command_line import error_of, run
from diffusers import DDPMScheduler, LCMScheduler, UNet2DConditionModel
from packaging.version import Version
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from fixclip_cli.app import Commands, errors_exit_with, parse_size
from fixclip_cli.generate import generate
from fixclip_cli.pictures import label_row, output_files, save_png
from fixclip_diffusion import FixClipStableDiffusionPipeline, FixClipTextEncoder, TextAdapter
from fixclip_diffusion.adapter_training.trainer import add_lora, save_lora
from fixclip_diffusion.lora import LORA_NAME

LONG = tiny.sentences(14)
FAST = ["--steps", "2", "--size", "16"]


@pytest.fixture(scope="module")
def python_pictures(sd1):
    """What the Python interface makes with the same settings."""
    pipe = FixClipStableDiffusionPipeline.from_pretrained(sd1)

    def picture(prompt, seed=0, **kwargs):
        settings = {
            "num_inference_steps": 2,
            "width": 16,
            "height": 16,
            "generator": torch.Generator().manual_seed(seed),
        }
        return np.asarray(pipe(prompt, **{**settings, **kwargs}).images[0])

    return picture


def test_generate_writes_what_python_makes(sd1, tmp_path, python_pictures):
    result = run("generate", LONG, "--base", sd1, *FAST, "--seed", 7, "--negative", "bad", "-o", tmp_path / "a.png")
    assert result.exit_code == 0, result.output
    assert "132 tokens" in result.output
    assert "a 77-token encoder stops before" in result.output
    image = Image.open(tmp_path / "a.png")
    assert np.array_equal(np.asarray(image), python_pictures(LONG, 7, negative_prompt="bad"))
    assert image.text["prompt"] == LONG
    settings = json.loads(image.text["fixclip"])
    assert settings["seed"] == 7
    assert settings["steps"] == 2
    assert settings["size"] == [16, 16]
    assert settings["conditioning"] == "overlap"
    assert settings["scheduler"] == "DDIMScheduler"
    assert image.text["parameters"] == (
        f"{LONG}\nNegative prompt: bad\nSteps: 2, CFG scale: 7.5, Seed: 7, Size: 16x16, Model: {sd1}"
    )
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("source", ["file", "stdin"])
def test_prompts_of_any_script_from_file_and_standard_input(sd1, tmp_path, python_pictures, source):
    prompt = "Ein Pferd — “rot”,\nund 馬 🐎.\n" + LONG
    if source == "file":
        (tmp_path / "prompt.txt").write_text(prompt + "\n", encoding="utf-8")
        arguments, kwargs = ["--prompt-file", tmp_path / "prompt.txt"], {}
    else:
        arguments, kwargs = ["-"], {"input": prompt + "\n"}
    result = run("generate", *arguments, "--base", sd1, *FAST, "-o", tmp_path / "out", **kwargs)
    assert result.exit_code == 0, result.output
    image = Image.open(tmp_path / "out" / "seed0.png")
    assert image.text["prompt"] == prompt
    assert np.array_equal(np.asarray(image), python_pictures(prompt))


def test_several_pictures(sd1, tmp_path, python_pictures):
    for output, names in (
        ("p.png", ["p-seed3.png", "p-seed4.png"]),
        ("folder", ["folder/seed3.png", "folder/seed4.png"]),
    ):
        result = run("generate", "a cat", "--base", sd1, *FAST, "--seed", 3, "--num", 2, "-o", tmp_path / output)
        assert result.exit_code == 0, result.output
        for seed, name in zip((3, 4), names, strict=True):
            assert np.array_equal(np.asarray(Image.open(tmp_path / name)), python_pictures("a cat", seed))


def test_compare_shows_every_conditioning_and_what_was_trained(sd1, tmp_path, python_pictures):
    arguments = ["generate", LONG, "--base", sd1, *FAST, "--compare", "-o", tmp_path / "sheet.png"]
    encoder = FixClipTextEncoder.from_pretrained(sd1, subfolder="text_encoder", keep=30, ratio=5)
    encoder.save_pretrained(tmp_path / "encoder")
    adapter = TextAdapter(32)
    torch.nn.init.normal_(adapter.blocks[0].fc2.weight)
    adapter.save_pretrained(tmp_path / "adapter")
    own = FixClipStableDiffusionPipeline.from_pretrained(
        sd1, encoder=tmp_path / "encoder", adapter=tmp_path / "adapter"
    )
    trained = own(LONG, num_inference_steps=2, width=16, height=16, generator=torch.Generator().manual_seed(0)).images[
        0
    ]
    for extra in ([], ["--encoder", tmp_path / "encoder", "--adapter", tmp_path / "adapter"]):
        result = run(*arguments, *extra)
        assert result.exit_code == 0, result.output
        image = Image.open(tmp_path / "sheet.png")
        names = ["stock", "chunks", "overlap", *(["overlap + adapter"] if extra else [])]
        settings = json.loads(image.text["fixclip"])
        assert settings["systems"] == names
        assert "conditioning" not in settings
        tiles = [np.asarray(image)[-256::16, 264 * i : 264 * i + 256 : 16] for i in range(len(names))]
        for name, tile in zip(names[:3], tiles, strict=False):
            assert np.array_equal(tile, python_pictures(LONG, conditioning=name))
        if extra:
            assert np.array_equal(tiles[3], trained)
    again = run("generate", "--config", tmp_path / "sheet.png", "-o", tmp_path / "again.png")
    assert again.exit_code == 0, again.output
    assert np.array_equal(np.asarray(Image.open(tmp_path / "again.png")), np.asarray(image))


@pytest.fixture(scope="module")
def styles(sd1, tmp_path_factory):
    """A LoRA of the UNet and a textual inversion of two vectors."""
    folder = tmp_path_factory.mktemp("styles")
    unet = UNet2DConditionModel.from_pretrained(sd1, subfolder="unet")
    torch.manual_seed(5)
    state = {name: 0.05 * torch.randn_like(parameter) for name, parameter in add_lora(unet, 2).items()}
    save_lora(unet, state, folder / "lora")
    save_file({"emb": torch.randn(2, 32)}, folder / "MyCat.safetensors")
    for name, width in (("x’s", 32), ("X’s", 32), ("wide", 48)):
        torch.save({"string_to_param": {"*": torch.randn(2, width)}}, folder / f"{name}.pt")
    return folder


def test_every_option_acts_and_is_recorded(sd1, tmp_path, styles):
    """All options of `generate` in one call, against Python; then the picture is drawn again from what it says."""
    options = {
        "base": sd1,
        "negative": "grey",
        "lora": f"{styles / 'lora'}:0.5",
        "embedding": styles / "MyCat.safetensors",
        "weights": "a1111",
        "conditioning": "chunks",
        "steps": 3,
        "guidance": 3.5,
        "scheduler": "ddpm",
        "seed": 5,
        "size": "16x24",
        "num": 2,
        "device": "cpu",
        "dtype": "float32",
        "output": tmp_path / "out",
    }
    prompt = f"a (red:1.4) mycat. {LONG}"
    elsewhere = {
        "prompt",
        "prompt_file",
        "prompts",
        "config",
        "encoder",
        "encoder_2",
        "adapter",
        "compare",
    }  # in other tests
    assert set(inspect.signature(generate).parameters) == {"ctx", *options, *elsewhere}
    result = run("generate", prompt, *(word for name, value in options.items() for word in (f"--{name}", value)))
    assert result.exit_code == 0, result.output

    pipe = FixClipStableDiffusionPipeline.from_pretrained(sd1, weights="a1111", conditioning="chunks")
    pipe.load_lora_weights(styles / "lora", adapter_name="style")
    pipe.set_adapters("style", 0.5)
    pipe.load_textual_inversion(styles / "MyCat.safetensors", token="MyCat")
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    for seed in (5, 6):
        expected = pipe(
            prompt, negative_prompt="grey", num_inference_steps=3, guidance_scale=3.5, width=16, height=24,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]  # fmt: skip
        image = Image.open(tmp_path / "out" / f"seed{seed}.png")
        assert np.asarray(image).std() > 1
        assert np.array_equal(np.asarray(image), np.asarray(expected))
        settings = json.loads(image.text["fixclip"])
        assert settings == {
            "prompt": prompt, "seed": seed, "negative_prompt": "grey", "steps": 3, "guidance_scale": 3.5,
            "size": [16, 24], "base": str(sd1), "encoder": None, "encoder_2": None, "adapter": None,
            "loras": [str(options["lora"])],
            "embeddings": [str(options["embedding"])], "conditioning": "chunks", "weights": "a1111",
            "scheduler": "DDPMScheduler", "dtype": "float32", "systems": ["chunks"],
            "version": settings["version"],
        }  # fmt: skip
    again = run("generate", "--config", tmp_path / "out" / "seed6.png", "-o", tmp_path / "again.png")
    assert again.exit_code == 0, again.output
    assert np.array_equal(np.asarray(Image.open(tmp_path / "again.png")), np.asarray(image))
    other = run("generate", "a MyCat", "--config", tmp_path / "again.png", "--seed", 7, "-o", tmp_path / "other.png")
    assert other.exit_code == 0, other.output
    changed = json.loads(Image.open(tmp_path / "other.png").text["fixclip"])
    assert {name for name in settings if changed[name] != settings[name]} == {"prompt", "seed"}


def test_an_embedding_whose_name_the_cleaning_of_prompts_would_change(sd1, tmp_path, styles, python_pictures):
    arguments = ("--base", sd1, *FAST, "--embedding", styles / "x’s.pt", "-o", tmp_path / "a.png")
    result = run("generate", "a x’s boat", *arguments)
    assert result.exit_code == 0, result.output
    assert not np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), python_pictures("a x’s boat"))


def test_a_file_of_many_prompts(sd1, tmp_path, python_pictures):
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\n")
    result = run("generate", "--prompts", tmp_path / "prompts.txt", "--base", sd1, *FAST, "--num", 2, "-o", tmp_path)
    assert result.exit_code == 0, result.output
    for number, prompt in enumerate(("a cat", "a dog")):
        for seed in (0, 1):
            image = Image.open(tmp_path / f"0000{number}-seed{seed}.png")
            assert image.text["prompt"] == prompt
            assert np.array_equal(np.asarray(image), python_pictures(prompt, seed))


def test_long_prompt_mode(sd1, tmp_path, python_pictures):
    prompt = tiny.sentences(40)
    for mode in ("one_pass", "chunks"):
        result = run("generate", prompt, "--base", sd1, *FAST, "--long-prompt", mode, "-o", tmp_path / "a.png")
        assert result.exit_code == 0, result.output
        expected = python_pictures(prompt, conditioning=mode)
        image = Image.open(tmp_path / "a.png")
        assert np.array_equal(np.asarray(image), expected)
        assert json.loads(image.text["fixclip"])["conditioning"] == mode
        assert f"conditioning {mode!r}" in result.output


def test_pictures_of_an_earlier_run_are_kept(sd1, tmp_path, python_pictures):
    for prompt, name in (("a cat", "seed0.png"), ("a dog", "seed0-2.png")):
        assert run("generate", prompt, "--base", sd1, *FAST, "-o", tmp_path).exit_code == 0
        assert np.array_equal(np.asarray(Image.open(tmp_path / name)), python_pictures(prompt))
    assert len(list(tmp_path.iterdir())) == 2


def test_pictures_of_processes_at_the_same_time_are_kept(tmp_path):
    """Each into the first free name of a folder, whoever finds it free first."""
    settings = {"prompt": "a", "steps": 1, "guidance_scale": 1.0, "seed": 0, "size": [8, 8], "base": "b"}

    def save(number):
        return save_png(Image.new("RGB", (8, 8), (number, 0, 0)), tmp_path / "seed0.png", settings, fresh=True)

    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(save, range(24)))
    assert set(paths) == set(tmp_path.iterdir())
    assert sorted(Image.open(path).getpixel((0, 0))[0] for path in paths) == list(range(24))
    assert sorted(path.name for path in paths)[:2] == ["seed0-10.png", "seed0-11.png"]
    assert save_png(Image.new("RGB", (8, 8)), tmp_path / "seed0.png", settings) == tmp_path / "seed0.png"


def test_what_the_base_holds_is_left_out_where_it_should_be(sd1, tmp_path, python_pictures):
    """A base that was saved with adapter and LoRA: stock in a comparison, and `--adapter none`."""
    adapter = TextAdapter(32)
    torch.nn.init.normal_(adapter.blocks[0].fc2.weight)
    adapter.save_pretrained(tmp_path / "adapter")
    pipe = FixClipStableDiffusionPipeline.from_pretrained(sd1, adapter=tmp_path / "adapter")
    unet = UNet2DConditionModel.from_pretrained(sd1, subfolder="unet")
    torch.manual_seed(5)
    save_lora(unet, {name: 0.2 * torch.randn_like(p) for name, p in add_lora(unet, 2).items()}, tmp_path / "lora")
    pipe.load_lora_weights(tmp_path / "lora", adapter_name=LORA_NAME)
    pipe.save_pretrained(tmp_path / "whole")
    arguments = ["generate", LONG, "--base", tmp_path / "whole", *FAST]
    result = run(*arguments, "--compare", "-o", tmp_path / "sheet.png")
    assert result.exit_code == 0, result.output
    image = Image.open(tmp_path / "sheet.png")
    names = json.loads(image.text["fixclip"])["systems"]
    assert names[:3] == ["stock", "chunks", "overlap"]
    assert names[3].startswith("overlap + adapter")
    tiles = [np.asarray(image)[-256::16, 264 * i : 264 * i + 256 : 16] for i in range(4)]
    for name, tile in zip(names[:3], tiles, strict=False):
        assert np.array_equal(tile, python_pictures(LONG, conditioning=name))
    assert not np.array_equal(tiles[2], tiles[3])
    for options, tile in (([], tiles[3]), (["--adapter", "none"], tiles[2])):
        assert run(*arguments, *options, "-o", tmp_path / "one.png").exit_code == 0
        assert np.array_equal(np.asarray(Image.open(tmp_path / "one.png")), tile)
    tokens = ["tokens", LONG, "--base", tmp_path / "whole", "--json"]
    assert json.loads(run(*tokens).output)["adapter"] is not None
    assert json.loads(run(*tokens, "--adapter", "none").output)["adapter"] is None


def test_a_picture_s_settings_are_never_refused(sd1, tmp_path, styles):
    """What draws, or the page draws, `--config` draws again: another scheduler, options that did not act there."""
    pipe = FixClipStableDiffusionPipeline.from_pretrained(sd1)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path / "lcm")
    options = ["--base", tmp_path / "lcm", "--guidance", 1, *FAST]
    assert run("generate", "a cat", *options, "-o", tmp_path / "a.png").exit_code == 0
    image = Image.open(tmp_path / "a.png")
    settings = json.loads(image.text["fixclip"])
    assert settings["scheduler"] == "LCMScheduler"
    settings |= {"negative_prompt": "grey", "embeddings": [str(styles / "MyCat.safetensors")]}
    save_png(image, tmp_path / "page.png", settings)
    again = run("generate", "--config", tmp_path / "page.png", "-o", tmp_path / "again.png")
    assert again.exit_code == 0, again.output
    assert np.array_equal(np.asarray(Image.open(tmp_path / "again.png")), np.asarray(image))


def test_a_long_negative_prompt_is_reported(sd1, tmp_path):
    result = run("generate", "a cat", "--negative", LONG, "--base", sd1, *FAST, "-o", tmp_path)
    assert "negative prompt: 132 tokens" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a PROMPT"),
        (["a", "--prompt-file", "b.txt"], "one of the two"),
        (["--prompt-file", "/no/such/file"], "/no/such/file: No such file or directory"),
        (["  "], "the prompt is empty"),
        (["a", "--size", "100"], "multiples of 8"),
        (["a", "--size", "64x64x64"], "WIDTHxHEIGHT"),
        (["a", "--size", "big"], "WIDTHxHEIGHT"),
        (["a", "--guidance", "-1"], "greater than or equal to 0"),
        (["a", "--num", "-1"], "greater than or equal to 1"),
        (["a", "--base", "/no/such/model"], "neither a folder nor a hub name"),
        (["a", "--conditioning", "chunk", "--base", "BASE"], "conditioning='chunk': valid are stock, chunks"),
        (["a", "--base", "BASE", "--encoder", "/no/such/encoder"], "neither a folder nor a hub name"),
        (
            ["a", "--base", "BASE", "--encoder", "BASE/model_index.json"],
            "is neither a pickle of tensors",
        ),
        (["a", "--base", "BASE", "--device", "cuda:99"], "device 'cuda:99' cannot be used"),
        (["a", "--base", "BASE", "--adapter", "/no/such/adapter"], "neither a folder nor a hub name"),
        (["a", "--base", "BASE", "-o", "picture.jpg"], "pictures are written as .png"),
        (["a", "--base", "BASE", "-o", "/proc/nowhere/a.png"], "cannot be written"),
        (
            ["a", "--base", "/no/such/model", "-o", "/proc/a.png"],
            "'/proc/a.png' cannot be written: /proc: No such",
        ),  # before the model is loaded
        (["a", "-o", ""], "output '': name a .png file or a folder"),
        (["a", "--compare", "--conditioning", "chunks"], "--conditioning does not act with --compare"),
        (["a", "--negative", "b", "--guidance", "1"], "--negative acts with a --guidance above 1 only"),
        (["a", "--prompts", "b.txt"], "one of them"),
        (["--prompts", "/no/such/file"], "not a readable text file"),
        (["caf\udce9"], "is not UTF-8; look at the terminal's encoding"),
        (["a", "--negative", "caf\udce9"], "is not UTF-8; look at the terminal's encoding"),
        (["--config", "/no/such.png"], "/no/such.png: it cannot be read as a picture"),
        (["a", "--config", "BASE/model_index.json"], "it cannot be read as a picture"),
        (
            ["a", "--base", "no/such", "--scheduler", "Eulr"],
            "--scheduler Eulr: valid are DDIM, DDPM",
        ),  # before the base
        (["a", "--base", "BASE", "--scheduler", "Eulr"], "--scheduler Eulr: valid are DDIM, DDPM"),
        (
            ["a", "--base", "BASE", "--lora", "/no/such:0.5"],
            "--lora '/no/such' is neither a file nor a folder, nor a hub name like owner/model",
        ),
        (
            ["a", "--base", "BASE", "--embedding", "/no/such"],
            "--embedding '/no/such' is neither a file nor a folder, nor a hub name like owner/model",
        ),
        (["a", "--base", "BASE", "--embedding", "STYLES/MyCat.safetensors"], "its token 'MyCat' is in no prompt"),
        (["a x's", "--base", "BASE", "--embedding", "STYLES/x’s.pt"], "its token 'x’s' is in no prompt"),
        (
            ["a", "--base", "BASE", "--embedding", "STYLES/wide.pt"],
            "wide.pt': it was made for another base: its vectors have the width 48, and 32 is needed here (768 Stable "
            "Diffusion 1, 1024 Stable Diffusion 2, 768 + 1280 Stable Diffusion XL)",
        ),
        (
            ["a", "--base", "BASE", "--embedding", "STYLES/x’s.pt", "--embedding", "STYLES/X’s.pt"],
            "such as '<X’s-2>'; here its token is the file's name, so rename the file",
        ),
        (["(a:b)", "--base", "BASE", "--weights", "a1"], "'a1' is not one of 'a1111', 'compel'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(sd1, styles, arguments, message):
    arguments = [argument.replace("BASE", str(sd1)).replace("STYLES", str(styles)) for argument in arguments]
    result = run("generate", *arguments, "--steps", "1", *([] if "--size" in arguments else ["--size", "16"]))
    assert message in error_of(result)


def test_errors_of_usage_are_one_line_too_and_a_bug_keeps_its_traceback(monkeypatch):
    assert "No such option: --stepz" in error_of(run("generate", "--stepz", 3))
    assert error_of(run("data", "check")) == "Missing argument 'source'; see root data check --help"
    assert "Did you mean 'generate'" in error_of(run("generat"))
    result = run("generate", "a", "-o", "", "--traceback")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert result.stderr.endswith("\nerror: output '': name a .png file or a folder\n")
    # After `--` the word belongs to the command.
    assert "(--traceback)" in error_of(run("generate", "a", "--", "--traceback"))
    monkeypatch.setattr("fixclip_cli.generate.read_prompt", lambda *_: 1 / 0)
    assert isinstance(run("generate", "a").exception, ZeroDivisionError)


def test_an_error_may_have_an_exit_code_of_its_own():
    app = typer.Typer(cls=Commands)

    @app.command()
    def work():
        with errors_exit_with(1):
            raise ValueError("the loss is not finite\n  at step 3")

    app.callback()(lambda: None)
    assert error_of(CliRunner().invoke(app, ["work"]), code=1) == "the loss is not finite at step 3"
    assert CliRunner().invoke(app, ["work", "--stepz"]).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("data pack a.jsonl out --side longest", "--side says which side --resize speaks of, and there is none"),
        ("data pack a.jsonl out --no-filter --min-words 3", "--min-words does not act beside --no-filter"),
        ("evaluate-images scenes:1 --system a: --adapter b", "--adapter does not act beside --system"),
        ("train encoder builtin:x --recipe-diff --smoke", "--smoke does not act beside --recipe-diff"),
        ("train encoder builtin:x --smoke --resume none", "--resume does not act beside --smoke"),
        ("train --list encoder builtin:x", "--list shows the recipes and trains nothing"),
        ("evaluate BASE --data scenes:4 --pretrained openai", "it chooses the weights of an open_clip model"),
        ("evaluate builtin:scenes/clip --data scenes:9 --device tpu", "device 'tpu' cannot be used"),
        (
            "convert openai/clip-vit-base-patch16 OUT",
            "of the hub: hf download openai/clip-vit-base-patch16 --local-dir",
        ),
        ("convert BASE/text_encoder OUT --model-name ViT-B-16", "leave out the model name 'ViT-B-16'"),
    ],
)
def test_options_that_would_not_act_are_refused(sd1, tmp_path, arguments, message):
    words = arguments.replace("BASE", str(sd1)).replace("OUT", str(tmp_path / "new")).split()
    assert message in error_of(run(*words))


def test_tokens_needs_only_the_tokenizer(sd1, tmp_path):
    import shutil

    shutil.copytree(sd1 / "tokenizer", tmp_path / "tokenizer")
    result = run("tokens", LONG, "--base", tmp_path)
    assert result.exit_code == 0, result.output
    assert "132 tokens" in result.output


def test_tokens_as_json(sd1):
    result = run(
        "tokens", f"(red:1.3) {LONG}", "--base", sd1, "--conditioning", "chunks", "--weights", "a1111", "--json"
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.output)
    assert report["conditioning"] == "chunks"
    assert report["text"] == f"red {LONG}"
    assert report["num_tokens"] == 133
    assert len(report["passes"]) == 2
    assert report["num_states"] == 154


@pytest.mark.parametrize("base", ["vae", "nowhere", "someone/nothing"])
def test_tokens_of_a_base_without_a_tokenizer(sd1, base):
    result = run("tokens", LONG, "--base", sd1 / base if base == "vae" else base)
    assert base in error_of(result)
    assert ("--base builtin:scenes needs no hub" in error_of(result)) == (base == "someone/nothing")
    result = run("generate", LONG, "--base", sd1 / base if base == "vae" else base)
    assert ("--base builtin:scenes needs no hub" in error_of(result)) == (base == "someone/nothing")


def test_version():
    name, version = run("--version").output.split()
    assert name == "fixclip"
    assert Version(version).release >= (0, 1)  # between two tags a version has a .dev part


def test_a_missing_extra_is_named(tmp_path):
    """With open_clip out of reach, as after `pip install fixclip` alone."""
    code = "import sys; sys.modules['webdataset'] = None; sys.argv[1:] = ['data', 'check', 'x.jsonl']; "
    done = subprocess.run(
        [sys.executable, "-c", code + "from fixclip_cli.main import main; main()"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.strip() == "error: this command needs webdataset: pip install 'fixclip[train]'"


def test_interrupt_leaves_no_half_written_file(sd1, tmp_path):
    command = ["-m", "fixclip_cli", "generate", "a cat", "--base", sd1, "--steps", "900", "--num", "1000"]
    process = subprocess.Popen(
        [sys.executable, *map(str, command), "--size", "16", "-o", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert "tokens" in process.stdout.readline()
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    # A shell shows both as 130.
    assert process.returncode in (130, -signal.SIGINT)
    assert "Traceback" not in errors
    for file in tmp_path.iterdir():
        Image.open(file).load()
        assert file.suffix == ".png"


def test_help_is_free_of_heavy_imports():
    code = "import sys, fixclip_cli.main; print([m for m in ('torch', 'diffusers', 'open_clip') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("text", "size"), [("512", (512, 512)), ("512x768", (512, 768)), ("64X8", (64, 8))])
def test_sizes(text, size):
    assert parse_size(text) == size


def test_output_files_and_sheet(tmp_path):
    assert output_files(str(tmp_path / "x.PNG"), ["s1"]) == [tmp_path / "x.PNG"]
    assert output_files(f"{tmp_path}/dir.png/", ["s1"]) == [tmp_path / "dir.png" / "s1.png"]
    assert output_files(f"{tmp_path}/dir.png", ["s1"]) == [tmp_path / "dir.png" / "s1.png"], "it is a folder by now"
    images = [Image.new("RGB", (300, 200), color) for color in ("red", "blue")]
    assert label_row(images, ["one", "two"]).size == (608, 230)
