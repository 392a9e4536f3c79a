"""Layouts: which token of a prompt is read where, by every conditioning; and token reports."""

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fixclip_diffusion import FixClipTokenizer, token_report
from fixclip_diffusion.conditioning import (
    ALIASES,
    CONDITIONINGS,
    Break,
    Conditioning,
    Context,
    Layout,
    PromptTokens,
    get_conditioning,
    overlapping,
    split,
)
from fixclip_diffusion.prompt_encoder import encode_passes
from fixclip_diffusion.prompt_tokens import tokenize_prompt

START, END, PAD = 9001, 9002, 9003
STRETCHED = Context(248, 77, START, END, PAD, "mask")
TRAINED = Context(248, 0, START, END, PAD, "mask")
KEPT = Context(248, 77, START, END, PAD, "keep")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.clip_tokenizer().save_pretrained(folder)
    return FixClipTokenizer.from_pretrained(folder)


def tokens_of(number, breaks=None, weights=None):
    """Tokens 0..number-1, one character each."""
    return PromptTokens(
        "x" * number,
        tuple(range(number)),
        tuple((i, i + 1) for i in range(number)),
        tuple(breaks or [Break.WORD] * number),
        tuple(weights or [1.0] * number),
    )


BREAKS = st.lists(st.sampled_from([0, 1, 2, 2, 2, 2, 3, 4]), max_size=400)


@pytest.mark.parametrize("name", CONDITIONINGS)
@pytest.mark.parametrize("context", [STRETCHED, KEPT, TRAINED], ids=["mask", "keep", "trained"])
@given(breaks=BREAKS)
@settings(max_examples=40)
def test_a_layout_reads_every_token_once_and_in_its_order(name, context, breaks):
    how = CONDITIONINGS[name]
    if how.needs_short and not context.short_length:
        with pytest.raises(ValueError, match=f"'{name}' needs the original 77 position embeddings"):
            how.lay_out(tokens_of(3), context)
        return
    tokens = tokens_of(len(breaks), breaks)
    layout = how.lay_out(tokens, context)
    read = [token for token in layout.token_L.tolist() if token >= 0]
    wanted = range(min(len(tokens), 75)) if name == "stock" else range(len(tokens))
    assert read == list(wanted)
    assert layout.num_read == len(wanted)
    assert layout.ids_NP.shape == layout.token_NP.shape == layout.weight_NP.shape
    assert layout.ids_NP.shape[1] <= context.length
    # Every pass is start, tokens, end, padding.
    for ids, numbers in zip(layout.ids_NP.tolist(), layout.token_NP.tolist(), strict=True):
        inside = [number for number in numbers if number >= 0]
        assert ids[: len(inside) + 2] == [START, *inside, END]
        assert set(ids[len(inside) + 2 :]) <= {PAD, END}
    first, last = layout.source_L[0], layout.source_L[-1]
    assert layout.ids_NP.flatten()[first] == START
    assert layout.ids_NP.flatten()[last] in (END, PAD)
    # What join takes is what source says.
    places = torch.arange(layout.ids_NP.numel()).reshape(*layout.ids_NP.shape, 1)
    assert torch.equal(layout.join(places)[:, 0], layout.source_L)


@pytest.mark.parametrize("name", CONDITIONINGS)
def test_a_text_that_fits_is_one_pass_of_77_with_its_padding(name):
    for number in (0, 1, 75):
        layout = CONDITIONINGS[name].lay_out(tokens_of(number), STRETCHED)
        assert layout.ids_NP.tolist() == [[START, *range(number), END, *[PAD] * (75 - number)]]
        assert layout.source_L.tolist() == list(range(77))


def test_sizes_that_the_documentation_names():
    shapes = {name: CONDITIONINGS[name].lay_out(tokens_of(98), STRETCHED) for name in CONDITIONINGS}
    assert {name: (len(item.ids_NP), len(item)) for name, item in shapes.items()} == {
        "stock": (1, 77),
        "chunks": (2, 154),
        "overlap": (2, 100),
        "one_pass": (1, 100),
    }
    assert len(CONDITIONINGS["one_pass"].lay_out(tokens_of(98), KEPT)) == 248
    assert len(CONDITIONINGS["one_pass"].lay_out(tokens_of(98), TRAINED)) == 100
    assert len(CONDITIONINGS["one_pass"].lay_out(tokens_of(10), TRAINED)) == 12
    long = CONDITIONINGS["one_pass"].lay_out(tokens_of(300), STRETCHED)
    assert (len(long.ids_NP), len(long)) == (2, 304)


