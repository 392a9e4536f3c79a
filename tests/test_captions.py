"""Captions: sentences, short captions and filters."""

import html
import itertools
import random
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixclip_core.data import captions
from fixclip_core.data.captions import (
    SHORT_POLICIES,
    CaptionFilters,
    ShortCaptions,
    caption_pair,
    caption_words,
    clean_caption,
    letter_share,
    longest_run,
    rejection,
    repeated_share,
    split_clauses,
    split_sentences,
    words_per_clause,
)

# Text that hits the splitter's special cases far more often than arbitrary characters do.
pieces = st.sampled_from(
    [
        *[
            "Mr.",
            "e.g.",
            "3.5",
            "1.",
            "p.m.",
            "U.S.",
            "J.",
            "No.",
            "A",
            "dog",
            "barks",
            "cat",
            "Étoile",
            "x" * 30,
        ],
        *[".", "!", "?", "...", "…", "。", "！", "」", '"', "”", ")", ",", ";", ":", "—", " - ", "•"],
        *[" ", "  ", "\n", "\n\n", "\t", "\u00a0", "这是猫", "&amp;", "😀", "1"],
    ]
)
texts = st.one_of(st.text(max_size=60), st.lists(pieces, max_size=25).map("".join))


def sentences(text: str) -> list[str]:
    return [text[start:end] for start, end in split_sentences(text)]


@pytest.mark.parametrize(
    "parts",
    [
        ["Mr. Smith paid 3.5 dollars. ", "He left at 5 p.m. ", "The dog, e.g. a pug, stayed."],
        ["a red cube. ", "a blue sphere. ", "2 cats"],
        ['"Stop!" he said. ', '"Go." ', "She went."],
        ["这是一只猫。", "它很可爱！", "“真的吗？”", "是的。"],
        ["1. A cat\n", "2. A dog. ", "Big\n\n", "Title \n \n", "The end"],
        ["J. K. Rowling wrote. ", "Wait... and see. ", "So there!? ", "Yes."],
        ["The year was 1990. ", "The end"],
        ["No. 5 is alive. ", "No. ", "He said no."],
        ["The U.S. flag at 5 p.m. on Main St. 7. ", "In the U.S. ", "They."],
        ["An A.I. model made it on Jan. 5 in Washington, D.C. ", "It sold on 3 Jan. ", "Nice."],
        ["  lead.\t", "x"],
        ["He saw (a cat.) ", "Then [a dog!] ", "End"],
        ["A line\nthat wraps. ", "Next"],
        ["Is it I. ", "Yes"],
    ],
)
def test_sentences(parts):
    assert sentences("".join(parts)) == parts


def test_clauses():
    text = "a cat, 1,000 dogs; well: yes - no. End—x，猫、狗"
    assert [text[a:b] for a, b in split_clauses(text)] == [
        *["a cat, ", "1,000 dogs; ", "well: ", "yes - ", "no. ", "End—x，", "猫、", "狗"]
    ]


@pytest.mark.parametrize("split", [split_sentences, split_clauses])
@given(text=texts)
def test_spans_tile_the_text(split, text):
    spans = split(text)
    assert "".join(text[start:end] for start, end in spans) == text
    assert all(start < end for start, end in spans)
    for _, end in spans[:-1]:
        assert end == len(text) or not text[end].isspace(), "white space belongs to the sentence before"


@given(text=texts)
def test_every_sentence_says_something(text):
    parts = sentences(text)
    if len(parts) > 1:
        assert all(any(character.isalnum() for character in part) for part in parts)


@given(text=texts)
def test_clauses_refine_sentences(text):
    assert {end for _, end in split_sentences(text)} <= {end for _, end in split_clauses(text)}


@pytest.mark.parametrize("text", ["!" * 50_000 + "x", " " * 50_000 + "x", "\n" * 50_000, '."' * 25_000, "1." * 25_000])
def test_hostile_text_is_no_slower_than_long_text(text):
    """Would take minutes if a pattern backtracked."""
    assert "".join(sentences(clean_caption(text) or text))


def operations(function, *arguments) -> int:
    """Calls that Python makes, of generators each item too; a clock would measure the machine."""
    count = 0

    def observe(*_: object) -> None:
        nonlocal count
        count += 1

    sys.setprofile(observe)
    try:
        function(*arguments)
    finally:
        sys.setprofile(None)
    return count


