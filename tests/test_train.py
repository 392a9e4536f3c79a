"""Training end to end on tiny real models: the same weights however often the run is interrupted."""

import dataclasses
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import command_line
import open_clip
import pytest
import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerator import reset_accelerator
from PIL import Image
from safetensors.torch import load_file, save_file
from test_checkpoint import forget_recipe
from test_files import full_disk

from fixclip_core import files, scenes
from fixclip_core.data.config import DataConfig
from fixclip_core.data.sources import open_source
from fixclip_core.device import supports_bf16
from fixclip_core.evaluation.encoders import load_encoder
from fixclip_core.evaluation.items import SourceItems
from fixclip_core.evaluation.retrieval import retrieval_metrics, retrieval_report
from fixclip_core.model.config import FixClipConfig
from fixclip_core.model.fixclip import FixClip
from fixclip_core.training import trainer
from fixclip_core.training.checkpoint import damage, list_checkpoints, save_checkpoint
from fixclip_core.training.encoder import trainer as train
from fixclip_core.training.encoder.recipe import EncoderRecipe
from fixclip_core.training.encoder.trainer import EncoderTrainer
from fixclip_core.training.memory import activation_bytes
from fixclip_core.training.metrics import plot_losses
from fixclip_core.training.optim import (
    Muon,
    lr_factor,
    make_ema,
    make_optimizer,
    optimizer_step,
    parameter_groups,
)
from fixclip_core.training.recipe import OptimSection, load_recipe
from fixclip_core.training.trainer import TrainState, batches, count_step
from fixclip_core.weights.load import load_fixclip

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
STEPS = 6
RECIPE = """\
seed: 3
model: {{name: "local-dir:{clip}", num_prompts: 2, num_groups: 2, first_group: 1}}
data: {{source: scenes, stop: 20, workers: 0}}
captions: {{short_caption: random_sentences}}
optim: {{lr: 1e-3, lr_new: 1e-2, warmup_steps: 2}}
train: {{steps: {steps}, batch_size: 8, precision: fp32, max_skipped_steps: 3}}
eval: {{source: scenes, start: 20, stop: 26, every: 3, batch_size: 4}}
output: {{folder: "{folder}", log_every: 1, save_every: 2, keep_last: 3}}
"""


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A tiny open_clip model as a local folder."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**CLIP).state_dict(), folder / "open_clip_model.safetensors")
    preprocess = {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
    config = {"model_cfg": CLIP, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


def test_weights_on_disk_are_a_base(recipe, clip_folder, tmp_path):
    by_open_clip = train.build_clip(recipe())
    by_path = train.build_clip(recipe("path", f"model.name={clip_folder}"))
    assert by_path.config.context_length == by_open_clip.config.context_length == 248
    assert torch.equal(by_path.text.positions(), by_open_clip.text.positions())
    by_open_clip.save_pretrained(tmp_path / "fixclip")
    again = train.build_clip(recipe("again", f"model.name={tmp_path / 'fixclip'}"))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), by_open_clip.parameters(), strict=True))
    with pytest.raises(ValueError, match="this FixClip has num_prompts=2, not 3"):
        train.build_clip(recipe("other", f"model.name={tmp_path / 'fixclip'}", "model.num_prompts=3"))


def test_the_plan_says_whose_weights_are_loaded(recipe, clip_folder):
    assert train._which_weights(recipe()) == "its own weights"  # local-dir:
    assert train._which_weights(recipe("a", f"model.name={clip_folder}")) == "its own weights"
    local = recipe("b", f"model.name={clip_folder}", "model.pretrained=openai")
    assert train._which_weights(local) == "its own weights, not openai"
    assert train._which_weights(recipe("c", "model.name=ViT-B-16")) == "random weights"
    assert train._which_weights(recipe("d", "model.name=ViT-B-16", "model.pretrained=openai")) == "openai"


def test_a_base_of_248_positions_is_not_stretched_again(recipe, tmp_path):
    long_cfg = {**CLIP, "text_cfg": {**CLIP["text_cfg"], "context_length": 248}}
    clip = open_clip.CLIP(**long_cfg)
    save_file(clip.state_dict(), tmp_path / "open_clip_model.safetensors")
    config = {"model_cfg": long_cfg, "preprocess_cfg": {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    model = train.build_clip(recipe("long", f"model.name={tmp_path}"))
    assert model.config.context_length == 248
    assert torch.equal(model.text.positions(), clip.positional_embedding)


@pytest.fixture
def recipe_file(clip_folder, tmp_path):
    def recipe_file(name="run", steps=STEPS):
        path = tmp_path / f"{name}.yaml"
        path.write_text(RECIPE.format(clip=clip_folder, folder=tmp_path / name, steps=steps))
        return path

    return recipe_file


@pytest.fixture
def recipe(recipe_file):
    return lambda name="run", *overrides: load_recipe(EncoderRecipe, recipe_file(name), overrides)


def run_until(recipe, step, resume="auto"):
    """Train, with the whole run's schedule, and stop after some steps as if the power went."""
    reset_accelerator()
    run = EncoderTrainer(recipe).prepare(resume)
    run.start()
    run.total_steps = step
    run.fit()
    return run


def weights(folder):
    return load_file(Path(folder) / "model" / "model.safetensors")


def assert_bitwise_equal(one, other):
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


# -- a run and its resumption --------------------------------------------------------------------------------


def test_a_run_trains_and_writes_everything(recipe, clip_folder, tmp_path):
    chosen = recipe("run", "output.trackers=[tensorboard]", "train.steps=null", "train.epochs=2")
    folder = EncoderTrainer(chosen).train()
    assert folder == tmp_path / "run" / "model"
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= {"checkpoints", "model", "best", "metrics.jsonl", "losses.png", "recipe.yaml"}
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))
    assert [step for step, _ in list_checkpoints(tmp_path / "run" / "checkpoints")] == [2, 4]  # 2 epochs of 2 batches
    assert load_recipe(EncoderRecipe, tmp_path / "run" / "recipe.yaml") == chosen

    rows = metrics(tmp_path / "run")
    losses = [row for row in rows if "loss" in row]
    assert [row["step"] for row in losses] == [1, 2, 3, 4]
    assert losses[0].keys() >= {"loss_long", "loss_short", "loss_mid_1", "loss_mid_2", "grad_norm", "logit_scale"}
    assert [row["lr"] for row in losses[:2]] == [5e-4, 1e-3]
    assert all(row["samples_per_second"] > 0 for row in losses)
    evaluations = [row for row in rows if "long_image_to_text_recall_at_1" in row]
    assert [row["step"] for row in evaluations] == [3, 4]

    base = load_fixclip(f"local-dir:{clip_folder}", num_prompts=2, num_groups=2, first_group=1)
    model = FixClip.from_pretrained(folder)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, base.get_parameter(name))}
    assert moved == {name for name, _ in model.named_parameters()}
    assert torch.equal(model.text.kept_positions, base.text.kept_positions)


