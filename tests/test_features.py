"""Features at every step and from a cache."""

import copy
import dataclasses
import json
import os
import pickle
import shutil

import pytest
import tiny_adapter
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_adapter import without_onednn  # noqa: F401

from fixclip_core.data.sources import open_source
from fixclip_core.training.trainer import make_accelerator
from fixclip_diffusion import FixClipStableDiffusionPipeline
from fixclip_diffusion.adapter_training import trainer as train
from fixclip_diffusion.adapter_training.features import (
    empty_states,
    encode_batch,
    encode_captions,
    encode_for_teacher,
    encode_pictures,
    encode_windows_for_teacher,
    pack_layouts,
    picture_transform,
    tokens_of,
    unpack_layouts,
)
from fixclip_diffusion.adapter_training.objectives.step import adapted_embeds, short_texts_left_out
from fixclip_diffusion.adapter_training.recipe import ObjectivesSection
from fixclip_diffusion.conditioning import CONDITIONINGS, Break, Context, PromptTokens
from fixclip_diffusion.fingerprint import tokenizer_digest, weights_digest

ALL = ObjectivesSection()
LONG, SHORT = tiny_adapter.caption(0), "A red horse."


@pytest.fixture(scope="module")
def models(sd1, tmp_path_factory):
    path = tiny_adapter.write_recipe(tmp_path_factory.mktemp("models") / "run.yaml", sd1, "unused")
    found = train.load_frozen(tiny_adapter.read(path).model)
    train.place(found, torch.device("cpu"), torch.float32)
    return found


def with_encoder(models, encoder):
    """The same with another text encoder to adapt."""
    return dataclasses.replace(models, encodings=(dataclasses.replace(models.encodings[0], encoder=encoder),))


@pytest.fixture
def setup(sd1, models, tmp_path):
    """Loaders of one recipe, with and without cache."""
    data = tiny_adapter.write_data(tmp_path / "data")
    path = tiny_adapter.write_recipe(tmp_path / "run.yaml", sd1, data)

    def setup(*overrides, **changes):
        recipe = tiny_adapter.read(path, *overrides)
        accelerator = make_accelerator(recipe.train, recipe.output)
        source = open_source(train.data_config(recipe, 4))
        frozen = dataclasses.replace(models, **changes)
        reader = train.make_loader(recipe, frozen, accelerator, 4, 16, source)
        cache = train.make_cache(recipe, frozen, reader, 16)
        if cache is None:
            return reader
        cache.build(reader.batches, frozen)
        return train.cached_loader(reader, cache)

    return setup


def cached(tmp_path, *overrides):
    return (f"features.folder={tmp_path / 'cache'}", "features.shard_size=5", "features.dtype=fp32", *overrides)


