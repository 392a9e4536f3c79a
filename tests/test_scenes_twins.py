"""Near twins differ in one thing, which their captions say, and the benchmark counts who notices."""

import difflib
import json
import re
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scenes import evaluate
from torch import nn

from fixclip_core.evaluation.encoders import Encoder
from fixclip_core.evaluation.twins import (
    Pair,
    choices,
    format_choices,
    smallest_difference,
    summarize_choices,
    twin_scenes,
    twins_report,
    twins_reports,
)
from fixclip_core.model.config import FINE_TUNE
from fixclip_core.scenes import (
    CHANGES,
    DIFFERENCE_ZONES,
    check,
    difference_zone,
    long_caption,
    near_twins,
    read_caption,
    render,
    sample_scene,
    scene_at,
)
from fixclip_core.weights.load import load_fixclip

seeds = st.integers(0, 2**32)


@given(seed=seeds, split=st.sampled_from(("train", "heldout")), size=st.integers(2, 9))
@settings(max_examples=50, deadline=None)
def test_a_twin_differs_in_one_thing_and_its_caption_says_it(seed, split, size):
    scene = sample_scene(seed, num_objects=size)
    twins = near_twins(scene, seed, split=split)
    assert twins == near_twins(scene, seed, split=split)
    changes = {twin.change for twin in twins}
    assert len(changes) == len(twins)
    assert changes >= {"colour", "shape", "size"}
    assert ("place" in changes) == (size < 9)
    assert ("swap" in changes) == (len({item.colour for item in scene.objects}) > 1)
    for twin in twins:
        assert read_caption(twin.caption) == twin.scene.described()
        assert read_caption(twin.original) == scene.described()
        assert twin.scene.background == scene.background
        assert twin.original[: twin.start] == twin.caption[: twin.start]
        assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]|  |(^|\. )[a-z]", twin.caption), twin.caption
        if twin.change != "reference":
            assert twin.original == long_caption(scene, seed, split=split).text
        before = {item.place: item for item in scene.objects}
        after = {item.place: item for item in twin.scene.objects}
        different = [place for place in {**before, **after} if before.get(place) != after.get(place)]
        assert len(different) == (2 if twin.change in ("swap", "place") else 1)
        if twin.change in ("colour", "shape", "size"):
            (place,) = different
            value = getattr(after[place], twin.change)
            assert replace(before[place], **{twin.change: value}) == after[place]
        elif twin.change == "swap":
            one, other = different
            assert (before[one].colour, before[other].colour) == (after[other].colour, after[one].colour)
        elif twin.change == "place":
            old, new = sorted(different, key=lambda place: place in after)
            assert replace(before[old], place=new) == after[new], "its jitter moves with it"
        matcher = difflib.SequenceMatcher(None, twin.original.split(), twin.caption.split(), autojunk=False)
        edited = [op for op in matcher.get_opcodes() if op[0] != "equal"]
        assert len(edited) <= (4 if twin.change in ("swap", "place") else 2), "an article may change, too"


def test_the_checker_tells_twins_apart():
    scene = scene_at(5, 3, num_objects=6)
    for twin in near_twins(scene, 3):
        result = check(render(twin.scene), scene)
        same = [v.shape_right and v.colour_right and v.size_right for v in result.objects]
        assert not all(same), twin.change


def test_differences_lie_in_every_zone():
    twins = [twin for i in range(60) for twin in near_twins(scene_at(5, i, num_objects=(4, 9)), i)]
    for change in CHANGES:
        found = [difference_zone(twin) for twin in twins if twin.change == change]
        zones = {"20 to 77", "77 to 248"} if change == "reference" else set(DIFFERENCE_ZONES)
        assert set(found) >= zones
        assert len(found) >= 40
    twin = twins[0]
    assert difference_zone(twin, lambda text: 18) == "before 20"
    assert difference_zone(twin, lambda text: 75) == "77 to 248"


# The benchmark


class SeesEverything(nn.Module):
    """Text and picture become the scene that they show: features differ where scenes do, up to `reads` characters."""

    def __init__(self, texts, pictures, reads=10**6):
        super().__init__()
        self.texts, self.pictures, self.reads = texts, pictures, reads

    def feature(self, key):
        generator = torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))
        return F.normalize(torch.randn(64, generator=generator), dim=0)

    def encode_image(self, image_BCHW, normalize):
        return torch.stack([self.feature(self.pictures[image.numpy().tobytes()]) for image in image_BCHW])

    def encode_text(self, ids_BT, normalize):
        texts = ["".join(map(chr, ids_T[1 : int(ids_T.argmax())].tolist())) for ids_T in ids_BT]
        return torch.stack([self.feature(self.texts.get(text, text[: self.reads])) for text in texts])


