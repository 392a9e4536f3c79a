"""State alignment against the formula written out: loops over captions and windows, open_clip's own base."""

import copy
import dataclasses
import json
from functools import partial
from operator import attrgetter

import open_clip
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import Accelerator
from accelerator import reset_accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from fixclip_core.data.captions import shared_tokens
from fixclip_core.data.loader import Batch
from fixclip_core.model.config import FINE_TUNE, LONG_CLIP
from fixclip_core.model.fixclip import FixClip
from fixclip_core.model.windows import NO_WINDOW, num_overlapping, overlapping_windows, window_and_offset
from fixclip_core.training.encoder.losses.gradcache import cached_backward
from fixclip_core.training.encoder.losses.state_alignment import plain_wording_loss, state_alignment_loss, window_states
from fixclip_core.training.encoder.recipe import EncoderRecipe, TrainSection
from fixclip_core.training.encoder.task import ContrastiveTask, forward_backward, make_alignment, split_batch
from fixclip_core.training.encoder.trainer import EncoderTrainer, build_clip
from fixclip_core.training.recipe import load_recipe
from fixclip_core.training.trainer import smoke
from fixclip_diffusion.conditioning import CONDITIONINGS, Break, Context, PromptTokens

START, END = 62, 63
CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 64, "width": 16, "heads": 2, "layers": 3},
}
PREPROCESS = {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
# Tokens of the long and short captions, start and end included: around 77, around the ends of windows, the most.
LONG = [248, 77, 113, 3]
SHORT = [9, 78, 20, 40]


def base_clip():
    torch.manual_seed(0)
    clip = open_clip.CLIP(**CLIP).double()
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return clip


def made_of(clip, **fields):
    fields = {"num_prompts": 2, "num_groups": 0} | fields
    return FixClip.from_clip(copy.deepcopy(clip), CLIP, PREPROCESS, **fields).double()


def moved(model):
    """The model after some training, so that its states are far from the base's."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def captions(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, START, (len(lengths), 248), generator=generator)
    ids[:, 0] = START
    for row, length in zip(ids, lengths, strict=True):
        row[length - 1] = END
        row[length:] = 0
    return ids


def captioned_images():
    generator, size = torch.Generator().manual_seed(2), len(LONG)
    return Batch(
        image=torch.randn(size, 3, 32, 32, generator=generator, dtype=torch.float64),
        long_ids=captions(LONG, 3),
        short_ids=captions(SHORT, 4),
        seeds=torch.arange(size),
        keys=[str(index) for index in range(size)],
    )


# -- the formula, written out --------------------------------------------------------------------------------------


def plain_windows(ids):
    """[(first word, ids of the window)] of a caption without padding."""
    words = ids[1:-1]
    windows = [(0, words[:75])]
    while windows[-1][0] + 75 < len(words):
        first = windows[-1][0] + 35
        windows.append((first, words[first : first + 75]))
    return [(first, torch.cat([ids[:1], piece, ids[-1:]])) for first, piece in windows]


def plain_states(text, positions, ids, state, weights=None):
    """Every token's hidden state in one causal pass, by open_clip's own blocks, or by these with other weights."""
    x = (text.token_embedding(ids) + positions[: len(ids)])[None]
    mask = torch.full((len(ids), len(ids)), -torch.inf, dtype=x.dtype).triu(1)
    blocks = list(text.transformer.resblocks)
    weights = [dict(block.named_parameters()) for block in blocks] if weights is None else weights
    for block, own in list(zip(blocks, weights, strict=True))[: None if state == "last" else -1]:
        x = functional_call(block, own, (x,), {"attn_mask": mask})
    return (text.ln_final(x) if state == "last" else x)[0]


def plain_targets(clip, ids, state):
    """Each token's state before the end-of-text token, from the first window that holds it."""
    targets = {}
    for first, window in plain_windows(ids):
        states = plain_states(clip, clip.positional_embedding, window, state)
        targets.setdefault(0, states[0])
        for place, token_state in enumerate(states[1:-1]):
            targets.setdefault(1 + first + place, token_state)
    return torch.stack([targets[token] for token in range(len(ids) - 1)]).detach()


def plain_loss(clip, model, batch, state):
    """The loss of `losses.state_alignment` in the tokens of the batch: open_clip's blocks with the trained weights."""
    text = open_clip.CLIP(**CLIP).double()
    text.token_embedding, text.ln_final = model.text.token_embedding, model.text.ln_final
    names = [name for name, _ in text.transformer.resblocks[0].named_parameters()]
    weights = [{name: attrgetter(name)(block) for name in names} for block in model.text.blocks]
    errors = []
    for ids in torch.cat([batch.long_ids, batch.short_ids]):
        ids = ids[: ids.argmax() + 1]
        states = plain_states(text, model.text.positions(), ids, state, weights)[:-1]
        errors += [(a - b).square().mean() for a, b in zip(states, plain_targets(clip, ids, state), strict=True)]
    return torch.stack(errors).sum() / len(errors)


# -- windows -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(lengths=st.lists(st.integers(2, 248), min_size=1, max_size=5))
def test_windows_are_the_rule(lengths):
    ids, num_tokens = captions(lengths), torch.tensor(lengths)
    windows = overlapping_windows(ids, num_tokens)
    assert windows.shape == (len(lengths), int(num_overlapping(num_tokens).max()), 77)
    for row, length, found in zip(ids, lengths, windows, strict=True):
        expected = plain_windows(row[:length])
        assert num_overlapping(torch.tensor([length])).item() == len(expected)
        for (_, window), got in zip(expected, found, strict=False):
            assert torch.equal(got[: len(window)], window)
            assert set(got[len(window) :].tolist()) <= ({0} if len(expected) == 1 else {END})
        assert (found[len(expected) :] == NO_WINDOW).all()
    # Where each token's state is read, there stands the token.
    window, offset = window_and_offset(num_tokens, 248)
    found = windows[torch.arange(len(lengths))[:, None], window, offset]
    text = torch.arange(248) < num_tokens[:, None]
    assert torch.equal(found[text], ids[text])


@given(words=st.integers(0, 246))
def test_windows_are_those_of_the_conditioning_overlap(words):
    """What the tower learns is what `long_prompt="overlap"` gives a UNet."""
    spans = tuple((word, word + 1) for word in range(words))
    tokens = PromptTokens("x" * words, tuple(range(words)), spans, (Break.WORD,) * words, (1.0,) * words)
    context = Context(length=248, short_length=77, start_id=START, end_id=END, pad_id=END, padding="mask")
    layout = CONDITIONINGS["overlap"].lay_out(tokens, context)
    window, offset = window_and_offset(torch.tensor([words + 2]), words + 2)
    assert torch.equal(layout.source_L[: words + 2], (77 * window + offset)[0])


def test_short_ids_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 40\): pad them to at least 77"):
        overlapping_windows(torch.zeros(1, 40, dtype=torch.long), torch.tensor([40]))


