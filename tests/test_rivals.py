"""Rivals' ideas as options of the recipe, against plain implementations."""

import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fixclip_core.data.captions import ShortCaptions, caption_pair
from fixclip_core.data.config import DataConfig
from fixclip_core.data.loader import build_loader, pad_before
from fixclip_core.model.fixclip import FixClipOutput
from fixclip_core.training.encoder.losses.contrastive import contrastive_loss
from fixclip_core.training.encoder.losses.pca import pca_reconstruction, variance_reconstruction
from fixclip_core.training.encoder.task import ContrastiveTask

# -- DeBias-CLIP -----------------------------------------------------------------------------------------------------


@given(count=st.integers(1, 6), seed=st.integers(0, 10**6))
def test_debiased_short_captions_leave_the_summary_out(count, seed):
    sentences = [f"Sentence number {i} is here." for i in range(count)]
    long, short = caption_pair(" ".join(sentences), None, ShortCaptions("debiased"), random.Random(seed))
    assert long == " ".join(sentences)
    chosen = short.replace(". ", ".|").split("|")
    assert len(set(chosen)) == len(chosen)
    assert set(chosen) <= set(sentences[1:] or sentences)


def test_debiased_short_captions_are_of_every_length_and_order():
    sentences = [f"Sentence number {i} is here." for i in range(4)]
    drawn = {
        caption_pair(" ".join(sentences), None, ShortCaptions("debiased"), random.Random(seed))[1]
        for seed in range(300)
    }
    assert len(drawn) == 3 + 6 + 6  # 1, 2 or 3 of three sentences, in any order


def plain_pad_before(ids, share):
    """[start] + padding + [rest of the text] + padding, by lists."""
    text = list(ids)
    while text[-1] == 0:
        text.pop()
    room = len(ids) - len(text)
    before = int(share * (room + 1))
    return [text[0]] + [0] * before + text[1:] + [0] * (room - before)


@given(lengths=st.lists(st.integers(2, 12), min_size=1, max_size=4), share=st.floats(0, 1, exclude_max=True))
def test_padding_before_the_text(lengths, share):
    ids = torch.zeros(len(lengths), 12, dtype=torch.long)
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = torch.arange(7, 7 + length)
        if length > 3:
            row[2] = 0  # an exclamation mark has the id of padding
    before = ids.clone()
    moved = pad_before(ids, [share] * len(lengths))
    assert torch.equal(ids, before)
    assert moved.tolist() == [plain_pad_before(row, share) for row in ids.tolist()]


def loader(tokenizer, **fields):
    config = DataConfig(source="scenes", stop=4, batch_size=4, workers=0, short_caption="debiased", **fields)
    return build_loader(config, transform=lambda image: torch.zeros(3, 8, 8), tokenizer=tokenizer, rank=0, world_size=1)


def tokenizer(texts):
    ids = torch.zeros(len(texts), 248, dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        words = text.split()[:246]
        row[: len(words) + 2] = torch.tensor([1, *(2 + len(word) for word in words), 99])
    return ids


def test_the_loader_pads_short_captions_alone_and_alike_each_time():
    plain, padded = next(loader(tokenizer).epoch(0)), next(loader(tokenizer, pad_short=True).epoch(0))
    assert torch.equal(plain.long_ids, padded.long_ids)
    assert not torch.equal(plain.short_ids, padded.short_ids)
    for before, after in zip(plain.short_ids, padded.short_ids, strict=True):
        assert before[before > 0].tolist() == after[after > 0].tolist()
        assert after[0] == 1
    again = next(loader(tokenizer, pad_short=True).epoch(0))
    assert torch.equal(padded.short_ids, again.short_ids)
    with pytest.raises(ValueError, match="the tokenizer pads with 5, not 0"):
        loader(lambda texts: tokenizer(texts).clamp(min=5), pad_short=True)


# -- HiMo-CLIP -------------------------------------------------------------------------------------------------------


def features(batch, width, seed=0):
    rows = torch.randn(batch, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(rows * torch.linspace(2, 0.1, width, dtype=torch.float64), dim=-1).requires_grad_()


@settings(deadline=None, max_examples=20)
@given(share=st.floats(0.05, 1.0), batch=st.integers(3, 12))
def test_components_are_the_fewest_that_hold_the_variance(share, batch):
    text = features(batch, 6)
    mean = text.mean(dim=0).detach()
    centred = (text - mean).detach()
    variances, directions = torch.linalg.eigh(centred.T @ centred)
    order = variances.argsort(descending=True)
    held, rank = 0.0, 0
    while held < share - 1e-9 and rank < 6:
        held += float(variances[order[rank]] / variances.sum())
        rank += 1
    best = directions[:, order[: max(rank, 1)]]
    expected = F.normalize((text - mean.clone()) @ best @ best.T + mean, dim=-1)
    torch.testing.assert_close(variance_reconstruction(text, share), expected, atol=1e-7, rtol=1e-7)


def test_the_loss_of_the_components_joins_with_its_weight():
    image, text = features(8, 6, 1), features(8, 6, 2)
    scale = torch.tensor(5.0, dtype=torch.float64)
    output = FixClipOutput(image, text, None, None, None, None, scale)
    losses = ContrastiveTask(weight_himo=0.3, himo_variance=0.8).losses(output)
    himo = contrastive_loss(image, variance_reconstruction(text, 0.8), scale)
    torch.testing.assert_close(losses["loss_himo"], himo)
    torch.testing.assert_close(losses["loss"], losses["loss_long"] + 0.3 * himo)
    assert ContrastiveTask().losses(output).keys() == {"loss", "loss_long"}
    (grad,) = torch.autograd.grad(losses["loss_himo"], text)
    assert grad.isfinite().all()
    assert grad.abs().sum() > 0


def test_all_variance_is_the_feature_itself():
    text = features(5, 8)
    torch.testing.assert_close(variance_reconstruction(text, 1.0), text)
    torch.testing.assert_close(variance_reconstruction(text, 1.0), pca_reconstruction(text, 4))
    with pytest.raises(ValueError, match="share=0"):
        variance_reconstruction(text, 0)
