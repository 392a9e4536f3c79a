"""Rivals' ideas as options of the recipe, against plain implementations."""

import random
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_clips import VOCAB_SIZE, tiny_clip, tiny_config

from fixclip_core.data.captions import ShortCaptions, caption_pair
from fixclip_core.data.config import DataConfig
from fixclip_core.data.loader import build_loader, pad_before
from fixclip_core.model.config import LONG_CLIP
from fixclip_core.model.fixclip import FixClip, FixClipOutput
from fixclip_core.training.encoder.losses.contrastive import contrastive_loss
from fixclip_core.training.encoder.losses.gradcache import cached_backward
from fixclip_core.training.encoder.losses.pca import pca_reconstruction, variance_reconstruction
from fixclip_core.training.encoder.plan import Cluster, _probe_recipe
from fixclip_core.training.encoder.recipe import EncoderRecipe, TrainSection
from fixclip_core.training.encoder.task import ContrastiveTask, split_batch
from fixclip_core.training.encoder.trainer import data_config, model_fields, smoke_recipe
from fixclip_diffusion.adapter_training.recipe import AdapterRecipe

PREPROCESS = {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
MODULES = {"num_prompts": 2, "num_groups": 1, "first_group": 1}

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
    drawn = [
        caption_pair(" ".join(sentences), None, ShortCaptions("debiased"), random.Random(seed))[1]
        for seed in range(300)
    ]
    assert len(set(drawn)) == 3 + 6 + 6  # 1, 2 or 3 of three sentences, in any order
    lengths = Counter(short.count(".") for short in drawn)
    assert all(80 < lengths[count] < 120 for count in (1, 2, 3))  # each number as often as another


END = 99


def plain_pad_before(ids, share):
    """[start] + padding + [rest of the text] + padding, by lists."""
    text = ids[: ids.index(END) + 1]
    behind = ids[len(text) :]
    before = int(share * (len(behind) + 1))
    return [text[0]] + [0] * before + text[1:] + behind[before:]


@given(
    lengths=st.lists(st.integers(2, 12), min_size=1, max_size=4),
    share=st.floats(0, 1, exclude_max=True),
    padding=st.sampled_from([0, 1, END]),
)
def test_padding_before_the_text(lengths, share, padding):
    """Whatever the tokenizer pads with: open_clip's 0, or the end-of-text token as those of transformers."""
    ids = torch.full((len(lengths), 12), padding)
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = torch.tensor([*range(7, 6 + length), END])
        if length > 3:
            row[2] = 0  # an exclamation mark has the id of padding
    before = ids.clone()
    moved = pad_before(ids, [share] * len(lengths), END)
    assert torch.equal(ids, before)
    assert moved.tolist() == [plain_pad_before(row, share) for row in ids.tolist()]


def loader(tokenizer, **fields):
    config = DataConfig(source="scenes", stop=4, batch_size=4, workers=0, short_caption="debiased", **fields)
    return build_loader(config, transform=lambda image: torch.zeros(3, 8, 8), tokenizer=tokenizer, rank=0, world_size=1)


def tokenizer(texts):
    ids = torch.zeros(len(texts), 248, dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        words = text.split()[:246]
        row[: len(words) + 2] = torch.tensor([1, *(2 + len(word) for word in words), END])
    return ids


def pads_with_the_end(texts):
    ids = tokenizer(texts)
    return ids.where(ids > 0, END)


def test_the_loader_pads_short_captions_alone_and_alike_each_time():
    plain, padded = next(loader(tokenizer).epoch(0)), next(loader(tokenizer, pad_short=True).epoch(0))
    assert torch.equal(plain.long_ids, padded.long_ids)
    assert not torch.equal(plain.short_ids, padded.short_ids)
    for before, after in zip(plain.short_ids, padded.short_ids, strict=True):
        assert before[before > 0].tolist() == after[after > 0].tolist()
        assert after[0] == 1
    again = next(loader(tokenizer, pad_short=True).epoch(0))
    assert torch.equal(padded.short_ids, again.short_ids)
    last = padded.short_ids.argmax(dim=-1)  # the end-of-text tokens, before padding at most 100 from the start
    assert plain.short_ids.argmax(dim=-1).max() < 100
    assert last.max() > 150  # late positions are trained
    assert len(set((last - plain.short_ids.argmax(dim=-1)).tolist())) == len(last)  # each text moves by its own draw
    other = next(loader(pads_with_the_end, pad_short=True).epoch(0)).short_ids
    assert torch.equal(other.eq(END).int().argmax(dim=-1), last)
    for one, row in zip(padded.short_ids, other, strict=True):
        end = int(row.eq(END).int().argmax())
        assert torch.equal(one[: end + 1], row[: end + 1])


# -- several short captions an image (DreamLIP) ----------------------------------------------------------------------


def test_further_short_captions_are_sampled_anew_from_the_long_one():
    one, three = next(loader(tokenizer).epoch(0)), next(loader(tokenizer, num_short=3).epoch(0))
    assert three.short_ids.shape == (3, 4, 248)
    assert torch.equal(three.short_ids[0], one.short_ids)
    assert torch.equal(three.long_ids, one.long_ids)
    assert len({tuple(row.tolist()) for row in three.short_ids.flatten(0, 1)}) > 8  # of 12, of few sentences each
    assert torch.equal(three.short_ids, next(loader(tokenizer, num_short=3).epoch(0)).short_ids)
    words = {int(i) for i in three.long_ids.flatten()} | {int(i) for i in one.short_ids.flatten()}
    assert {int(i) for i in three.short_ids.flatten()} <= words
    padded = next(loader(tokenizer, num_short=3, pad_short=True).epoch(0)).short_ids
    assert padded.shape == three.short_ids.shape
    assert not torch.equal(padded[2], three.short_ids[2])
    for before, after in zip(three.short_ids.flatten(0, 1), padded.flatten(0, 1), strict=True):
        assert before[before > 0].tolist() == after[after > 0].tolist()


@dataclass
class Captioned:
    """A batch."""

    image: torch.Tensor
    long_ids: torch.Tensor
    short_ids: torch.Tensor
    seeds: torch.Tensor
    plain_ids: torch.Tensor | None = None


def several_short():
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(1, VOCAB_SIZE - 2, (4, 6, 12), generator=generator)  # long, and three short ones, of 6 images
    ids[..., -1] = VOCAB_SIZE - 1
    return Captioned(torch.randn(6, 3, 32, 32, generator=generator), ids[0], ids[1:], torch.arange(6))


def gradients(model, backward):
    model.zero_grad()
    backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "fields",
    [{**MODULES, "hierarchy_branch": "short"}, MODULES, {**LONG_CLIP, "pca_rank": 3}],
    ids=["short", "long", "longclip"],
)
def test_their_loss_is_the_mean_of_plain_ones(fields):
    """Values and gradients against three passes with one short caption each; the first of them is aligned."""
    model = FixClip.from_clip(tiny_clip(), tiny_config(), PREPROCESS, **fields)
    batch, task = several_short(), ContrastiveTask.from_recipe(TrainSection(), model.config)
    found = {}

    def whole():
        losses = task.batch_losses(model, batch)
        found.update({name: loss.item() for name, loss in losses.items()})
        losses["loss"].backward()

    def plain():
        passes = [task.losses(model(replace(batch, short_ids=ids))) for ids in batch.short_ids]
        short = torch.stack([losses["loss_short"] for losses in passes]).mean()
        mids = sum(loss for name, loss in passes[0].items() if name.startswith("loss_mid"))
        total = passes[0]["loss_long"] + short + mids
        assert found["loss_short"] == pytest.approx(short.item(), abs=1e-5)
        assert found["loss"] == pytest.approx(total.item(), abs=1e-5)
        total.backward()

    ours, theirs = gradients(model, whole), gradients(model, plain)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], atol=2e-5, rtol=1e-3)


