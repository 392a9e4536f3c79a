"""FixClipTokenizer against open_clip's tokenizer and against the stock one."""

import open_clip
import pytest
import tiny
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from fixclip_diffusion import FixClipTokenizer
from fixclip_diffusion.tokenizer import CleanText


@pytest.fixture(scope="module", params=["<|endoftext|>", "!"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tiny.clip_tokenizer(pad_token=request.param).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def stock(folder):
    return CLIPTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def ours(folder):
    return FixClipTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def uncleaned(folder):
    return FixClipTokenizer.from_pretrained(folder, clean_text=False)


@pytest.fixture(scope="module")
def theirs():
    return open_clip.get_tokenizer("ViT-B-32", context_length=248)


def open_clip_ids(tokenizer, text):
    """Ids of one text without the padding; the end token is the largest id."""
    ids = tokenizer([text])[0].tolist()
    return ids[: ids.index(49407) + 1]


# Letters of alphabets, symbols, emoji; no lone surrogates and no code points that Unicode has not assigned yet.
CHARACTERS = st.characters(exclude_categories=["Cs", "Cn", "Co"])
SNIPPETS = st.sampled_from(
    ["&amp;", "&amp;amp;lt;", "&#39;", "&eacute;", "e&#769;", "<b>", "“", "’", "Ã©", "â€™", "ﬁ", " \t\n", "\u3000", "!"]
)
TEXTS = st.lists(st.one_of(st.text(CHARACTERS, max_size=12), SNIPPETS, st.just(" ")), max_size=12).map("".join)


@given(text=TEXTS)
@example(text="A cat's “photo” &amp;amp; more!! It'S 3,5 m")
@example(text="ΑΣ ΟΔΟΣ ΣΟΦΙΑ İΣ ǅ ﬃ Straße")
@example(text="<p>e&#769;</p> &lt;b&gt; naïve cafe\u0301")
@example(text="schÃ¶n â€œquotedâ€\x9d")
@example(text="don't I'LL we'Re 'ſ ½ ² Ⅷ ٣ 你好，世界 👩‍👩‍👧 🇩🇪")
@example(text="l\u0345X \u0345 &amp;\u0345\u0345")
@example(text="!" * 30)
@example(text="")
@settings(max_examples=400)
def test_ids_equal_open_clips(ours, theirs, text):
    ids = ours(text, truncation=True).input_ids
    assert ids == open_clip_ids(theirs, text)


def test_very_long_text_equals_open_clips(ours, theirs):
    text = "a dog, &amp; " * 5000
    assert ours(text, truncation=True).input_ids == open_clip_ids(theirs, text)
    assert len(ours(text).input_ids) == 2 + 4 * 5000


@given(text=st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters="&<!"), max_size=80))
def test_plain_ascii_equals_the_stock_tokenizer(stock, ours, text):
    assert ours(text).input_ids == stock(text).input_ids


def test_padding_is_the_base_models(stock, ours):
    padded = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "pt"}
    texts = ["a red horse", "", "word " * 100]
    assert torch.equal(ours(texts, **padded).input_ids, stock(texts, **padded).input_ids)


def test_an_exclamation_mark_is_not_padding(ours, theirs):
    assert ours("wow!").input_ids == open_clip_ids(theirs, "wow!")


@given(text=TEXTS)
def test_without_cleaning_it_is_the_stock_tokenizer(stock, uncleaned, text):
    assert uncleaned(text).input_ids == stock(text).input_ids