def test_batches_that_wait_must_fit_into_shared_memory(recipe):
    run = EncoderTrainer(recipe("run", "data.workers=1")).prepare()
    assert run.loader.waiting_bytes() == 2 * 8 * 3 * 32 * 32 * 4
    assert "loading  up to 0.0 GiB of the machine's shared memory, data.workers=1" in run.plan()
    reset_accelerator()
    assert "loading" not in EncoderTrainer(recipe("run")).prepare().plan()
    reset_accelerator()
    many = ["data.workers=1", "data.stop=100000000", "train.batch_size=100000000"]
    message = (
        r"data\.workers=1: batches that wait fill up to 1144\.41 GiB of shared memory, and /dev/shm has .* GiB free; "
    )
    with pytest.raises(ValueError, match=message + "set fewer data.workers .* docker run --ipc=host"):
        EncoderTrainer(recipe("run", *many)).prepare()


def test_training_learns_its_samples(recipe, tmp_path):
    """Eight pairs are told apart after 60 steps, by what the run itself evaluates."""
    options = ["data.stop=8", "train.steps=60", "eval.start=0", "eval.stop=8", "eval.every=60", "output.save_every=60"]
    EncoderTrainer(recipe("run", *options, "optim.lr=3e-3", "captions.short_caption=first_sentence")).train()
    rows = metrics(tmp_path / "run")
    assert rows[0]["loss_long"] > math.log(8) - 0.3  # chance
    assert rows[-2]["loss_long"] < 0.3
    assert rows[-2]["loss_mid_2"] < 0.3
    assert rows[-1]["long_text_to_image_recall_at_1"] >= 0.75


def test_trainings_on_other_short_captions_are_evaluated_alike(recipe):
    """By the data's own short captions if so asked; by default by those of the training's kind."""
    wanted = [scenes.short_caption(scenes.scene_at(0, index), index).text for index in range(20, 24)]
    found = {}
    for trained, evaluated in (
        ("debiased", "given"),
        ("given", "null"),
        ("debiased", "null"),
        ("given", "first_sentence"),
    ):
        options = [f"captions.short_caption={trained}", f"eval.short_caption={evaluated}"]
        trainer = EncoderTrainer(recipe("run", *options)).prepare()
        found[trained, evaluated] = next(trainer.eval_loader.epoch(0)).short_ids
    own = trainer.module.tokenizer()(wanted)
    assert torch.equal(found["debiased", "given"], own)
    assert torch.equal(found["given", "null"], own)
    assert not torch.equal(found["debiased", "null"], own)
    assert torch.equal(found["given", "first_sentence"], found["debiased", "null"])


@pytest.mark.parametrize(("workers", "optimizer"), [(0, "adamw"), (2, "adamw"), (2, "muon")])
def test_a_resumed_run_ends_with_the_same_weights(recipe, tmp_path, workers, optimizer):
    """Interrupted inside an epoch; with averaging, GradCache and bf16, or with fp16 and its gradient scaler."""
    options = [f"data.workers={workers}", f"optim.optimizer={optimizer}"]
    options += ["train.ema_decay=0.5", "train.micro_batch_size=3"] if workers == 0 else []
    options += ["train.precision=bf16" if workers == 0 else "train.precision=fp16"]
    EncoderTrainer(recipe("whole", *options)).train()
    run_until(recipe("halves", *options), 3)
    assert not (tmp_path / "halves" / "model").exists()
    reset_accelerator()
    EncoderTrainer(recipe("halves", *options)).train()
    assert_bitwise_equal(weights(tmp_path / "whole"), weights(tmp_path / "halves"))
    one, other = ([without_speed(row) for row in metrics(tmp_path / name)] for name in ("whole", "halves"))
    assert one == other
    assert one[-2]["skipped_steps"] < 3  # the scaler may start too high, but trains
    assert (tmp_path / "whole" / "best" / "model.safetensors").read_bytes() == (
        tmp_path / "halves" / "best" / "model.safetensors"
    ).read_bytes()


PICTURES = [  # five pairs to evaluate on, and what is trained on
    *("eval.source={data}", "eval.start=0", "eval.stop=5", "eval.batch_size=5", "data.source={data}", "data.start=5"),
    *("data.stop=null", "train.batch_size=4", "train.steps=4", "eval.every=2"),
]


@pytest.fixture
def with_pictures(recipe, tmp_path):
    """A recipe that reads pictures from a disk, of which some cannot be read."""

    def with_pictures(bad, *overrides):
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        for index in range(20):
            sample = scenes.scene_at(0, index)
            image = folder / f"{index:02}.png"
            Image.fromarray(scenes.render(sample).permute(1, 2, 0).numpy()).save(image)
            if index in bad:
                image.write_bytes(b"no picture")
            (folder / f"{index:02}.txt").write_text(scenes.long_caption(sample, index).text)
        return recipe("run", *(option.format(data=folder) for option in PICTURES), *overrides)

    return with_pictures


def test_bad_pairs_are_left_out_of_an_evaluation_however_many(with_pictures, tmp_path):
    EncoderTrainer(with_pictures(bad=(0, 3))).train()
    rows = metrics(tmp_path / "run")
    scores = [row["long_image_to_text_recall_at_1"] for row in rows if "long_image_to_text_recall_at_1" in row]
    assert len(scores) == 2
    assert all(3 * score == pytest.approx(round(3 * score)) for score in scores)  # of the three that are left


def test_an_evaluation_that_fails_costs_no_step(with_pictures, tmp_path):
    """It is made up for once the pairs are mended; without an evaluation the run goes on, too."""
    recipe = with_pictures(bad=range(5))
    message = r"step 2 cannot be evaluated: no usable sample among .* none \(section eval\)\. .*goes on from step 2"
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            EncoderTrainer(recipe).train()
        assert [step for step, _ in list_checkpoints(tmp_path / "run" / "checkpoints")] == [2]
        reset_accelerator()
    shutil.copytree(tmp_path / "run", tmp_path / "without")
    assert EncoderTrainer(with_pictures(bad=())).train().is_dir()
    assert [row["step"] for row in metrics(tmp_path / "run") if set(train.SCORED) <= row.keys()] == [2, 4]
    reset_accelerator()
    without = with_pictures((), f"output.folder={tmp_path / 'without'}", "eval.source=null")
    assert EncoderTrainer(without).train().is_dir()
    assert not [row for row in metrics(tmp_path / "without") if set(train.SCORED) <= row.keys()]


class CutOff(EncoderTrainer):
    """Ends in one of its evaluations, as if the power went: at its beginning, or before its figures are written."""

    def __init__(self, recipe, step, before):
        super().__init__(recipe)
        self.cut_at, self.before = step, before

    def evaluate(self, log):
        if self.state.step == self.cut_at:
            if self.before == "figures":
                log.write = self.cut
            else:
                self.cut()
        super().evaluate(log)

    def cut(self, *_):
        raise KeyboardInterrupt