# -- values and gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["last", "penultimate"])
def test_states_of_the_base_are_those_of_open_clip(state):
    clip = base_clip()
    model = made_of(clip)
    ids = captions(LONG)
    found = window_states(model.base_text_tower(), ids, state)
    for row, length, states in zip(ids, LONG, found, strict=True):
        torch.testing.assert_close(states, plain_targets(clip, row[:length], state))
    # Nothing is lost at the beginning: a caption of 77 tokens, read by the base in one pass.
    whole = plain_states(clip, clip.positional_embedding, ids[1, :77], state)[:-1]
    torch.testing.assert_close(found[1], whole.detach())


@pytest.mark.parametrize("state", ["last", "penultimate"])
@pytest.mark.parametrize(
    "fields",
    [
        {"num_groups": 1, "first_group": 1},
        LONG_CLIP | {"pca_rank": 3},
        FINE_TUNE,
        {"lora_rank": 2},
        {"positions": "kept"},
    ],
)
def test_values_and_gradients_are_those_of_the_formula(fields, state):
    clip = base_clip()
    model = made_of(clip, **fields)
    train = TrainSection(weight_states=0.7, align_state=state)
    alignment = make_alignment(train, model, "cpu")
    moved(model)
    batch = captioned_images()
    task = ContrastiveTask.from_recipe(train, model.config, alignment)
    without = ContrastiveTask.from_recipe(train, model.config)
    plain = plain_loss(clip, model, batch, state)
    total = without.losses(model(batch))["loss"] + 0.7 * plain
    total.backward()
    expected = gradients(model)
    for micro_batch_size in (None, 3):
        model.zero_grad()
        losses = forward_backward(Accelerator(cpu=True), model, batch, task, micro_batch_size)
        torch.testing.assert_close(losses["loss_states"], plain.detach())
        torch.testing.assert_close(losses["loss"], total.detach())
        torch.testing.assert_close(gradients(model), expected)
        assert not any(loss.requires_grad for loss in losses.values())


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@given(ids=st.lists(st.integers(0, 5), max_size=30), other=st.lists(st.integers(0, 5), max_size=30))
def test_shared_tokens_are_the_same_tokens_in_the_same_order(ids, other):
    own, others = shared_tokens(tuple(ids), tuple(other))
    assert [ids[i] for i in own] == [other[i] for i in others]
    assert list(own) == sorted(set(own))
    assert list(others) == sorted(set(others))
    assert shared_tokens(tuple(ids), tuple(ids)) == (tuple(range(len(ids))),) * 2


