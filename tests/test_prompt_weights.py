"""Prompt weights: both syntaxes, against the tools that they come from."""

import copy
import json
from types import SimpleNamespace

import pytest
import tiny
import tiny_adapter
import torch
from command_line import run
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPTextConfig, CLIPTextModel

from fixclip_diffusion import FixClipStableDiffusionPipeline, FixClipTextEncoder, TextAdapter
from fixclip_diffusion.conditioning import CONDITIONINGS, Break
from fixclip_diffusion.prompt_reader import PromptReader
from fixclip_diffusion.prompt_weights import Fragment, parse_weights, weigh

LONG = tiny.sentences(14)


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def pipe(base_folders, request):
    return FixClipStableDiffusionPipeline.from_pretrained(base_folders[request.param])


def weighted(pipe, prompt, weights, conditioning="overlap"):
    pipe._weights, pipe._conditioning = weights, conditioning
    try:
        with torch.no_grad():
            return pipe.encode_prompt(prompt, "cpu", 1, False)[0]
    finally:
        pipe._weights = pipe._conditioning = None


# -- A1111 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red cat", [("a red cat", 1.0)]),
        ("a (red) cat", [("a ", 1.0), ("red", 1.1), (" cat", 1.0)]),
        ("a ((red)) [blue] cat", [("a ", 1.0), ("red", 1.21), (" ", 1.0), ("blue", 1 / 1.1), (" cat", 1.0)]),
        ("(red:1.3) and (blue: .5 )", [("red", 1.3), (" and ", 1.0), ("blue", 0.5)]),
        ("(a (b:2) c:1.5)", [("a ", 1.5), ("b", 3.0), (" c", 1.5)]),
        (r"\(red\) \[b\] \\ c", [(r"(red) [b] \ c", 1.0)]),
        ("open (red cat", [("open ", 1.0), ("red cat", 1.1)]),
        ("close) it] 3:4 a:b", [("close) it] 3:4 a:b", 1.0)]),
        ("[red:1.3]", [("red:1.3", 1 / 1.1)]),
        ("(:1.3)", [("", 1.0)]),
        ("", [("", 1.0)]),
        ("BREAKFAST (at:1.2)", [("BREAKFAST ", 1.0), ("at", 1.2)]),
    ],
)
def test_syntax_of_a1111(text, expected):
    found = parse_weights(text, "a1111")
    assert [fragment.text for fragment in found] == [text for text, _ in expected]
    assert [fragment.weight for fragment in found] == pytest.approx([weight for _, weight in expected])


def test_break_ends_a_pass():
    assert parse_weights("a cat BREAK a dog", "a1111") == [
        Fragment("a cat ", 1.0, ends_pass=True),
        Fragment("a dog", 1.0),
    ]
    assert [fragment.ends_pass for fragment in parse_weights("BREAK a", "a1111")] == [False]


@given(text=st.text(alphabet="ab()[]:\\1.5 BREAK,", max_size=60))
def test_any_text_parses_and_loses_nothing_but_syntax(text):
    found = parse_weights(text, "a1111")
    letters = "".join(char for fragment in found for char in fragment.text if char in "ab,")
    assert letters == "".join(char for char in text.replace("BREAK", "") if char in "ab,") or "BREAK" in text
    assert all(fragment.weight > 0 or ":0" in text or "." in text for fragment in found)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_a1111_weights_multiply_states_and_restore_the_mean_of_each_pass(pipe, conditioning):
    """By hand: every pass by itself."""
    prompt = f"(A red cat:1.5) sits. {LONG} A [blue] dog."
    encoder = pipe.prompt_encoder.__class__(pipe.prompt_encoder.encodings, conditioning, "a1111")
    layout = encoder.lay_out(prompt)
    mean = pipe.text_encoder.text_model.final_layer_norm.bias
    with torch.no_grad():
        mean.fill_(0.5)  # without a mean there is nothing to restore
        expected = []
        for ids, weight in zip(layout.ids_NP, layout.weight_NP, strict=True):
            states = pipe.text_encoder(ids[None])[0][0]
            scaled = states * weight[:, None]
            expected.append(scaled * states.mean() / scaled.mean() if (weight != 1).any() else states)
        rows = layout.join(torch.stack(expected))
    try:
        torch.testing.assert_close(weighted(pipe, prompt, "a1111", conditioning)[0], rows, rtol=1e-4, atol=1e-4)
    finally:
        mean.data.fill_(0)
    assert layout.is_weighted
    read = layout.token_L[layout.token_L >= 0]
    heavy = {int(token) for token in range(3)}
    assert {int(t) for t in read if float(layout.weight_NP[layout.token_NP == t][0]) == 1.5} == heavy