# -- encoding ------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("conditioning", [name for name in CONDITIONINGS if name != "stock"])
@pytest.mark.parametrize("short_texts", [True, False])
@pytest.mark.parametrize("kind", [None, "mlp", "attention", "text"])
def test_training_reads_captions_as_the_pipeline_reads_prompts(sd1, models, conditioning, kind, short_texts):
    """One caption at a time and all together: embeds of prompts, of the empty one, and of the base's own encoder."""
    frozen = dataclasses.replace(models, conditioning=conditioning)
    width, scope = models.encodings[0].encoder.config.hidden_size, "text" if kind == "text" else "window"
    adapter = identity = tiny_adapter.no_adapter
    if kind is not None:
        kind = "attention" if kind == "text" else kind
        sizes = {"hidden_width": 16, "num_layers": 1, "num_heads": 4, "mask_padding": True}
        adapter = train.TextAdapter(width, kind, scope=scope, short_texts=short_texts, **sizes)
        adapter = tiny_adapter.randomize(adapter)
    pipe = FixClipStableDiffusionPipeline.from_pretrained(
        sd1, adapter=None if adapter is identity else adapter, conditioning=conditioning
    )
    stock = StableDiffusionPipeline.from_pretrained(sd1, safety_checker=None)
    texts = [SHORT, LONG, "", *(tiny_adapter.caption(i, sentences=n) for i, n in ((1, 16), (2, 21), (3, 40)))]
    ids = pickle.loads(pickle.dumps(frozen.caption_ids))(texts)
    acted_on = (lambda captions: captions) if short_texts else short_texts_left_out
    together, length = adapted_embeds(adapter, acted_on(encode_captions(frozen, ids)), True, scope)
    teacher, _, fits = encode_for_teacher(frozen, ids)
    for row, text in enumerate(texts):
        # The empty caption is that of guidance, beside a long one.
        expected = pipe.encode_prompt(text, "cpu", 1, False)[0][0] if text else negative_of_a_long_one(pipe)
        assert int(length[row]) == len(expected)
        torch.testing.assert_close(together[row, : len(expected)], expected, rtol=1e-4, atol=1e-4)
        assert not together[row, len(expected) :].any()
        alone = encode_captions(frozen, frozen.caption_ids([text]))
        one, _ = adapted_embeds(adapter, acted_on(alone), False, scope)
        torch.testing.assert_close(one[0], expected, rtol=1e-4, atol=1e-4)
        assert bool(fits[row]) == (len(pipe.tokenizer(text).input_ids) <= 77)
        if fits[row]:
            base = stock.encode_prompt(text, "cpu", 1, False)[0][0]
            torch.testing.assert_close(teacher[row], base, rtol=1e-4, atol=1e-5)
            if not short_texts:
                assert torch.equal(pipe.encode_prompt(text, "cpu", 1, False)[0][0], base)
    empty, empty_teacher, _ = empty_states(frozen)
    adapted = adapted_embeds(adapter, acted_on(empty), True, scope)[0]
    torch.testing.assert_close(adapted[0], negative_of_a_long_one(pipe), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(empty_teacher, teacher[2:3], rtol=1e-4, atol=1e-5)


def negative_of_a_long_one(pipe):
    """The 77 rows that guidance reads of the empty prompt beside a long one."""
    embeds = pipe.encode_prompt(LONG, "cpu", 1, True)[1][0]
    assert not embeds[77:].any()
    return embeds[:77]


def test_the_empty_prompt_is_that_of_stock_beside_short_prompts_and_the_adapters_beside_long_ones(sd1):
    """Rows of a batch do not depend on one another."""
    sizes = {"kind": "attention", "hidden_width": 16, "num_heads": 4, "mask_padding": True, "short_texts": False}
    adapter = tiny_adapter.randomize(train.TextAdapter(32, scope="text", **sizes))
    pipe = FixClipStableDiffusionPipeline.from_pretrained(sd1, adapter=adapter)
    stock = StableDiffusionPipeline.from_pretrained(sd1, safety_checker=None)
    empty = stock.encode_prompt("", "cpu", 1, False)[0][0]
    embeds, negatives = pipe.encode_prompt([SHORT, LONG], "cpu", 1, True)
    assert torch.equal(negatives[0, :77], empty)
    assert torch.equal(pipe.encode_prompt(SHORT, "cpu", 1, True)[1][0], empty)
    assert torch.allclose(negatives[1, :77], negative_of_a_long_one(pipe), atol=1e-5)
    assert not torch.allclose(negatives[1, :77], empty, atol=1e-2)
    # A negative prompt with words is read as any short prompt; embeds that were made before tell as much as prompts.
    words = pipe.encode_prompt(LONG, "cpu", 1, True, SHORT)[1][0]
    assert torch.equal(words[:77], stock.encode_prompt(SHORT, "cpu", 1, False)[0][0])
    again = pipe.encode_prompt(None, "cpu", 1, True, prompt_embeds=embeds[1:])[1]
    assert torch.allclose(again[0, :77], negatives[1, :77], atol=1e-5)


def test_an_encoder_without_original_positions_reads_as_it_was_trained(models):
    trained = copy.deepcopy(models.encodings[0].encoder)
    trained.text_model.embeddings.short_position_embedding = None
    trained.config.short_position_embeddings = 0
    frozen = with_encoder(models, trained)
    assert frozen.prompt_encoder.conditioning.name == "one_pass"
    num_tokens = len(models.tokenizer(SHORT).input_ids)
    for padding, size in (("keep", 248), ("mask", num_tokens)):
        trained.config.padding = padding
        captions = encode_captions(frozen, frozen.caption_ids([SHORT, LONG]))
        assert int(captions.size[0]) == size
        assert int((captions.text[0] == 1).sum()) == num_tokens


@torch.no_grad()
@pytest.mark.parametrize("conditioning", [name for name in CONDITIONINGS if name != "stock"])
@pytest.mark.parametrize("padding", ["mask", "keep"])
def test_window_states_stand_where_their_tokens_stand(sd1, models, conditioning, padding):
    """Against the pipeline's overlapping windows, token by token; 0 for padding behind more than 77 tokens."""
    encoder = copy.deepcopy(models.encodings[0].encoder)
    encoder.config.padding = padding
    frozen = dataclasses.replace(with_encoder(models, encoder), conditioning=conditioning)
    pipe = FixClipStableDiffusionPipeline.from_pretrained(sd1, conditioning="overlap")
    texts = [SHORT, LONG, "", *(tiny_adapter.caption(i, sentences=n) for i, n in ((1, 16), (2, 21), (3, 30)))]
    ids = frozen.caption_ids(texts)
    states, known, gap = encode_windows_for_teacher(frozen, ids)
    assert not gap.any()
    assert [int(row.sum()) for row in known] == [len(layout) for layout in unpack_layouts(ids)]
    for row, (text, layout) in enumerate(zip(texts, unpack_layouts(ids), strict=True)):
        wanted = pipe.encode_prompt(text, "cpu", 1, False)[0][0]
        for place, token in enumerate(layout.token_L.tolist()):
            if token >= 0:
                torch.testing.assert_close(states[row, place], wanted[token + 1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(states[row, 0], wanted[0], rtol=1e-4, atol=1e-5)
        if len(layout.ids_NP) == 1 and len(wanted) == 77:
            torch.testing.assert_close(states[row, :77], wanted, rtol=1e-4, atol=1e-5)
        elif len(layout.ids_NP) == 1:
            torch.testing.assert_close(states[row, len(wanted) - 1], wanted[-1], rtol=1e-4, atol=1e-5)
            assert not states[row, len(wanted) :].any()


@torch.no_grad()
@pytest.mark.parametrize("conditioning", ["one_pass", "overlap"])
def test_window_states_come_from_the_plain_wording(sd1, models, conditioning):
    """Tokens that both wordings have are taught the state in the plain one; of the others nothing is known."""
    frozen = dataclasses.replace(models, conditioning=conditioning)
    pipe = FixClipStableDiffusionPipeline.from_pretrained(sd1, conditioning="overlap")
    first = tiny_adapter.caption(1, sentences=14)
    texts, plain = [f"{first} A cat.", LONG], [f"A cat. {first}", LONG]
    states, known, gap = encode_windows_for_teacher(frozen, frozen.caption_ids(texts), frozen.caption_ids(plain))
    shift = len(pipe.tokenizer("A cat.").input_ids) - 2
    wanted = pipe.encode_prompt(plain[0], "cpu", 1, False)[0][0]
    length = len(pipe.tokenizer(texts[0]).input_ids)
    shared = range(1, length - 1 - shift)
    for place in shared:
        torch.testing.assert_close(states[0, place], wanted[place + shift], rtol=1e-4, atol=1e-5)
    assert known[0].nonzero().flatten().tolist() == [0, *shared, length - 1]
    torch.testing.assert_close(states[0, length - 1], wanted[length - 1], rtol=1e-4, atol=1e-5)
    literal = pipe.encode_prompt(texts[0], "cpu", 1, False)[0][0]
    for place in (1, shared[-1]):
        far = (states[0, place] - literal[place]).square().mean()
        torch.testing.assert_close(gap[0, place], far, rtol=1e-3, atol=1e-6)
    assert not gap[0][~known[0]].any()
    assert not gap[1].any()
    alone, *_ = encode_windows_for_teacher(frozen, frozen.caption_ids([LONG]))
    torch.testing.assert_close(states[1, : alone.shape[1]], alone[0], rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=50)
@given(numbers=st.lists(st.integers(0, 400), min_size=1, max_size=4), name=st.sampled_from(sorted(CONDITIONINGS)))
def test_packed_layouts_come_back(numbers, name):
    context = Context(248, 77, 1, 2, 3)
    layouts = []
    for number in numbers:
        spans, levels = ((0, 0),) * number, (int(Break.WORD),) * number
        tokens = PromptTokens("", tuple(range(10, 10 + number)), spans, levels, (1.0,) * number)
        layouts.append(CONDITIONINGS[name].lay_out(tokens, context))
    for layout, again in zip(layouts, unpack_layouts(pack_layouts(layouts)), strict=True):
        for field in ("ids_NP", "token_NP", "source_L", "weight_NP"):
            assert torch.equal(getattr(layout, field), getattr(again, field))
        assert list(tokens_of(again).ids) == list(range(10, 10 + layout.num_read))


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
    encoder = models.encodings[0].encoder
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
    other([LONG, SHORT], padding=True)  # the last call's padding does not count
    assert tokenizer_digest(other) == tokenizer_digest(models.tokenizer)
    other.add_tokens(["<new>"])
    assert tokenizer_digest(other) != tokenizer_digest(models.tokenizer)


def test_only_what_the_objectives_read_is_encoded(setup, models):
    batch = next(setup().epoch(0))
    every, long = (encode_batch(models, batch, section) for section in (ALL, ObjectivesSection(short_share=0.0)))
    assert torch.equal(every.long.states, long.long.states)
    assert every.teacher_fits.all()
    assert not long.teacher_fits.any()
    assert long.short is long.long
    assert every.windows is None
    states = ObjectivesSection(weight_long=0, weight_prediction=0, weight_states=1, weight_windows=1)
    without_noise = encode_batch(models, batch, states)
    assert without_noise.windows.shape[1] == without_noise.long.source.shape[1]
    assert not without_noise.mean.any()
    assert torch.equal(without_noise.long.states, every.long.states)
    assert every.short.states.shape != long.short.states.shape


# -- the cache -----------------------------------------------------------------------------------------------


def assert_features_close(one, other):
    """Tensors of features, and of the captions inside."""
    for field in dataclasses.fields(one):
        first, second = getattr(one, field.name), getattr(other, field.name)
        if dataclasses.is_dataclass(first):
            assert_features_close(first, second)
        elif isinstance(first, torch.Tensor):
            torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5, msg=field.name)


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
            assert_features_close(stored, live)


def test_window_states_are_cached_too(setup, models, tmp_path):
    section = ObjectivesSection(weight_windows=1.0)
    windows = "objectives.weight_windows=1"
    plain, loader = setup(windows), setup(*cached(tmp_path, "features.text=true"), windows)
    for batch, stored in zip(plain.epoch(0), loader.epoch(0), strict=True):
        live = encode_batch(models, batch, section)
        torch.testing.assert_close(stored.windows, live.windows, rtol=1e-4, atol=1e-5)
    less = setup(*cached(tmp_path, "features.text=true"))  # which reads less than there is
    for batch, stored in zip(plain.epoch(0), less.epoch(0), strict=True):
        assert_features_close(stored, encode_batch(models, batch, ALL))
    other = (f"features.folder={tmp_path / 'other'}", "features.text=true")
    setup(*other)
    with pytest.raises(
        ValueError, match=r"this cache has no window states, which nothing read when it was made; delete"
    ):
        setup(*other, windows)


STATES_ALONE = (  # a start without the UNet that leaves short captions alone
    *("objectives.weight_long=0", "objectives.weight_short=0", "objectives.weight_prediction=0"),
    *("objectives.weight_states=0", "objectives.short_share=0", "objectives.weight_windows=1"),
)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_nothing_reads_is_not_cached(setup, models, tmp_path, workers):
    options = (*STATES_ALONE, f"data.workers={workers}")
    section = ObjectivesSection(weight_long=0, weight_prediction=0, short_share=0, weight_windows=1)
    plain, loader = setup(*options), setup(*cached(tmp_path, "features.text=true", *options))
    with safe_open(tmp_path / "cache" / "shard-00000.safetensors", framework="pt") as file:
        names = set(file.keys())
        assert file.get_slice("mean").get_shape()[2:] == [1, 1]
    assert not [name for name in names if name.startswith(("short", "teacher"))]
    for batch, stored in zip(plain.epoch(0), loader.epoch(0), strict=True):
        live = encode_batch(models, batch, section)
        assert_features_close(stored, live)
        torch.testing.assert_close(stored.windows, live.windows, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="this cache has no latents and no short captions, which nothing read when"):
        setup(*cached(tmp_path, "features.text=true", "objectives.weight_windows=1"))
    full = (f"features.folder={tmp_path / 'full'}", "features.text=true", "features.dtype=fp32")
    setup(*full, "objectives.weight_windows=1")
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "full").iterdir()}
    for batch, stored in zip(plain.epoch(0), setup(*full, *options).epoch(0), strict=True):
        torch.testing.assert_close(stored.long.states, encode_batch(models, batch, section).long.states)
    assert before == {file.name: file.stat().st_mtime_ns for file in (tmp_path / "full").iterdir()}


