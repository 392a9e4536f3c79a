"""Training the adapter end to end: the same weights however often it is interrupted, and what comes out of it."""

import copy
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import command_line
import numpy as np
import pytest
import tiny
import tiny_adapter
import torch
import yaml
from accelerate import Accelerator, DistributedType, PartialState
from accelerator import reset_accelerator
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from PIL import Image
from safetensors.torch import load_file
from test_checkpoint import forget_recipe
from test_files import full_disk
from tiny_adapter import without_onednn  # noqa: F401
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from fixclip_core import files
from fixclip_core.training.checkpoint import list_checkpoints, save_checkpoint
from fixclip_core.training.recipe import builtin_recipes, load_recipe
from fixclip_core.training.trainer import CHECKPOINTS, smoke
from fixclip_diffusion import FixClipStableDiffusionPipeline, TextAdapter
from fixclip_diffusion.adapter_training import random_models
from fixclip_diffusion.adapter_training import trainer as train
from fixclip_diffusion.adapter_training.recipe import AdapterRecipe
from fixclip_diffusion.adapter_training.trainer import AdapterTrainer
from fixclip_diffusion.evaluation import generate
from fixclip_diffusion.evaluation.prompts import Prompt
from fixclip_diffusion.state_mask import mask_empty_states
from fixclip_diffusion.tiny import clip_text_config, unet

ROOT = Path(__file__).parents[1]
PROMPT = tiny_adapter.caption(5)
NO_SHORT = ("objectives.weight_short=0", "objectives.weight_states=0")  # of the tiny recipe, for short_share=0


@pytest.fixture(scope="session")
def encoder_folder(sd1, tmp_path_factory):
    """A text encoder that was trained: other weights than the base's, no original positions."""
    folder = tmp_path_factory.mktemp("encoder")
    pipe = FixClipStableDiffusionPipeline.from_pretrained(sd1)
    encoder = pipe.text_encoder
    torch.manual_seed(8)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    encoder.text_model.embeddings.short_position_embedding = None
    encoder.config.short_position_embeddings = 0
    encoder.save_pretrained(folder)
    return folder


@pytest.fixture
def recipe_file(sd1, tmp_path):
    data = tiny_adapter.write_data(tmp_path / "data")
    return lambda name="run": tiny_adapter.write_recipe(tmp_path / f"{name}.yaml", sd1, data)


@pytest.fixture
def recipe(recipe_file):
    return lambda name="run", *overrides: tiny_adapter.read(recipe_file(name), *overrides)


def run_until(recipe, step, resume="auto"):
    """Train, with the whole run's schedule, and stop after some steps as if the power went."""
    reset_accelerator()
    trainer = AdapterTrainer(recipe).prepare(resume)
    trainer.start()
    trainer.total_steps = step
    trainer.fit()
    return trainer


def train_again(recipe, **kwargs):
    reset_accelerator()
    return AdapterTrainer(recipe, **kwargs).train()


def weights(folder):
    found = load_file(Path(folder) / "adapter" / "adapter.safetensors")
    lora = Path(folder) / "lora" / "pytorch_lora_weights.safetensors"
    return found | (load_file(lora) if lora.exists() else {})


def assert_equal(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **(tolerance or {"rtol": 0, "atol": 0}), msg=name)


def metrics(folder):
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "samples_per_second"} for row in rows]


# -- a run and its resumption --------------------------------------------------------------------------------


def test_a_run_trains_the_adapter_alone_and_writes_everything(recipe, sd1, tmp_path):
    chosen = recipe(
        "run",
        "output.trackers=[tensorboard]",
        f"samples.prompts=['{PROMPT}', A horse.]",
        "samples.every=2",
        "train.ema_decay=0.5",
        "optim.lr=0.05",
    )
    run = AdapterTrainer(chosen).prepare()
    before = [copy.deepcopy(module.state_dict()) for module in run.frozen.modules]
    new = {name: p.detach().clone() for name, p in run.module.named_parameters()}
    run.start()
    run.fit()
    run.save()
    run.accelerator.end_training()
    for state, module in zip(before, run.frozen.modules, strict=True):
        assert_equal(state, module.state_dict())
    moved = {name for name, p in run.module.named_parameters() if not torch.equal(p, new[name])}
    assert moved == set(new)
    assert all(name.startswith("adapter.") for name in new)

    folder = tmp_path / "run"
    assert {p.name for p in folder.iterdir()} >= {"adapter", "checkpoints", "samples", "recipe.yaml", "losses.png"}
    assert load_recipe(AdapterRecipe, folder / "recipe.yaml") == chosen
    assert [step for step, _ in list_checkpoints(folder / "checkpoints")] == [2, 4]
    assert sum(p.stat().st_size for p in (folder / "checkpoints").rglob("*") if p.is_file()) < 500_000
    rows = metrics(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[0].keys() >= {"loss", "loss_long", "loss_short", "loss_prediction", "loss_states", "grad_norm", "lr"}
    assert all(math.isfinite(row["loss"]) for row in rows)

    averaged = TextAdapter.from_pretrained(folder / "adapter")
    assert_equal(averaged.state_dict(), run.ema.module.adapter.state_dict())
    assert not torch.equal(averaged.blocks[0].fc2.weight, run.module.adapter.blocks[0].fc2.weight)

    sheets = sorted((folder / "samples").glob("*.png"))
    assert [p.name for p in sheets] == ["step-00000002.png", "step-00000004.png"]
    events = list(folder.rglob("events.out.tfevents*"))
    assert any(b"samples" in p.read_bytes() for p in events)
    # The columns: stock reads 77 tokens, untuned reads all of them, current differs from both.
    stock = StableDiffusionPipeline.from_pretrained(sd1, safety_checker=None)
    ours = FixClipStableDiffusionPipeline.from_pretrained(sd1, adapter=folder / "adapter")
    untuned = FixClipStableDiffusionPipeline.from_pretrained(sd1)
    assert run.references.keys() == {"stock", "untuned"}
    assert np.array_equal(run.references["stock"][0], picture_in_training(stock))
    assert np.array_equal(run.references["untuned"][0], picture_in_training(untuned))
    columns = {**run.references, "current": [Image.fromarray(picture_in_training(ours))] * 2}
    expected = train.sample_sheet(columns, chosen.samples.prompts).crop((0, 0, 600, 200))
    assert np.array_equal(np.asarray(Image.open(sheets[1]).crop((0, 0, 600, 200))), np.asarray(expected))


def picture(pipe, prompt=PROMPT, seed=0):
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "guidance_scale": 7.5, "width": 16, "height": 16}
    return np.asarray(pipe(prompt, generator=torch.Generator().manual_seed(seed), **settings).images[0])


