"""Token reports and windows."""

import pytest
import tiny
from hypothesis import example, given
from hypothesis import strategies as st

from fixclip_diffusion import FixClipTokenizer, token_report
from fixclip_diffusion.conditioning import split_windows


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.clip_tokenizer().save_pretrained(folder)
    return FixClipTokenizer.from_pretrained(folder)


def test_a_short_prompt_has_no_cuts(tokenizer):
    report = token_report(tokenizer, "A  red&nbsp;horse.")
    assert report.text == "A red horse."
    assert report.num_tokens == 6
    assert report.stock_cut is None
    assert report.context_cut is None
    assert [window.text for window in report.windows] == ["A red horse."]
    assert str(report) == "6 tokens"


def test_cuts_are_where_reading_stops(tokenizer):
    report = token_report(tokenizer, tiny.sentences(60))
    for cut, length in ((report.stock_cut, 77), (report.context_cut, 248)):
        read = report.text[:cut]
        assert len(tokenizer(read).input_ids) == length
        full = tokenizer(report.text, truncation=True, max_length=length).input_ids
        assert tokenizer(read).input_ids == full
    assert repr(report.text[report.stock_cut :][:10])[:-1] in str(report)
    assert "read in 3 windows" in str(report)
    assert "the rest is dropped" in report.describe("truncate")
    assert "up to 248 in one pass" in str(token_report(tokenizer, tiny.sentences(14)))


def test_exactly_77_and_248_tokens_fit(tokenizer):
    for length, attribute in ((77, "stock_cut"), (248, "context_cut")):
        fits = token_report(tokenizer, "word " * (length - 2))
        assert fits.num_tokens == length
        assert getattr(fits, attribute) is None
        over = token_report(tokenizer, "word " * (length - 1))
        assert over.text[getattr(over, attribute) :] == "word"
    assert len(token_report(tokenizer, "word " * 246).windows) == 1
    assert [window.num_tokens for window in token_report(tokenizer, "word " * 247).windows] == [248, 3]


def test_windows_end_at_sentences_then_clauses_then_words(tokenizer):
    filler = "word " * 150
    by_sentence = split_windows(tokenizer, tokenizer.clean(f"{filler}one, two. {filler}three"), 248)
    assert by_sentence[0].endswith("one, two.")
    by_clause = split_windows(tokenizer, tokenizer.clean(f"{filler}one, two {filler}three"), 248)
    assert by_clause[0].endswith("one,")
    by_word = split_windows(tokenizer, tokenizer.clean(f"{filler}one two {filler}three"), 248)
    assert [len(tokenizer(piece).input_ids) for piece in by_word] == [248, 2 + 150 + 3 + 150 - 246]


def test_a_word_longer_than_a_window_is_cut_inside(tokenizer):
    pieces = split_windows(tokenizer, tokenizer.clean("q" * 3000), 77)
    assert "".join(pieces) == "q" * 3000
    assert all(len(tokenizer(piece).input_ids) <= 77 for piece in pieces)


PROMPTS = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs", "Cn", "Co"]), max_size=30),
        st.sampled_from(
            ["word ", "A horse stands. ", "red, ", "\n\n", "- item\n", "👩‍👩‍👧", "3.5 m ", "&amp;", "q" * 90]
        ),
    ),
    max_size=60,
).map("".join)


@given(text=PROMPTS, context_length=st.sampled_from([9, 20, 77, 248]))
@example(text="👩‍👩‍👧" * 40, context_length=9)
@example(text="", context_length=77)
def test_windows_lose_nothing(tokenizer, text, context_length):
    clean = tokenizer.clean(text)
    pieces = split_windows(tokenizer, clean, context_length)
    assert "".join("".join(pieces).split()) == "".join(clean.split())
    lengths = [len(tokenizer(piece).input_ids) for piece in pieces]
    assert max(lengths) <= context_length
    report = token_report(tokenizer, text, context_length)
    assert [window.text for window in report.windows] == pieces
    assert [window.num_tokens for window in report.windows] == lengths
    for window in report.windows:
        assert report.text[window.start : window.end].strip() == window.text


def test_a_prompt_that_is_not_text(tokenizer):
    with pytest.raises(ValueError, match="a prompt must be text, got int: 5"):
        token_report(tokenizer, 5)