@pytest.mark.parametrize("before", ["evaluation", "figures"])
@pytest.mark.parametrize("step", [2, 4])
def test_an_evaluation_that_was_cut_off_is_made_up_for(recipe, tmp_path, step, before):
    """In the middle of a run and at its end; one that is recorded is not repeated."""
    learns = ["data.stop=8", "eval.start=0", "eval.stop=8", "eval.every=2", "train.steps=4", "optim.lr=3e-3"]
    options = [*learns, "train.ema_decay=0.5", "output.trackers=[tensorboard]"]
    EncoderTrainer(recipe("whole", *options)).train()
    reset_accelerator()
    with pytest.raises(KeyboardInterrupt, match=f"interrupted at step {step}"):
        CutOff(recipe("cut", *options), step, before).train()
    for _ in range(2):
        reset_accelerator()
        EncoderTrainer(recipe("cut", *options)).train()
        one, other = ([without_speed(row) for row in metrics(tmp_path / name)] for name in ("whole", "cut"))
        assert one == other
        assert_bitwise_equal(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
        best = [(tmp_path / name / "best" / "model.safetensors").read_bytes() for name in ("whole", "cut")]
        assert best[0] == best[1]
        assert (tmp_path / "cut" / "losses.png").exists()


def without_speed(row):
    return {name: value for name, value in row.items() if name != "samples_per_second"}


def test_a_resumed_run_knows_the_best_score_of_the_checkpoints_own_step(recipe, tmp_path, caplog):
    """Where best/ has its model, and the pairs are the same: a score of others may never be reached."""
    options = ["eval.every=2", "data.stop=8", "eval.start=0", "eval.stop=8", "train.steps=60", "optim.lr=3e-3"]
    best = run_until(recipe("run", *options, "output.save_every=40"), 40).state.best
    assert best > 0
    run = EncoderTrainer(recipe("run", *options)).prepare()
    run.start()
    assert run.state.best == best
    reset_accelerator()
    elsewhere = EncoderTrainer(recipe("other", *options)).prepare(str(tmp_path / "run"))
    elsewhere.start()
    assert elsewhere.state.best == -math.inf
    reset_accelerator()
    others = EncoderTrainer(recipe("run", *options, "eval.stop=6", "eval.every=3")).prepare()
    others.start()
    assert others.state.best == -math.inf
    assert f"eval.stop changed, so {tmp_path / 'run' / 'best'} is chosen anew" in caplog.text


def test_a_resumed_run_knows_how_many_processes_took_its_steps(recipe):
    """Where shards are remote, the loader needs it to read every sample once (tests/test_sampler.py)."""
    run = EncoderTrainer(recipe()).prepare("none")
    run.start()
    assert run.loader.batches.history == [(0, 1)]
    run.state.history, run.state.step = [(0, 4)], 2  # as four processes leave it
    save_checkpoint(run.accelerator, run.folder / trainer.CHECKPOINTS, 2, keep_last=1)
    reset_accelerator()
    again = EncoderTrainer(recipe()).prepare()
    again.start()
    assert again.loader.batches.history == again.state.history == [(0, 4), (2, 1)]


def test_a_damaged_last_checkpoint_costs_only_its_steps(recipe, tmp_path, caplog):
    EncoderTrainer(recipe("whole")).train()
    run_until(recipe("halves"), 5)
    checkpoints = list_checkpoints(tmp_path / "halves" / "checkpoints")
    assert [step for step, _ in checkpoints] == [2, 4, 5]
    os.truncate(checkpoints[2][1] / "optimizer.bin", 100)
    (checkpoints[1][1] / "model.safetensors").unlink()
    reset_accelerator()
    with caplog.at_level(logging.WARNING):
        EncoderTrainer(recipe("halves")).train()
    assert "step-00000005 is damaged: optimizer.bin has 100 bytes" in caplog.text
    assert "step-00000004 is damaged: model.safetensors is missing" in caplog.text
    assert_bitwise_equal(weights(tmp_path / "whole"), weights(tmp_path / "halves"))


def test_changes_and_conflicts_on_resume(recipe, tmp_path, caplog):
    run_until(recipe("run", "eval.source=null"), 2)
    with caplog.at_level(logging.WARNING):
        run_until(recipe("run", "optim.lr=5e-4", "eval.source=null"), 3)
    assert "Since step-00000002 was written: optim.lr was 0.001 and is 0.0005 now" in caplog.text
    rows = metrics(tmp_path / "run")  # and it counts: two steps of warm-up, then a cosine over six
    assert [row["lr"] for row in rows] == pytest.approx([5e-4, 1e-3, 5e-4])
    with pytest.raises(ValueError, match=r"--resume none: .* holds checkpoints \(step-00000002, step-00000003\)"):
        run_until(recipe("run"), 3, resume="none")
    with pytest.raises(ValueError, match=r"checkpoints newer than step-00000002 \(step-00000003\)"):
        run_until(recipe("run"), 3, resume=str(tmp_path / "run" / "checkpoints" / "step-00000002"))
    shapes = r"visual\.prompts is \(2, 2, 32\) there and \(2, 3, 32\) here"
    was = r"model\.num_prompts was 2 and is 3 now, .*; set it back, or start anew in another output\.folder"
    with pytest.raises(ValueError, match=f"does not fit this model: {shapes}; {was}"):
        EncoderTrainer(recipe("run", "eval.source=null", "model.num_prompts=3")).prepare()
    reset_accelerator()
    for change in ("train.ema_decay=0.9", "train.precision=fp16"):
        with pytest.raises(ValueError, match=f"{change.split('=')[0]} was .* when step-00000003 was written and is"):
            EncoderTrainer(recipe("run", "eval.source=null", change)).prepare()
        reset_accelerator()
    for key, value in {"optim.optimizer": "muon", "model.positions": "kept", "model.prompt_flow": "replace"}.items():
        with pytest.raises(ValueError, match=f"{key} was .* when step-.* was written and is '{value}' now, which"):
            run_until(recipe("run", f"{key}={value}"), 4)
    older = tmp_path / "run" / "checkpoints" / "step-00000002"
    with pytest.raises(ValueError, match=r"optim\.optimizer was 'adamw' when step-00000002 was written"):
        run_until(recipe("muon", "optim.optimizer=muon"), 4, resume=str(older))
    alone = shutil.copytree(older, tmp_path / "alone" / older.name)
    forget_recipe(alone)
    with pytest.raises(ValueError, match=r"step-00000002: written with another optim\.optimizer"):
        run_until(recipe("muon", "optim.optimizer=muon"), 4, resume=str(alone))
    for number, start in enumerate((older, alone)):
        elsewhere = run_until(recipe(f"other{number}"), 3, resume=str(start))
        assert elsewhere.state.step == 3
        assert metrics(tmp_path / f"other{number}")[0]["step"] == 3


def test_each_checkpoint_says_what_it_was_written_with(recipe, tmp_path):
    """Whatever the run did since; the run's own recipe stands in for one of version 0.1."""
    run_until(recipe("run"), 2)
    run_until(recipe("run", "optim.lr=5e-4"), 4)
    checkpoints = tmp_path / "run" / "checkpoints"
    found = []
    for name in ("step-00000002", "step-00000004"):
        reset_accelerator()
        found.append(EncoderTrainer(recipe("other", "optim.lr=1e-4")).prepare(str(checkpoints / name)).changes())
    assert found == [[("optim.lr", 1e-4, 1e-3)], [("optim.lr", 1e-4, 5e-4)]]
    forget_recipe(checkpoints / "step-00000002")
    reset_accelerator()
    other = EncoderTrainer(recipe("other", "optim.lr=1e-4")).prepare(str(checkpoints / "step-00000002"))
    assert other.changes() == [("optim.lr", 1e-4, 5e-4)]


def test_a_run_whose_steps_are_all_taken_says_so(recipe, tmp_path, caplog):
    EncoderTrainer(recipe("run", "train.steps=2")).train()
    caplog.clear()
    reset_accelerator()
    assert (
        "step 2 of 2 is taken, so none is left; raise"
        in EncoderTrainer(recipe("run", "train.steps=2")).prepare().plan()
    )
    reset_accelerator()
    with caplog.at_level(logging.WARNING):
        EncoderTrainer(recipe("run", "train.steps=2")).train(resume=str(tmp_path / "run"))
    assert "step 2 of 2 is taken, so none is left; raise train.steps or train.epochs for more" in caplog.text
    assert "warming up" not in caplog.text


def test_a_checkpoint_is_found_from_inside_its_folder_and_by_its_own_name_only(recipe, tmp_path, monkeypatch):
    run_until(recipe("run"), 2)
    checkpoints = tmp_path / "run" / "checkpoints"
    monkeypatch.chdir(checkpoints)
    reset_accelerator()
    run = EncoderTrainer(recipe("other", "optim.lr=5e-4")).prepare("step-00000002")
    assert run.changes() == [("optim.lr", 5e-4, 1e-3)]
    shutil.copytree(checkpoints / "step-00000002", tmp_path / "the best")
    with pytest.raises(ValueError, match=r"the best: the folder of a checkpoint is named step-XXXXXXXX"):
        run_until(recipe("third"), 3, resume=str(tmp_path / "the best"))


# -- processes -----------------------------------------------------------------------------------------------


def launch(*command):
    finished = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return finished


def test_accelerate_launch_survives_kill_9(recipe_file, tmp_path, caplog):
    """Killed soon after its first checkpoint, resumed, and equal to an uninterrupted run; then evaluated."""
    file = recipe_file("killed")
    overrides = ["output.save_every=1", "output.keep_last=12", "eval.source=null", "train.steps=12"]
    EncoderTrainer(load_recipe(EncoderRecipe, recipe_file("whole"), overrides)).train()

    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1"]
    command += ["--mixed_precision=no", "--dynamo_backend=no", "--cpu", "train_encoder.py", str(file), *overrides]
    process = subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    checkpoints = tmp_path / "killed" / "checkpoints"
    while not list_checkpoints(checkpoints):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    left = list_checkpoints(checkpoints)
    assert 1 <= left[-1][0] < 12
    assert [damage(path) for _, path in left] == [None] * len(left)
    assert len(metrics(tmp_path / "killed")) - left[-1][0] in (0, 1)  # no more is lost than the step in progress

    reset_accelerator()
    with caplog.at_level(logging.INFO):
        EncoderTrainer(load_recipe(EncoderRecipe, file, overrides)).train()
    assert f"Resumed step {left[-1][0]} from" in caplog.text
    assert_bitwise_equal(weights(tmp_path / "whole"), weights(tmp_path / "killed"))

    model = FixClip.from_pretrained(tmp_path / "killed" / "model")
    tokens = model.tokenizer()(["a red square", "a blue star"])
    images = torch.randn(2, 3, 32, 32)
    scores = retrieval_metrics(model.encode_image(images), model.encode_text(tokens), [0, 1], ks=(1, 2))
    assert scores["image_to_text_recall_at_2"] == 1.0


def test_two_processes(recipe, recipe_file, tmp_path):
    """With state alignment: interrupted and whole runs are bitwise equal; one process without GradCache agrees to
    rounding."""
    aligned = "train.weight_states=2"
    script = tmp_path / "two.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            from pathlib import Path
            from accelerate.state import AcceleratorState, GradientState
            from fixclip_core.training.encoder.trainer import EncoderTrainer
            from fixclip_core.training.encoder.recipe import EncoderRecipe
            from fixclip_core.training.recipe import load_recipe

            def run(file, until=None, *overrides):
                overrides = [*overrides, "train.micro_batch_size=3", "train.weight_states=2"]
                recipe = load_recipe(EncoderRecipe, file, overrides)
                run = EncoderTrainer(recipe).prepare()
                assert "2 process(es) x 4, 3 at a time" in run.plan()
                assert run.accelerator.num_processes == 2 and len(run.eval_loader) == 1
                run.start()
                run.total_steps = until or run.total_steps
                run.fit()
                if until is None:
                    run.save()
                AcceleratorState._reset_state()
                GradientState._reset_state()

            whole, workers, halves = map(Path, sys.argv[1:])
            run(whole)
            run(workers, 3, "data.workers=2")
            run(workers, None, "data.workers=2")
            run(halves, 3)
            """
        )
    )
    files = [recipe_file(name) for name in ("whole", "workers", "halves")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    launch(*torchrun, str(script), *map(str, files))
    shutil.copytree(tmp_path / "halves", tmp_path / "fewer")
    assert_bitwise_equal(weights(tmp_path / "whole"), weights(tmp_path / "workers"))
    finished = launch(*torchrun, "train_encoder.py", str(files[2]), "train.micro_batch_size=3", aligned)
    assert finished.stderr.count("Resumed step 3 from") == 1  # one process speaks for all
    assert finished.stdout.splitlines() == [f"Done: {tmp_path / 'halves' / 'model'}"]
    assert_bitwise_equal(weights(tmp_path / "whole"), weights(tmp_path / "halves"))
    assert len(metrics(tmp_path / "halves")) == STEPS + 2  # each line once, two of them evaluations

    EncoderTrainer(recipe("alone", aligned)).train()
    reset_accelerator()
    EncoderTrainer(recipe("fewer", aligned)).train()  # begun by two processes, finished by one
    assert metrics(tmp_path / "whole")[0]["loss_states"] > 0
    for name in ("alone", "fewer"):
        for one, two in zip(metrics(tmp_path / name), metrics(tmp_path / "whole"), strict=True):
            assert one.keys() == two.keys()
            same = {k: v for k, v in two.items() if k != "samples_per_second"}
            assert {k: one[k] for k in same} == pytest.approx(same, rel=1e-3, abs=1e-5), name


# -- the NaN guard -------------------------------------------------------------------------------------------


def test_a_poisoned_gradient_changes_nothing():
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    layer = torch.nn.Linear(3, 2)
    layer, optimizer = accelerator.prepare(layer, torch.optim.AdamW(layer.parameters(), lr=0.1))

    def step(value):
        accelerator.backward(layer(torch.full((1, 3), value)).sum())
        return optimizer_step(accelerator, layer, optimizer, 1.0)

    norm, applied = step(1.0)
    assert norm == pytest.approx(math.sqrt(8))
    assert applied
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    moments = [state["exp_avg"].clone() for state in optimizer.state.values()]
    for poison in (math.nan, math.inf):
        norm, applied = step(poison)
        assert not math.isfinite(norm)
        assert not applied
    assert_bitwise_equal(before, dict(layer.named_parameters()))
    assert all(torch.equal(a, s["exp_avg"]) for a, s in zip(moments, optimizer.state.values(), strict=True))
    assert step(1.0)[1]


def test_skipped_steps_are_counted_and_stop_the_run_when_in_a_row():
    state = TrainState()
    for applied in (True, False, False, True, False, False):
        count_step(state, applied, limit=3)
    assert (state.step, state.skipped, state.skipped_in_a_row) == (6, 4, 2)
    with pytest.raises(FloatingPointError, match="step 7: 3 steps in a row"):
        count_step(state, False, limit=3)


@pytest.mark.parametrize(
    ("save_every", "change"),
    [(1, "method=fixclip"), (100, "method=fixclip"), (1, "method=longclip"), (100, "train.weight_himo=1")],
)
def test_a_diverged_run_says_what_is_whole_and_saves_nothing_poisoned(recipe_file, tmp_path, save_every, change):
    options = [change, "optim.lr=1e30", "optim.lr_new=1e30", "train.steps=9", "eval.source=null", "output.keep_last=1"]
    result = command(recipe_file(), *options, f"output.save_every={save_every}")
    assert result.exit_code == 1
    error = result.stderr.splitlines()[-1]
    assert error.startswith("error: step ")
    assert "3 steps in a row without a finite gradient" in error
    assert "It would diverge again: lower optim.lr" in error
    rows = metrics(tmp_path / "run")
    assert rows[-1]["skipped_steps"] >= 2
    assert rows[-1]["grad_norm"] is None  # JSON has no NaN
    checkpoints = list_checkpoints(tmp_path / "run" / "checkpoints")
    if save_every == 1:
        ((step, path),) = checkpoints
        assert f"{path} is whole: the same command goes on from step {step}" in error
        assert damage(path) is None
        assert all(torch.isfinite(tensor).all() for tensor in load_file(path / "model.safetensors").values())
    else:
        assert not checkpoints
        assert f"There is no checkpoint in {tmp_path / 'run'} yet: the same command starts over" in error
    assert not (tmp_path / "run" / "model").exists()


def test_ctrl_c_says_how_to_go_on(recipe_file, tmp_path, monkeypatch):
    seed_step = trainer.seed_step

    def seed_or_interrupt(seed, step, rank):
        if step == 3:
            signal.raise_signal(signal.SIGINT)
        seed_step(seed, step, rank)

    monkeypatch.setattr(trainer, "seed_step", seed_or_interrupt)
    result = command(recipe_file(), "eval.source=null")
    assert result.exit_code == 130
    path = tmp_path / "run" / "checkpoints" / "step-00000002"
    expected = f"interrupted at step 3. {path} is whole: the same command goes on from step 2"
    assert result.stderr.splitlines()[-1] == expected


def test_a_full_disk_ends_in_one_line_and_costs_no_checkpoint(recipe_file, tmp_path):
    """Of the operating system's own errors; the run goes on once there is space."""
    options = ["eval.source=null", "output.save_every=1"]
    run_until(load_recipe(EncoderRecipe, recipe_file(), options), 2)
    reset_accelerator()
    with full_disk(1_000_000):
        result = command(recipe_file(), *options)
    assert result.exit_code == 1
    error = result.stderr.splitlines()[-1]
    assert error.startswith("error: step 3: ")
    assert "step-00000003 could not be written" in error
    assert "step-00000002 is whole: the same command goes on from step 2" in error
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {"step-00000001", "step-00000002"}
    reset_accelerator()
    EncoderTrainer(load_recipe(EncoderRecipe, recipe_file(), options)).train()
    assert (tmp_path / "run" / "model").exists()


def test_a_second_training_into_a_folder_is_refused(recipe_file, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LOCK_PATIENCE", 0.1)
    (tmp_path / "run").mkdir()
    lock = files.lock_folder(tmp_path / "run")
    result = command(recipe_file())
    lock.release()
    assert result.exit_code == 2
    assert f"output.folder: {tmp_path / 'run'}: process {os.getpid()} on " in result.stderr.splitlines()[-1]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_poisoned_weights_are_not_saved(recipe):
    run = EncoderTrainer(recipe()).prepare()
    with torch.no_grad():
        run.module.logit_scale.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="logit_scale is not finite"):
        run.save()
    assert not (run.folder / "model").exists()


# -- parts ---------------------------------------------------------------------------------------------------


def test_weights_are_fp32_whatever_the_base_was_saved_in(clip_folder, recipe, tmp_path):
    """Half-precision weights are what makes a scaler say "Attempting to unscale FP16 gradients"."""
    half = shutil.copytree(clip_folder, tmp_path / "half")
    file = half / "open_clip_model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file)
    run = EncoderTrainer(recipe("run", f"model.name=local-dir:{half}", "train.precision=bf16")).prepare()
    assert {p.dtype for p in run.module.parameters()} == {torch.float32}
    run.accelerator.backward(run.task.losses(run.model(next(batches(run.loader, 0, 1))))["loss"])
    assert {p.grad.dtype for p in run.module.parameters()} == {torch.float32}


def test_methods_are_one_switch(recipe, tmp_path):
    expected = {
        "fixclip": {"loss", "loss_long", "loss_short", "loss_mid_1", "loss_mid_2"},
        "longclip": {"loss", "loss_long", "loss_short"},
        "finetune": {"loss", "loss_long"},
    }
    for method, names in expected.items():
        reset_accelerator()
        folder = EncoderTrainer(recipe(method, f"method={method}", "train.steps=1", "eval.source=null")).train()
        row = metrics(tmp_path / method)[0]
        assert {key for key in row if key.startswith("loss")} == names
        config = FixClip.from_pretrained(folder).config
        assert (config.num_prompts, config.num_groups) == ((2, 2) if method == "fixclip" else (0, 0))
        assert config.context_length == 248


def test_the_recipe_says_in_how_many_pieces_texts_are_read(recipe):
    assert train.build_clip(recipe("run", "train.text_pieces=3")).text.pieces == 3


def test_every_module_can_be_switched_off(recipe):
    off = ["model.num_prompts=0", "model.num_groups=0", "model.masking=none"]
    fields = train.model_fields(recipe("run", *off, "model.prompt_flow=replace"))
    assert (fields["num_prompts"], fields["num_groups"], fields["masking"]) == (0, 0, "none")
    assert fields["prompt_flow"] == "replace"


def test_the_recipe_reaches_every_setting_of_model_and_data(recipe):
    fields = set(train.data_config(recipe(), 8).model_fields_set)
    assert fields == DataConfig.model_fields.keys() - {"shuffle", "last_batch"}
    assert train.model_fields(recipe()).keys() == {f.name for f in dataclasses.fields(FixClipConfig)} - {
        *("clip", "preprocess", "context_length"),
    }


def test_a_share_of_the_data_is_held_out(recipe):
    """Its first samples; what that means is written down with the run."""
    run = EncoderTrainer(recipe("run", "eval={held_out: 0.2, every: 3, batch_size: 4}", "data.start=5")).prepare()
    held_out, trained = (loader.config for loader in (run.eval_loader, run.loader))
    assert (held_out.start, held_out.stop, held_out.source) == (5, 8, "scenes")
    assert (trained.start, trained.stop) == (8, 20)
    assert (run.recipe.eval.stop, run.recipe.eval.held_out, run.recipe.data.start) == (8, None, 8)
    with pytest.raises(ValueError, match=r"eval\.held_out=0\.5: it is a share of the data; set eval\.source=null"):
        recipe("run", "eval.held_out=0.5")
    with pytest.raises(
        ValueError, match=r"eval\.held_out=0\.99: it leaves none of 20 samples to train on; give a smal"
    ):
        EncoderTrainer(recipe("run", "eval={held_out: 0.99, every: 3, batch_size: 4}")).prepare()


def test_off_in_a_recipe_is_a_word(recipe):
    assert recipe("run", "model.short_branch=off").model.short_branch == "off"


def test_long_clip_keeps_as_many_components_as_the_recipe_says(recipe):
    assert train.build_clip(recipe("run", "method=longclip", "model.pca_rank=5")).config.pca_rank == 5


def test_modules_that_do_not_fit_the_base_are_named_as_in_a_recipe(recipe):
    for key, value in (("keep", 300), ("lora_rank", 100_000)):
        with pytest.raises(ValueError, match=rf"^model\.{key}={value}: "):
            train.build_clip(recipe("run", f"model.{key}={value}"))


def test_tokens_of_a_caption_end_with_its_end_whatever_pads_it():
    assert train.mean_length(torch.tensor([[7, 1, 9, 9], [7, 9, 0, 0]])) == 2.5


def test_the_precision_that_auto_means_is_written_down(recipe, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        run = run_until(recipe("run", "train.precision=auto", "eval.source=null"), 1)
    expected = "bf16" if supports_bf16(torch.device("cpu")) else "fp32"
    assert run.accelerator.mixed_precision == {"bf16": "bf16", "fp32": "no"}[expected]
    assert load_recipe(EncoderRecipe, tmp_path / "run" / "recipe.yaml").train.precision == expected
    assert f"train.precision=auto: {expected} on cpu" in caplog.text


def test_groups_have_their_learning_rates_and_no_decay_where_none_belongs(recipe):
    clip = train.build_clip(recipe())
    optim = OptimSection(lr=1.0, lr_new=2.0, weight_decay=3.0)
    run = EncoderTrainer(recipe())
    run.module = clip
    groups = parameter_groups(clip, run.is_new, run.no_decay, optim)
    found = {}
    for group in groups:
        for parameter in group["params"]:
            name = next(name for name, p in clip.named_parameters() if p is parameter)
            found[name] = (group["lr"], group["weight_decay"])
    assert found.keys() == {name for name, _ in clip.named_parameters()}
    expected = {
        "visual.prompts": (2.0, 0.0),
        "visual.mask_embedding": (2.0, 0.0),
        "image_groups.0.0.weight": (2.0, 3.0),
        "image_groups.0.1.weight": (2.0, 0.0),
        "text.token_embedding.weight": (1.0, 3.0),
        "text.stretched_positions": (1.0, 0.0),
        "text.ln_final.weight": (1.0, 0.0),
        "logit_scale": (1.0, 0.0),
        "visual.positional_embedding": (1.0, 0.0),
        "visual.class_embedding": (1.0, 0.0),
    }
    assert {name: found[name] for name in expected} == expected


def test_muon_moves_the_matrices_alone(recipe):
    """Not embeddings, positions, prompts, convolutions, biases or norms; what is new keeps its own learning rate."""
    run = EncoderTrainer(recipe())
    run.module = train.build_clip(recipe())
    optim = OptimSection(optimizer="muon", lr=1.0, lr_new=2.0)
    groups = parameter_groups(run.module, run.is_new, run.no_decay, optim)
    names = {id(parameter): name for name, parameter in run.module.named_parameters()}
    moved = {names[id(p)]: group["lr"] for group in groups if group["muon"] for p in group["params"]}
    assert sorted(names.values()) == sorted(names[id(p)] for group in groups for p in group["params"])
    assert moved["image_groups.0.0.weight"] == 2.0
    assert moved["text.transformer.resblocks.0.mlp.c_fc.weight"] == 1.0
    assert {name for name in moved if "transformer" not in name and "groups" not in name} == {
        "text.text_projection",
        "visual.proj",
    }
    unmoved = {
        "text.token_embedding.weight",
        "text.stretched_positions",
        "visual.positional_embedding",
        "visual.prompts",
        "visual.conv1.weight",
        "text.ln_final.weight",
        "logit_scale",
    }
    assert unmoved <= set(names.values()) - set(moved)
    assert all(not group["muon"] for group in parameter_groups(run.module, run.is_new, run.no_decay, OptimSection()))


def small_network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(24, 48), torch.nn.GELU(), torch.nn.Linear(48, 8))


def fit(network, *optimizers, steps=12):
    """Weights after some steps of a regression, which leave the gradients where they are."""
    torch.manual_seed(1)
    inputs, wanted = torch.randn(64, 24), torch.randn(64, 8)
    for _ in range(steps):
        network.zero_grad()
        (network(inputs) - wanted).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    assert all(parameter.grad is not None for parameter in network.parameters())
    return [parameter.detach() for parameter in network.parameters()]


def test_muon_is_torchs_beside_torchs_adamw():
    """Torch's computes in bfloat16 on any device, ours only where a device multiplies in it."""
    ours, theirs = small_network(), small_network()
    groups = [
        {"params": [p for p in ours.parameters() if (p.ndim == 2) == muon], "muon": muon} for muon in (True, False)
    ]
    found = fit(ours, Muon(groups, lr=0.01, weight_decay=0.1))
    matrices, others = ([p for p in theirs.parameters() if (p.ndim == 2) == muon] for muon in (True, False))
    muon = torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    expected = fit(theirs, muon, torch.optim.AdamW(others, lr=0.01, weight_decay=0.1))
    exact = supports_bf16(torch.device("cpu"))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0 if exact else 5e-3)


