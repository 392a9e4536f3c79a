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
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_adapter import without_onednn  # noqa: F401

from fixclip_diffusion import FixClipStableDiffusionPipeline, train
from fixclip_diffusion.features import (
    IdsAndWindowIds,
    TokenIds,
    WindowIds,
    empty_states,
    encode_batch,
    encode_captions,
    encode_for_teacher,
    encode_pictures,
    encode_windows_for_teacher,
    num_tokens,
    num_windows,
    picture_transform,
    tokenizer_digest,
    weights_digest,
)
from fixclip_diffusion.prompts import split_windows
from fixclip_diffusion.recipe import ObjectivesSection

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


def test_window_states_stand_where_their_tokens_stand(sd1, models):
    """Each piece read alone by the stock encoder, token by token, and 0 for padding.

    What is cut at 248 or inside a word is not read; what fits into one window keeps the base's padding.
    """
    stock = StableDiffusionPipeline.from_pretrained(sd1, safety_checker=None)
    tokenizer = models.tokenizer
    uncut = "a" + "zebrahorse" * 40  # one word longer than a window
    texts = [SHORT, LONG, "", tiny_adapter.caption(1, sentences=16), tiny_adapter.caption(2, sentences=30), uncut]
    ids = pickle.loads(pickle.dumps(frozen_ids := IdsAndWindowIds(tokenizer)))(texts)
    assert isinstance(models.caption_ids_for_windows, IdsAndWindowIds)
    assert torch.equal(ids, frozen_ids(texts))
    assert torch.equal(ids[:, :248], TokenIds(tokenizer)(texts))
    torch.testing.assert_close(encode_captions(models, ids), encode_captions(models, ids[:, :248]), rtol=0, atol=0)
    states, read = encode_windows_for_teacher(models, ids)
    assert states.shape[:2] == read.shape == (len(texts), 248)
    for row, text in enumerate(texts):
        expected, pieces_ids = [], []
        for piece in split_windows(tokenizer, tokenizer.clean(text), 77):
            own = stock.tokenizer(piece, padding="max_length", max_length=77, return_tensors="pt").input_ids
            with torch.no_grad():
                found = stock.text_encoder(own).last_hidden_state[0]
            fits = len(tokenizer(text).input_ids) <= 77
            count = 77 if fits else len(tokenizer(piece).input_ids)
            first = 1 if expected else 0
            expected = expected[:-1]  # the end of the piece before
            pieces_ids = pieces_ids[:-1]
            expected += list(found[first:count])
            pieces_ids += own[0, first:count].tolist()
        whole = tokenizer(text).input_ids
        whole += [tokenizer.pad_token_id] * (77 - len(whole))
        same = [a == b for a, b in zip(whole[:248], pieces_ids, strict=False)]
        count = same.index(False) if False in same else len(same)
        count = min(count, 247) if len(whole) > 248 else count  # the last place is the end's
        padded = count == len(whole)
        assert read[row].tolist() == [True] * count + [padded] * (248 - count)
        assert not states[row, len(whole) :].any()
        torch.testing.assert_close(states[row, :count], torch.stack(expected)[:count], rtol=1e-4, atol=1e-5)
        if text not in texts[-2:]:
            assert count == len(whole), "every token has one, start and end too"
    assert read[-2].sum() == 247
    assert 0 < read[-1].sum() < len(tokenizer(uncut).input_ids)


def test_window_states_in_windows_are_the_states_themselves(models):
    frozen = dataclasses.replace(models, long_prompt="windows_77")
    ids = frozen.caption_ids_for_windows([SHORT, LONG])
    states, length = encode_captions(frozen, ids)
    teacher, read = encode_windows_for_teacher(frozen, ids)
    assert torch.equal(states, teacher)
    assert read.sum(1).tolist() == length.tolist() == [77, 154]


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
    batch = next(setup("objectives.weight_windows=1").epoch(0))
    without_noise = encode_batch(models, batch, states)
    assert without_noise.windows.shape == without_noise.long.shape
    assert without_noise.windows_read.shape == without_noise.long.shape[:2]
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
        assert torch.equal(stored.windows_read, live.windows_read)
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