def picture_in_training(pipe):
    """With the UNet's attention as training and evaluation compute it; torch's fused one rounds otherwise."""
    train.write_attention_out(pipe.unet, torch.device("cpu"))
    return picture(pipe)


@pytest.mark.parametrize(
    "options",
    [
        ["train.ema_decay=0.5", "train.precision=bf16", "lora.rank=2", "train.micro_batch_size=3"],
        ["data.workers=2", "adapter.kind=attention", "captions.short_caption=random_sentences"],
        ["adapter.kind=attention", "adapter.rotary=true", "adapter.causal_heads=1", "optim.optimizer=muon"],
    ],
)
def test_a_resumed_run_ends_with_the_same_weights(recipe, tmp_path, options):
    """Interrupted inside an epoch of three batches, after one of them."""
    options = [*options, "train.steps=4"]
    AdapterTrainer(recipe("whole", *options)).train()
    run_until(recipe("halves", *options), 1)
    assert not (tmp_path / "halves" / "adapter").exists()
    train_again(recipe("halves", *options))
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "halves"))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "halves")


def test_trainings_that_begin_together_fill_one_cache(recipe, tmp_path, monkeypatch, caplog):
    """Each has seen it empty. The second waits for the first and takes what it made, or is refused."""
    monkeypatch.setattr(files, "LOCK_PATIENCE", 0.1)
    cache = tmp_path / "cache"
    options = [f"features.folder={cache}", "features.shard_size=5", "features.text=true"]
    runs = []
    for name, *change in (("one",), ("two",), ("other", "features.dtype=fp32")):
        reset_accelerator()
        runs.append(AdapterTrainer(recipe(name, *options, *change)).prepare())
    assert [run.cache.missing for run in runs] == [[0, 1, 2]] * 3
    cache.mkdir()
    code = "import sys; from pathlib import Path; from fixclip_core.files import lock_folder; "
    code += "lock = lock_folder(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(cache)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    threading.Timer(0.5, process.kill).start()
    runs[0].start()
    process.wait()
    assert f"{cache}: process {process.pid} on " in caplog.text
    times = [path.stat().st_mtime_ns for path in sorted(cache.glob("shard-*"))]
    assert len(times) == 3
    runs[1].start()
    assert runs[1].cache.missing == []
    with pytest.raises(ValueError, match=r"made with another dtype \(fp16, now fp32\); delete it or choose another"):
        runs[2].start()
    assert [path.stat().st_mtime_ns for path in sorted(cache.glob("shard-*"))] == times
    files.lock_folder(cache).release()  # whoever was refused holds it no longer
    reset_accelerator()
    within = recipe("within", f"features.folder={tmp_path / 'within'}", "features.text=true", "train.steps=1")
    assert AdapterTrainer(within).train().is_dir()


class CutOff(AdapterTrainer):
    """Ends in the sheet of a step, as if the power went."""

    cut_at = 2

    def generate_samples(self, *arguments):
        if self.state.step == self.cut_at:
            raise KeyboardInterrupt
        return super().generate_samples(*arguments)


def test_a_sheet_that_was_cut_off_is_made_up_for(recipe, tmp_path):
    """And no other one is drawn again."""
    options = [f"samples.prompts=['{PROMPT}']", "samples.every=2", "samples.steps=2", "train.steps=4"]
    AdapterTrainer(recipe("whole", *options)).train()
    for step in (2, 4):
        reset_accelerator()
        CutOff.cut_at = step
        with pytest.raises(KeyboardInterrupt):
            CutOff(recipe("cut", *options)).train()
        assert not (tmp_path / "cut" / "samples" / f"step-{step:08d}.png").exists()
    train_again(recipe("cut", *options))
    sheets = [sorted((tmp_path / name / "samples").iterdir()) for name in ("whole", "cut")]
    assert [path.name for path in sheets[1]] == ["step-00000002.png", "step-00000004.png"]
    assert [path.read_bytes() for path in sheets[0]] == [path.read_bytes() for path in sheets[1]]
    before = [path.stat().st_mtime_ns for path in sheets[1]]
    train_again(recipe("cut", *options))
    assert [path.stat().st_mtime_ns for path in sheets[1]] == before