@pytest.mark.parametrize("sharding", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_what_needs_whole_weights_is_refused_where_they_are_sharded(sharding, monkeypatch):
    reset_accelerator()
    accelerator, network = Accelerator(), small_network()
    monkeypatch.setattr(accelerator.state, "distributed_type", sharding)  # as a launch with FSDP or DeepSpeed leaves it
    with pytest.raises(ValueError, match=f"optim.optimizer=muon: with {sharding.value} it must be adamw"):
        make_optimizer(accelerator, [{"params": list(network.parameters())}], OptimSection(optimizer="muon"))
    with pytest.raises(ValueError, match=rf"train.ema_decay=0.5: with {sharding.value} it must be null"):
        make_ema(accelerator, network, 0.5)
    make_optimizer(accelerator, [{"params": list(network.parameters())}], OptimSection())


def test_sharding_of_version_1_is_refused(recipe, monkeypatch):
    accelerator = Accelerator()
    for state in (accelerator.state, PartialState()):  # as a launch with FSDP leaves them
        monkeypatch.setattr(state, "distributed_type", DistributedType.FSDP)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=1)
    monkeypatch.setattr(accelerator.state, "fsdp_plugin", plugin, raising=False)
    with pytest.raises(ValueError, match=r"FSDP of version 1.* set fsdp_version: 2 in Accelerate's config"):
        EncoderTrainer(recipe())
    plugin.fsdp_version = 2
    EncoderTrainer(recipe())