def test_text_without_weights_is_left_alone_to_the_bit(pipe):
    for syntax in ("a1111", "compel"):
        assert torch.equal(weighted(pipe, "a red cat", syntax), weighted(pipe, "a red cat", None))
        assert torch.equal(weighted(pipe, LONG, syntax), weighted(pipe, LONG, None))


def test_a_pipelines_syntax_may_be_set(pipe):
    wanted = weighted(pipe, "a (red:1.5) cat", "a1111")
    pipe.weights = "a1111"
    try:
        assert pipe.weights == pipe.config.weights == "a1111"
        with torch.no_grad():
            assert torch.equal(pipe.encode_prompt("a (red:1.5) cat", "cpu", 1, False)[0], wanted)
        assert pipe.token_report("a (red:1.5) cat").text == "a red cat"
        with pytest.raises(ValueError, match="weights='a1': valid are"):
            pipe.weights = "a1"
        assert pipe.weights == "a1111"
    finally:
        pipe.weights = None


def test_literal_text_where_a_syntax_was_set(pipe, tmp_path):
    """In a call, a report, another pipeline, and one that was saved; None keeps the syntax."""
    text = "a (red:1.5) cat"
    settings = {"num_inference_steps": 1, "height": 16, "width": 16, "output_type": "np"}

    def draw(**weights):
        return pipe(text, generator=torch.Generator().manual_seed(1), **settings, **weights).images

    kind = FixClipStableDiffusionPipeline
    literal = draw()
    pipe.weights = "a1111"
    try:
        weighted = draw(weights=None)
        assert (weighted != literal).any()
        assert (draw(weights="literal") == literal).all()
        assert pipe.weights == "a1111"
        assert [pipe.token_report(text, weights=w).text for w in (None, "literal")] == ["a red cat", text]
        assert [kind.from_pipe(pipe, weights=w).weights for w in (None, "literal")] == ["a1111", None]
        pipe.save_pretrained(tmp_path)
    finally:
        pipe.weights = "literal"
    assert pipe.weights is pipe.config.weights is None, "what is saved is what every version reads"
    assert [kind.from_pretrained(tmp_path, weights=w).weights for w in ("a1111", "literal")] == ["a1111", None]
    base = str(tmp_path)
    for arguments, expected in (([], "a red cat"), (["--weights", "literal"], text)):
        reader = PromptReader.from_pretrained(base, weights=arguments[1] if arguments else None)
        assert reader.report(text).text == expected
        assert json.loads(run("tokens", text, "--base", base, "--json", *arguments).output)["text"] == expected


def test_no_syntax_takes_brackets_literally(pipe):
    literal = pipe.prompt_encoder.tokens("a (red:1.3) cat")
    assert literal.text == "a (red:1.3) cat"
    assert set(literal.weights) == {1.0}
    assert Break.ALWAYS not in pipe.prompt_encoder.tokens("a BREAK b").breaks


# -- compel --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compel(pipe):
    from compel import Compel
    from diffusers import StableDiffusionPipeline

    stock = StableDiffusionPipeline.from_pretrained(pipe._name_or_path, safety_checker=None)
    return Compel(tokenizer=stock.tokenizer, text_encoder=stock.text_encoder)