def test_gradcache_cuts_them_by_image():
    model = FixClip.from_clip(tiny_clip(), tiny_config(), PREPROCESS, **MODULES)
    batch, task = several_short(), ContrastiveTask(first_group=1)
    parts = split_batch(batch, 4)
    assert [part.short_ids.shape for part in parts] == [(3, 4, 12), (3, 2, 12)]
    whole = gradients(model, lambda: task.batch_losses(model, batch)["loss"].backward())
    cached = gradients(model, lambda: cached_backward(parts, model, task.losses))
    for name, gradient in whole.items():
        torch.testing.assert_close(gradient, cached[name], atol=2e-5, rtol=1e-3)


def test_several_that_would_all_be_the_same_are_refused():
    for policy in ("given", "first_sentence"):
        with pytest.raises(ValueError, match=f"num_short=2: short_caption={policy} gives the same one each time"):
            DataConfig(source="scenes", short_caption=policy, num_short=2)
    with pytest.raises(ValueError, match="num_short=2: with drop_short_from_long=true further short captions would be"):
        DataConfig(source="scenes", short_caption="debiased", num_short=2, drop_short_from_long=True)
    captions = {"num_short": 2, "short_caption": "debiased"}
    common = {"model": {"name": "ViT-B-32"}, "data": {"source": "scenes"}, "captions": captions}
    assert EncoderRecipe.model_validate(common).captions.num_short == 2
    with pytest.raises(ValueError, match="state alignment reads one short caption"):
        EncoderRecipe.model_validate({**common, "train": {"weight_states": 1.0}})