def reworded(batch):
    """The batch with plain wordings: caption 2 lacks tokens 40 to 42, caption 1 has another token 5."""
    plain = batch.long_ids.clone()
    plain[2, 40:110], plain[2, 110:113] = batch.long_ids[2, 43:113], 0
    plain[1, 5] = START - 1 if batch.long_ids[1, 5] != START - 1 else 1
    return dataclasses.replace(batch, plain_ids=plain)


def shared_places(batch):
    """For each long caption its tokens and those of its plain wording that are the same, of `reworded`."""
    lengths = [int(ids.argmax()) for ids in batch.long_ids]
    pairs = [[(place, place) for place in range(length)] for length in lengths]
    pairs[1] = [(own, other) for own, other in pairs[1] if own != 5]
    pairs[2] = [(own, own if own < 40 else own - 3) for own, _ in pairs[2] if not 40 <= own < 43]
    return pairs


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_a_plain_wording_gives_the_targets_of_the_tokens_that_it_shares(micro_batch_size):
    """Both losses, and their gradients, against loops over the captions and the tokens."""
    clip = base_clip()
    model = made_of(clip)
    train = TrainSection(weight_states=0.7, weight_plain=0.4)
    task = ContrastiveTask.from_recipe(train, model.config, make_alignment(train, model, "cpu"))
    without = ContrastiveTask.from_recipe(TrainSection(), model.config)
    moved(model)
    batch = reworded(captioned_images())

    output = model(batch, state="last")
    errors, weighted = [], []
    for number, pairs in enumerate(shared_places(batch)):
        ids, wording = (row[: int(row.argmax()) + 1] for row in (batch.long_ids[number], batch.plain_ids[number]))
        targets, misread = plain_targets(clip, wording, "last"), plain_targets(clip, ids, "last")
        own = [(output.text_states[number][own] - targets[other]).square().mean() for own, other in pairs]
        gaps = [(misread[own] - targets[other]).square().mean() for own, other in pairs]
        errors += own
        if number in (1, 2):  # the others' plain wordings are themselves
            weighted.append(sum(gap * error for gap, error in zip(gaps, own, strict=True)) / sum(gaps))
    for number, ids in enumerate(batch.short_ids):
        targets = plain_targets(clip, ids[: int(ids.argmax()) + 1], "last")
        states = output.text_states[len(LONG) + number]
        errors += [(a - b).square().mean() for a, b in zip(states, targets, strict=True)]
    expected = {"states": torch.stack(errors).mean(), "plain": torch.stack(weighted).mean()}
    total = without.losses(output)["loss"] + 0.7 * expected["states"] + 0.4 * expected["plain"]
    total.backward()
    wanted = gradients(model)

    model.zero_grad()
    losses = forward_backward(Accelerator(cpu=True), model, batch, task, micro_batch_size)
    for name, value in expected.items():
        torch.testing.assert_close(losses[f"loss_{name}"], value.detach())
    torch.testing.assert_close(losses["loss"], total.detach())
    torch.testing.assert_close(gradients(model), wanted)


def test_captions_without_another_plain_wording_add_nothing():
    model = made_of(base_clip())
    train = TrainSection(weight_states=0.7, weight_plain=0.4)
    task = ContrastiveTask.from_recipe(train, model.config, make_alignment(train, model, "cpu"))
    moved(model)
    batch = captioned_images()
    for same in (batch, dataclasses.replace(batch, plain_ids=batch.long_ids)):
        assert task.batch_losses(model, same)["loss_plain"] == 0
    alone = ContrastiveTask.from_recipe(train := TrainSection(weight_states=0.7), model.config, task.alignment)
    torch.testing.assert_close(task.batch_losses(model, batch)["loss"], alone.batch_losses(model, batch)["loss"])


def test_a_token_that_no_window_misreads_is_left_to_the_other_loss():
    states = [torch.tensor([[1.0], [2.0], [3.0]], requires_grad=True)]
    targets, misread = [torch.tensor([[1.0], [1.0], [1.0]])], [torch.tensor([[1.0], [1.0], [3.0]])]
    loss = plain_wording_loss(states, targets, misread)
    torch.testing.assert_close(loss, torch.tensor(4.0))
    loss.backward()
    torch.testing.assert_close(states[0].grad, torch.tensor([[0.0], [0.0], [4.0]]))
    assert plain_wording_loss(states, targets, targets) == 0