@pytest.mark.parametrize(("before", "now"), [("adamw", "muon"), ("muon", "adamw")])
def test_a_run_goes_on_with_the_optimizer_that_it_was_begun_with(recipe, tmp_path, before, now):
    """Where both have the same parameter groups, too; a checkpoint older than Muon says nothing and is AdamW's."""
    run = run_until(recipe("run", f"optim.optimizer={before}"), 1)
    with pytest.raises(ValueError, match=f"optim.optimizer was '{before}' when step-.* was written and is '{now}' now"):
        run_until(recipe("run", f"optim.optimizer={now}"), 2)
    forget_recipe(tmp_path / "run" / CHECKPOINTS / "step-00000001")
    (tmp_path / "run" / "recipe.yaml").unlink()
    with pytest.raises(ValueError, match=f"step-00000001: written with optim.optimizer={before}, not with {now}; set"):
        run_until(recipe("run", f"optim.optimizer={now}"), 2)
    if before == "adamw":
        for group in run.optimizer.param_groups:
            del group["muon"]
        save_checkpoint(run.accelerator, run.folder / CHECKPOINTS, 1, keep_last=1)
        assert run_until(recipe("run"), 2).state.step == 2


@pytest.mark.parametrize("change", ["num_heads=4", "rotary=true", "causal_heads=1", "mask_padding=false"])
def test_a_run_goes_on_with_the_adapter_that_it_was_begun_with(recipe, tmp_path, change):
    """The weights' shapes do not tell these apart. It is said before features are cached, and so by --dry-run."""
    options = ["adapter.kind=attention", "adapter.num_heads=2"]
    run_until(recipe("run", *options), 1)
    name, value = change.split("=")
    cache = f"features.folder={tmp_path / 'cache'}"
    checkpoint = str(tmp_path / "run" / CHECKPOINTS / "step-00000001")
    for folder, resume in (("run", "auto"), ("other", checkpoint)):
        changed = recipe(folder, *options, f"adapter.{change}", cache)
        expected = f"adapter.{name} was .* when step-00000001 was written and is {value.title()} now, "
        with pytest.raises(ValueError, match=expected):
            AdapterTrainer(changed).prepare(resume)
    assert not (tmp_path / "cache").exists()


def test_training_with_a_cache_is_training_without(recipe, tmp_path):
    AdapterTrainer(recipe("plain")).train()
    cache = [f"features.folder={tmp_path / 'cache'}", "features.dtype=fp32", "features.shard_size=5"]
    train_again(recipe("cached", *cache, "features.text=true"))
    half = [f"features.folder={tmp_path / 'half'}", "features.dtype=fp16"]
    train_again(recipe("latents", *half))
    plain = weights(tmp_path / "plain")
    assert_equal(weights(tmp_path / "cached"), plain, rtol=0, atol=2e-4)
    for one, other in zip(metrics(tmp_path / "plain"), metrics(tmp_path / "cached"), strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-5)
    for one, other in zip(metrics(tmp_path / "plain"), metrics(tmp_path / "latents"), strict=True):
        assert other == pytest.approx(one, rel=0.05, abs=1e-2)


def test_parts_of_a_batch_give_the_same_step(recipe, tmp_path):
    AdapterTrainer(recipe("whole", "train.steps=2")).train()
    train_again(recipe("parts", "train.steps=2", "train.micro_batch_size=3"))
    assert metrics(tmp_path / "parts")[0] == pytest.approx(metrics(tmp_path / "whole")[0], rel=1e-3, abs=1e-6)


def test_gradient_checkpointing_changes_nothing(recipe, tmp_path):
    options = ["train.steps=2", "lora.rank=2"]
    AdapterTrainer(recipe("plain", *options)).train()
    train_again(recipe("saving", *options, "train.gradient_checkpointing=true"))
    for one, other in zip(metrics(tmp_path / "plain"), metrics(tmp_path / "saving"), strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-6)


def test_it_learns(recipe, tmp_path):
    """With the distillation alone, an encoder that was shifted comes back to its base's short captions."""
    options = ["objectives.weight_long=0", "objectives.weight_short=0", "objectives.weight_states=1"]
    options += ["objectives.weight_prediction=0", "objectives.short_share=0.99", "objectives.caption_dropout=0"]
    models = train.load_frozen(recipe("run", *options).model)
    shifted = copy.deepcopy(models.encodings[0].encoder)
    with torch.no_grad():
        shifted.text_model.final_layer_norm.bias += torch.randn(shifted.config.hidden_size)
    chosen = recipe(
        "run", *options, "train.steps=15", "adapter.hidden_width=64", "output.save_every=15", "optim.lr=3e-2"
    )
    train_again(chosen, models=replace(models, encodings=(replace(models.encodings[0], encoder=shifted),)))
    rows = metrics(tmp_path / "run")
    assert rows[-1]["loss_states"] < 0.5 * rows[0]["loss_states"]


def test_a_start_without_the_unet(recipe, encoder_folder, tmp_path, monkeypatch):
    """The states alone are learnt, neither UNet nor VAE runs, and a run with them goes on from the adapter."""
    encoder = f"model.encoder={encoder_folder}"
    states = ["objectives.weight_long=0", "objectives.weight_short=0", "objectives.weight_prediction=0"]
    states += ["objectives.weight_windows=1", "objectives.weight_states=1", "adapter.kind=attention"]
    states += ["objectives.noise_draws=8", "optim.lr=1e-2"]  # every caption has its turn in every step
    with monkeypatch.context() as patch:
        for part in (UNet2DConditionModel, AutoencoderKL):
            patch.setattr(part, "forward", lambda *args, **kwargs: pytest.fail("not needed"))
            patch.setattr(part, "encode", lambda *args, **kwargs: pytest.fail("not needed"), raising=False)
        start = AdapterTrainer(recipe("start", encoder, *states, "train.steps=60")).train()
        cache = ["features.text=true", "features.dtype=fp32", f"features.folder={tmp_path / 'states'}"]
        train_again(recipe("cached", encoder, *states, *cache, "train.steps=3"))
    for one, other in zip(metrics(tmp_path / "start"), metrics(tmp_path / "cached")[:2], strict=False):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)
    rows = metrics(tmp_path / "start")
    assert rows[0].keys() >= {"loss_windows", "loss_states"}
    assert not rows[0].keys() & {"loss_long", "loss_short", "loss_prediction"}
    for name in ("loss_windows", "loss_states"):
        assert np.mean([row[name] for row in rows[-3:]]) < 0.6 * np.mean([row[name] for row in rows[:3]])
    reset_accelerator()
    run = AdapterTrainer(recipe("then", encoder, f"adapter.start_from={start}")).prepare()
    assert_equal(run.module.adapter.state_dict(), load_file(start / "adapter.safetensors"))
    reset_accelerator()
    everything = recipe("both", encoder, *states[3:], "features.text=true", f"features.folder={tmp_path / 'cache'}")
    AdapterTrainer(everything).train()
    assert metrics(tmp_path / "both")[0].keys() >= {"loss_windows", "loss_long", "loss_prediction"}