@given(number=st.integers(76, 500))
def test_overlapping_windows_begin_every_35_tokens_and_leave_40_before_each_token(number):
    ranges = overlapping(tokens_of(number), 75, 35)
    assert [first for first, _ in ranges] == list(range(0, 35 * len(ranges), 35))
    assert all(stop == min(first + 75, number) for first, stop in ranges)
    assert len(ranges) == 1 + -(-(number - 75) // 35)
    layout = CONDITIONINGS["overlap"].lay_out(tokens_of(number), STRETCHED)
    places = layout.source_L % 77
    assert all(place > 40 for place in places[42:-1])


@st.composite
def inversions(draw):
    """Breaks of words and of textual inversions of up to 40 vectors."""
    breaks = []
    for size in draw(st.lists(st.sampled_from([1, 1, 1, 2, 5, 15, 40]), min_size=1, max_size=120)):
        breaks += [Break.NEVER] * (size - 1) + [Break.WORD]
    return breaks[:400]


@given(breaks=inversions())
def test_a_textual_inversion_is_never_divided(breaks):
    tokens = tokens_of(len(breaks), breaks)
    inside = {i + 1 for i, level in enumerate(breaks[:-1]) if level == Break.NEVER}
    for ranges in (split(tokens, 75), overlapping(tokens, 75, 35)):
        assert ranges[0][0] == 0
        assert ranges[-1][1] == len(tokens)
        for first, stop in ranges:
            assert stop - first <= 75
            assert first not in inside
            assert stop not in inside
        assert all(a[0] < b[0] <= a[1] < b[1] for a, b in itertools.pairwise(ranges))


def test_a_textual_inversion_of_more_vectors_than_a_pass_holds_is_cut():
    tokens = tokens_of(200, [Break.WORD] * 10 + [Break.NEVER] * 100 + [Break.WORD] * 90)
    for name in ("chunks", "overlap"):
        layout = CONDITIONINGS[name].lay_out(tokens, STRETCHED)
        assert [t for t in layout.token_L.tolist() if t >= 0] == list(range(200))


def test_a_pass_ends_at_the_best_place_that_it_reaches():
    levels = [Break.WORD] * 200
    levels[70], levels[40], levels[20] = Break.CLAUSE, Break.SENTENCE, Break.SENTENCE
    assert split(tokens_of(200, levels), 75)[0] == (0, 41)
    levels[40] = levels[20] = Break.INSIDE_WORD
    assert split(tokens_of(200, levels), 75)[0] == (0, 71)


@pytest.mark.parametrize("name", CONDITIONINGS)
def test_break_begins_a_new_pass(name):
    levels = [Break.WORD] * 120
    levels[9] = Break.ALWAYS
    layout = CONDITIONINGS[name].lay_out(tokens_of(120, levels), STRETCHED)
    alone = CONDITIONINGS[name].lay_out(tokens_of(110), STRETCHED)
    assert layout.pass_tokens()[0] == (0, 10)
    assert layout.pass_tokens()[1:] == [(a + 10, b + 10) for a, b in alone.pass_tokens()]
    assert layout.token_L.tolist()[77:] == [t + 10 if t >= 0 else t for t in alone.token_L.tolist()]
    assert len(layout) == 77 + len(alone)


@pytest.mark.parametrize("name", CONDITIONINGS)
def test_weights_stand_where_their_tokens_stand(name):
    weights = [1.0] * 120
    weights[7], weights[100] = 1.5, 0.5
    layout = CONDITIONINGS[name].lay_out(tokens_of(120, weights=weights), STRETCHED)
    for token, weight in zip(layout.token_NP.flatten().tolist(), layout.weight_NP.flatten().tolist(), strict=True):
        assert weight == (weights[token] if token >= 0 else 1.0)


@given(numbers=st.lists(st.integers(0, 300), min_size=1, max_size=6))
def test_passes_of_a_batch_are_encoded_together_and_come_back_to_their_prompts(numbers):
    """An encoder whose states are the ids, and which remembers the shapes of its calls."""
    shapes = []

    def encode(ids_NP):
        shapes.append(tuple(ids_NP.shape))
        return ids_NP[..., None].float(), ids_NP[:, 1:2].float()

    layouts = [CONDITIONINGS["one_pass"].lay_out(tokens_of(number), STRETCHED) for number in numbers]
    states, pooled = encode_passes(encode, layouts, STRETCHED)
    assert len(shapes) <= 2
    for layout, states_NPD, first in zip(layouts, states, pooled, strict=True):
        assert torch.equal(states_NPD[..., 0].long(), layout.ids_NP)
        assert first == layout.ids_NP[0, 1]


def test_names():
    assert get_conditioning("overlap_77").name == "overlap"
    assert set(ALIASES.values()) == set(CONDITIONINGS)
    with pytest.raises(ValueError, match="conditioning='nope': valid are stock, chunks, overlap, one_pass"):
        get_conditioning("nope")
    with pytest.raises(ValueError, match="padding='zero': valid are keep, mask"):
        Context(248, 77, 0, 1, 1, "zero")


def test_a_new_conditioning_needs_this_room_alone():
    """One that reads backwards, as a value outside of the registry: pipeline code takes it as it is."""

    @dataclasses.dataclass(frozen=True)
    class LastOnly(Conditioning):
        name = "last"
        summary = "the last 75 tokens"
        unit = "pass"

        def passes(self, tokens, context):
            kept = dataclasses.replace(tokens, ids=tokens.ids[-75:], weights=tokens.weights[-75:])
            return CONDITIONINGS["stock"].passes(kept, context)

    layout = LastOnly().lay_out(tokens_of(100), STRETCHED)
    assert isinstance(layout, Layout)
    assert layout.ids_NP[0, 1] == 25


def test_no_other_file_branches_on_a_conditionings_name():
    """A name may be passed on, chosen by default or shown; what it means is told by its class alone."""
    names = "|".join([*CONDITIONINGS, *ALIASES])
    pattern = rf"(==|!=|\bin\b|endswith|startswith)[ (\[]*['\"]({names})['\"]"
    found = subprocess.run(
        ["git", "grep", "-nE", pattern, "--", "fixclip_diffusion", "fixclip_cli", "apps", "pipelines", "comfyui"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    rooms = ("fixclip_diffusion/conditioning.py:",)
    assert not [line for line in found if " for " not in line and not line.startswith(rooms)], found


def test_layouts_need_torch_alone():
    code = (
        "import importlib.util, sys; "
        "spec = importlib.util.spec_from_file_location('conditioning', 'fixclip_diffusion/conditioning.py'); "
        "module = importlib.util.module_from_spec(spec); sys.modules['conditioning'] = module; "
        "spec.loader.exec_module(module); "
        "assert not {'diffusers', 'transformers', 'fixclip_core'} & {name.split('.')[0] for name in sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# -- tokens and reports --------------------------------------------------------------------------------------


def test_a_short_prompt_has_no_cuts(tokenizer):
    report = token_report(tokenizer, "A  red&nbsp;horse.")
    assert report.text == "A red horse."
    assert report.num_tokens == 6
    assert report.stock_cut is None
    assert report.cut is None
    assert [item.text for item in report.passes] == ["A red horse."]
    assert str(report) == "6 tokens"


def test_the_report_says_what_the_conditioning_does(tokenizer):
    text = tiny.sentences(14)
    words = {name: str(token_report(tokenizer, text, name)) for name in CONDITIONINGS}
    num_tokens = len(tokenizer(text).input_ids)
    cut = token_report(tokenizer, text, "stock").cut
    assert all(said.startswith(f"{num_tokens} tokens\n  a 77-token encoder stops before: ") for said in words.values())
    assert "cut at 77 tokens, as stock diffusers does; dropped from: " + repr(text[cut:])[:20] in words["stock"]
    assert "one behind the other, as compel and A1111 do; all of it, in 2:" in words["chunks"]
    assert "that overlap, one hidden state for each token; all of it, in 3:" in words["overlap"]
    assert "read in one pass of up to 248 tokens, all of it" in words["one_pass"]
    assert all(("all of it" in said) == (name != "stock") for name, said in words.items())


def test_cuts_are_where_reading_stops(tokenizer):
    report = token_report(tokenizer, tiny.sentences(60), "stock")
    read = report.text[: report.stock_cut]
    assert len(tokenizer(read).input_ids) == 77
    assert report.cut == report.stock_cut
    for length in (77, 78):
        over = token_report(tokenizer, "word " * (length - 2))
        assert over.num_tokens == length
        assert (over.stock_cut is None) == (length == 77)
    assert over.text[over.stock_cut :] == "word"


def test_windows_end_at_sentences_then_clauses_then_words(tokenizer):
    filler = "word " * 150

    def first(text):
        return token_report(tokenizer, text, "one_pass").passes[0].text

    assert first(f"{filler}one, two. {filler}three").endswith("one, two.")
    assert first(f"{filler}one, two {filler}three").endswith("one,")
    assert token_report(tokenizer, f"{filler}one two {filler}three", "one_pass").passes[0].num_tokens == 248


PROMPTS = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs", "Cn", "Co"]), max_size=30),
        st.sampled_from(
            ["word ", "A horse stands. ", "red, ", "\n\n", "- item\n", "👩‍👩‍👧", "3.5 m ", "&amp;", "q" * 90]
        ),
    ),
    max_size=60,
).map("".join)


@pytest.mark.parametrize("name", CONDITIONINGS)
@given(text=PROMPTS)
@example(text="👩‍👩‍👧" * 40)
@example(text="")
@settings(max_examples=25)
def test_reports_of_any_text(tokenizer, name, text):
    report = token_report(tokenizer, text, name)
    tokens = tokenize_prompt(tokenizer, text)
    assert list(tokens.ids) == tokenizer(text, add_special_tokens=False).input_ids
    assert report.num_tokens == len(tokens) + 2
    for item in report.passes:
        assert report.text[item.start : item.end].strip() == item.text
    assert report.passes[0].start == 0
    if report.cut is None:
        assert report.passes[-1].end == len(report.text)
        assert all(a.end >= b.start - 1 for a, b in zip(report.passes, report.passes[1:], strict=False))
    else:
        assert name == "stock"
    if name == "chunks" and len(report.passes) > 1:
        assert "".join("".join(item.text for item in report.passes).split()) == "".join(report.text.split())
    str(report)


def test_a_prompt_that_is_not_text(tokenizer):
    with pytest.raises(ValueError, match="a prompt must be text, got int: 5"):
        token_report(tokenizer, 5)


# -- textual inversions of several vectors -------------------------------------------------------------------


@pytest.mark.parametrize("typed", ["badhandV4", "badhandv4", "BADHANDV4", "badhandV4 badhandV4_1 badhandV4_2"])
def test_all_vectors_are_used_in_whatever_case_the_name_is_typed(typed):
    tokenizer = FixClipTokenizer.from_pretrained(_with_inversion())
    first = tokenizer.convert_tokens_to_ids("badhandV4")
    tokens = tokenize_prompt(tokenizer, f"a {typed} hand")
    assert tokens.ids[1:4] == (first, first + 1, first + 2)
    assert tokens.breaks[1:4] == (Break.NEVER, Break.NEVER, Break.WORD)
    assert tokenizer(f"a {typed} hand").input_ids[2:5] == [first, first + 1, first + 2]
    assert tokenizer.tokenize(f"a {typed} hand")[1:4] == ["badhandV4", "badhandV4_1", "badhandV4_2"]
    ids = tokenizer("a badhandv4 hand", add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == "a badhandV4 badhandV4_1 badhandV4_2 hand"
    assert tokenizer.convert_ids_to_tokens(ids)[1:3] == ["badhandV4", "badhandV4_1"]


def _with_inversion():
    import tempfile

    folder = tempfile.mkdtemp()
    tokenizer = tiny.clip_tokenizer()
    tokenizer.add_tokens(["badhandV4", "badhandV4_1", "badhandV4_2"])
    tokenizer.save_pretrained(folder)
    return folder