@pytest.mark.parametrize("option", [{"weight_plain": 1.0}, {"align_state": "penultimate"}])
def test_parts_of_state_alignment_need_its_weight(option):
    common = {"model": {"name": "ViT-B-32"}, "data": {"source": "scenes-references"}}
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=rf"{name}={value}: .* set weight_states"):
        EncoderRecipe.model_validate({**common, "train": option})
    EncoderRecipe.model_validate({**common, "train": option | {"weight_states": 1.0}})


def test_kept_positions_leave_the_first_77_states_as_they_are(tmp_path):
    clip = base_clip()
    made_of(clip, positions="kept").float().save_pretrained(tmp_path)
    model = FixClip.from_pretrained(tmp_path).double()
    assert model.config.positions == "kept"
    assert len(model.text.kept_positions) == 20
    ids = captions([248, 100])
    _, _, states = model.text.encode_states(ids, "last")
    for row, found in zip(ids, states, strict=True):
        whole = plain_states(clip, clip.positional_embedding, row[:77], "last")
        torch.testing.assert_close(found[:77], whole, rtol=1e-5, atol=1e-5)
    targets = window_states(model.base_text_tower(), ids, "last")
    torch.testing.assert_close(targets[0], plain_targets(clip, ids[0], "last"), rtol=1e-5, atol=1e-5)


def test_a_model_that_was_just_made_of_its_base_differs_only_in_what_windows_and_stretching_change():
    """With positions that are not stretched, short captions are what the base makes of them: the loss is 0."""
    model = made_of(base_clip(), ratio=1)
    ids = captions([9, 77, 40])
    _, _, states = model.text.encode_states(ids[:, :77], "last")
    assert state_alignment_loss(states, window_states(model.base_text_tower(), ids, "last")) < 1e-20


def test_without_alignment_nothing_is_computed_and_nothing_changes():
    model, batch = made_of(base_clip()), captioned_images()
    assert make_alignment(TrainSection(), model, "cpu") is None
    task = ContrastiveTask.from_recipe(TrainSection(), model.config)
    output = task.encode(model, batch)
    assert output.text_states == ()
    assert {name: loss.item() for name, loss in task.batch_losses(model, batch).items()} == {
        name: loss.item() for name, loss in task.losses(model(batch)).items()
    }


def test_the_base_is_a_copy_that_no_one_trains():
    model = made_of(base_clip())
    base = model.base_text_tower()
    assert not any(p.requires_grad for p in base.parameters())
    assert base.context_length == 77
    before = window_states(base, captions([100]), "last")
    moved(model)
    torch.testing.assert_close(window_states(base, captions([100]), "last"), before)


def test_a_base_of_248_positions_is_refused():
    long = {**CLIP, "text_cfg": {**CLIP["text_cfg"], "context_length": 248}}
    model = FixClip.from_clip(open_clip.CLIP(**long), long, PREPROCESS, ratio=1, num_groups=0)
    with pytest.raises(ValueError, match=r"weight_states=1\.0: a base of 248 text positions"):
        make_alignment(TrainSection(weight_states=1.0), model, "cpu")


def test_states_of_other_captions_are_refused():
    with pytest.raises(ValueError, match="differ in shape"):
        state_alignment_loss([torch.zeros(3, 2)], [torch.zeros(4, 2)])


# -- several processes ---------------------------------------------------------------------------------------------


def aligned(**fields):
    model = made_of(base_clip(), num_groups=1, first_group=1, **fields)
    train = TrainSection(weight_states=2.0, weight_plain=0.6)
    alignment = make_alignment(train, model, "cpu")
    return moved(model), ContrastiveTask.from_recipe(train, model.config, alignment)


def part(batch, start, stop):
    names = ("image", "long_ids", "short_ids", "seeds", "keys", "plain_ids")
    return Batch(**{name: getattr(batch, name)[start:stop] for name in names})