def test_defaults_to_248_tokens_whatever_the_base_says(ours):
    ids = ours("word " * 300, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert ids.shape == (1, 248)
    assert ids[0, 0] == 49406
    assert ids[0, -1] == 49407


@pytest.mark.parametrize("context_length", [77, 248, 500])
def test_save_and_load(folder, tmp_path, context_length):
    first = FixClipTokenizer.from_pretrained(folder, context_length=context_length)
    first.add_tokens(["<MyToken>"])
    first.save_pretrained(tmp_path)
    again = FixClipTokenizer.from_pretrained(tmp_path)
    text = "Wow! A <MyToken> &amp; “more” " + "word " * 600
    arguments = {"padding": "max_length", "truncation": True}
    assert again(text, **arguments).input_ids == first(text, **arguments).input_ids
    assert again(text).input_ids == first(text).input_ids
    assert again.model_max_length == again.context_length == context_length
    assert again.pad_token_id == first.pad_token_id
    assert len(again) == len(first) == 49409


def test_saved_folder_loads_in_the_stock_class(ours, tmp_path):
    ours.save_pretrained(tmp_path)
    stock = CLIPTokenizer.from_pretrained(tmp_path)
    assert stock.model_max_length == 248
    assert stock("a red horse").input_ids == ours("a red horse").input_ids


@pytest.mark.parametrize("token", ["<MyToken>", "<cat-toy>", "S*", "midjourney-Style"])
def test_mixed_case_added_tokens_are_found(folder, token):
    tokenizer = FixClipTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([token])
    ids = tokenizer(f"A Photo of {token} &amp; Friends, {token}").input_ids
    assert ids.count(49408) == 2
    assert tokenizer.tokenize(f"A {token}").count(token) == 1


@pytest.mark.parametrize("name", ["x’s", "“q”", "my  cat", "a&amp;b", "&amp;", "ＡＢ", "cafe\u0301", " cat ", "ΣΑΣ’"])
def test_names_that_cleaning_would_change_are_found_as_by_the_stock_tokenizer(folder, name):
    """In whatever case, white space and composition, and only there; the text around them is cleaned."""
    stock, ours, plain = (kind.from_pretrained(folder) for kind in (CLIPTokenizer, FixClipTokenizer, FixClipTokenizer))
    for tokenizer in (stock, ours):
        tokenizer.add_tokens([name])
    for word in (name, name.upper(), name.replace(" ", "\t"), "x's q a&b & ab AB"):
        text = f"a {word} boat {word}"
        assert ours(text).input_ids.count(49408) == stock(text).input_ids.count(49408)
    assert 49408 in ours(f"a {name} boat").input_ids
    before, behind = "Wow! “more” &lt;  schÃ¶n", "caf&eacute; 's  ﬁn"
    expected = [*plain(before).input_ids[:-1], 49408, *plain(behind).input_ids[1:]]
    assert ours(f" {before} {name} {behind} ").input_ids == expected


def test_of_two_names_at_one_place_the_longer_is_expanded(folder):
    tokenizer = FixClipTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<x", "<x_1", "<xyz>", "z>", "z>_1", "<xz>", "<xz>_1"])
    for text, pieces in {
        "<XYZ>": ["<xyz>"],
        "<x": ["<x", "<x_1"],
        "<X <x_1": ["<x", "<x_1"],
        "<xz> <xyz>": ["<xz>", "<xz>_1", "<xyz>"],
    }.items():
        assert tokenizer.tokenize(text) == pieces


def test_cleaned_text_is_not_cleaned_again(ours):
    text = "a <b> &amp;amp;amp;lt;"
    once = ours.clean(text)
    assert isinstance(once, CleanText)
    assert once == "a <b> &amp;lt;"
    assert ours.clean(once) is once
    assert ours(once).input_ids == ours(text).input_ids
    assert ours(str(once)).input_ids != ours(once).input_ids, "cleaning is not idempotent, hence CleanText"


def test_too_short_a_context_is_an_error(folder):
    with pytest.raises(ValueError, match=r"context_length=2.*at least 3"):
        FixClipTokenizer.from_pretrained(folder, context_length=2)


def test_a_folder_without_tokenizer_files_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no tokenizer files there.*subfolder="):
        FixClipTokenizer.from_pretrained(tmp_path)