# -- what comes out ------------------------------------------------------------------------------------------


def test_a_trained_adapter_gives_the_same_picture_everywhere(recipe, sd1, encoder_folder, tmp_path):
    """Loaded by our pipeline, saved, reloaded by ours and by the stock pipeline."""
    adapter = AdapterTrainer(recipe("run", f"model.encoder={encoder_folder}", "optim.lr=0.05")).train()
    pipe = FixClipStableDiffusionPipeline.from_pretrained(sd1, encoder=encoder_folder, adapter=adapter)
    wanted = picture(pipe)
    untuned = picture(FixClipStableDiffusionPipeline.from_pretrained(sd1, encoder=encoder_folder))
    assert not np.array_equal(wanted, untuned)
    pipe.save_pretrained(tmp_path / "saved")
    again = FixClipStableDiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert np.array_equal(picture(again), wanted)
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "saved", safety_checker=None)
    assert type(stock) is StableDiffusionPipeline
    mask_empty_states(stock.unet)  # it pads prompts to 248 tokens, and zeros stand behind the text
    np.testing.assert_allclose(picture(stock).astype(int), wanted.astype(int), atol=1)


@pytest.mark.parametrize(("kind", "mode"), [("mlp", "chunks"), ("attention", "chunks"), ("attention", "overlap")])
def test_an_adapter_for_windows_of_77_tokens(recipe, sd1, tmp_path, kind, mode):
    """Trained on scenes' captions of one to three windows; pipeline and evaluation apply it to each window."""
    chosen = recipe(
        "run",
        f"model.conditioning={mode}",
        f"adapter.kind={kind}",
        "data.source=scenes",
        "data.stop=8",
        "train.micro_batch_size=3",
        "optim.lr=0.05",
        f"samples.prompts=['{PROMPT}']",
    )
    run = AdapterTrainer(chosen).prepare()
    assert "windows of 77 tokens" in run.plan()
    features = train.encode_batch(run.frozen, next(run.loader.epoch(0)), chosen.objectives)
    assert len(set((features.long.source >= 0).sum(1).tolist())) >= 3
    reset_accelerator()
    adapter = AdapterTrainer(chosen).train()
    assert all(math.isfinite(value) for row in metrics(tmp_path / "run") for value in row.values())

    pipe = FixClipStableDiffusionPipeline.from_pretrained(sd1, adapter=adapter, conditioning=mode)
    untuned = FixClipStableDiffusionPipeline.from_pretrained(sd1, conditioning=mode)
    wanted, plain = picture_in_training(pipe), picture_in_training(untuned)
    assert not np.array_equal(wanted, plain)
    drawing = generate.Drawing(steps=2, size=16)
    for options, expected in ((f"adapter={adapter},", wanted), ("", plain)):
        system = generate.parse_system(f"windows:{options}conditioning={mode}")
        drawn = generate.Painter(str(sd1)).draw(system, [Prompt(PROMPT)], drawing)[0][0]
        assert np.array_equal(np.asarray(drawn), expected)
    # A run's sheets are drawn in windows too.
    stock = picture_in_training(StableDiffusionPipeline.from_pretrained(sd1, safety_checker=None))
    columns = {"stock": stock, "untuned": plain, "current": wanted}
    expected = train.sample_sheet({k: [Image.fromarray(v)] for k, v in columns.items()}, [PROMPT])
    sheet = Image.open(tmp_path / "run" / "samples" / "step-00000004.png")
    assert np.array_equal(np.asarray(sheet), np.asarray(expected))


def test_stock_load_lora_weights_reads_the_lora(recipe, sd1, tmp_path):
    """The UNet with the loaded LoRA predicts what the trained one predicts."""
    chosen = recipe("run", "lora.rank=2", "train.ema_decay=0.3", "optim.lr_new=0.05")
    run = run_until(chosen, 4)
    run.save()
    names = [name for name, _ in run.module.named_parameters() if name.startswith("lora.")]
    assert len(names) == len(run.module.lora_names) > 0
    assert all("attn2" in name for name in run.module.lora_names)

    stock = StableDiffusionPipeline.from_pretrained(sd1, safety_checker=None)
    torch.manual_seed(0)
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor(500), torch.randn(1, 77, 32))
    with torch.no_grad():
        plain = stock.unet(*inputs).sample
        with run.denoiser.base_unet():
            torch.testing.assert_close(run.frozen.unet(*inputs).sample, plain)
        with run.lora_weights(run.ema_module):
            averaged = run.frozen.unet(*inputs).sample
        current = run.frozen.unet(*inputs).sample
        stock.load_lora_weights(tmp_path / "run" / "lora")
        loaded = stock.unet(*inputs).sample
    assert (loaded - plain).abs().max() > 1e-4
    torch.testing.assert_close(loaded, averaged, rtol=1e-4, atol=1e-5)
    assert not torch.equal(averaged, current)


# -- bad input -----------------------------------------------------------------------------------------------