@pytest.mark.parametrize(
    "prompt",
    [
        "a red cat",
        "a red++ cat on a (wooden boat)1.3",
        "a red- cat on a (wooden boat)0.5, with a (green hat)1.2",
        "a (red cat)0.0 and a dog--",
        "(a (very)1.2 red cat)1.1 sleeps",
        "",
    ],
)
def test_compels_weights_are_compels(pipe, compel, prompt):
    with torch.no_grad():
        expected = compel(prompt)
    torch.testing.assert_close(weighted(pipe, prompt, "compel"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_compels_weights_count_beyond_token_77_too(pipe, conditioning):
    plain, heavy, light = (
        weighted(pipe, f"{LONG} A {word} hat.", "compel", conditioning)
        for word in ("green", "(green)1.5", "(green)0.5")
    )
    changed = conditioning != "stock"
    assert (not torch.equal(plain, heavy)) == changed
    assert (not torch.equal(plain, light)) == changed


@torch.no_grad()
@pytest.mark.parametrize("conditioning", ["chunks", "overlap"])
def test_weights_come_after_an_adapter_that_reads_all_windows(pipe, conditioning):
    """z' = e + w (z - e) of adapted states z and the adapted empty prompt's e, which only weighted tokens change."""
    width = pipe.text_encoder.config.hidden_size
    adapter = tiny_adapter.randomize(TextAdapter(width, "attention", num_heads=4, mask_padding=True, scope="text"))
    plain, heavy = f"{LONG} A green hat.", f"{LONG} A (green)1.5 hat."
    pipe.text_encoder.set_adapter_module(adapter)
    try:
        rows = [weighted(pipe, text, "compel", conditioning)[0] for text in (plain, heavy)]
    finally:
        pipe.text_encoder.set_adapter_module(None)
    layout = pipe._prompt_encoder_of(conditioning, "compel").lay_out(heavy)
    context = pipe.prompt_encoder.encodings[0].context
    size = layout.ids_NP.shape[1]
    empty_1P = torch.tensor([[context.start_id, context.end_id, *[context.pad_id] * (size - 2)]])
    empty_1PD = adapter(pipe.text_encoder(empty_1P).last_hidden_state, torch.arange(size)[None] < 2)
    weight_L = layout.weight_NP.flatten()[layout.source_L]
    empty_LD = empty_1PD[0][layout.source_L % size]
    expected = torch.where(weight_L[:, None] == 1, rows[0], empty_LD + weight_L[:, None] * (rows[0] - empty_LD))
    assert (weight_L == 1.5).sum() == 1
    torch.testing.assert_close(rows[1], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("prompt", [f"A (green)1.5 hat. {LONG} A (green)1.5 hat.", "A (green)1.5 hat."])
def test_a_weight_acts_alike_wherever_its_word_stands_in_one_pass(base_folders, prompt, trained):
    """z' = e + w (z - e), where e has a state for every place, though an encoder's own are 0 behind a text."""
    folder, options = base_folders["sd1"], {}
    if trained:
        own = CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder").to_dict() | {
            "max_position_embeddings": 248,
            "padding": "mask",
        }
        options["encoder"] = FixClipTextEncoder.from_clip(CLIPTextModel(CLIPTextConfig(**own)))
    pipe = FixClipStableDiffusionPipeline.from_pretrained(folder, **options)
    encoder = pipe.text_encoder
    assert encoder.config.padding == "mask"
    heavy, plain = (weighted(pipe, text, "compel", "one_pass")[0] for text in (prompt, prompt.replace("1.5", "1.0")))
    layout = pipe._prompt_encoder_of("one_pass", "compel").lay_out(prompt)
    context, size = pipe.prompt_encoder.encodings[0].context, layout.ids_NP.shape[1]
    empty_1P = torch.tensor([[context.start_id, context.end_id, *[context.pad_id] * (size - 2)]])
    keeping = copy.deepcopy(encoder)
    keeping.config.padding = "keep"
    empty_LD = keeping(empty_1P).last_hidden_state[0]
    assert empty_LD.any(-1).all()
    weight_L1 = layout.weight_NP[0][:, None]
    assert (weight_L1 == 1.5).sum() == prompt.count("1.5")
    expected = torch.where(weight_L1 == 1, plain, empty_LD + weight_L1 * (plain - empty_LD))
    torch.testing.assert_close(heavy, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("weights", ["a1111", "compel"])
def test_weights_of_a_prompt_reach_no_other_of_the_batch(pipe, weights, conditioning):
    heavy = "(green:1.5)" if weights == "a1111" else "(green)1.5"
    prompts = ["A blue hat.", f"{LONG} A {heavy} hat.", tiny.sentences(9), f"A {heavy} hat.", tiny.sentences(30)]
    mean = pipe.text_encoder.text_model.final_layer_norm.bias.data
    mean.fill_(0.5)  # without a mean there is nothing to restore
    try:
        together = weighted(pipe, prompts, weights, conditioning)
        for number, prompt in enumerate(prompts):
            (alone,) = weighted(pipe, prompt, weights, conditioning)
            torch.testing.assert_close(together[number, : len(alone)], alone, rtol=1e-5, atol=1e-5)
            assert not together[number, len(alone) :].any()
    finally:
        mean.fill_(0)


@pytest.mark.parametrize("prompt", ['("a cat", "a dog").blend(0.3, 0.7)', '("a cat", "a dog").and()'])
def test_what_is_no_weight_is_refused_with_compels_name(prompt):
    with pytest.raises(ValueError, match=r"asks for more than weights .* with compel itself"):
        parse_weights(prompt, "compel")


def test_unknown_syntax():
    with pytest.raises(ValueError, match="weights='comp': valid are 'a1111', 'compel', 'literal'"):
        parse_weights("a", "comp")


def test_a_mean_of_zero_leaves_the_states_finite():
    """Weighted states whose mean is exactly 0: no number restores it, and none is infinite."""
    states_NPD = torch.tensor([[[1.0, 3.0], [-4.0, -4.0]]])
    weight_NP = torch.tensor([[2.0, 1.0]])
    found = weigh(states_NPD, SimpleNamespace(weight_NP=weight_NP), "a1111", lambda *_: states_NPD, states_NPD[0])
    assert torch.equal(found, states_NPD * weight_NP[..., None])