def test_a_start_does_not_load_pictures(setup, tmp_path):
    """One that cannot be decoded costs nothing where no objective reads it."""
    (tmp_path / "data" / "3.png").write_bytes(b"no picture")
    loader = setup(*cached(tmp_path, "features.text=true", *STATES_ALONE))
    assert sum(len(batch) for batch in loader.epoch(0)) == 12
    assert not loader.skipped


def test_windows_are_cached_too(setup, models, tmp_path):
    """Captions of one to four windows, in another cache than those of one pass; latents serve both."""
    path = tmp_path / "data" / "data.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [{**row, "long": tiny_adapter.caption(i, sentences=3 + 2 * i)} for i, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    frozen = dataclasses.replace(models, conditioning="chunks")
    windows = {"conditioning": "chunks"}
    plain, loader = setup(**windows), setup(*cached(tmp_path, "features.text=true", "data.workers=2"), **windows)
    lengths = set()
    for batch, stored in zip(plain.epoch(0), loader.epoch(0), strict=True):
        live = encode_batch(frozen, batch, ALL)
        assert_features_close(stored, live)
        lengths |= set((live.long.source >= 0).sum(1).tolist())
    assert lengths == {77, 154, 231, 308}
    with pytest.raises(ValueError, match="this cache was made with another conditioning; delete it"):
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
    assert first.long.states.dtype == torch.float32


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


