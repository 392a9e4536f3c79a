"""Features at every step and from a cache."""

import copy
import dataclasses
import json
import os
import pickle

import pytest
import tiny_adapter
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_adapter import without_onednn  # noqa: F401
from torch import nn

from fixclip_diffusion import FixClipStableDiffusionPipeline
from fixclip_diffusion.adapter_training import trainer as train
from fixclip_diffusion.adapter_training.features import (
    TokenIds,
    WindowIds,
    empty_states,
    encode_batch,
    encode_captions,
    encode_for_teacher,
    encode_pictures,
    encode_windows_for_teacher,
    num_tokens,
    num_tokens_in_windows,
    num_windows,
    picture_transform,
    tokenizer_digest,
    weights_digest,
)
from fixclip_diffusion.adapter_training.objectives import Features, adapter_losses
from fixclip_diffusion.adapter_training.recipe import ObjectivesSection
from fixclip_diffusion.text_encoder import NO_WINDOW, join_overlapping, num_overlapping, overlapping_windows

ALL = ObjectivesSection()
LONG, SHORT = tiny_adapter.caption(0), "A red horse."


@pytest.fixture(scope="module")
def models(sd1, tmp_path_factory):
    path = tiny_adapter.write_recipe(tmp_path_factory.mktemp("models") / "run.yaml", sd1, "unused")
    found = train.load_frozen(tiny_adapter.read(path).model)
    train.place(found, torch.device("cpu"), torch.float32)
    return found


@pytest.fixture
def setup(sd1, models, tmp_path):
    """Loaders of one recipe, with and without cache."""
    data = tiny_adapter.write_data(tmp_path / "data")
    path = tiny_adapter.write_recipe(tmp_path / "run.yaml", sd1, data)

    def setup(*overrides, **changes):
        recipe = tiny_adapter.read(path, *overrides)
        accelerator = train.make_accelerator(recipe.train, recipe.output)
        return train.make_loader(recipe, dataclasses.replace(models, **changes), accelerator, 4, 16)

    return setup


def cached(tmp_path, *overrides):
    return (f"features.folder={tmp_path / 'cache'}", "features.shard_size=5", "features.dtype=fp32", *overrides)


# -- encoding ------------------------------------------------------------------------------------------------


def test_states_are_those_of_the_pipeline(sd1, models):
    """Short captions by the original positions, long ones by all 248, and the teacher as stock reads them."""
    pipe = FixClipStableDiffusionPipeline.from_pretrained(sd1)
    stock = StableDiffusionPipeline.from_pretrained(sd1, safety_checker=None)
    ids = TokenIds(models.tokenizer)([LONG, SHORT, ""])
    assert num_tokens(ids, models.tokenizer).tolist() == [len(pipe.tokenizer(t).input_ids) for t in (LONG, SHORT, "")]
    states, length = encode_captions(models, ids)
    teacher, fits = encode_for_teacher(models, ids)
    assert length.tolist() == [248, 77, 77]
    assert fits.tolist() == [False, True, True]
    for row, text in enumerate((LONG, SHORT, "")):
        theirs = pipe.encode_prompt(text, "cpu", 1, False)[0][0]
        torch.testing.assert_close(states[row, : length[row]], theirs, rtol=1e-4, atol=1e-5)
        assert not states[row, length[row] :].any()
        if fits[row]:
            torch.testing.assert_close(
                teacher[row], stock.encode_prompt(text, "cpu", 1, False)[0][0], rtol=1e-4, atol=1e-5
            )


def test_an_encoder_without_original_positions_reads_248_tokens_always(models):
    trained = copy.deepcopy(models.text_encoder)
    trained.text_model.embeddings.short_position_embedding = None
    trained.config.short_position_embeddings = 0
    _, length = encode_captions(dataclasses.replace(models, text_encoder=trained), TokenIds(models.tokenizer)([SHORT]))
    assert length.tolist() == [248]


