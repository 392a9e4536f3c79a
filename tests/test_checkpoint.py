"""Checkpoints: whole or not there, and a damaged one is passed over."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from accelerate import Accelerator

from fixclip_core.training.checkpoint import (
    MANIFEST,
    damage,
    find_resume,
    latest_valid,
    list_checkpoints,
    load_checkpoint,
    misfit,
    remove_unfinished,
    save_checkpoint,
    training_state_bytes,
)
from fixclip_core.training.trainer import RECIPE, TrainState


@pytest.fixture
def run():
    """A prepared model and optimizer after one step, and a registered state."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(4, 3)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    state = TrainState(step=1)
    accelerator.register_for_checkpointing(state)
    take_step(accelerator, model, optimizer)
    yield accelerator, model, optimizer, state
    accelerator.free_memory()


def forget_recipe(checkpoint):
    """As version 0.1 wrote it, whose recipe lay beside it alone."""
    (checkpoint / RECIPE).unlink()
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    del manifest[RECIPE]
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


def take_step(accelerator, model, optimizer):
    accelerator.backward(model(torch.ones(2, 4)).square().sum())
    optimizer.step()
    optimizer.zero_grad()


def test_round_trip_restores_weights_moments_and_state(run, tmp_path):
    accelerator, model, optimizer, state = run
    path = save_checkpoint(accelerator, tmp_path, 1, keep_last=2)
    weight = model.weight.detach().clone()
    take_step(accelerator, model, optimizer)
    after = model.weight.detach().clone()
    state.step = 99
    load_checkpoint(accelerator, path)
    assert torch.equal(model.weight, weight)
    assert state.step == 1
    take_step(accelerator, model, optimizer)
    assert torch.equal(model.weight, after)  # AdamW's moments came back too


def test_keeps_the_last_ones(run, tmp_path):
    accelerator = run[0]
    for step in (1, 2, 10, 9):
        save_checkpoint(accelerator, tmp_path, step, keep_last=2)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [9, 10]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000009", "step-00000010"]
    with pytest.raises(ValueError, match="keep_last=0"):
        save_checkpoint(accelerator, tmp_path, 11, keep_last=0)