def test_going_on_from_an_adapter(recipe, encoder_folder, tmp_path, caplog):
    first = AdapterTrainer(recipe("first", "train.steps=2")).train()
    reset_accelerator()
    run = AdapterTrainer(recipe("second", f"adapter.start_from={first}")).prepare()
    assert_equal(run.module.adapter.state_dict(), TextAdapter.from_pretrained(first).state_dict())
    reset_accelerator()
    with pytest.raises(
        ValueError, match=r"^adapter\.start_from: .*another text encoder .*; or .* adapter\.transfer=true$"
    ):
        AdapterTrainer(recipe("second", f"adapter.start_from={first}", f"model.encoder={encoder_folder}")).prepare()
    reset_accelerator()
    transfer = recipe(
        "third", f"adapter.start_from={first}", f"model.encoder={encoder_folder}", "adapter.transfer=true"
    )
    run = AdapterTrainer(transfer).prepare()
    assert_equal(run.module.adapter.state_dict(), TextAdapter.from_pretrained(first).state_dict())
    made_for = json.loads((first / "made_for.json").read_text())
    assert json.loads((run.save() / "made_for.json").read_text()) == run.made_for[0] != made_for
    reset_accelerator()
    (first / "made_for.json").write_text(json.dumps(made_for | {"tokenizer": "of another kind"}))
    with pytest.raises(ValueError, match="it was made with another tokenizer than the one given now"):
        AdapterTrainer(transfer).prepare()
    with pytest.raises(
        ValueError, match=r"^command line: adapter\.transfer=true .*: set adapter\.start_from, or leave"
    ):
        recipe("third", "adapter.transfer=true")
    (first / "made_for.json").unlink()
    reset_accelerator()
    with caplog.at_level(logging.WARNING):
        AdapterTrainer(recipe("second", f"adapter.start_from={first}")).prepare()
    assert "it is not known which text encoder it belongs to" in caplog.text
    TextAdapter(48).save_pretrained(tmp_path / "wide")
    reset_accelerator()
    with pytest.raises(ValueError, match=f"did you mean '{first}'"):
        AdapterTrainer(recipe("second", f"adapter.start_from={first.parent}")).prepare()
    with pytest.raises(ValueError, match="an adapter of width 48 on a text encoder of width 32"):
        AdapterTrainer(recipe("second", f"adapter.start_from={tmp_path / 'wide'}")).prepare()


def test_a_learning_rate_of_0_trains_the_lora_alone(recipe, tmp_path):
    first = AdapterTrainer(recipe("first", "train.steps=2")).train()
    options = [f"adapter.start_from={first}", "optim.lr=0", "lora.rank=2"]
    train_again(recipe("second", *options))
    trained = load_file(tmp_path / "second" / "lora" / "pytorch_lora_weights.safetensors")
    assert_equal(load_file(tmp_path / "second/adapter/adapter.safetensors"), load_file(first / "adapter.safetensors"))
    assert all(tensor.any() for name, tensor in trained.items() if "lora_B" in name or "lora.up" in name)