@pytest.mark.parametrize("text", ["true", "false"])
def test_bad_samples_are_replaced_and_counted_as_without_cache(setup, tmp_path, text):
    (tmp_path / "data" / "3.png").write_bytes(b"no picture")
    options = ("data.max_bad_share=1.0",)
    plain, loader = setup(*options), setup(*cached(tmp_path, *options, f"features.text={text}"))
    one, other = list(plain.epoch(0)), list(loader.epoch(0))
    assert [batch.keys for batch in one] == [batch.keys for batch in other]
    assert plain.counts() == loader.counts() == {"not_an_image": 1}
    assert plain.seen == loader.seen == 12  # `max_bad_share` is a share of these


def test_stale_caches_are_refused(setup, models, sd1, tmp_path):
    options = cached(tmp_path, "features.text=true")
    setup(*options)
    other_vae = type(models.vae).from_pretrained(sd1, subfolder="vae")
    with torch.no_grad():
        other_vae.encoder.conv_in.weight[0] += 1
    own = models.encodings[0]
    encoder = copy.deepcopy(own.encoder)
    with torch.no_grad():
        encoder.text_model.final_layer_norm.bias += 1
    tokenizer = copy.deepcopy(models.tokenizer)
    tokenizer.add_tokens(["<new>"])
    for changes, overrides, named in (
        ({"vae": other_vae}, (), "vae"),
        ({"encodings": (dataclasses.replace(own, encoder=encoder),)}, (), "text_encoder"),
        ({"teachers": (dataclasses.replace(own, encoder=encoder),)}, (), "base text_encoder"),
        ({"encodings": (dataclasses.replace(own, tokenizer=tokenizer),)}, (), "tokenizer"),
        ({}, ("captions.drop_short_from_long=true",), "captions"),
        ({}, ("features.dtype=fp16",), r"dtype \(fp32, now fp16\)"),
        ({}, ("features.text=false",), r"text \(True, now False\)"),
    ):
        with pytest.raises(ValueError, match=f"this cache was made with another {named}; delete it"):
            setup(*options, *overrides, **changes)

    rows = (tmp_path / "data" / "data.jsonl").read_text().replace("Picture 7", "Drawing 7")
    (tmp_path / "data" / "data.jsonl").write_text(rows)
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors: stale: .* among samples 5 to 9 of .*data\.jsonl"):
        setup(*options)