UNITS = [". ", ", ", "; ", "? ", "\n- ", "\n1. ", " 1. ", "，", "— ", "\u00a0.", "a. ", "a, b ", "&amp; ", "猫。"]


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(
    "function",
    [
        clean_caption,
        split_sentences,
        split_clauses,
        lambda text: rejection(text, CaptionFilters(min_words=None)),
        lambda text: caption_pair(f"A. {text}", text + "a", ShortCaptions("given", drop_from_long=True), random),
    ],
    ids=["clean", "sentences", "clauses", "filters", "pair"],
)
def test_ten_times_the_text_is_ten_times_the_work(function, unit):
    """ ". " * 5000 took seconds: until the first letter, every cut looked at everything before it again."""
    function(unit * 10)  # compiles and caches what is needed once
    assert operations(function, unit * 3000) <= 12 * operations(function, unit * 300) + 100


def quadratic_spans(text: str, ends: list[int]) -> list[tuple[int, int]]:
    """What `captions._spans` must give, with each span looked at as a whole."""
    spans: list[tuple[int, int]] = []
    start = 0
    for end in [*ends, len(text)]:
        if end <= start:
            continue
        has_content = any(character.isalnum() for character in text[start:end])
        if spans and not has_content:
            spans[-1] = (spans[-1][0], end)
        elif end == len(text) or has_content:
            spans.append((start, end))
        else:
            continue
        start = end
    return spans


@given(text=texts, data=st.data())
def test_spans_are_those_of_the_plain_reference(text, data):
    ends = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    assert captions._spans(text, ends) == quadratic_spans(text, ends)


@given(pieces=st.lists(st.sampled_from(["1", "23", "4567", "a", ".", " ", "\t", "\n", "\u00a0", "\r"]), max_size=9))
def test_item_numbers_are_those_of_the_plain_reference(pieces):
    for count, word in itertools.product(range(len(pieces) + 1), ["7", "12", "1234", "x"]):
        text = "".join(pieces[:count])
        plain = word.isdigit() and len(word) <= 3 and (not text.strip() or text.rstrip(" \t").endswith("\n"))
        assert captions._is_item_number(f"{text}{word}. And", len(text + word), word) == plain


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("a &#" + "9" * 5000 + "; b", "a \ufffd b"),
        ("a &#" + "0" * 5000 + "65; b", "a A b"),
        ("a &#0; b", "a \ufffd b"),
        ("a &amp;#" + "9" * 5000 + "; b", "a \ufffd b"),
    ],
)
def test_numbers_of_entities_may_be_long(text, cleaned):
    assert clean_caption(text) == cleaned


@given(number=st.integers(0, 10**12), zeros=st.integers(0, 12))
def test_numbered_entities_mean_what_the_standard_library_says(number, zeros):
    entity = f"&#{'0' * zeros}{number};"
    assert captions._unescape(entity) == html.unescape(entity)


def test_cleaning_mends_encoding_entities_and_white_space():
    assert clean_caption("  A cafÃ©  &amp;amp;\n a \t bar. ") == "A café & a bar."
    assert clean_caption("Title\n \nText\n- one\n- two") == "Title\n\nText\n\n- one\n\n- two"
    assert clean_caption(" \n ") == ""


@given(text=st.lists(pieces.filter(lambda piece: piece != "&amp;"), max_size=25).map("".join))
def test_cleaning_twice_changes_nothing(text):
    """Not so for arbitrary characters: ftfy may find a second layer of mojibake in what it mended."""
    assert clean_caption(clean_caption(text)) == clean_caption(text)


def test_captions_import_without_torch():
    code = "import fixclip_core.data.captions, sys; assert not {'torch', 'open_clip', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


LONG = "A dog sits. It is brown. The sky is blue. A tree stands far away."


def test_first_sentence_and_the_rest():
    kept = caption_pair(LONG, "ignored", ShortCaptions("first_sentence"), random.Random(0))
    assert kept == (LONG, "A dog sits.")
    options = ShortCaptions("first_sentence", drop_from_long=True)
    long, short = caption_pair(LONG, None, options, random.Random(0))
    assert (long, short) == ("It is brown. The sky is blue. A tree stands far away.", "A dog sits.")