def test_attention_written_out_is_the_fused_one(recipe):
    """On CPUs training takes the slower-looking processor; values and gradients must not notice."""
    run = AdapterTrainer(recipe("run")).prepare()
    unet = run.frozen.unet
    assert {type(p) for p in unet.attn_processors.values()} == {AttnProcessor}
    found = []
    for processor in (AttnProcessor(), AttnProcessor2_0()):
        unet.set_attn_processor(processor)
        torch.manual_seed(0)
        states = torch.randn(2, 77, 32, requires_grad=True)
        out = unet(torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), states).sample
        out.square().sum().backward()
        found.append((out, states.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_windows_need_original_positions(recipe, encoder_folder):
    windows = "model.conditioning=chunks"
    with pytest.raises(ValueError, match=r"model\.encoder=.*conditioning='chunks' needs the original 77"):
        AdapterTrainer(recipe("run", windows, f"model.encoder={encoder_folder}")).prepare()


def test_a_run_is_not_resumed_with_another_encoder(recipe, encoder_folder):
    run_until(recipe("run"), 2)
    with pytest.raises(ValueError, match=r"made with another text encoder than the one given now; .*; or start anew"):
        AdapterTrainer(recipe("run", f"model.encoder={encoder_folder}")).prepare()
    with pytest.raises(ValueError, match=r"model\.conditioning was None when step-.* was written and is 'chunks' now"):
        AdapterTrainer(recipe("run", "model.conditioning=chunks")).prepare()
    assert "resumes  from step 2, " in AdapterTrainer(recipe("run")).prepare().plan()
    checkpoint = recipe("run").output.folder + "/checkpoints/step-00000002"
    with pytest.raises(ValueError, match="it was made with another text encoder than the one given now"):
        AdapterTrainer(recipe("other", f"model.encoder={encoder_folder}")).prepare(checkpoint)


def test_an_encoder_of_another_width(recipe, tmp_path):
    CLIPTextModel(clip_text_config(hidden_size=48, vocab_size=49408)).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match="the text encoder is 48 wide, but the UNet's cross-attention takes 32"):
        AdapterTrainer(recipe("run", f"model.encoder={tmp_path / 'wide'}")).prepare()


def test_the_sizes_of_an_adapter_to_go_on_from_are_recorded_and_not_contradicted(recipe, encoder_folder, tmp_path):
    sizes = ("adapter.num_layers=3", "adapter.scope=text", "adapter.rotary=true", "adapter.causal_heads=4")
    made = recipe("start", "adapter.kind=attention", *sizes)
    train_again(made)
    start = f"adapter.start_from={tmp_path / 'start' / 'adapter'}"
    train_again(recipe("on", start, "adapter.kind=attention"))
    written = yaml.safe_load((tmp_path / "on" / "recipe.yaml").read_text())["adapter"]
    assert (written["kind"], written["num_layers"], written["scope"]) == ("attention", 3, "text")
    assert (written["rotary"], written["causal_heads"]) == (True, 4)
    reset_accelerator()
    with pytest.raises(ValueError, match=r"adapter\.num_layers=2: adapter\.start_from=.* has 3; leave"):
        AdapterTrainer(recipe("other", start, "adapter.num_layers=2")).prepare()
    with pytest.raises(ValueError, match=r"adapter\.scope=text needs adapter\.kind=attention"):
        recipe("mlp", "adapter.kind=mlp", "adapter.scope=text")
    for option in ("num_heads=4", "mask_padding=false", "rotary=true", "causal_heads=2"):
        with pytest.raises(ValueError, match=rf"adapter\.{option} needs adapter\.kind=attention, and kind is mlp"):
            recipe("mlp", "adapter.kind=mlp", f"adapter.{option}")
    with pytest.raises(ValueError, match=r"adapter\.causal_heads=9: it must be at most adapter\.num_heads=8"):
        recipe("many", "adapter.kind=attention", "adapter.causal_heads=9")


def test_captions_that_end_before_the_77th_token(recipe, tmp_path, caplog):
    tiny_adapter.write_data(tmp_path / "short", sentences=3)
    with pytest.raises(
        ValueError, match=r"all of 12 captions fit into 77 tokens, which the adapter leaves as they are"
    ):
        AdapterTrainer(
            recipe("run", f"data.source={tmp_path / 'short' / 'data.jsonl'}", "objectives.short_share=0", *NO_SHORT)
        ).prepare()
    reset_accelerator()
    with caplog.at_level(logging.WARNING):
        AdapterTrainer(recipe("run", f"data.source={tmp_path / 'short' / 'data.jsonl'}")).prepare()
    assert "all of 12 captions fit into 77 tokens; nothing can be learnt about the tokens after them" in caplog.text
    caplog.clear()
    reset_accelerator()
    with caplog.at_level(logging.WARNING):
        AdapterTrainer(recipe("run")).prepare()
    assert "fit into 77 tokens" not in caplog.text


def test_a_start_whose_targets_are_what_the_base_gives_already(recipe, encoder_folder, tmp_path):
    """The loss would be 0; another encoder, other windows or a plain wording leave something to learn."""
    start = ["objectives.weight_long=0", "objectives.weight_windows=1", "objectives.short_share=0", *NO_SHORT]
    with pytest.raises(ValueError, match=r"none of 12 captions in .* has a plain wording .* name model\.encoder"):
        AdapterTrainer(recipe("run", *start)).prepare()
    reset_accelerator()
    states = ["objectives.weight_long=0", "objectives.weight_states=1", "objectives.weight_prediction=0"]
    with pytest.raises(
        ValueError, match=r"^objectives\.weight_states: the base's own encoder gives these hidden states"
    ):
        AdapterTrainer(recipe("run", *states, "objectives.weight_short=0")).prepare()
    others = {
        "encoder": [f"model.encoder={encoder_folder}"],
        "chunks": ["model.conditioning=chunks"],
        "plain": ["data.source=scenes-references", "data.start=0", "data.stop=8"],
    }
    for name, more in others.items():
        train_again(recipe(name, *start, *more, "train.steps=1"))
        assert metrics(tmp_path / name)[0]["loss_windows"] > 0
    reset_accelerator()
    smoke(AdapterTrainer, recipe("smoke", *start))


def test_sharding_is_refused(recipe, monkeypatch):
    for state in (Accelerator().state, PartialState()):  # as a launch with FSDP leaves them
        monkeypatch.setattr(state, "distributed_type", DistributedType.FSDP)
    with pytest.raises(ValueError, match=r"an adapter cannot be trained with FSDP, .* leave that out"):
        AdapterTrainer(recipe("run"))


def test_a_weight_of_plain_wordings_needs_captions_that_have_one(recipe):
    with pytest.raises(ValueError, match=r"objectives\.weight_plain: none of 12 captions in .* has a plain wording"):
        AdapterTrainer(recipe("run", "objectives.weight_plain=0.3")).prepare()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.source=EMPTY"], r"empty\.jsonl: it holds no sample"),
        (["data.source=nowhere"], "source 'nowhere' does not exist"),
        (["train.batch_size=13"], "12 samples do not fill one batch of 13"),
        (["model.base=TMP"], "is a folder without model_index.json"),
        (["objectives.weight_long=0", "objectives.short_share=0", *NO_SHORT], "every weight that counts is 0"),
        (
            [
                *("lora.rank=2", "objectives.weight_long=0", "objectives.weight_windows=1"),
                *("objectives.short_share=0", *NO_SHORT),
            ],
            r"lora\.rank=2: a LoRA learns from noise predictions",
        ),
        (["objectives.short_share=0"], r"objectives\.weight_short=0\.5 with short_share=0: no draw reads a short"),
        (
            ["objectives.short_share=0", "objectives.weight_short=0"],
            r"objectives\.weight_states=0\.1 with short_share=0",
        ),
        (
            ["features.text=true"],
            r"^command line: features\.text=true is of the cache .*: set features\.folder, or leave",
        ),
        (["features.shard_size=4"], r"features\.shard_size=4 is of the cache of features, and there is none"),
        (["train.micro_batch_size=9"], "micro_batch_size=9: it must be at most"),
        (["objectives.weight_shrt=1"], r"unknown key; did you mean objectives\.weight_short\?"),
    ],
)
def test_bad_input_is_named_before_the_first_step(recipe_file, tmp_path, overrides, message):
    (tmp_path / "empty.jsonl").write_text("")
    places = {"EMPTY": str(tmp_path / "empty.jsonl"), "TMP": str(tmp_path)}
    for name, place in places.items():
        overrides = [override.replace(name, place) for override in overrides]
    with pytest.raises(ValueError, match=message):
        AdapterTrainer(tiny_adapter.read(recipe_file(), *overrides)).prepare()