def flip_byte(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "optimizer.bin is missing": lambda path: (path / "optimizer.bin").unlink(),
    "model.safetensors has 3 bytes": lambda path: os.truncate(path / "model.safetensors", 3),
    "model.safetensors has changed": lambda path: flip_byte(path / "model.safetensors"),
    f"{MANIFEST} cannot be read": lambda path: (path / MANIFEST).write_text("{"),
    "No such file": lambda path: (path / MANIFEST).unlink(),
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_named(run, tmp_path, caplog, reason):
    accelerator = run[0]
    first = save_checkpoint(accelerator, tmp_path, 1, keep_last=3)
    second = save_checkpoint(accelerator, tmp_path, 2, keep_last=3)
    assert latest_valid(tmp_path) == second
    DAMAGES[reason](second)
    assert reason in damage(second)
    with caplog.at_level(logging.WARNING):
        assert find_resume(accelerator, "auto", tmp_path) == first
    assert "step-00000002" in caplog.text
    assert reason in caplog.text
    with pytest.raises(ValueError, match=r"step-00000002"):
        find_resume(accelerator, str(second), tmp_path)

    # The resumed run reaches step 2 again and replaces the damaged folder.
    save_checkpoint(accelerator, tmp_path, 2, keep_last=3)
    assert latest_valid(tmp_path) == second

    DAMAGES[reason](first)
    DAMAGES[reason](second)
    with pytest.raises(ValueError, match="every checkpoint is damaged"):
        find_resume(accelerator, "auto", tmp_path)
    assert find_resume(accelerator, "none", tmp_path) is None


def test_resume_paths(run, tmp_path):
    accelerator = run[0]
    assert find_resume(accelerator, "auto", tmp_path / "nowhere") is None
    with pytest.raises(ValueError, match="no checkpoint there"):
        find_resume(accelerator, str(tmp_path), tmp_path)
    path = save_checkpoint(accelerator, tmp_path, 5, keep_last=1)
    assert find_resume(accelerator, str(path), tmp_path / "elsewhere") == path
    assert find_resume(accelerator, str(tmp_path), tmp_path / "elsewhere") == path
    run_folder = tmp_path / "run"
    inside = save_checkpoint(accelerator, run_folder / "checkpoints", 7, keep_last=1)
    assert find_resume(accelerator, str(run_folder), tmp_path / "elsewhere") == inside
    with pytest.raises(
        ValueError, match=r"no checkpoint there, but step-00000005; pass auto, none, the folder of a run"
    ):
        find_resume(accelerator, str(tmp_path / "step-00000003"), tmp_path)


def test_what_lies_in_a_checkpoint_beside_its_state_is_whole_with_it(run, tmp_path):
    path = save_checkpoint(run[0], tmp_path, 1, keep_last=1, files={"recipe.yaml": b"seed: 3"})
    assert (path / "recipe.yaml").read_bytes() == b"seed: 3"
    (path / "recipe.yaml").write_bytes(b"seed: 4")
    assert damage(path) == "recipe.yaml has changed since it was written"


def test_weights_that_do_not_fit_are_named_before_they_are_loaded(run, tmp_path):
    path = save_checkpoint(run[0], tmp_path, 1, keep_last=1)
    assert misfit(path, torch.nn.Linear(4, 3)) is None
    assert misfit(path, torch.nn.Linear(4, 5)) == "weight is (3, 4) there and (5, 4) here, and 1 more"
    assert misfit(path, torch.nn.Linear(4, 3, bias=False)) == "there is a bias, and none here"
    tied = torch.nn.Linear(4, 3)
    tied.register_parameter("twin", tied.weight)  # a file holds one of the two
    assert misfit(path, tied) is None
    tied.register_parameter("other", torch.nn.Parameter(torch.zeros(2)))
    assert misfit(path, tied) == "there is no other"


def test_a_checkpoint_of_another_model_is_refused(run, tmp_path):
    accelerator, _, _, _ = run
    path = save_checkpoint(accelerator, tmp_path, 1, keep_last=1)
    accelerator.free_memory()
    other = torch.nn.Linear(5, 3)
    accelerator.prepare(other, torch.optim.AdamW(other.parameters()))
    with pytest.raises(ValueError, match="does not fit this model"):
        load_checkpoint(accelerator, path)


def test_kill_9_while_saving_leaves_only_whole_checkpoints(tmp_path):
    """A process that does nothing but save is killed at several moments of a save."""
    code = """
        import sys, torch
        from pathlib import Path
        from accelerate import Accelerator
        from fixclip_core.training.checkpoint import save_checkpoint
        accelerator = Accelerator(cpu=True)
        accelerator.prepare(torch.nn.Linear(700, 700))
        print("ready", flush=True)
        for step in range(10**6):
            save_checkpoint(accelerator, Path(sys.argv[1]), step, keep_last=2)
            print(step, flush=True)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    copies = []
    while len(copies) < 12:  # each copy is what a kill -9 at that moment would have left behind
        if int(process.stdout.readline().replace("ready", "-1")) < 2:
            continue
        time.sleep(0.003 * len(copies))
        process.send_signal(signal.SIGSTOP)
        copy = tmp_path.with_name(f"{tmp_path.name}-{len(copies)}")
        shutil.copytree(tmp_path, copy)
        copies.append(copy)
        process.send_signal(signal.SIGCONT)
    process.kill()
    process.wait()
    for copy in [tmp_path, *copies]:
        remove_unfinished(copy)
        checkpoints = list_checkpoints(copy)
        assert checkpoints
        assert [damage(path) for _, path in checkpoints] == [None] * len(checkpoints)
        assert sorted(path.name for path in copy.iterdir()) == [path.name for _, path in checkpoints]


def test_estimate_matches_what_is_written(run, tmp_path):
    accelerator = run[0]
    accelerator.free_memory()
    model = torch.nn.Linear(500, 500)
    model.bias.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained))
    accelerator.backward(model(torch.ones(1, 500)).sum())
    optimizer.step()
    path = save_checkpoint(accelerator, tmp_path, 1, keep_last=1)
    written = sum(file.stat().st_size for file in path.iterdir())
    assert training_state_bytes(model) == pytest.approx(written, rel=0.02)