def test_given_short_caption_is_dropped_only_where_the_long_one_repeats_it():
    options = ShortCaptions("given", drop_from_long=True)
    assert caption_pair(LONG, "a DOG sits.", options, random.Random(0))[0].startswith("It is brown.")
    assert caption_pair(LONG, "A hound.", options, random.Random(0)) == (LONG, "A hound.")


def test_random_policies_reach_every_sentence_and_count():
    pairs = [caption_pair(LONG, None, ShortCaptions("random_sentence"), random.Random(seed)) for seed in range(60)]
    assert {short for _, short in pairs} == {text.strip() for text in sentences(LONG)}
    options = ShortCaptions("random_sentences", max_sentences=3)
    counts = {len(sentences(caption_pair(LONG, None, options, random.Random(seed))[1])) for seed in range(60)}
    assert counts == {1, 2, 3}


@given(
    text=texts.map(clean_caption).filter(bool),
    policy=st.sampled_from(SHORT_POLICIES),
    drop=st.booleans(),
    seed=st.integers(0, 2**63),
)
def test_pairs_are_never_empty_and_depend_on_the_seed_alone(text, policy, drop, seed):
    options = ShortCaptions(policy, drop_from_long=drop)
    given_short = "A short one."
    random.seed(seed)
    before = random.getstate()
    long, short = caption_pair(text, given_short, options, random.Random(seed))
    assert random.getstate() == before, "the global generator is left alone"
    assert (long, short) == caption_pair(text, given_short, options, random.Random(seed))
    assert long.strip()
    assert short.strip()
    parts = [part.strip() for part in sentences(text)]
    if policy != "given":
        used = parts if short == " ".join(parts) else [part for part in parts if part in short]
        assert used
    if not drop:
        assert long == text
    elif policy != "given" and len(parts) > 1 and len(set(parts)) == len(parts):
        assert len(long) < len(text) or short == " ".join(parts)


@pytest.mark.parametrize(
    ("long", "short", "message"),
    [
        (" ", "x", "long caption is empty"),
        ("A dog.", None, "no short caption"),
        ("A dog.", " ", "no short caption"),
    ],
)
def test_a_missing_caption_is_an_error(long, short, message):
    with pytest.raises(ValueError, match=message):
        caption_pair(long, short, ShortCaptions("given"), random.Random(0))


def test_bad_options_name_the_value():
    with pytest.raises(ValueError, match=r"'last_sentence'.*first_sentence, random_sentence"):
        ShortCaptions("last_sentence")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_sentences=0"):
        ShortCaptions(max_sentences=0)
    with pytest.raises(ValueError, match=r"min_letter_share=1\.5"):
        CaptionFilters(min_letter_share=1.5)
    with pytest.raises(ValueError, match="min_words=0"):
        CaptionFilters(min_words=0)


REJECTED = {
    "too_short": ["A cat.", "猫。", ""],
    "repetition": [
        "the cat sat on " * 8,
        "A very very very very nice dog sits on the green grass.",
        "The image shows a street. " * 3 + "There is a car.",
    ],
    "not_sentences": [
        "1girl, solo, blue hair, smile, long hair, outdoors, sky, tree",
        "IMG_1234 5678 // 44 33 22 11 00 99 jpg",
    ],
}


@pytest.mark.parametrize(("reason", "text"), [(r, t) for r, examples in REJECTED.items() for t in examples])
def test_filters_give_their_reason(reason, text):
    assert rejection(clean_caption(text), CaptionFilters()) == reason


@pytest.mark.parametrize(
    "text",
    [
        LONG,
        "A photograph of a narrow cobbled street in Lisbon, lit by 3 lamps at dusk; two trams pass.",
        "这是一只坐在绿色草地上的棕色小狗，背景是蓝色的天空。",
    ],
)
def test_good_captions_pass(text):
    assert rejection(text, CaptionFilters()) is None


@given(text=texts)
def test_switched_off_filters_reject_nothing(text):
    assert rejection(text, CaptionFilters(None, None, None, None, None)) is None


def test_measures_by_hand():
    words = caption_words("The cat, the CAT; don't stop")
    assert words == ["the", "cat", "the", "cat", "don't", "stop"]
    assert longest_run(["a", "b", "b", "b", "a"]) == 3
    assert repeated_share(["a", "b", "c"] * 3) == pytest.approx(1 - 3 / 7)
    assert repeated_share(["a"]) == 0
    assert letter_share("ab 1!") == 0.5
    assert letter_share(" ") == 0
    assert words_per_clause("one two, three") == 1.5