def test_a_gpu_has_the_fused_optimizer_though_the_model_still_lies_on_the_cpu(monkeypatch):
    accelerator, network = Accelerator(), small_network()
    groups = [{"params": list(network.parameters())}]
    assert not make_optimizer(accelerator, groups, OptimSection()).defaults["fused"]
    monkeypatch.setattr(accelerator.state, "device", torch.device("cuda"))
    assert make_optimizer(accelerator, groups, OptimSection()).defaults["fused"]


def test_processes_wait_for_hours(recipe_file, tmp_path):
    """Whoever connects them first."""
    script = tmp_path / "wait.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            import torch
            from torch.distributed.distributed_c10d import _get_default_group
            from fixclip_core.training.encoder.recipe import EncoderRecipe
            from fixclip_core.training.encoder.trainer import EncoderTrainer
            from fixclip_core.training.recipe import load_recipe

            recipe = load_recipe(EncoderRecipe, sys.argv[1], [f"train.precision={sys.argv[2]}"])
            EncoderTrainer(recipe)
            assert _get_default_group()._get_backend(torch.device("cpu")).options._timeout.total_seconds() == 24 * 3600
            """
        )
    )
    for precision in ("fp32", "auto"):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
        launch(*torchrun, str(script), str(recipe_file()), precision)


def test_muon_moves_every_direction_of_a_matrix_equally_far():
    """A first step against the product of the singular vectors of the gradient, whose singular values differ much."""
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(6, 9), full_matrices=False)
    matrix = torch.nn.Parameter(torch.zeros(6, 9))
    matrix.grad = left @ torch.diag(torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2, 0.1])) @ right
    Muon([{"params": [matrix], "muon": True}], lr=0.5, weight_decay=0.0).step()
    moved = left.T @ matrix.detach() @ right.T / (-0.5 * 0.2 * 9**0.5)
    lengths = moved.diagonal()
    torch.testing.assert_close(moved, torch.diag(lengths), rtol=0, atol=0.02)
    assert lengths.min() > 0.6
    assert lengths.max() < 1.25


def test_schedule():
    cosine = [lr_factor(step, warmup=4, total=12, schedule="cosine") for step in range(13)]
    assert cosine[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert cosine[8] == pytest.approx(0.5)
    assert cosine[12] == pytest.approx(0.0)
    assert cosine[4:] == sorted(cosine[4:], reverse=True)
    assert lr_factor(10**6, warmup=0, total=1, schedule="constant") == 1.0
    assert lr_factor(5, warmup=5, total=5, schedule="cosine") == 1.0


def test_evaluation_counts_each_pair_once(recipe):
    """6 pairs in batches of 4: the last batch wraps around, and its two extra pairs must not become ties."""
    run = EncoderTrainer(recipe()).prepare()
    found = run.retrieval(run.eval_loader)
    pairs = list(run.eval_loader.epoch(0))
    assert [len(batch) for batch in pairs] == [4, 4]
    with torch.no_grad():
        image = torch.cat([run.module.encode_image(batch.image) for batch in pairs])[:6]
        text = torch.cat([run.module.encode_text(batch.long_ids) for batch in pairs])[:6]
    expected = retrieval_metrics(image, text, range(6))
    assert {k: v for k, v in found.items() if k.startswith("long")} == {f"long_{k}": v for k, v in expected.items()}
    assert run.module.training


def captions_of_few_pictures(folder, names, bad=()):
    """A manifest of rows with these pictures, in this order, each row with a caption of its own."""
    folder.mkdir()
    for number, name in enumerate(sorted(set(names))):
        file = folder / f"{name}.png"
        Image.fromarray(scenes.render(scenes.scene_at(0, number)).permute(1, 2, 0).numpy()).save(file)
        if name in bad:
            file.write_bytes(b"no picture")
    rows = [
        {
            "image": f"{name}.png",
            "long": scenes.long_caption(scenes.scene_at(0, ord(name)), row).text,
            "short": f"{row}.",
        }
        for row, name in enumerate(names)
    ]
    manifest = folder / "captions.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest


def without_prefix(values, prefix):
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


# Of a, b, c, d and one that cannot be read: each picture in several rows, in no order; a copy is the same picture.
SEVERAL = "abcdxaabdcbxac"


def test_an_evaluation_during_training_has_the_figures_of_the_report(recipe, recipe_file, tmp_path):
    """Pictures have several captions, of which one process sees some; batches wrap around; one cannot be read."""
    data = captions_of_few_pictures(tmp_path / "data", SEVERAL, bad="x")
    shutil.copy(tmp_path / "data" / "a.png", tmp_path / "data" / "e.png")
    with data.open("a") as file:
        file.write(json.dumps({"image": "e.png", "long": "A copy, and what it shows.", "short": "copy."}) + "\n")
    options = [f"eval.source={data}", "eval.start=0", "eval.stop=null", "eval.short_caption=given", "train.steps=2"]
    options += ["eval.batch_size=4"]
    EncoderTrainer(recipe("run", *options)).train()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    launch(*torchrun, "train_encoder.py", str(recipe_file("two")), *options, "eval.batch_size=3")
    for name in ("run", "two"):
        found = metrics(tmp_path / name)[-1]
        encoder = load_encoder(str(tmp_path / name / "model"))
        for caption in ("long", "short"):
            items = SourceItems(open_source(DataConfig(source=str(data), batch_size=1)), encoder.preprocess, caption)
            report = retrieval_report(encoder, items, "data", "")
            assert report["data"]["images"] == 4
            assert report["data"]["texts"] == 13
            assert without_prefix(found, f"{caption}_") == report["metrics"]
    assert max(value for name, value in found.items() if "recall_at_1" in name) > 0


@pytest.mark.parametrize(("names", "middle"), [("abcde", 2), ("abbbcde", 4), ("aabbcc", 2), ("aaaa", 2), ("axxbc", 2)])
def test_successive_samples_of_one_picture_are_held_out_together(recipe, tmp_path, names, middle):
    """Of all samples the first two, and those with the second one's picture, where it can be read."""
    data = captions_of_few_pictures(tmp_path / "data", names)
    (tmp_path / "data" / "x.png").unlink(missing_ok=True)
    held = f"eval={{held_out: {2 / len(names)}, every: 3, batch_size: 4}}"
    found = train.hold_out(recipe("run", held, f"data.source={data}", "data.stop=null"))
    assert (found.eval.stop, found.data.start) == (middle, middle)