def _two_processes(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, task = aligned()
    wrapped = DistributedDataParallel(model)
    mine = part(reworded(captioned_images()), 2 * rank, 2 * rank + 2)
    losses = task.batch_losses(wrapped, mine)
    losses["loss"].backward()
    result = {"gradients": gradients(model), "loss_states": losses["loss_states"].detach()}
    model.zero_grad()
    in_parts(task, wrapped, mine, no_sync=wrapped.no_sync)
    result["in_parts"] = gradients(model)
    model, task = aligned()
    model.logit_scale = torch.nn.Parameter(model.logit_scale.detach().reshape(1))  # a scalar cannot be sharded
    sharded(model)
    losses = task.batch_losses(model, mine)
    losses["loss"].sum().backward()
    result["sharded"] = whole_gradients(model)
    model.zero_grad()
    in_parts(task, model, mine)
    result["sharded in parts"] = whole_gradients(model)
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def in_parts(task, model, batch, **options):
    """The step of a micro batch of 1, as `forward_backward` takes it."""
    options |= {"backward": lambda loss: loss.sum().backward(), "own_losses": task.own_losses(batch)}
    cached_backward(split_batch(batch, 1), partial(task.encode, model), one_loss(task.losses), **options)


def one_loss(losses):
    """The losses with a scalar to minimise, also where the logit scale is a vector of one."""
    return lambda output: {name: loss.sum() for name, loss in losses(output).items()}


def whole_gradients(model):
    return {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}


def sharded(model):
    mesh = init_device_mesh("cpu", (2,))
    for block in [*model.visual.blocks, *model.text.blocks]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def test_two_processes_sharded_or_not_equal_one_however_uneven_their_captions(tmp_path):
    mp.spawn(_two_processes, args=(str(tmp_path),), nprocs=2)
    model, task = aligned()
    losses = task.batch_losses(model, reworded(captioned_images()))
    losses["loss"].backward()
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    torch.testing.assert_close(
        (results[0]["loss_states"] + results[1]["loss_states"]) / 2, losses["loss_states"].detach()
    )
    for result in results:
        expected = gradients(model)
        shapes = {name: grad.shape for name, grad in expected.items()}
        for name in ("gradients", "in_parts", "sharded", "sharded in parts"):
            torch.testing.assert_close({n: g.reshape(shapes[n]) for n, g in result[name].items()}, expected)


# -- a run ---------------------------------------------------------------------------------------------------------

RECIPE = """\
seed: 3
model: {{name: "local-dir:{clip}", num_prompts: 2, num_groups: 0}}
data: {{source: scenes, stop: 20, workers: 0}}
captions: {{short_caption: given}}
optim: {{lr: 3.0e-3, warmup_steps: 2}}
train: {{steps: 12, batch_size: 8, precision: fp32, weight_states: 1.0}}
output: {{folder: "{folder}", log_every: 1, save_every: 6}}
"""


@pytest.fixture
def recipe(tmp_path):
    torch.manual_seed(0)
    config = {**CLIP, "text_cfg": {**CLIP["text_cfg"], "vocab_size": 49408}}
    folder = tmp_path / "clip"
    folder.mkdir()
    save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": PREPROCESS}))

    def recipe(name, *overrides):
        reset_accelerator()
        file = tmp_path / f"{name}.yaml"
        file.write_text(RECIPE.format(clip=folder, folder=tmp_path / name))
        return load_recipe(EncoderRecipe, file, overrides)

    return recipe


def test_a_run_learns_the_states_and_resumes_with_the_same_base(recipe, tmp_path):
    states_alone = ["train.weight_long=0", "train.weight_short=0"]
    EncoderTrainer(recipe("whole", *states_alone)).train()
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss_states"] < 0.6 * rows[0]["loss_states"]
    halves = EncoderTrainer(recipe("halves", *states_alone)).prepare()
    assert halves.describe()["state alignment"] == "last states of the base's windows, weight 1"
    halves.start()
    halves.total_steps = 6
    halves.fit()
    assert not [name for name in halves.model.state_dict() if "base" in name]
    EncoderTrainer(recipe("halves", *states_alone)).train()
    whole, again = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "halves"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_weight_of_plain_wordings_needs_captions_that_have_one(recipe):
    """A smoke test of it reads others, whatever the data."""
    weights = "train.weight_plain=0.5"
    with pytest.raises(ValueError, match=r"train\.weight_plain: none of 20 captions in scenes has a plain wording"):
        EncoderTrainer(recipe("none", weights)).prepare()
    reset_accelerator()
    smoke(EncoderTrainer, recipe("smoke", weights))
    reset_accelerator()
    EncoderTrainer(recipe("some", weights, "data.source=scenes-mixed")).prepare()


def test_a_trained_fixclip_is_no_base(recipe, tmp_path):
    build_clip(recipe("base")).save_pretrained(tmp_path / "fixclip")
    with pytest.raises(ValueError, match=r"weight_states=1\.0: .*fixclip is a FixClip"):
        EncoderTrainer(recipe("run", f"model.name={tmp_path / 'fixclip'}")).prepare()
