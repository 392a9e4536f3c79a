"""The command line, on tiny real models."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
import torch
import typer
from command_line import error_of, run
from PIL import Image
from typer.testing import CliRunner

from fixclip_cli.app import Commands, errors_exit_with, parse_size
from fixclip_cli.pictures import label_row, output_files
from fixclip_diffusion import FixClipStableDiffusionPipeline, FixClipTextEncoder, TextAdapter

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


def test_compare_shows_three_systems(sd1, tmp_path, python_pictures):
    arguments = ["generate", LONG, "--base", sd1, *FAST, "--compare", "-o", tmp_path / "sheet.png"]
    encoder = FixClipTextEncoder.from_pretrained(sd1, subfolder="text_encoder", keep=30, ratio=5)
    encoder.save_pretrained(tmp_path / "encoder")
    adapter = TextAdapter(32)
    torch.nn.init.normal_(adapter.blocks[0].fc2.weight)
    adapter.save_pretrained(tmp_path / "adapter")
    for extra in ([], ["--encoder", tmp_path / "encoder", "--adapter", tmp_path / "adapter"]):
        result = run(*arguments, *extra)
        assert result.exit_code == 0, result.output
        sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
        tiles = [sheet[-256::16, left : left + 256 : 16] for left in (0, 264, 528)]
        assert np.array_equal(tiles[0], python_pictures(LONG, conditioning="stock"))
        assert np.array_equal(tiles[1], python_pictures(LONG, conditioning="chunks"))
        assert np.array_equal(tiles[2], python_pictures(LONG)) == (not extra)


def test_long_prompt_mode(sd1, tmp_path, python_pictures):
    prompt = tiny.sentences(40)
    for mode in ("one_pass", "chunks"):
        result = run("generate", prompt, "--base", sd1, *FAST, "--long-prompt", mode, "-o", tmp_path / "a.png")
        assert result.exit_code == 0, result.output
        expected = python_pictures(prompt, conditioning=mode)
        image = Image.open(tmp_path / "a.png")
        assert np.array_equal(np.asarray(image), expected)
        assert json.loads(image.text["fixclip"])["conditioning"] == mode
        assert ("the rest is dropped" in result.output) == (mode == "truncate")
        assert f"conditioning {mode!r}" in result.output


def test_pictures_of_an_earlier_run_are_kept(sd1, tmp_path, python_pictures):
    for prompt, name in (("a cat", "seed0.png"), ("a dog", "seed0-2.png")):
        assert run("generate", prompt, "--base", sd1, *FAST, "-o", tmp_path).exit_code == 0
        assert np.array_equal(np.asarray(Image.open(tmp_path / name)), python_pictures(prompt))
    assert len(list(tmp_path.iterdir())) == 2


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
        (["a", "--base", "BASE", "--encoder", "BASE/model_index.json"], "is a file; a folder or a hub name"),
        (["a", "--base", "BASE", "--device", "cuda:99"], "device 'cuda:99' cannot be used"),
        (["a", "--base", "BASE", "--adapter", "/no/such/adapter"], "expected a folder or hub name"),
        (["a", "--base", "BASE", "-o", "picture.jpg"], "pictures are written as .png"),
        (["a", "--base", "BASE", "-o", "/proc/nowhere/a.png"], "cannot be written"),
        (["a", "--base", "/no/such/model", "-o", "/proc/a.png"], "cannot be written"),  # before the model is loaded
        (["a", "-o", ""], "output '': name a .png file or a folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(sd1, arguments, message):
    arguments = [argument.replace("BASE", str(sd1)) for argument in arguments]
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


def test_tokens_needs_only_the_tokenizer(sd1, tmp_path):
    import shutil

    shutil.copytree(sd1 / "tokenizer", tmp_path / "tokenizer")
    result = run("tokens", LONG, "--base", tmp_path)
    assert result.exit_code == 0, result.output
    assert "132 tokens" in result.output


@pytest.mark.parametrize("base", ["vae", "nowhere", "someone/nothing"])
def test_tokens_of_a_base_without_a_tokenizer(sd1, base):
    result = run("tokens", LONG, "--base", sd1 / base if base == "vae" else base)
    assert base in error_of(result)


def test_version():
    assert re.fullmatch(r"fixclip \d+\.\d+\.\d+\n", run("--version").output)


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
