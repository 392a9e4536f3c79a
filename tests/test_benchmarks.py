"""Readers of published layouts and of one's own files, and where the subjects of questions lie."""

import functools
import json
import re

import benchmark_folders as folders
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fixclip_diffusion.evaluation import generate
from fixclip_diffusion.evaluation.benchmarks import LAYOUTS, open_benchmark
from fixclip_diffusion.evaluation.generate import Drawing, find_pictures, save_picture
from fixclip_diffusion.evaluation.prompts import Prompt, PromptTokens, Question, read_prompts
from fixclip_diffusion.tokenizer import FixClipTokenizer


@functools.cache
def clip_tokens() -> FixClipTokenizer:
    model = json.loads(tiny.clip_tokenizer().backend_tokenizer.to_str())["model"]
    return FixClipTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])


# -- published layouts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", folders.MAKERS)
def test_each_layout_is_recognised_and_named(name, tmp_path):
    folder = folders.MAKERS[name](tmp_path / "any name")
    recognised = open_benchmark(str(folder))
    assert recognised == open_benchmark(str(folder), name)
    assert (recognised.name, recognised.licence) == (name, LAYOUTS[name].licence)
    assert [layout.name for layout in LAYOUTS.values() if layout.recognise(folder)] == [name]
    assert len({prompt.id for prompt in recognised.prompts}) == len(recognised.prompts)


def test_dpg(tmp_path):
    kitchen, harbour = open_benchmark(str(folders.dpg(tmp_path / "dpg"))).prompts
    assert (kitchen.id, kitchen.text, harbour.text) == ("kitchen", folders.LONG, folders.TEXTS["harbour"])
    assert [(q.id, q.parents, q.category) for q in harbour.questions] == [
        ("1", (), "entity - whole"),
        ("2", ("1",), "attribute - color"),
        ("3", ("1", "2"), "relation - spatial"),
    ]
    assert {q.kind for q in kitchen.questions} == {"yes_no"}
    assert (kitchen.extra, harbour.extra) == ({"first_row": "1"}, {})


def test_tiif_has_a_short_and_a_long_twin(tmp_path):
    prompts = open_benchmark(str(folders.tiif(tmp_path))).prompts
    assert [(p.id, p.twin_of) for p in prompts] == [
        ("color/0/long", ""),
        ("color/0/short", "color/0/long"),
        ("negation/0/long", ""),
        ("negation/0/short", "negation/0/long"),
    ]
    assert [(q.text, q.expected) for q in prompts[3].questions] == [
        ("Is there a table?", "yes"),
        ("Are there lemons?", "no"),
    ]
    assert prompts[0].questions == prompts[1].questions


def test_longbench_lgbench_and_geneval2(tmp_path):
    first, second = open_benchmark(str(folders.longbench(tmp_path / "a"))).prompts
    assert (first.id, second.id) == ("0", "1")
    assert [(q.id, q.kind) for q in first.questions] == [("Object", "score"), ("Color and Tone", "score")]
    (goal,) = open_benchmark(str(folders.lgbench(tmp_path / "b"))).prompts
    assert (goal.id, goal.category) == ("7", "food/kitchen")
    assert [(q.category, q.text) for q in goal.questions][1] == (
        "attribute", 'Does the image show this: "the hat is white"?',
    )  # fmt: skip
    many, one = open_benchmark(str(folders.geneval2(tmp_path / "c"))).prompts
    assert [(q.expected, q.kind, q.category) for q in many.questions] == [
        ("three", "word", "count"),
        ("Yes", "yes_no", "attribute"),
    ]
    assert one.extra == {"atom_count": 2}


def spoil(path, change):
    path.write_text(change(path.read_text()))