def encoder(number, reads=10**6):
    texts, shown = {}, []
    for i in range(number):
        scene = scene_at(5, i, num_objects=(4, 9))
        twins = near_twins(scene, i)
        texts |= dict.fromkeys((long_caption(scene, i).text, *(twin.original for twin in twins)), scene)
        texts |= {twin.caption: twin.scene for twin in twins}
        shown += [scene, *(twin.scene for twin in twins)]
    pictures = {render(scene).float().numpy().tobytes(): scene for scene in shown}

    def tokenizer(batch):
        rows = [[0, *map(ord, text), 70000] for text in batch]
        return torch.tensor([row + [0] * (3000 - len(row)) for row in rows])

    def preprocess(image):
        pixels_HWC = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(72, 72, 3)
        return pixels_HWC.permute(2, 0, 1).float().contiguous()

    model = SeesEverything({text: s for text, s in texts.items() if len(text) < reads}, pictures, reads)
    return Encoder(model, tokenizer, preprocess, "all", "test", 248, 72, torch.device("cpu"))


def test_who_sees_everything_is_always_right_and_who_reads_nothing_is_at_chance():
    report = twins_report(encoder(12), 12)
    assert report["metrics"]["image_to_text_recall_at_1"] == 1
    assert report["without_twins"]["text_to_image_recall_at_1"] == 1
    assert {entry["image_to_text"] for entry in report["choices"]} == {1}
    assert len(report["pairs"]) == report["data"]["pairs"] > 12 * 4
    blind = twins_report(encoder(12, reads=3), 12)
    assert {entry[name] for entry in blind["choices"] for name in ("image_to_text", "text_to_image")} == {0.5}
    assert blind["metrics"]["image_to_text_recall_at_1"] == 0, "a tie counts against the match"
    assert f"50.0 / 50.0 ({len(blind['pairs'])})" in format_choices(blind)
    assert json.loads(json.dumps(report))["pairs"][0][2:] == [1, 1]


def test_encoders_that_share_the_pictures_get_the_reports_of_their_own():
    seeing, blind = encoder(5), encoder(5, reads=3)
    assert twins_reports([seeing, blind], 5) == [twins_report(seeing, 5), twins_report(blind, 5, batch_size=30)]


def test_runs_of_a_folder_are_judged_once(tmp_path):
    load_fixclip("builtin:scenes/clip", **FINE_TUNE).save_pretrained(tmp_path / "stretched")
    evaluate.twins(["base", "stretched"], folder=tmp_path, base=Path("builtin:scenes/clip"), number=4)
    reports = [json.loads((tmp_path / "twins" / f"{name}.json").read_text()) for name in ("base", "stretched")]
    assert [report["model"]["context_length"] for report in reports] == [77, 248]
    assert reports[0]["data"]["name"] == "scenes-twins:4"
    before = (tmp_path / "twins" / "base.json").stat().st_mtime_ns
    evaluate.twins(["base", "stretched"], folder=tmp_path, base=tmp_path / "gone", number=4)
    assert (tmp_path / "twins" / "base.json").stat().st_mtime_ns == before


def test_choices_by_hand():
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    text = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6], [0.6, 0.8]])
    pairs = [Pair("colour", "before 20", (0, 1), texts) for texts in ((0, 1), (1, 2), (1, 3))]
    to_text, to_image = choices(image, text, pairs)
    # right both times; wrong both times; the same caption twice: ties for the pictures, one caption of two fits
    assert to_text.tolist() == [1, 0, 0.5]
    assert to_image.tolist() == [1, 0, 0.5]
    rows = [("colour", "before 20", 1.0, 0.5), ("colour", "77 to 248", 0.0, 0.5)]
    found = {(e["change"], e["zone"]): e for e in summarize_choices(rows)}
    assert found["colour", "all"]["image_to_text"] == found["all", "all"]["image_to_text"] == 0.5
    assert found["all", "all"]["image_to_text_standard_error"] == pytest.approx(0.5)
    assert found["all", "before 20"]["pairs"] == 1


def test_the_smallest_difference_is_the_one_that_the_page_names():
    cases = ((5000, 0.0, 0.037), (5000, 0.01, 0.048), (1000, 0.0, 0.083), (1000, 0.01, 0.088), (29000, 0.01, 0.034))
    for pairs, spread, expected in cases:
        assert round(smallest_difference(pairs, seed_spread=spread), 3) == expected
    assert smallest_difference(5000, share=0.9) < smallest_difference(5000)
    with pytest.raises(ValueError, match="seeds=9"):
        smallest_difference(10, seeds=9)


def test_names_of_the_set():
    assert twin_scenes("scenes-twins") == 5000
    assert twin_scenes("scenes-twins:7") == 7
    for wrong in ("scenes-twins:", "scenes-twins:0", "scenes-twins:x", "scenes"):
        with pytest.raises(ValueError, match="scenes-twins:5000"):
            twin_scenes(wrong)