def test_padding_within_a_text_is_refused_where_all_before_its_end_is_text():
    common = {"model": {"name": "ViT-B-32"}, "data": {"source": "scenes"}}
    padded = {**common, "captions": {"short_caption": "debiased", "pad_short": True}}
    assert EncoderRecipe.model_validate(padded).captions.pad_short
    with pytest.raises(ValueError, match=r"captions\.pad_short=true: state alignment would take this padding"):
        EncoderRecipe.model_validate({**padded, "train": {"weight_states": 1.0}})
    with pytest.raises(ValueError, match=r"captions\.pad_short=true: an adapter's training would take"):
        AdapterRecipe.model_validate({**padded, "model": {"base": "builtin:scenes"}})


# -- in every method -------------------------------------------------------------------------------------------------

DRAWN = {"short_caption": "random_sentence"}
OPTIONS = {  # of DeBias-CLIP, DreamLIP and HiMo-CLIP
    "short_caption": {"captions": {"short_caption": "debiased"}},
    "pad_short": {"captions": {**DRAWN, "pad_short": True}},
    "num_short": {"captions": {**DRAWN, "num_short": 2}},
    "weight_himo": {"train": {"weight_himo": 0.5}},
    "himo_variance": {"train": {"weight_himo": 0.5, "himo_variance": 0.3}},
}
METHODS = {
    "fixclip": {"method": "fixclip"},
    "longclip": {"method": "longclip"},
    "finetune": {"method": "finetune"},
    "off": {"method": "fixclip", "model": {"short_branch": "off"}},
}


def recipe_of(method, option=None):
    fields = {"captions": DRAWN, **METHODS[method], **OPTIONS.get(option, {})}
    fields["model"] = {"name": "ViT-B-32", **MODULES, **fields.get("model", {})}
    return EncoderRecipe.model_validate({"data": {"source": "scenes", "stop": 4, "workers": 0}, **fields})


def loss_of(recipe):
    """Of the first batch, with the model and the losses that the recipe's training has."""
    transform = lambda image: torch.full((3, 32, 32), float(np.asarray(image).mean() / 255))  # noqa: E731
    ids = lambda texts: tokenizer(texts).clamp(max=VOCAB_SIZE - 2).where(tokenizer(texts) < 99, VOCAB_SIZE - 1)  # noqa: E731
    batch = next(build_loader(data_config(recipe, 4), transform=transform, tokenizer=ids).epoch(0))
    model = FixClip.from_clip(tiny_clip(), tiny_config(), PREPROCESS, **model_fields(recipe))
    with torch.no_grad():
        return ContrastiveTask.from_recipe(recipe.train, model.config).batch_losses(model, batch)["loss"].item()