@pytest.mark.parametrize(
    ("name", "file", "change", "message"),
    [
        ("dpg", "dpg_bench.csv", None, r"dpg_bench\.csv is missing; dpg is a folder with dpg_bench\.csv"),
        ("dpg", "prompts/harbour.txt", None, r"1 prompts are missing, e\.g\. harbour\.txt"),
        ("dpg", "dpg_bench.csv", lambda t: t.replace("harbour", "pier"), r"prompts are missing, e\.g\. pier\.txt"),
        ("dpg", "dpg_bench.csv", lambda t: t.replace('"1, 2"', "1,2"), r":7: more columns than the first line"),
        ("dpg", "dpg_bench.csv", lambda t: t.replace('"1, 2"', '"1, 9"'), "question '3': its parent '9' is"),
        ("dpg", "dpg_bench.csv", lambda t: t.replace(",tuple,", ",other,"), r":2: no tuple; found item_id"),
        ("tiif", "testmini_eval_prompts/color_eval_prompts.jsonl", None, "missing; it holds the questions of color"),
        (
            "tiif", "testmini_eval_prompts/color_eval_prompts.jsonl", lambda t: t + t,
            r"2 lines for the 1 prompts of color_prompts\.jsonl",
        ),
        (
            "tiif", "testmini_eval_prompts/color_eval_prompts.jsonl", lambda t: t.replace("color", "shape"),
            r":1: type 'shape', but the prompt's is 'color'",
        ),
        ("longbench", "instruction.jsonl", lambda t: t[:100], r"instruction\.jsonl:1: not JSON"),
        ("longbench", "instruction.jsonl", lambda t: t.replace("label", "labels"), "an object with instruction, label"),
        ("lgbench", "t2i_1000.json", lambda t: t.replace("goals", "aims"), "entry 1: expected an object with id"),
        ("lgbench", "t2i_1000.json", lambda t: '{"a": 1}', "expected a list of prompts, found dict"),
        ("geneval2", "geneval2_data.jsonl", lambda t: t.replace('"count", ', ""), ":1: 2 questions and 1 skills"),
    ],
)  # fmt: skip
def test_incomplete_folders_are_named(name, file, change, message, tmp_path):
    folder = folders.MAKERS[name](tmp_path / name)
    if change is None:
        (folder / file).unlink()
    else:
        spoil(folder / file, change)
    with pytest.raises(ValueError, match=message):
        open_benchmark(str(folder), name)


def test_what_nothing_recognises_is_refused_with_what_was_found(tmp_path):
    (tmp_path / "notes.md").write_text("hello")
    with pytest.raises(ValueError, match=r"it holds notes\.md\. Known are dpg: a folder with dpg_bench\.csv"):
        open_benchmark(str(tmp_path))
    with pytest.raises(ValueError, match="benchmark 'drawbench': valid are dpg, tiif"):
        open_benchmark(str(tmp_path), "drawbench")
    with pytest.raises(ValueError, match="no such folder; tiif is a folder with testmini_prompts"):
        open_benchmark(str(tmp_path / "none"), "tiif")


# -- files of one's own --------------------------------------------------------------------------------------

OWN = {
    "id": "k1", "category": "food", "prompt": folders.LONG, "short": "A cook and a lobster.",
    "questions": [
        {"id": "cook", "text": "Is there a cook?", "about": "A cook in a white hat"},
        {"id": "hat", "text": "Is the hat white?", "parents": ["cook"]},
        "Is there a lobster?",
        {"text": "How many lemons are there?", "expected": "three", "category": "count"},
    ],
}  # fmt: skip


