"""The rivals' steps that benchmarks/train_step.py measures do what open_clip does."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_clips import VOCAB_SIZE, tiny_clip

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


def test_buckets_hold_the_same_captions_sorted():
    """The padded tokens of four sorted batches are fewer, the captions as long on average as those of a mixed batch."""
    batches = train_step.bucketed_batches(SETTING, 8)
    longest = [int(batch.long_ids.argmax(-1).max()) + 1 for batch in batches]
    assert longest == sorted(longest)
    assert longest[0] < 110 < 170 < longest[-1]
    mean = sum(float(batch.long_ids.argmax(-1).float().mean()) for batch in batches) / len(batches)
    mixed = train_step.random_batch(replace(SETTING, batch_size=32), 8).long_ids
    assert mean == pytest.approx(float(mixed.argmax(-1).float().mean()))


def test_the_table_counts_all_batches_of_a_bucketed_step():
    result = {"seconds": 2.0, "cpu_seconds": 2.0, "peak_mib": 1.0}
    text = train_step.table({"our_fine_tune": result, "fine_tune_bucketed": {**result, "seconds": 4.0}}, 8)
    assert "| our_fine_tune: fine-tuning in this code | 4 | 0.25 | 1 | fine_tune_bucketed: 0.50x (0.25x) |" in text
    assert "fine-tuning, length buckets | 8 |" in text