def test_a_cache_grows_and_shrinks_with_the_data(setup, tmp_path):
    """Its last file is made anew for a larger `data.stop`; for a smaller one its first samples are read."""
    folder = tmp_path / "cache"

    def times():
        return [file.stat().st_mtime_ns for file in sorted(folder.glob("shard-*"))]

    for stop, changed in ((9, [0, 1]), (12, [1, 2]), (11, []), (8, [])):
        before, limit = [*times(), 0, 0, 0], f"data.stop={stop}"
        plain, loader = setup(limit), setup(*cached(tmp_path, "features.text=true", limit))
        assert [number for number, time in enumerate(times()) if time != before[number]] == changed
        for one, other in zip(plain.epoch(0), loader.epoch(0), strict=True):
            assert one.keys == other.keys
            assert torch.equal(one.seeds, other.seeds)
    rows = (tmp_path / "data" / "data.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "data" / "data.jsonl").write_text("".join(rows[:11]))
    with pytest.raises(
        ValueError, match=r"shard-00002.*: holds samples up to 11, which .*made again up to data.stop=11"
    ):
        setup(*cached(tmp_path, "features.text=true"))


def test_a_cache_that_is_made_anew_under_a_training_is_no_longer_read(setup, models, sd1, tmp_path):
    """Of other weights, that is; one that grows holds what it held."""
    options = cached(tmp_path, "features.text=true")
    small = setup(*options, "data.stop=8")
    before = list(small.epoch(0))
    setup(*options)
    small.batches.cache._open.clear()  # as in a loading process of the next epoch
    for one, other in zip(before, small.epoch(0), strict=True):
        assert one.keys == other.keys
        assert torch.equal(one.mean, other.mean)
    shutil.rmtree(tmp_path / "cache")
    other_vae = type(models.vae).from_pretrained(sd1, subfolder="vae")
    with torch.no_grad():
        other_vae.encoder.conv_in.weight[0] += 1
    setup(*options, vae=other_vae)
    small.batches.cache._open.clear()
    with pytest.raises(ValueError, match=r"shard-0000\d\.safetensors: made anew .* with another features\.folder"):
        list(small.epoch(0))


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
        (("data.flip=true",), "data.flip=true: a cache of features holds one view of a picture; set it to false"),
        (
            ("features.text=false", *STATES_ALONE),
            "features.text=false: the cache would hold latents alone, which nothing",
        ),
        (("features.text=true", "captions.short_caption=random_sentence"), "a cache holds one short caption a picture"),
        (("features.text=true", "captions.short_caption=debiased"), "a cache holds one short caption a picture"),
    ],
)
def test_what_a_cache_cannot_hold_is_refused(sd1, tmp_path, override, message):
    path = tiny_adapter.write_recipe(tmp_path / "run.yaml", sd1, "data.jsonl")
    with pytest.raises(ValueError, match=message):
        tiny_adapter.read(path, f"features.folder={tmp_path}", *override)


def test_files_are_plain_safetensors(setup, tmp_path):
    setup(*cached(tmp_path, "features.text=true"))
    with safe_open(tmp_path / "cache" / "shard-00000.safetensors", framework="pt") as file:
        assert {"mean", "logvar", "long.states", "short.source", "teacher"} < set(file.keys())
        assert json.loads(file.metadata()["keys"])[2] == "2.png"