def test_own_prompts_with_questions_and_a_short_twin(tmp_path):
    file = tmp_path / "own.json"
    file.write_text(json.dumps([OWN, {"prompt": "A boat."}]))
    long, short, boat = read_prompts(str(file))
    assert (long.id, short.id, short.twin_of, boat.id) == ("k1", "k1/short", "k1", "00002")
    assert [(q.id, q.expected, q.parents) for q in long.questions] == [
        ("cook", "yes", ()),
        ("hat", "yes", ("cook",)),
        ("3", "yes", ()),
        ("4", "three", ()),
    ]
    assert (long.questions[0].about, short.questions[0].about) == ("A cook in a white hat", "")
    lines = tmp_path / "own.jsonl"
    lines.write_text(json.dumps(OWN) + "\n")
    assert read_prompts(str(lines)) == [long, short]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.txt", '["A horse.", "A boat."]', "it looks like JSON; a text file has one prompt a line"),
        ("rows.csv", "prompt\nA horse.\n", r"it looks like a \.csv table"),
        ("list.json", '{"prompts": []}', "expected a list of objects with `prompt`, found an object with prompts"),
        ("list.json", '["A horse."]', "entry 1: expected a JSON object with `prompt`"),
        ("list.json", "[", "not JSON"),
        ("list.json", '[{"text": "a"}]', "expected a JSON object with `prompt`, found text"),
        ("list.json", '[{"prompt": "a", "short": "b"}]', "a prompt with `short` needs an `id`"),
        (
            "list.json",
            '[{"prompt": "a", "questions": [{"text": "b", "parent": 1}]}]',
            "question 1 has 'parent'; valid are",
        ),
        (
            "list.json",
            '[{"prompt": "a", "questions": [{"text": "b", "parents": ["x"]}]}]',
            "its parent 'x' is no question",
        ),
        (
            "list.json",
            '[{"prompt": "a", "questions": [{"id": 1, "text": "b"}, {"id": 1, "text": "c"}]}]',
            "share the id '1'",
        ),
        ("rows.jsonl", '{"prompt": "a", "id": 1}\n{"prompt": "b", "id": 1}\n', r":2: id '1' stands in line 1 already"),
    ],
)
def test_formats_that_are_none_are_refused_with_what_was_found(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(str(tmp_path / name))


def test_a_folder_is_no_file_of_prompts(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"a folder with a\.txt; of no benchmark"):
        read_prompts(str(tmp_path))


# -- places --------------------------------------------------------------------------------------------------


def test_places_of_questions():
    """30 numbered sentences of about 10 tokens: given by `about`, or found by the words they share."""
    text = tiny.sentences(30)
    tokens = PromptTokens(text, clip_tokens())
    ends = [tokens.place(start, end).last for start, end in tokens.sentences]
    assert ends[-1] == tokens.num_tokens - 2
    for number in (0, 6, 7, 15, 29):
        sentence = text[slice(*tokens.sentences[number])]
        given = tokens.find(Question("1", "?", about=sentence))
        found = tokens.find(Question("1", f"Does something stand near the number {number}?"))
        assert given == found
        assert given.last == ends[number]
        assert given.window == (ends[number] - 1) // 75 + 1
        wanted = "before" if ends[number] <= 75 else "after" if ends[number] <= 246 else "past"
        assert given.zone == (wanted if given.first > 75 or ends[number] <= 75 else "across")


def test_what_no_sentence_or_two_answer_is_about_the_whole_prompt():
    tokens = PromptTokens("A red horse stands here. A red boat lies there.", clip_tokens())
    for question in ("Is it raining?", "Is something red?", ""):
        assert tokens.find(Question("1", question)).zone == "whole"
    assert tokens.find(Question("1", "Is the boat red?")).last == tokens.num_tokens - 2
    assert tokens.find(Question("1", "?", about="a green cow")).zone == "whole"
    assert tokens.find(Question("1", "Is the boat red?", expected="")).zone == "whole"


@given(st.text(max_size=200), st.text(max_size=80))
def test_any_text_has_places_within_itself(text, question):
    tokens = PromptTokens(text, clip_tokens())
    place = tokens.find(Question("1", question))
    assert 0 <= place.first <= place.last <= len(tokens.offsets)
    assert (place.zone == "whole") == (place.last == 0)


# -- pictures made elsewhere ---------------------------------------------------------------------------------


def square(path, colour, side=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), colour).save(path)
    return path