def test_windows_are_those_of_the_pipeline(sd1, models):
    """One to five of them: the states, those of the empty caption that guidance reads, and those with an adapter."""
    frozen = dataclasses.replace(models, long_prompt="windows_77")
    texts = [SHORT, LONG, tiny_adapter.caption(1, sentences=16), "", tiny_adapter.caption(2, sentences=30)]
    assert isinstance(frozen.caption_ids, WindowIds)
    ids = pickle.loads(pickle.dumps(frozen.caption_ids))(texts)
    states, length = encode_captions(frozen, ids)
    teacher, fits = encode_for_teacher(frozen, ids)
    assert num_windows(ids).tolist() == [1, 2, 3, 1, 5]
    assert length.tolist() == [77, 154, 231, 77, 385]
    assert states.shape[1] == 385
    assert fits.tolist() == [True, False, False, True, False]
    denoiser = train.make_denoiser(frozen, has_lora=False)
    assert denoiser.empty.keys() == {77}
    adapter = tiny_adapter.randomize(train.TextAdapter(states.shape[-1], hidden_width=16))
    pipe, adapted = (
        FixClipStableDiffusionPipeline.from_pretrained(sd1, adapter=part, long_prompt="windows_77")
        for part in (None, adapter)
    )
    for row, text in enumerate(texts):
        theirs, empty = pipe.encode_prompt(text, "cpu", 1, True)
        own = states[row : row + 1, : length[row]]
        torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(denoiser.empty_caption(int(length[row])), empty, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(
                adapter(own), adapted.encode_prompt(text, "cpu", 1, False)[0], rtol=1e-4, atol=1e-4
            )
        assert not states[row, length[row] :].any()
        if fits[row]:
            torch.testing.assert_close(teacher[row], theirs[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(empty_states(frozen)[1], teacher[3:4], rtol=1e-4, atol=1e-5)


def overlapping_states(stock, text, tokenizer):
    """One state a token, each from a pass of its own: 75 tokens at most, of which 40 before it if there are."""
    ids = tokenizer(text).input_ids[:248]
    if len(tokenizer(text).input_ids) > 248:
        ids[-1] = tokenizer.eos_token_id
    if len(ids) <= 77:
        padded = stock.tokenizer(text, padding="max_length", max_length=77, return_tensors="pt").input_ids
        return stock.text_encoder(padded).last_hidden_state[0]
    words, found = ids[1:-1], []
    for index in range(len(words)):
        start = next(s for s in range(0, 1000, 35) if index < s + 75)
        piece = [ids[0], *words[start : start + 75], ids[-1]]
        states = stock.text_encoder(torch.tensor([piece])).last_hidden_state[0]
        found += [states[0]] if not found else []
        found.append(states[1 + index - start])
    return torch.stack([*found, states[-1]])


@torch.no_grad()
def test_window_states_stand_where_their_tokens_stand(sd1, models):
    """Against the stock encoder, token by token, and 0 for padding; a text that fits into 77 keeps its own."""
    stock = StableDiffusionPipeline.from_pretrained(sd1, safety_checker=None)
    texts = [SHORT, LONG, "", *(tiny_adapter.caption(i, sentences=n) for i, n in ((1, 16), (2, 21), (3, 30)))]
    ids = models.caption_ids(texts)
    states = encode_windows_for_teacher(models, ids)
    assert states.shape[:2] == (len(texts), 248)
    for row, text in enumerate(texts):
        expected = overlapping_states(stock, text, models.tokenizer)
        torch.testing.assert_close(states[row, : len(expected)], expected, rtol=1e-4, atol=1e-5)
        assert not states[row, len(expected) :].any()
    overlap = dataclasses.replace(models, long_prompt="overlap_77")
    read = overlap.caption_ids(texts)
    assert num_tokens_in_windows(read, models.tokenizer).tolist() == num_tokens(ids, models.tokenizer).tolist()
    torch.testing.assert_close(encode_windows_for_teacher(overlap, read), states, rtol=1e-4, atol=1e-5)
    behind = dataclasses.replace(models, long_prompt="windows_77")
    read = behind.caption_ids(texts)
    assert torch.equal(encode_windows_for_teacher(behind, read), encode_captions(behind, read)[0])


@settings(deadline=None, max_examples=200)
@given(tokens=st.lists(st.integers(2, 400), min_size=1, max_size=4))
def test_overlapping_windows_hold_every_token_once_in_their_join(tokens):
    """Whatever the lengths, joining the windows' ids gives the ids; every token but the first ones has 40 before it."""
    length = max(77, *tokens)
    ids = torch.full((len(tokens), length), 9999)
    for row, count in enumerate(tokens):
        ids[row, : count - 1] = torch.arange(count - 1)
    counts = torch.tensor(tokens)
    windows = overlapping_windows(ids, counts)
    assert windows.shape[1:] == (int(num_overlapping(counts).max()), 77)
    place = torch.arange(77).expand(windows.shape)
    joined = join_overlapping(torch.stack([windows, place], -1).float(), counts, length).long()
    for row, count in enumerate(tokens):
        assert torch.equal(joined[row, :count, 0], ids[row, :count])
        assert not joined[row, max(count, 77) :].any()
        assert (joined[row, 41 : count - 1, 1] >= 41).all()
        assert int((windows[row, :, 0] != NO_WINDOW).sum()) == num_overlapping(counts)[row]


@torch.no_grad()
def test_overlapping_windows_are_those_of_the_pipeline(sd1, models):
    """Prompt and empty prompt, with an adapter that sees one window at a time."""
    frozen = dataclasses.replace(models, long_prompt="overlap_77")
    adapter = tiny_adapter.randomize(train.TextAdapter(models.text_encoder.config.hidden_size, "attention", 16, 1, 4))
    pipe = FixClipStableDiffusionPipeline.from_pretrained(sd1, adapter=adapter, long_prompt="overlap_77")
    denoiser = train.make_denoiser(frozen, has_lora=False)
    for number in (4, 9, 14, 20):
        text = tiny_adapter.caption(number, sentences=number)
        ids = frozen.caption_ids([text])
        states, length = encode_captions(frozen, ids)
        assert int(length) == states.shape[1] == 77 * int(num_windows(ids))
        features = Features(
            *[torch.zeros(1, 4, 8, 8)] * 2,
            *[states] * 2,
            *[length] * 2,
            teacher=states,
            teacher_fits=torch.tensor([False]),
            seeds=torch.zeros(1, dtype=torch.long),
            keys=[],
            skipped=[],
            long_tokens=num_tokens_in_windows(ids, frozen.tokenizer),
            short_tokens=num_tokens_in_windows(ids, frozen.tokenizer),
        )
        wanted, empty = pipe.encode_prompt(text, "cpu", 1, True)
        unet = Recording()
        recording = dataclasses.replace(denoiser, unet=unet)
        for dropout, expected in ((0.0, wanted), (0.999, empty)):
            section = ObjectivesSection(short_share=0.0, caption_dropout=dropout)
            adapter_losses(adapter, features, recording, section)
            torch.testing.assert_close(unet.read, expected, rtol=1e-4, atol=1e-4)


class Recording(nn.Module):
    """In place of a UNet: remembers the text states."""

    dtype = torch.float32

    def forward(self, noisy, timestep, states):
        self.read = states
        return UNet2DConditionOutput(noisy)


def test_pictures_become_the_latents_of_the_vae(models):
    transform = picture_transform(16)
    picture = Image.new("RGB", (40, 20), (255, 0, 127))
    image = transform(picture)
    assert image.shape == (3, 16, 16)
    assert image[:, 0, 0].tolist() == pytest.approx([1, -1, 0], abs=0.01)
    mean, logvar = encode_pictures(models.vae, image[None])
    theirs = models.vae.encode(image[None]).latent_dist
    assert torch.equal(mean, theirs.mean)
    assert torch.equal(logvar, theirs.logvar)


def test_digests_tell_weights_and_tokenizers_apart(models):
    encoder = models.text_encoder
    one = weights_digest(encoder)
    encoder.set_adapter_module(tiny_adapter.randomize(train.TextAdapter(encoder.config.hidden_size)))
    assert weights_digest(encoder) == one
    encoder.set_adapter_module(None)
    parameter = next(encoder.parameters())
    with torch.no_grad():
        parameter[0, 0] += 1e-3
        assert weights_digest(encoder) != one
        parameter[0, 0] -= 1e-3
    other = copy.deepcopy(models.tokenizer)
    assert tokenizer_digest(other) == tokenizer_digest(models.tokenizer)
    WindowIds(other)([LONG])  # the last call's padding does not count
    assert tokenizer_digest(other) == tokenizer_digest(models.tokenizer)
    other.add_tokens(["<new>"])
    assert tokenizer_digest(other) != tokenizer_digest(models.tokenizer)


def test_only_what_the_objectives_read_is_encoded(setup, models):
    batch = next(setup().epoch(0))
    every, long = (encode_batch(models, batch, section) for section in (ALL, ObjectivesSection(short_share=0.0)))
    assert torch.equal(every.long, long.long)
    assert every.teacher_fits.all()
    assert not long.teacher_fits.any()
    assert long.short is long.long
    assert every.windows is None
    states = ObjectivesSection(weight_long=0, weight_prediction=0, weight_states=1, weight_windows=1)
    without_noise = encode_batch(models, batch, states)
    assert without_noise.windows.shape == without_noise.long.shape
    assert not without_noise.mean.any()
    assert torch.equal(without_noise.long, every.long)
    assert not torch.equal(every.short, long.short)


# -- the cache -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_cached_features_are_those_of_every_step(setup, models, tmp_path, text, workers):
    plain = setup()
    loader = setup(*cached(tmp_path, f"features.text={text}", f"data.workers={workers}"))
    assert sorted(p.name for p in (tmp_path / "cache").glob("*.safetensors")) == [
        f"shard-0000{i}.safetensors" for i in range(3)
    ]
    for epoch in (0, 1):
        for one, other in zip(plain.epoch(epoch), loader.epoch(epoch), strict=True):
            live = encode_batch(models, one, ALL)
            stored = other if text else encode_batch(models, other, ALL)
            assert live.keys == stored.keys
            for field in dataclasses.fields(live):
                if isinstance(getattr(live, field.name), torch.Tensor):
                    torch.testing.assert_close(
                        getattr(stored, field.name), getattr(live, field.name), rtol=1e-4, atol=1e-5, msg=field.name
                    )


def test_window_states_are_cached_too(setup, models, tmp_path):
    section = ObjectivesSection(weight_windows=1.0)
    windows = "objectives.weight_windows=1"
    plain, loader = setup(windows), setup(*cached(tmp_path, "features.text=true"), windows)
    for batch, stored in zip(plain.epoch(0), loader.epoch(0), strict=True):
        live = encode_batch(models, batch, section)
        torch.testing.assert_close(stored.windows, live.windows, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="this cache was made with another window states; delete it"):
        setup(*cached(tmp_path, "features.text=true"))


def test_windows_are_cached_too(setup, models, tmp_path):
    """Captions of one to four windows, in another cache than those of one pass; latents serve both."""
    path = tmp_path / "data" / "data.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [{**row, "long": tiny_adapter.caption(i, sentences=3 + 2 * i)} for i, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    frozen = dataclasses.replace(models, long_prompt="windows_77")
    windows = {"long_prompt": "windows_77"}
    plain, loader = setup(**windows), setup(*cached(tmp_path, "features.text=true", "data.workers=2"), **windows)
    lengths = set()
    for batch, stored in zip(plain.epoch(0), loader.epoch(0), strict=True):
        live = encode_batch(frozen, batch, ALL)
        for name in ("long", "short", "long_length", "short_length", "teacher", "teacher_fits"):
            torch.testing.assert_close(getattr(stored, name), getattr(live, name), rtol=1e-4, atol=1e-5, msg=name)
        lengths |= set(live.long_length.tolist())
    assert lengths == {77, 154, 231, 308}
    with pytest.raises(ValueError, match="this cache was made with another long_prompt; delete it"):
        setup(*cached(tmp_path, "features.text=true"))
    latents = (f"features.folder={tmp_path / 'latents'}",)
    setup(*latents)
    setup(*latents, **windows)


def test_half_precision_halves_the_files_and_costs_rounding_only(setup, tmp_path):
    def size_and_first(dtype):
        loader = setup(f"features.folder={tmp_path / dtype}", f"features.dtype={dtype}", "features.text=true")
        return sum(p.stat().st_size for p in (tmp_path / dtype).glob("*.safetensors")), next(loader.epoch(0))

    (half, first), (full, exact) = size_and_first("fp16"), size_and_first("fp32")
    assert half < 0.6 * full
    torch.testing.assert_close(first.mean, exact.mean, rtol=2e-3, atol=1e-3)
    assert first.long.dtype == torch.float32


def test_an_interrupted_cache_goes_on_where_it_stopped(setup, tmp_path):
    setup(*cached(tmp_path))
    shards = sorted((tmp_path / "cache").glob("*.safetensors"))
    content = [load_file(shard) for shard in shards]
    shards[1].unlink()
    before = [shards[i].stat().st_mtime_ns for i in (0, 2)]
    setup(*cached(tmp_path))
    for shard, tensors in zip(shards, content, strict=True):
        again = load_file(shard)
        assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    assert [shards[i].stat().st_mtime_ns for i in (0, 2)] == before
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_bad_samples_are_replaced_as_without_cache(setup, tmp_path, caplog):
    (tmp_path / "data" / "3.png").write_bytes(b"no picture")
    options = ("data.max_bad_share=1.0",)
    plain, loader = setup(*options), setup(*cached(tmp_path, *options, "features.text=true"))
    one, other = list(plain.epoch(0)), list(loader.epoch(0))
    assert [batch.keys for batch in one] == [batch.keys for batch in other]
    assert plain.counts() == loader.counts() == {"not_an_image": 1}


def test_stale_caches_are_refused(setup, models, sd1, tmp_path):
    options = cached(tmp_path, "features.text=true")
    setup(*options)
    other_vae = type(models.vae).from_pretrained(sd1, subfolder="vae")
    with torch.no_grad():
        other_vae.encoder.conv_in.weight[0] += 1
    encoder = copy.deepcopy(models.text_encoder)
    with torch.no_grad():
        encoder.text_model.final_layer_norm.bias += 1
    tokenizer = copy.deepcopy(models.tokenizer)
    tokenizer.add_tokens(["<new>"])
    for changes, overrides, named in (
        ({"vae": other_vae}, (), "vae"),
        ({"text_encoder": encoder}, (), "text_encoder"),
        ({"teacher": encoder}, (), "base text_encoder"),
        ({"tokenizer": tokenizer}, (), "tokenizer"),
        ({}, ("captions.drop_short_from_long=true",), "captions"),
        ({}, ("features.dtype=fp16",), "dtype"),
    ):
        with pytest.raises(ValueError, match=f"this cache was made with another {named}; delete it"):
            setup(*options, *overrides, **changes)

    rows = (tmp_path / "data" / "data.jsonl").read_text().replace("Picture 7", "Drawing 7")
    (tmp_path / "data" / "data.jsonl").write_text(rows)
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors: stale: .* among samples 5 to 9 of .*data\.jsonl"):
        setup(*options)


def test_changed_pictures_and_damaged_files_are_refused(setup, tmp_path):
    options = cached(tmp_path)
    setup(*options)
    os.utime(tmp_path / "data" / "11.png", ns=(1, 1))
    with pytest.raises(ValueError, match=r"stale: .* samples 10 to 11"):
        setup(*options)
    shard = tmp_path / "cache" / "shard-00000.safetensors"
    os.truncate(shard, 10)
    with pytest.raises(ValueError, match=r"shard-00000\.safetensors: damaged"):
        setup(*options)


def test_latents_alone_allow_new_captions_every_epoch(setup, tmp_path):
    options = ("captions.short_caption=random_sentences", "captions.max_short_sentences=1")
    plain, loader = setup(*options), setup(*cached(tmp_path, *options))
    epochs = [torch.cat([batch.short_ids for batch in loader.epoch(epoch)]) for epoch in (0, 1)]
    assert not torch.equal(*epochs)
    assert torch.equal(epochs[1], torch.cat([batch.short_ids for batch in plain.epoch(1)]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (("data.flip=true",), "features.folder: a cache holds one view of a picture"),
        (("features.text=true", "captions.short_caption=random_sentence"), "a cache holds one short caption a picture"),
    ],
)
def test_what_a_cache_cannot_hold_is_refused(sd1, tmp_path, override, message):
    path = tiny_adapter.write_recipe(tmp_path / "run.yaml", sd1, "data.jsonl")
    with pytest.raises(ValueError, match=message):
        tiny_adapter.read(path, f"features.folder={tmp_path}", *override)


def test_files_are_plain_safetensors(setup, tmp_path):
    setup(*cached(tmp_path, "features.text=true"))
    with safe_open(tmp_path / "cache" / "shard-00000.safetensors", framework="pt") as file:
        assert {"mean", "logvar", "long", "short", "teacher"} < set(file.keys())
        assert json.loads(file.metadata()["keys"])[2] == "2.png"
