"""Data: every format gives the same batches, whatever the ranks, workers and starting point."""

import functools
import http.server
import io
import json
import os
import pickle
import random
import tarfile
import threading
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from torchvision import transforms

from fixclip_core import scenes
from fixclip_core.data.config import DataConfig
from fixclip_core.data.loader import Batch, Loader, build_loader, seeded
from fixclip_core.data.order import EpochOrder, sample_seeds
from fixclip_core.data.samples import BadSampleError, Sample, check_captions, decode_image
from fixclip_core.data.sources import Source, open_source
from fixclip_core.data.sources.manifest import read_manifest
from fixclip_core.data.sources.shards import index_tar, write_index

TOKENIZER = open_clip.tokenizer.SimpleTokenizer(context_length=32)


def augment():
    """Random in torch's generator (crop) and in Python's (grey), as open_clip's own training transform is."""
    return transforms.Compose([transforms.RandomResizedCrop(8), MaybeGrey(), transforms.ToTensor()])


class MaybeGrey:
    def __call__(self, image: Image.Image) -> Image.Image:
        return image.convert("L").convert("RGB") if random.random() < 0.5 else image


def picture(index: int, size: tuple[int, int] = (12, 10), kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(index).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def caption(index: int) -> str:
    return f"Picture number {index} is noise. Its dots are coloured. There are {index + 3} reasons for that."


def write_manifest(folder: Path, count: int, name: str = "manifest.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        (folder / f"{i}.png").write_bytes(picture(i))
        rows.append({"image": f"{i}.png", "long": caption(i), "short": f"Noise {i}."})
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_shards(folder: Path, sizes: list[int], index: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for shard, size in enumerate(sizes):
        with tarfile.open(folder / f"s-{shard:02d}.tar", "w") as tar:
            for _ in range(size):
                extra = json.dumps({"short": f"Noise {number}."})
                for extension, data in (
                    ("png", picture(number)),
                    ("txt", caption(number).encode()),
                    ("json", extra.encode()),
                ):
                    member = tarfile.TarInfo(f"{number:04d}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                number += 1
    if index:
        write_index(folder, {f"s-{shard:02d}.tar": size for shard, size in enumerate(sizes)})
    return folder


def loader(source: object, *, rank: int = 0, world_size: int = 1, **fields: object) -> Loader:
    config = DataConfig.model_validate({"source": str(source), "batch_size": 4, "workers": 0, **fields})
    return build_loader(config, transform=augment(), tokenizer=TOKENIZER, rank=rank, world_size=world_size)


def same(one: Batch, other: Batch) -> bool:
    tensors = all(torch.equal(getattr(one, n), getattr(other, n)) for n in ("image", "long_ids", "short_ids", "seeds"))
    return tensors and one.keys == other.keys and one.skipped == other.skipped


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_manifest(tmp_path_factory.mktemp("manifest"), 37)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), [5, 1, 9, 0, 7, 15])


def test_a_batch_holds_what_the_model_reads(manifest):
    batch = next(loader(manifest, short_caption="given", shuffle=False).epoch(0))
    assert batch.image.shape == (4, 3, 8, 8)
    assert batch.image.dtype == torch.float32
    assert batch.keys == ["0.png", "1.png", "2.png", "3.png"]
    assert torch.equal(batch.long_ids, TOKENIZER([caption(i) for i in range(4)]))
    assert torch.equal(batch.short_ids, TOKENIZER([f"Noise {i}." for i in range(4)]))
    assert batch.seeds.tolist() == [sample_seeds(0, 0, i)[2] for i in range(4)]
    assert len(batch) == 4
    moved = batch.to("meta")
    assert moved.image.device.type == moved.seeds.device.type == "meta"
    assert moved.keys == batch.keys


def test_all_formats_give_the_same_batches(manifest, shards, tmp_path):
    rows = list(read_manifest(manifest))
    write_manifest(tmp_path, 37)
    (tmp_path / "m.csv").write_text(
        "image,short,long\n" + "".join(f'{r["image"]},{r["short"]},"{r["long"]}"\n' for r in rows)
    )
    gpt = [
        {"id": i, "image": r["image"], "conversations": [{"from": "human"}, {"value": r["long"]}]}
        for i, r in enumerate(rows)
    ]
    (tmp_path / "gpt4v.json").write_text(json.dumps(gpt, indent=1))
    folder = tmp_path / "folder"
    folder.mkdir()
    for i, row in enumerate(rows):
        (folder / f"{i:03d}.png").write_bytes(picture(i))
        (folder / f"{i:03d}.txt").write_text(row["long"])
    options = {"short_caption": "random_sentences", "shuffle_shards": 6}
    expected = list(loader(manifest, **options).epoch(1))
    assert len(expected) == 9
    for source in (tmp_path / "m.csv", tmp_path / "gpt4v.json", folder):
        got = list(loader(source, **options).epoch(1))
        for a, b in zip(expected, got, strict=True):
            assert torch.equal(a.image, b.image)
            assert torch.equal(a.long_ids, b.long_ids)
            assert torch.equal(a.short_ids, b.short_ids)
            assert torch.equal(a.seeds, b.seeds)
    unshuffled = [list(loader(s, shuffle=False).epoch(0)) for s in (manifest, shards)]
    for a, b in zip(*unshuffled, strict=True):
        assert torch.equal(a.image, b.image)
        assert torch.equal(a.long_ids, b.long_ids)


@pytest.mark.parametrize("kind", ["manifest", "shards", "scenes"])
def test_batches_do_not_depend_on_workers_nor_on_the_start(kind, request):
    source = kind if kind == "scenes" else request.getfixturevalue(kind)
    fields = {"short_caption": "random_sentence", "stop": 26 if kind == "scenes" else None, "shuffle_shards": 2}
    expected = list(loader(source, **fields).epoch(3))
    for workers in (0, 1, 2):
        for start in (0, 4):
            got = list(loader(source, workers=workers, **fields).epoch(3, start))
            assert len(got) == len(expected) - start
            assert all(map(same, expected[start:], got))


def test_loading_leaves_the_global_generators_alone(manifest):
    torch.manual_seed(5)
    random.seed(5)
    states = torch.get_rng_state(), random.getstate()
    for workers in (0, 1):
        list(loader(manifest, workers=workers).epoch(0))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def test_epochs_and_seeds_differ_and_repeat(manifest):
    def keys(epoch: int, **fields: object) -> list[str]:
        return [key for batch in loader(manifest, **fields).epoch(epoch) for key in batch.keys]

    assert keys(0) == keys(0)
    assert keys(0) != keys(1)
    assert keys(0) != keys(0, seed=1)
    first, second = (next(loader(manifest, shuffle=False).epoch(epoch)) for epoch in (0, 1))
    assert first.keys == second.keys
    assert not torch.equal(first.image, second.image), "augmentation changes with the epoch"
    assert not torch.equal(first.seeds, second.seeds)


@pytest.mark.parametrize("kind", ["manifest", "shards"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_each_global_batch(kind, world_size, request):
    source = request.getfixturevalue(kind)
    whole = list(loader(source, batch_size=6, last_batch="drop").epoch(2))
    parts = [
        list(loader(source, batch_size=6 // world_size, rank=rank, world_size=world_size).epoch(2))
        for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        assert torch.equal(batch.image, torch.cat([part[step].image for part in parts]))
        assert batch.keys == [key for part in parts for key in part[step].keys]
    assert {len(part) for part in parts} == {len(whole)}


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 0),
    window=st.integers(1, 4),
    shuffle=st.booleans(),
    epoch=st.integers(0, 3),
    data=st.data(),
)
def test_an_epoch_is_a_permutation(sizes, window, shuffle, epoch, data):
    start = data.draw(st.integers(0, sum(sizes) - 1))
    stop = data.draw(st.one_of(st.none(), st.integers(start + 1, sum(sizes))))
    config = DataConfig(source="x", start=start, stop=stop, shuffle=shuffle, shuffle_shards=window)
    order = EpochOrder(sizes, config)
    wanted = list(range(start, stop or sum(sizes)))
    in_order = [order.index(epoch, position) for position in range(len(order))]
    assert sorted(in_order) == wanted
    if not shuffle:
        assert in_order == wanted
    backwards = EpochOrder(sizes, config)
    assert [backwards.index(epoch, p) for p in reversed(range(len(order)))] == in_order[::-1]


@pytest.mark.parametrize("kind", ["manifest", "shards"])
@pytest.mark.parametrize(
    ("world_size", "last_batch"), [(1, "keep"), (1, "wrap"), (3, "wrap"), (2, "drop"), (3, "drop")]
)
@pytest.mark.parametrize("remote", [False, True])
def test_every_sample_once_per_epoch(kind, world_size, last_batch, remote, request):
    source = request.getfixturevalue(kind)
    counts: Counter[str] = Counter()
    lengths = set()
    for rank in range(world_size):
        part = loader(source, rank=rank, world_size=world_size, last_batch=last_batch)
        part.batches.source.remote = remote
        batches = list(part.epoch(0))
        lengths.add(len(batches))
        assert len(batches) == len(part)
        counts.update(key for batch in batches for key in batch.keys)
    assert len(lengths) == 1, "a rank with more batches would wait for ever"
    size = 4 * world_size
    if last_batch == "drop":
        assert set(counts.values()) == {1}
        assert len(counts) == 37 - 37 % size
    else:
        assert len(counts) == 37
        extra = 0 if last_batch == "keep" else -37 % size
        assert sum(counts.values()) == 37 + extra


def test_batch_sizes_that_cannot_work_are_refused(manifest):
    with pytest.raises(ValueError, match=r"37 samples do not fill one batch of 20 on 2 rank"):
        loader(manifest, batch_size=20, world_size=2)
    with pytest.raises(ValueError, match="last_batch='keep' needs a single rank"):
        loader(manifest, last_batch="keep", world_size=2)
    with pytest.raises(ValueError, match="start=10: an epoch has 9 batches"):
        next(loader(manifest).epoch(0, start=10))
    assert list(loader(manifest).epoch(0, start=9)) == []


# -- bad samples ---------------------------------------------------------------------------------------------


def bomb() -> bytes:
    """A PNG whose header claims 20000 x 20000 pixels."""
    data = bytearray(picture(0))
    data[16:24] = (20000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def write_bad_manifest(folder: Path, good: int = 40) -> tuple[Path, dict[str, str]]:
    """A manifest with one bad sample of every kind, and {key: reason}."""
    path = write_manifest(folder, good)
    jpeg = picture(1, (64, 64), "JPEG")
    png = bytearray(picture(2, (64, 64)))
    png[100:140] = bytes(40)
    images = {
        "truncated.jpg": ("truncated_image", jpeg[: len(jpeg) // 2]),
        "damaged.png": ("corrupt_image", bytes(png)),
        "text.jpg": ("not_an_image", b"<html>404</html>"),
        "empty.jpg": ("not_an_image", b""),
        "bomb.png": ("decompression_bomb", bomb()),
        "strip.png": ("extreme_aspect_ratio", picture(3, (300, 2))),
    }
    rows: list[dict[str, object]] = []
    reasons = {}
    for name, (reason, data) in images.items():
        (folder / name).write_bytes(data)
        rows.append({"image": name, "long": caption(0), "short": "A."})
        reasons[name] = reason
    (folder / "folder.png").mkdir()
    for name, reason, long in (
        ("absent.png", "missing_file", caption(0)),
        ("folder.png", "unreadable_file", caption(0)),
        ("a\0b.png", "unreadable_file", caption(0)),
        ("0.png", "empty_caption", " \n "),
        ("1.png", "empty_caption", "..."),
        ("2.png", "no_caption", None),
        ("3.png", "wrong_type", ["a", "list"]),
        ("4.png", "wrong_type", 7),
    ):
        rows.append({"image": name, "long": long})
        reasons[f"{name}/{long!r}"] = reason
    rows.append({"image": 5, "long": caption(0)})
    rows.append({"image": "5.png", "long": caption(0), "short": 3})
    rows.append({"image": "", "long": caption(0)})
    reasons |= {"5": "wrong_type", "5.png": "wrong_type", "": "wrong_type"}
    with path.open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    return path, reasons


def use(source: Source, index: int) -> None:
    sample = source.read(index)
    check_captions(sample)
    decode_image(sample)


def test_every_kind_of_bad_sample_is_skipped_counted_and_listed(tmp_path):
    path, reasons = write_bad_manifest(tmp_path)
    source = open_source(DataConfig(source=str(path)))
    found = []
    for index in range(40, 40 + len(reasons)):
        with pytest.raises(BadSampleError) as caught:
            use(source, index)
        found.append(caught.value.skipped)
    assert [skipped.reason for skipped in found] == list(reasons.values())
    assert found[0].file == f"{path}:41"
    assert found[0].key == "truncated.jpg"

    fields = {"max_bad_share": 0.5, "short_caption": "first_sentence", "last_batch": "wrap"}
    runs = []
    for workers in (0, 2):
        part = loader(path, workers=workers, **fields)
        batches = list(part.epoch(0))
        assert all(len(batch) == 4 for batch in batches), "others take the place of bad ones"
        assert part.counts() == Counter(reasons.values()), "counts survive the worker processes"
        assert {skipped.index for skipped in part.skipped.values()} == set(range(40, 40 + len(reasons)))
        runs.append(batches)
    assert all(map(same, *runs))


def test_a_replacement_is_not_in_the_same_global_batch(tmp_path):
    path, _ = write_bad_manifest(tmp_path, good=60)
    for epoch in range(4):
        parts = [loader(path, rank=r, world_size=2, max_bad_share=0.5) for r in range(2)]
        for batches in zip(*(part.epoch(epoch) for part in parts), strict=True):
            good = [key for batch in batches for key in batch.keys]
            replaced = sum(len(batch.skipped) for batch in batches)
            assert len(set(good)) >= len(good) - max(0, replaced - 1), "only two replacements may coincide"


def test_training_stops_past_the_share_with_one_clear_error(tmp_path):
    path, reasons = write_bad_manifest(tmp_path)
    for workers in (0, 1):
        with pytest.raises(ValueError, match=r"cannot be used, more than max_bad_share=0\.01.*(e\.g\. .*jsonl:\d+: )"):
            list(loader(path, workers=workers).epoch(0))
    assert list(loader(path, max_bad_share=len(reasons) / 57).epoch(0))
    with pytest.raises(ValueError, match=r"more than max_bad_share=0 "):
        list(loader(path, max_bad_share=0.0).epoch(0))


def test_a_wrong_image_root_stops_at_once(manifest, tmp_path):
    for workers in (0, 1):
        with pytest.raises(ValueError, match=r"missing_file \(e\.g\. ") as caught:
            next(loader(manifest, image_root=str(tmp_path), workers=workers).epoch(0))
        assert "Traceback" not in str(caught.value)
    with pytest.raises(ValueError, match="no usable sample among") as caught:
        next(loader(manifest, image_root=str(tmp_path), max_bad_share=1.0).epoch(0))
    tried = int(str(caught.value).split("among ")[1].split()[0])
    assert tried <= len(manifest.read_text().splitlines())  # each counts once, however often it stood for others


def test_given_captions_must_be_there(tmp_path):
    path = write_manifest(tmp_path, 12)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, json.dumps({"image": "0.png", "long": caption(0)})]))
    part = loader(path, short_caption="given", max_bad_share=0.1)
    list(part.epoch(0))
    assert part.counts() in ({"no_short_caption": 1}, {})
    part = loader(path, short_caption="given", max_bad_share=0.1, last_batch="keep")
    list(part.epoch(0))
    assert part.counts() == {"no_short_caption": 1}


def test_filters_count_apart_from_damage(tmp_path):
    path = write_manifest(tmp_path, 12)
    with path.open("a") as file:
        file.write("".join(json.dumps({"image": "0.png", "long": "One two three."}) + "\n" for _ in range(8)))
    part = loader(path, filter_captions=True, max_bad_share=0.0)
    list(part.epoch(0))
    assert part.counts() == {"too_short": 8}
    part = loader(path, filter_captions=True, max_bad_share=0.0, min_words=None)
    list(part.epoch(0))
    assert part.counts() == {}


def test_pictures_come_upright_rgb_and_drafted():
    pixels = Image.new("RGB", (400, 200), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter turn
    buffer = io.BytesIO()
    pixels.save(buffer, "JPEG", exif=exif)
    sample = Sample("f", "k", buffer.getvalue(), "", None)
    assert decode_image(sample).size == (200, 400)
    assert decode_image(sample, draft_size=50).size == (50, 100)
    assert decode_image(sample, draft_size=51).size == (100, 200), "no side below the draft size"
    for mode in ("L", "P", "LA", "RGBA", "CMYK", "1"):
        buffer = io.BytesIO()
        Image.new(mode, (4, 4)).save(buffer, "TIFF")
        assert decode_image(Sample("f", "k", buffer.getvalue(), "", None)).mode == "RGB"


def test_the_limit_of_pixels_is_pillows_own(monkeypatch):
    sample = Sample("f", "k", picture(0, (20, 20)), "", None)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 399)
    with pytest.raises(BadSampleError, match="decompression_bomb"):
        decode_image(sample)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert decode_image(sample).size == (20, 20)


def test_seeded_restores_generators_even_after_an_error():
    def draw() -> tuple[float, float, float]:
        return torch.rand(()).item(), random.random(), np.random.rand()  # noqa: NPY002

    with seeded(3):
        first = draw()
    before = torch.get_rng_state()
    again = []

    def fail() -> None:
        again.append(draw())
        raise RuntimeError

    with pytest.raises(RuntimeError), seeded(3):
        fail()
    assert again == [first]
    assert torch.equal(torch.get_rng_state(), before)


# -- manifests -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.jsonl", '{"image": "a", "long": "b"}\n{"image": \n', r"m\.jsonl:2: not a line of JSON"),
        ("m.jsonl", "[1]\n", r"m\.jsonl:1: expected an object"),
        ("m.jsonl", '{"file": "a", "text": "b"}\n', r"m\.jsonl:1: expected `image`, `long`.*found file, text"),
        ("m.jsonl", "\n\n", r"m\.jsonl: it holds no sample"),
        ("m.csv", "image,caption\na,b\n", r"m\.csv:1: expected `image`.*found image, caption"),
        ("m.csv", 'image,long\na,b\n"c,d\n', r"m\.csv:3: a quote that is opened here is not closed"),
        ("m.csv", "image,long\na,b\nc,d,e,f\n", r"m\.csv:3: .*more than 2 columns"),
        ("m.csv", "", r"m\.csv: it holds no sample"),
        ("m.json", '{"image": 1}', r"m\.json:1: expected a JSON list"),
        ("m.json", '[\n{"image": "a", "long": "b"}\n{"image": 1}]', r"m\.json:3: expected a comma"),
        ("m.json", '[\n{"image": "a", "long": "b"},\n{"image" 1}]', r"m\.json:3: not valid JSON"),
        ("m.json", '[\n{"image": "a", "long": "b"},\n\n', r"m\.json:\d: not valid JSON"),
        ("m.json", '[\n{"image": "a", "long": "b"},\n3]', r"m\.json:3: expected an object"),
        ("m.json", "[]", r"m\.json: it holds no sample"),
    ],
)
def test_malformed_manifests_name_file_and_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        list(read_manifest(tmp_path / name))


@pytest.mark.parametrize("name", ["m.jsonl", "m.csv", "m.json"])
def test_encodings(tmp_path, name):
    texts = {
        "m.jsonl": '\ufeff{"image": "ä.png", "long": "Ein Bär."}\r\n',
        "m.csv": '\ufeffimage,long\r\nä.png,"Ein Bär."\r\n',
        "m.json": '\ufeff[{"image": "ä.png", "long": "Ein Bär."}]',
    }
    (tmp_path / name).write_bytes(texts[name].encode())
    (row,) = read_manifest(tmp_path / name)
    assert (row["image"], row["long"]) == ("ä.png", "Ein Bär.")
    (tmp_path / name).write_bytes(texts[name].encode("latin-1", "ignore"))
    with pytest.raises(ValueError, match=rf"{name}:[12]: "):
        list(read_manifest(tmp_path / name))


@given(rows=st.lists(st.fixed_dictionaries({"image": st.text(max_size=5), "long": st.text(max_size=9)}), min_size=1))
def test_any_text_survives_the_manifest(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("any")
    (folder / "m.json").write_text(json.dumps(rows, indent=random.Random(len(rows)).choice([None, 1])))
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("m.json", "m.jsonl"):
        source = open_source(DataConfig(source=str(folder / name)))
        assert [{k: source.rows[i][k] for k in ("image", "long")} for i in range(len(rows))] == rows


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.jsonl", r"nowhere\.jsonl: cannot be read: No such file"),
        ("nowhere", "'nowhere' does not exist: give .tar shards, a manifest"),
        ("nowhere-{00..02}.tar", r"3 of 3 shards do not exist, the first is nowhere-00\.tar"),
        ("scenes", "set `stop`"),
    ],
)
def test_unknown_sources_say_what_is_valid(source, message):
    with pytest.raises(ValueError, match=message):
        open_source(DataConfig(source=source))


def test_empty_folder_and_bounds(tmp_path, manifest):
    with pytest.raises(ValueError, match=r"no \.tar shards and no images"):
        open_source(DataConfig(source=str(tmp_path)))
    with pytest.raises(ValueError, match=r"stop=38: .*manifest\.jsonl has only 37"):
        loader(manifest, stop=38)
    with pytest.raises(ValueError, match=r"start=37: .*has only 37"):
        loader(manifest, start=37)
    kept = [key for batch in loader(manifest, start=30, stop=34).epoch(0) for key in batch.keys]
    assert sorted(kept) == ["30.png", "31.png", "32.png", "33.png"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bach_size": 3}, "bach_size"),
        ({"batch_size": "3"}, "batch_size"),
        ({"batch_size": 0}, "batch_size"),
        ({"start": 5, "stop": 5}, "stop=5: it must be larger than start=5"),
        ({"short_caption": "last"}, "random_sentences"),
        ({"min_letter_share": 2.0}, "min_letter_share"),
        ({"max_bad_share": float("nan")}, "max_bad_share"),
    ],
)
def test_config_names_what_is_wrong(fields, message):
    with pytest.raises(ValidationError, match=message):
        DataConfig.model_validate({"source": "x", **fields})


# -- shards --------------------------------------------------------------------------------------------------


def test_shards_by_braces_folder_and_without_an_index(shards, tmp_path):
    expected = list(loader(shards).epoch(0))
    braces = shards / "s-{00..05}.tar"
    assert all(map(same, expected, loader(braces).epoch(0)))
    joined = f"{shards}/s-0{{0..2}}.tar::{shards}/s-0{{3..5}}.tar"
    assert all(map(same, expected, loader(joined).epoch(0)))
    assert all(map(same, expected, loader(shards / "s-*.tar").epoch(0)))
    bare = write_shards(tmp_path / "bare", [5, 1, 9, 0, 7, 15], index=False)
    part = loader(bare)
    assert part.batches.source.sizes == [5, 1, 9, 0, 7, 15]
    for a, b in zip(expected, part.epoch(0), strict=True):
        assert torch.equal(a.image, b.image)
    (bare / "sizes.json").write_text(json.dumps({f"s-{i:02d}.tar": 1 for i in range(6)}))
    assert loader(bare).batches.source.sizes == [1] * 6
    (bare / "sizes.json").write_text("[")
    assert loader(bare).batches.source.sizes == [5, 1, 9, 0, 7, 15]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def served(shards):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(shards)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_remote_shards_are_fetched_once_and_agree_with_local_ones(served, shards, tmp_path):
    source, cache = f"{served}/s-{{00..05}}.tar", tmp_path / "cache"
    expected = list(loader(shards).epoch(0))
    for workers in (0, 2):
        got = list(loader(source, workers=workers, cache_dir=str(cache)).epoch(0))
        for a, b in zip(expected, got, strict=True):
            assert torch.equal(a.image, b.image)
            assert a.keys == b.keys
    assert len(list(cache.glob("*.tar"))) == 5, "the empty shard is never read"
    piped = f"pipe:cat {shards}/s-{{00..05}}.tar"
    got = list(loader(piped, cache_dir=str(tmp_path / "piped")).epoch(0))
    assert all(torch.equal(a.image, b.image) for a, b in zip(expected, got, strict=True))


def shards_read_and_first(part: Loader, epoch: int) -> tuple[set[str], int]:
    """Numbers of the shards that a rank reads from in an epoch, and of the first of them."""
    ends = np.cumsum(part.batches.source.sizes)
    keys = [key for batch in part.epoch(epoch) for key in batch.keys]
    read = [int(np.searchsorted(ends, int(key), side="right")) for key in keys]
    return set(read), read[0]


def test_no_rank_waits_for_anothers_shards(shards, tmp_path):
    """Two ranks with one cache: the first goes through its epoch while the second hangs in its own first shard."""
    asked, go_on = threading.Event(), threading.Event()

    def rank_of(source, rank, **fields):
        part = loader(source, rank=rank, world_size=2, shuffle_shards=1, **fields)
        part.batches.source.remote = True  # each rank has its own part of the epoch, as with remote shards
        return part

    for epoch in range(20):
        (first, _), (_, stuck) = (shards_read_and_first(rank_of(shards, rank), epoch) for rank in (0, 1))
        if stuck not in first:
            break

    class Stuck(Quiet):
        def do_GET(self) -> None:
            if self.path == f"/s-{stuck:02d}.tar":
                asked.set()
                go_on.wait(60)
            super().do_GET()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Stuck, directory=str(shards)))
    source, cache = f"http://127.0.0.1:{server.server_port}/s-{{00..05}}.tar", str(tmp_path / "cache")
    with ThreadPoolExecutor(3) as pool:
        pool.submit(server.serve_forever)
        try:
            waiting = pool.submit(lambda: list(rank_of(source, 1, cache_dir=cache).epoch(epoch)))
            assert asked.wait(60)
            read = pool.submit(lambda: list(rank_of(source, 0, cache_dir=cache).epoch(epoch))).result(timeout=60)
            assert all(map(same, read, rank_of(shards, 0).epoch(epoch)))
            assert not waiting.done()
            go_on.set()
            assert len(waiting.result(timeout=60)) == len(read) == 4
        finally:
            go_on.set()
            server.shutdown()
            server.server_close()