def test_a_cache_is_turned_off_by_its_folder_alone(recipe):
    assert recipe("run", "features.folder=null", "features.text=true").features.text


def test_names_of_windows(recipe):
    """Version 0.1 called one pass of 248 tokens `windows`, under another key; here it is refused."""
    assert recipe("run", "model.long_prompt=windows").model.conditioning == "one_pass"
    assert recipe("run", "model.long_prompt=windows_77").model.conditioning == "chunks"
    with pytest.raises(ValueError, match=r"model\.conditioning='windows': valid are chunks, overlap, one_pass"):
        recipe("run", "model.conditioning=windows")
    for key in (
        "model.conditioning=stock",
        "model.long_prompt=truncate_77",
    ):  # which reads nothing that is to be learnt
        with pytest.raises(ValueError, match=r"conditioning='stock': valid are chunks, overlap, one_pass"):
            recipe("run", key)


def test_a_checkpoint_of_another_kind_of_training(recipe, tmp_path, caplog):
    run_until(recipe("run"), 2)
    (tmp_path / "encoder.yaml").write_text("model: {name: ViT-B-32}\ndata: {source: scenes}\nmethod: longclip\n")
    reset_accelerator()
    checkpoint = tmp_path / "run" / CHECKPOINTS / "step-00000002"
    shutil.copy(tmp_path / "encoder.yaml", tmp_path / "run" / "recipe.yaml")
    forget_recipe(checkpoint)
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="the checkpoint does not fit this model"):
        AdapterTrainer(recipe("run", "adapter.num_layers=3")).prepare()
    assert re.search(r"The recipe that .* was written with cannot be compared: .* \(and \d+ more\)$", caplog.text, re.M)


def test_a_recipe_of_the_other_kind(recipe_file, tmp_path):
    encoder = tmp_path / "encoder.yaml"
    encoder.write_text("model: {name: ViT-B-32}\ndata: {source: scenes}\nmethod: longclip\noptim: {lrr: 1}\n")
    assert command_line.error_of(run_command(encoder)) == f"{encoder} is a recipe of fixclip train encoder"
    result = command_line.run("train", "encoder", recipe_file())
    assert command_line.error_of(result) == f"{recipe_file()} is a recipe of fixclip train adapter"


def test_inpainting_models_are_refused(recipe, sd1, tmp_path):
    models = train.load_frozen(recipe("run").model)
    with pytest.raises(ValueError, match="its UNet takes 9 channels, its VAE makes 4: not a text-to-image model"):
        AdapterTrainer(recipe("run"), replace(models, unet=unet(in_channels=9))).prepare()


def test_poisoned_steps_are_skipped_and_stop_the_run(recipe, tmp_path):
    chosen = recipe("run", "train.steps=6")
    run = run_until(chosen, 2)
    run.total_steps = 6
    with torch.no_grad():
        run.denoiser.empty_teacher.fill_(math.nan)
        run.frozen.teachers[0].encoder.text_model.final_layer_norm.bias.fill_(math.nan)
    before = {name: p.detach().clone() for name, p in run.module.named_parameters()}
    with pytest.raises(FloatingPointError, match="step 5: 3 steps in a row without a finite gradient") as caught:
        run.fit()
    assert "step-00000004 is whole: the same command goes on from step 4" in str(caught.value)
    assert_equal(before, dict(run.module.named_parameters()))


# -- the command ---------------------------------------------------------------------------------------------


def run_command(*arguments):
    return command_line.run("train", "adapter", *arguments)


def test_command(recipe_file, tmp_path):
    planned = run_command(recipe_file(), "lora.rank=2", "--dry-run")
    assert planned.exit_code == 0, planned.output
    assert "mlp adapter, LoRA of rank 2" in planned.output
    assert "memory  about" in planned.output
    assert "12 samples, 3 batches an epoch, 16 px" in planned.output
    assert not (tmp_path / "run" / "adapter").exists()
    wrong = run_command(recipe_file(), "optim.learning_rate=1")
    assert wrong.exit_code == 2
    assert "did you mean optim.lr" in wrong.output


def test_a_dry_run_says_what_it_would_cache_and_go_on_from(recipe_file, tmp_path):
    cache = [f"features.folder={tmp_path / 'new' / 'cache'}", "features.shard_size=4", "features.text=true"]
    planned = run_command(recipe_file(), *cache, "--dry-run")
    assert re.search(r"cache  .*/new/cache, with text states: 12 samples to add, about \d+ MiB\n", planned.output)
    assert "resumes" not in planned.output
    assert not (tmp_path / "new").exists()
    assert run_command(recipe_file(), *cache, "train.steps=2").exit_code == 0
    size = sum(file.stat().st_size for file in (tmp_path / "new" / "cache").glob("*.safetensors"))
    planned = run_command(recipe_file(), *cache, "optim.lr=2e-4", "output.save_every=1", "--dry-run")
    assert "cache, with text states: complete" in planned.output
    assert f"resumes  from step 2, {tmp_path / 'run' / 'checkpoints' / 'step-00000002'}" in planned.output
    changed = r"changed  optim\.lr was [0-9.]* and is 0\.0002 now, train\.steps was 2 and is 4 now$"
    assert re.search(changed, planned.output, re.MULTILINE)
    elsewhere = (f"output.folder={tmp_path / 'other'}", "--resume", str(tmp_path / "run" / "checkpoints"), "--dry-run")
    assert "resumes  from step 2" in run_command(recipe_file(), *cache, *elsewhere).output
    (tmp_path / "new" / "cache" / "shard-00001.safetensors").unlink()
    reset_accelerator()
    run = AdapterTrainer(tiny_adapter.read(recipe_file(), *cache)).prepare()
    assert len(run.cache.missing_samples) == 4
    assert run.cache_bytes == pytest.approx(size / 3, rel=0.2)