def test_memory_estimate_extrapolates_what_a_whole_pass_keeps(recipe):
    run = EncoderTrainer(recipe()).prepare()
    batch = next(batches(run.loader, 0, 1))
    state, activations = run.memory_of(run.batch_size, probe=4).values()
    measured = activation_bytes(lambda: run.task.losses(run.model(batch)), run.module)
    assert activations == pytest.approx(measured, rel=0.25)  # captions differ in length
    assert state == pytest.approx(16 * sum(p.numel() for p in run.module.parameters()), rel=0.01)
    reset_accelerator()
    frugal = EncoderTrainer(recipe("run", "train.gradient_checkpointing=true")).prepare()
    assert (
        list(frugal.memory_of(frugal.batch_size, probe=4).values())[1] < 0.9 * activations
    )  # half is the layer being recomputed


def test_activation_bytes_of_a_known_graph():
    layer = torch.nn.Linear(3, 5, bias=False)
    x = torch.randn(7, 3, requires_grad=True)
    assert activation_bytes(lambda: layer(x).exp(), layer) == 4 * (7 * 3 + 7 * 5)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("output.folder=/proc/fixclip", "cannot be written to"),
        ("output.keep_last=100000000", "too little disk space"),
        ("model.name=ViT-X", "ViT-X"),
        ("data.source=missing.jsonl", "missing.jsonl"),
        ("train.batch_size=64", "20 samples do not fill one batch of 64"),
        ("model.num_groups=3", "do not split into equal groups"),
        ("output.trackers=[wandb]", "wandb cannot be imported"),
        ("train.ema_decay=0.5", None),
    ],
)
def test_what_cannot_work_fails_before_the_first_step(recipe, override, message):
    chosen = recipe("run", override, "model.first_group=1")
    if message is None:
        assert EncoderTrainer(chosen).prepare().ema is not None
        return
    with pytest.raises(ValueError, match=message):
        EncoderTrainer(chosen).prepare()