def test_a_remote_shard_that_is_not_there(served, shards, tmp_path):
    source, cache = f"{served}/s-{{04..06}}.tar", str(tmp_path / "cache")
    with pytest.raises(ValueError, match=r"s-06\.tar: cannot be fetched: "):
        loader(source, cache_dir=cache)
    (shards / "sizes.json").write_text("{}")
    (shards / "index.json").rename(shards / "index.bak")
    try:
        (shards / "sizes.json").write_text(json.dumps({"s-04.tar": 7, "s-05.tar": 15, "s-06.tar": 2}))
        part = loader(source, cache_dir=cache, max_bad_share=1.0, last_batch="keep")
        assert sum(len(batch) for batch in part.epoch(0)) == 24
        assert part.counts() == {"unreadable_shard": 2}
    finally:
        (shards / "sizes.json").unlink()
        (shards / "index.bak").rename(shards / "index.json")


def test_s3_goes_through_webdatasets_pipe(shards, tmp_path, monkeypatch):
    """The AWS client is the user's; a script of its name shows which command line it gets."""
    client = tmp_path / "aws"
    client.write_text(f'#!/bin/sh\n[ "$1 $2 $4" = "s3 cp -" ] || exit 9\ncat "{shards}/${{3#s3://bucket/}}"\n')
    client.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    part = loader("s3://bucket/s-{00..05}.tar", cache_dir=str(tmp_path / "cache"))
    for a, b in zip(loader(shards).epoch(0), part.epoch(0), strict=True):
        assert torch.equal(a.image, b.image)