def test_a_cache_that_the_disk_cannot_hold_is_refused_before_it_is_made(recipe_file, tmp_path):
    few = ("data.source=scenes", "data.stop=100000", "data.resolution=1024", "features.batch_size=1")
    error = command_line.error_of(run_command(recipe_file(), *few, f"features.folder={tmp_path / 'cache'}"))
    assert re.search(r"too little disk space: .*; choose another features\.folder than '.*', or leave it out", error)
    assert error.startswith("command line: ")
    assert not (tmp_path / "cache").exists()


def test_an_error_says_where_the_recipe_sets_what_it_names(recipe_file):
    """Errors of loading models and data too, which the recipe alone does not show."""
    file = recipe_file()
    text, count = re.subn(r"batch_size: \d+", "batch_size: 13", file.read_text())
    assert count == 1
    file.write_text(text)
    line = next(number for number, row in enumerate(text.splitlines(), 1) if "batch_size" in row)
    reason = "12 samples do not fill one batch of {} on 1 rank(s)"
    assert command_line.error_of(run_command(file)).startswith(f"{file}:{line}: {reason.format(13)}")
    error = command_line.error_of(run_command(file, "train.batch_size=14"))
    assert error.startswith(f"command line: {reason.format(14)}")
    # Where no key is named, but what one is set to.
    error = command_line.error_of(run_command(file, "data.source=scnes"))
    assert error.startswith("command line: data.source: source 'scnes' does not exist; did you mean scenes?")
    wrong = re.sub(r"base: .*?([,}\n])", r"base: runs/nowhere\1", text, count=1)
    file.write_text(wrong)
    line = next(number for number, row in enumerate(wrong.splitlines(), 1) if "runs/nowhere" in row)
    assert command_line.error_of(run_command(file)).startswith(f"{file}:{line}: model.base: ")


def test_every_mistake_in_a_recipe_has_a_line(recipe_file):
    result = run_command(recipe_file(), "optim.lrr=1", "train.steps=0", "features.text=true", "features.dtype=fp32")
    assert result.exit_code == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert [re.search(r"(optim\.lrr|train\.steps|features\.\w+)", line)[1] for line in errors] == [
        *("features.dtype", "features.text", "optim.lrr", "train.steps")
    ]
    assert not [line for line in result.stderr.splitlines() if not line.startswith("error: ")]


def test_a_full_disk_while_caching_keeps_what_is_there(recipe_file, tmp_path):
    """One line; the file that did not fit is not there, and the same command goes on."""
    cache = [f"features.folder={tmp_path / 'cache'}", "features.shard_size=4", "features.text=true"]
    with full_disk(20_000):
        result = run_command(recipe_file(), *cache)
    assert result.exit_code == 1
    error = result.stderr.splitlines()[-1]
    assert error.startswith(f"error: features.folder='{tmp_path / 'cache'}': ")
    assert error.endswith("The files before it are whole: the same command goes on from them")
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.name[0] != "."] == ["features.json"]
    reset_accelerator()
    assert run_command(recipe_file(), *cache, "train.steps=1").exit_code == 0
    assert len(list((tmp_path / "cache").glob("shard-*.safetensors"))) == 3


def test_two_processes_train_as_one_does(recipe_file, recipe, tmp_path):
    """The same global batches and losses; they build the cache together, and rank 0 writes what comes out."""
    options = ["lora.rank=2", "train.micro_batch_size=1", "train.steps=2"]
    options += [f"features.folder={tmp_path / 'cache'}", "features.shard_size=5", "features.text=true"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command += ["train_adapter.py", str(recipe_file("two")), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 3
    AdapterTrainer(recipe("one", *options)).train()
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-3, abs=1e-5)
    assert_equal(weights(tmp_path / "two"), weights(tmp_path / "one"), rtol=0, atol=1e-3)


def test_smoke(recipe, caplog):
    """With a local base smoke takes it as it is; the random one of full size is for the recipe's own check."""
    smoke(AdapterTrainer, recipe("run", f"samples.prompts=['{tiny.sentences(2)}']", "samples.steps=2"))
    reset_accelerator()
    with caplog.at_level(logging.WARNING):
        smoke(AdapterTrainer, recipe("run", "model.long_prompt=windows_77", "optim.warmup_steps=100"))
    assert "warming up" not in caplog.text


def test_shipped_recipes_are_valid():
    for name in builtin_recipes(AdapterRecipe):
        assert load_recipe(AdapterRecipe, name, ["data.source=my.jsonl"]).data.source == "my.jsonl"


def test_sizes_of_the_random_bases():
    """The modules' shapes are those of Stable Diffusion 1.5 and XL: their published numbers of parameters."""
    with torch.device("meta"):
        models = [
            UNet2DConditionModel(**random_models.SD15_UNET),
            AutoencoderKL(**random_models.SD15_VAE),
            UNet2DConditionModel(**random_models.SDXL_UNET),
            AutoencoderKL(**random_models.SDXL_VAE),
            CLIPTextModel(CLIPTextConfig(**random_models.VIT_L)),
            CLIPTextModelWithProjection(CLIPTextConfig(**random_models.VIT_BIG_G)),
        ]
    wanted = [859_520_964, 83_653_863, 2_567_463_684, 83_653_863, 123_060_480, 694_659_840]
    assert [sum(p.numel() for p in model.parameters()) for model in models] == wanted