@pytest.mark.parametrize("method", METHODS)
def test_an_option_acts_in_a_method_or_is_refused(method):
    without = loss_of(recipe_of(method))
    assert loss_of(recipe_of(method)) == without
    for option in OPTIONS:
        if method in ("finetune", "off") and not option.endswith(("himo", "variance")):
            why = {"finetune": "method=finetune", "off": r"model\.short_branch=off"}[method]
            with pytest.raises(ValueError, match=rf"captions\.{option}=\w+: {why} reads no short caption"):
                recipe_of(method, option)
        else:
            assert abs(loss_of(recipe_of(method, option)) - without) > 1e-4, option
    losses = [loss_of(recipe_of(method, share)) for share in ("weight_himo", "himo_variance")]
    assert abs(losses[0] - losses[1]) > 1e-4


def test_short_captions_that_are_left_out_of_the_long_ones_or_aligned_act_without_a_short_branch():
    fields = {"model": {"name": "ViT-B-32"}, "data": {"source": "scenes"}, "method": "finetune"}
    captions = {"short_caption": "debiased", "drop_short_from_long": True}
    assert EncoderRecipe.model_validate({**fields, "captions": captions}).captions.drop_short_from_long
    aligned = {**fields, "captions": {"short_caption": "debiased"}, "train": {"weight_states": 1.0}}
    assert EncoderRecipe.model_validate(aligned).captions.short_caption == "debiased"


def test_a_share_of_variance_without_the_loss_is_refused():
    fields = {"model": {"name": "ViT-B-32"}, "data": {"source": "scenes"}}
    with pytest.raises(ValueError, match=r"train\.himo_variance=0\.5: it is a part of HiMo-CLIP's loss"):
        EncoderRecipe.model_validate({**fields, "train": {"himo_variance": 0.5}})
    train = {"himo_variance": 0.5, "weight_himo": 1.0}
    assert EncoderRecipe.model_validate({**fields, "train": train}).train.himo_variance == 0.5


def test_smoke_and_plan_sample_short_captions_as_the_recipe_says(tmp_path):
    """Several of them were refused there, since both took the first sentence of generated data instead."""
    recipe = recipe_of("fixclip", "num_short")
    for probe in (smoke_recipe(recipe, tmp_path), _probe_recipe(recipe, Cluster(8, samples=1000), str(tmp_path))):
        config = data_config(probe, 2)
        assert (config.short_caption, config.num_short) == ("random_sentence", 2)


# -- HiMo-CLIP -------------------------------------------------------------------------------------------------------


def features(batch, width, seed=0):
    rows = torch.randn(batch, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(rows * torch.linspace(2, 0.1, width, dtype=torch.float64), dim=-1).requires_grad_()


@settings(deadline=None, max_examples=20)
@given(share=st.floats(0.05, 1.0), batch=st.integers(3, 12))
def test_components_are_the_fewest_that_hold_the_variance(share, batch):
    """Values and gradients, of which none goes through the components."""
    text = features(batch, 6)
    mean = text.mean(dim=0)
    centred = (text - mean).detach()
    variances, directions = torch.linalg.eigh(centred.T @ centred)
    order = variances.argsort(descending=True)
    held, rank = 0.0, 0
    while held < share - 1e-9 and rank < 6:
        held += float(variances[order[rank]] / variances.sum())
        rank += 1
    best = directions[:, order[: max(rank, 1)]]
    expected = F.normalize((text - mean) @ best @ best.T + mean, dim=-1)
    found = variance_reconstruction(text, share)
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-7)
    wanted, own = (torch.autograd.grad((kept**3).sum(), text, retain_graph=True) for kept in (expected, found))
    torch.testing.assert_close(own, wanted, atol=1e-6, rtol=1e-6)


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
