"""The rivals' steps that benchmarks/train_step.py measures do what open_clip does."""

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from tiny_clips import VOCAB_SIZE, tiny_clip

from fixclip_core.model.config import FINE_TUNE, LONG_CLIP
from fixclip_core.model.fixclip import FixClip

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import train_step

SETTING = train_step.Setting("ViT-B-32", 8, 1, 0, "fp32", "cpu", 1, 4)


def test_trimmed_texts_have_the_features_of_padded_ones():
    """Values and gradients, for texts whose longest is no multiple of 8."""
    model = tiny_clip(context_length=77)
    ids_BT = torch.zeros(3, 77, dtype=torch.long)
    for row, length in enumerate((5, 11, 3)):
        ids_BT[row, :length] = torch.arange(length) + 1
        ids_BT[row, length - 1] = VOCAB_SIZE - 1
    lengths = []
    model.transformer.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    found = []
    for encode in (train_step.encode_trimmed, lambda m, ids: m.encode_text(ids, normalize=True)):
        model.zero_grad()
        feature_BE = encode(model, ids_BT)
        (feature_BE**3).sum().backward()
        found.append((feature_BE.detach(), model.positional_embedding.grad.clone()))
    assert lengths == [16, 77]
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_buckets_hold_captions_of_like_lengths():
    """A pool's batches are hardly padded, and their captions as long on average as those of a mixed batch."""
    batches = train_step.bucketed_batches(SETTING, 8)
    lengths = [(batch.long_ids.argmax(-1) + 1).tolist() for batch in batches]
    assert [round(sum(own) / 8) for own in lengths] == [74, 107, 133, 166]  # the pool's 1/8, 3/8, 5/8 and 7/8
    assert all(max(own) - min(own) <= 1 for own in lengths)
    mixed = train_step.random_batch(replace(SETTING, batch_size=32), 8).long_ids.argmax(-1) + 1
    assert sum(map(sum, lengths)) / 32 == pytest.approx(float(mixed.float().mean()), abs=1)
    short = [sorted(batch.short_ids.argmax(-1).tolist()) for batch in batches]
    assert short == [sorted(train_step.random_batch(SETTING, 8).short_ids.argmax(-1).tolist())] * 4


TINY = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "layers": 4, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": train_step.EOS + 1, "width": 16, "heads": 2, "layers": 4},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model that open_clip knows by its name, and its setting."""
    path = tmp_path_factory.mktemp("models") / "tiny-step.json"
    path.write_text(json.dumps(TINY))
    open_clip.add_model_config(path)
    return replace(SETTING, model="tiny-step", batch_size=4)


def step_of(variant, setting):
    """What a variant trains, after one step."""
    torch.manual_seed(0)
    trained, step = train_step.VARIANTS[variant][1](setting)
    trained = list(trained)
    step()
    return trained


@pytest.mark.parametrize("variant", train_step.VARIANTS)
def test_every_variant_takes_a_step(variant, tiny, monkeypatch):
    monkeypatch.setattr(train_step, "LOSS_ROWS", 1024)
    gradients = [parameter.grad for parameter in step_of(variant, tiny) if parameter.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert sum(float(gradient.abs().sum()) for gradient in gradients) > 0


@pytest.mark.parametrize(
    ("own", "rivals", "fields"),
    [
        ("our_fine_tune", ("fine_tune", "fine_tune_bucketed"), FINE_TUNE),
        ("our_long_clip", ("long_clip", "long_clip_bucketed"), {**LONG_CLIP, "pca_rank": 2}),
    ],
)
def test_rivals_steps_have_the_gradients_of_ours(own, rivals, fields, tiny, monkeypatch):
    """With the same weights at 248 positions and the same captions, so that equal work is compared."""
    config = {**TINY, "text_cfg": {**TINY["text_cfg"], "context_length": train_step.CONTEXT_LENGTH}}
    torch.manual_seed(0)
    clip = open_clip.CLIP(**config)
    model = FixClip.from_clip(copy.deepcopy(clip), config, {"size": 32}, ratio=1, **fields)
    batch = train_step.random_batch(tiny, 32)
    monkeypatch.setattr(train_step, "PCA_RANK", 2)
    monkeypatch.setattr(train_step, "fix_clip", lambda setting, **_: (model, batch))
    monkeypatch.setattr(train_step, "open_clip_at_248", lambda setting: (clip, batch))
    monkeypatch.setattr(train_step, "bucketed_batches", lambda *_: [batch])
    step_of(own, tiny)
    wanted = [model.visual.conv1.weight.grad, model.text.token_embedding.weight.grad, model.logit_scale.grad]
    for rival in rivals:
        clip.zero_grad()
        step_of(rival, tiny)
        found = [clip.visual.conv1.weight.grad, clip.token_embedding.weight.grad, clip.logit_scale.grad]
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_steps_and_memory_are_measured_in_both_precisions(dtype, tiny):
    found = train_step.measure("our_fine_tune", replace(tiny, steps=2, warmup=1, dtype=dtype))
    assert len(found["seconds"]) == len(found["cpu_seconds"]) == 2
    assert min(*found["seconds"], *found["cpu_seconds"], found["peak_mib"]) > 0


def test_the_table_counts_all_batches_of_a_bucketed_step():
    result = {"seconds": 2.0, "cpu_seconds": 2.0, "peak_mib": 1.0}
    text = train_step.table({"our_fine_tune": result, "fine_tune_bucketed": {**result, "seconds": 4.0}}, 8)
    assert "| our_fine_tune: fine-tuning in this code | 4 | 0.25 | 1 | fine_tune_bucketed: 0.50x (0.25x) |" in text
    assert "fine-tuning, length buckets | 8 |" in text