def test_batches_survive_pickling(manifest, shards):
    """Worker processes that are spawned, not forked, get a copy."""
    for source in (manifest, shards):
        part = loader(source)
        expected = part.batches[1, 2]
        assert same(pickle.loads(pickle.dumps(part.batches))[1, 2], expected)


def test_damaged_shards_lose_only_what_is_damaged(tmp_path):
    folder = write_shards(tmp_path, [10, 10])
    shard = folder / "s-01.tar"
    samples = index_tar(shard).samples
    offset, size = samples[6][1]["png"]
    os.truncate(shard, offset + size // 2)
    part = loader(folder, max_bad_share=1.0, last_batch="keep")
    keys = {key for batch in part.epoch(0) for key in batch.keys}
    assert keys == {f"{i:04d}" for i in range(16)}
    assert part.counts() == {"truncated_shard": 1, "missing_sample": 3}
    (skipped,) = [s for s in part.skipped.values() if s.reason == "truncated_shard"]
    assert (skipped.file, skipped.key) == (str(shard), "0016")


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"txt": b"A b c."}, "missing_file"),
        ({"png": picture(0)}, "no_caption"),
        ({"png": picture(0), "txt": b"\xff\xfe\xfa"}, "wrong_type"),
        ({"png": picture(0), "txt": b"A.", "json": b"{"}, "wrong_type"),
        ({"png": picture(0), "txt": b"A.", "json": b"[]"}, "wrong_type"),
        ({"png": picture(0), "json": b'{"long": 5}'}, "wrong_type"),
        ({"png": picture(0), "txt": b" "}, "empty_caption"),
    ],
)
def test_bad_members_of_a_shard(tmp_path, members, reason):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for extension, data in members.items():
            member = tarfile.TarInfo(f"key.{extension}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    source = open_source(DataConfig(source=str(tmp_path / "s.tar")))
    with pytest.raises(BadSampleError) as caught:
        check_captions(source.read(0))
    assert caught.value.skipped.reason == reason
    assert caught.value.skipped.key == "key"


def test_images_without_captions_are_a_source_for_captioning_only(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(0))
    manifest = tmp_path / "images.jsonl"
    manifest.write_text('{"image": "a.png", "licence": "CC0"}\n')
    for source in (tmp_path, manifest):
        sample = open_source(DataConfig(source=str(source)), captioned=False).read(0)
        assert (sample.image, sample.long, sample.short) == (picture(0), None, None)
        with pytest.raises(BadSampleError, match="no_caption"):
            check_captions(sample)
    assert sample.extra == {"licence": "CC0"}
    with pytest.raises(ValueError, match=r"images.jsonl:1: expected `image`, `long`"):
        open_source(DataConfig(source=str(manifest)))


def test_scenes_by_number():
    source = open_source(DataConfig(source="scenes:3"))
    assert source.sizes == [3]
    assert source.read(2).long == open_source(DataConfig(source="scenes", stop=3)).read(2).long
    for wrong in ("scenes:", "scenes:0", "scenes:x"):
        with pytest.raises(ValueError, match=r"scenes:200|endless"):
            open_source(DataConfig(source=wrong))


def test_scenes_with_references_are_a_source_of_their_own():
    source = open_source(DataConfig(source="scenes-references:32"))
    sample = source.read(5)
    assert source.sizes == [32]
    assert sample.long != open_source(DataConfig(source="scenes:32")).read(5).long
    assert source.fingerprint(5) == "scenes-references/0/5"
    assert scenes.annotate_caption(sample.long).references
    verdicts = scenes.check(sample.image, scenes.read_caption(sample.long))
    assert all(verdict.right for verdict in verdicts.objects)
    with pytest.raises(ValueError, match="scenes-references:200"):
        open_source(DataConfig(source="scenes-references"))


def test_mixed_scenes_take_turns_and_give_their_plain_wordings_to_the_batch():
    """Every second caption refers; a batch has plain ids where one of its captions does."""
    mixed = open_source(DataConfig(source="scenes-mixed:32"))
    assert mixed.read(6).long == open_source(DataConfig(source="scenes:32")).read(6).long
    assert mixed.read(7).long == open_source(DataConfig(source="scenes-references:32")).read(3).long
    assert mixed.read(6).plain is None
    assert mixed.read(7).plain != mixed.read(7).long

    def loaded(source="scenes-mixed:32", **fields):
        return next(loader(source, batch_size=8, shuffle=False, **fields).epoch(0))

    batch = loaded(short_caption="given")
    assert torch.equal(batch.long_ids[::2], batch.plain_ids[::2])
    assert not torch.equal(batch.long_ids[1::2], batch.plain_ids[1::2])
    assert batch.to("cpu").plain_ids is not None
    # What is left of a long caption without its short one is no caption that the plain wording is of.
    assert loaded(short_caption="debiased", drop_short_from_long=True).plain_ids is None
    assert loaded("scenes:32", short_caption="given").plain_ids is None