def test_pictures_of_dpg_are_grids(tmp_path):
    benchmark = open_benchmark(str(folders.dpg(tmp_path / "dpg")))
    grid = Image.new("RGB", (8, 8))
    for number, colour in enumerate(("red", "lime", "blue", "white")):
        grid.paste(colour, (number % 2 * 4, number // 2 * 4, number % 2 * 4 + 4, number // 2 * 4 + 4))
    for prompt in benchmark.prompts:
        grid.save(tmp_path / f"{prompt.id}.png")
    found = find_pictures(tmp_path, benchmark.prompts, Drawing(num_seeds=3), benchmark.layout, partial=False)
    assert [[p.load().getpixel((1, 1)) for p in own] for own in found] == [[(255, 0, 0), (0, 255, 0), (0, 0, 255)]] * 2
    whole = find_pictures(tmp_path, benchmark.prompts, Drawing(), benchmark.layout, partial=False)
    assert whole[0][0].load().size == (8, 8)
    with pytest.raises(ValueError, match="5 pictures of a prompt: a grid of DPG-Bench holds 4"):
        find_pictures(tmp_path, benchmark.prompts, Drawing(num_seeds=5), benchmark.layout, partial=False)


def test_pictures_as_each_benchmark_names_them(tmp_path, monkeypatch):
    tiif = open_benchmark(str(folders.tiif(tmp_path / "tiif")))
    for kind in ("color", "negation"):
        for length in ("short", "long"):
            square(tmp_path / "t" / kind / "my-model" / f"{length}_description" / "0.jpg", "red")
    longbench = open_benchmark(str(folders.longbench(tmp_path / "longbench")))
    for index in "01":
        for step, picture in ((1, 9), (2, 3), (2, 11)):
            square(tmp_path / "l" / index / f"step{step}" / f"generated_image_{picture}.jpg", "red")
    geneval = open_benchmark(str(folders.geneval2(tmp_path / "geneval2")))
    square(tmp_path / "g" / "x.png", "red")
    (tmp_path / "g.json").write_text(json.dumps({prompt.text: "g/x.png" for prompt in geneval.prompts}))
    for benchmark, root, wanted in (
        (tiif, tmp_path / "t", r"color/my-model/long_description/0\.jpg"),
        (longbench, tmp_path / "l", r"0/step2/generated_image_11\.jpg"),
        (geneval, tmp_path / "g.json", r"g/x\.png"),
    ):
        found = find_pictures(root, benchmark.prompts, Drawing(), benchmark.layout, partial=False)
        assert re.search(wanted + "$", str(found[0][0].path)), benchmark.name
        assert all(picture.path for own in found for picture in own)
    (tmp_path / "l" / "1").rename(tmp_path / "l" / "2")
    (tmp_path / "l" / "0").rename(tmp_path / "l" / "1")  # the scorer pairs sorted folders with prompts, from any number
    found = find_pictures(tmp_path / "l", longbench.prompts, Drawing(), longbench.layout, partial=False)
    assert [own[0].path.parts[-3] for own in found] == ["1", "2"]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "g.json").write_text((tmp_path / "g.json").read_text())
    monkeypatch.chdir(tmp_path)  # GenEval 2's scorer reads paths from the working directory
    found = find_pictures(tmp_path / "elsewhere" / "g.json", geneval.prompts, Drawing(), geneval.layout, partial=False)
    assert all(own[0].path for own in found)
    square(tmp_path / "t" / "color" / "another" / "long_description" / "0.png", "red")
    with pytest.raises(ValueError, match="pictures of 2 models, another, my-model: keep one"):
        find_pictures(tmp_path / "t", tiif.prompts, Drawing(), tiif.layout, partial=False)


def test_missing_and_foreign_pictures_are_named(tmp_path):
    prompts = [Prompt("A boat.", id="boat"), Prompt("A tree.", id="tree")]
    with pytest.raises(ValueError, match=r"no picture of any of the 2 prompts, e\.g\. none of 'boat'"):
        find_pictures(tmp_path, prompts, Drawing(), None, partial=True)
    square(tmp_path / "boat.png", "red")
    with pytest.raises(ValueError, match=r"pictures of 1 of 2 prompts are missing, e\.g\. of tree; with --partial"):
        find_pictures(tmp_path, prompts, Drawing(), None, partial=False)
    found = find_pictures(tmp_path, prompts, Drawing(), None, partial=True)
    assert [own[0].path for own in found] == [tmp_path / "boat.png", None]
    (tmp_path / "tree.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"tree\.png: not a picture, or damaged"):
        find_pictures(tmp_path, prompts, Drawing(), None, partial=False)
    metadata = generate.drawn_of(generate.System("a"), prompts[0], 0, Drawing())
    save_picture(tmp_path / "tree.png", Image.new("RGB", (8, 8)), metadata)
    with pytest.raises(ValueError, match=r"tree\.png: a picture of another prompt, 'A boat\.' instead of 'A tree\.'"):
        find_pictures(tmp_path, prompts, Drawing(), None, partial=False)