def test_loss_curves_are_drawn(tmp_path):
    rows = [{"step": s, "loss": 1 / (s + 1), "loss_long": 0.5} for s in range(3)] + [{"step": 2, "x_recall_at_1": 0.1}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot_losses(tmp_path / "metrics.jsonl", tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


# -- the command ---------------------------------------------------------------------------------------------


def command(*arguments):
    return command_line.run("train", "encoder", *arguments)


def test_dry_run_prints_the_plan_and_trains_nothing(recipe_file, tmp_path):
    result = command(recipe_file(), "--dry-run", "method=longclip")
    assert result.exit_code == 0, result.output
    for expected in ("longclip: 0 prompts", "20 samples, 2 batches an epoch", "8 = 1 process(es) x 8", "GiB"):
        assert expected in result.output
    assert "8 of at most" not in result.output
    assert "tokens a long caption in the first batch" in result.output
    assert "state alignment  off" in result.output
    assert not (tmp_path / "run").exists()


def test_what_is_wrong_with_the_data_is_said_before_models_are_loaded(recipe_file, tmp_path):
    manifest, new = tmp_path / "captions.jsonl", tmp_path / "new"
    manifest.write_text('{"image": "a.png", "long": "A cat."}\n' * 20)
    data = (f"data.source={manifest}", "data.start=20", "data.stop=null", "model.name=no/such/model")
    error = command_line.error_of(command(recipe_file(), *data, "--dry-run", f"output.folder={new / 'run'}"))
    assert "start=20: " in error
    assert "has only 20 samples; start=0 begins with the first (in a recipe: data.start or eval.start)" in error
    assert not new.exists()
    missing = command_line.error_of(command("nowhere.yaml"))
    assert missing.startswith(
        "nowhere.yaml: there is no such recipe; in the package are builtin:own_data, builtin:vit_"
    )


def test_smoke_trains_two_steps_and_leaves_nothing(recipe_file, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        result = command(recipe_file(), "--smoke", "optim.warmup_steps=100")
    assert result.exit_code == 0, result.output
    assert "warming up" not in caplog.text
    assert "Smoke test passed" in result.output
    assert not (tmp_path / "run").exists()


def test_traceback_shows_where_an_error_arose(recipe_file):
    result = command(recipe_file(), "data.source=missing.jsonl", "--traceback")
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: command line: data.source: missing.jsonl: ")


def test_one_s_own_data_needs_no_override_but_its_source(tmp_path, clip_folder, monkeypatch):
    result = command("builtin:own_data")
    assert result.exit_code == 2
    assert ": data.source: the recipe leaves it to you: data.source=..." in result.stderr
    wrong = command("builtin:own_data", "optim.learning_rate=1", "train.batch_size=-1").stderr.splitlines()
    words = ("did you mean optim.lr?", "train.batch_size=-1", "leaves it to you")  # what is misspelt comes first
    assert all(word in line and line.startswith("error: ") for word, line in zip(words, wrong, strict=True))
    monkeypatch.chdir(tmp_path)
    base = [f"model.name={clip_folder}", "model.pretrained=null", "model.num_groups=2", "model.first_group=1"]
    result = command("builtin:own_data", "data.source=scenes", "data.stop=300", *base, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "294 samples, 1 batches an epoch" in result.stdout
    reset_accelerator()
    smoke = command("builtin:own_data", *base, "--smoke")
    assert smoke.exit_code == 0, smoke.output
    assert "Smoke test passed" in smoke.stdout
    reset_accelerator()
    error = command_line.error_of(command("builtin:own_data", "--smoke", "model.name=local-dir:nowhere"))
    assert error.startswith("command line: model.name: ")
    assert "nowhere" in error
    listed = command_line.run("train", "--list")
    assert {line.split()[0] for line in listed.stdout.splitlines()} == {"encoder", "adapter"}
    assert "encoder  builtin:own_data" in listed.stdout
    assert "adapter  builtin:own_data_xl" in listed.stdout
    other = command_line.error_of(command("builtin:stable_diffusion_xl", "--dry-run"))
    assert other == "builtin:stable_diffusion_xl is a recipe of fixclip train adapter"


def test_wrong_recipes_end_with_one_message(recipe_file):
    result = command(recipe_file(), "train.lr=1e-5")
    assert result.exit_code == 2
    assert "error: command line: train.lr: unknown key; did you mean optim.lr?" in str(result.output)


@pytest.mark.parametrize("late", [0, 1])
def test_processes_that_fail_alike_print_one_error(recipe_file, late):
    """As a launcher starts them; one of them comes much later, as on a loaded machine, and finds it said."""
    code = "from fixclip_cli.main import main; main()"
    command = [sys.executable, "-c", code, "train", "encoder", recipe_file(), "optim.learning_rate=1"]
    launch = {**os.environ, "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": f"{recipe_file()}-{late}"}
    printed = []
    for rank in (1 - late, late):  # one after the other
        done = subprocess.run(
            [str(word) for word in command], env={**launch, "RANK": str(rank)}, capture_output=True, text=True
        )
        assert done.returncode == 2
        printed += [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    (line,) = printed
    assert "optim.learning_rate: unknown key; did you mean optim.lr?" in line
