"""The nodes against our pipelines, on tiny real models.

The CLIP objects stand in for ComfyUI's, or are a real ComfyUI's: `pytest tests/comfyui --comfyui PATH`.
"""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import stand_in
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from fixclip_diffusion import (
    FixClipStableDiffusionPipeline,
    FixClipStableDiffusionXLPipeline,
    FixClipTextEncoder,
    TextAdapter,
)
from fixclip_diffusion.tiny import clip_text_config, stable_diffusion_xl

ROOT = Path(__file__).parents[2]
SHORT = "A red horse near a boat, in the evening."
LONG = tiny.sentences(14)
TEXTS = ("", SHORT, LONG, tiny.sentences(40))
WINDOWS = ("stock", "chunks", "overlap")


def same(found, expected):
    """Within 1e-5; of their spread, where states are larger than those behind a LayerNorm."""
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(1.0, float(expected.std())))


def encoded(encode, *args, **kwargs):
    """(hidden states, pooled vector) of a CLIP without hooks."""
    ((states, more),) = encode.encode_prompt(*args, **kwargs)
    return states, more["pooled_output"]


def trained(**config):
    """An adapter that is not the identity."""
    adapter = TextAdapter(**{"num_heads": 4, **config})
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return adapter.eval()


@pytest.fixture(scope="module")
def sd1_clip(core, sd1):
    model = CLIPTextModel.from_pretrained(sd1, subfolder="text_encoder").eval()
    return core.clip({"l": (model, CLIPTokenizer.from_pretrained(sd1, subfolder="tokenizer"))})


@pytest.fixture(scope="module")
def older_clip(sd1):
    """As a core of 2023 reads texts: word by word."""
    model = CLIPTextModel.from_pretrained(sd1, subfolder="text_encoder").eval()
    return stand_in.OlderClip({"l": (model, tiny.clip_tokenizer())})


@pytest.fixture(scope="module")
def sd1_pipe(sd1):
    return FixClipStableDiffusionPipeline.from_pretrained(sd1)


@pytest.fixture(scope="module")
def long_model():
    torch.manual_seed(1)
    return CLIPTextModel(clip_text_config(max_position_embeddings=248, eos_token_id=49407)).eval()


@pytest.fixture(scope="module")
def long_clip(core, long_model):
    return core.clip({"l": (long_model, tiny.clip_tokenizer(248))})


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdxl")
    pipe = stable_diffusion_xl(tiny.clip_tokenizer(), tiny.clip_tokenizer(pad_token="!"))
    pipe.text_encoder_2.config.projection_dim = 48  # as wide as the encoder, as ComfyUI takes for granted
    pipe.text_encoder_2 = CLIPTextModelWithProjection(pipe.text_encoder_2.config)
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def xl_models(xl):
    first = CLIPTextModel.from_pretrained(xl, subfolder="text_encoder").eval()
    second = CLIPTextModelWithProjection.from_pretrained(xl, subfolder="text_encoder_2").eval()
    return {"l": (first, tiny.clip_tokenizer()), "g": (second, tiny.clip_tokenizer(pad_token="!"))}


@pytest.fixture(scope="module")
def xl_clip(core, xl_models):
    return core.clip(xl_models)


@pytest.fixture(scope="module")
def xl_pipe(xl):
    return FixClipStableDiffusionXLPipeline.from_pretrained(xl, add_watermarker=False)


@torch.no_grad()
def ours(pipe, text, conditioning):
    pipe.conditioning = conditioning
    if isinstance(pipe, FixClipStableDiffusionXLPipeline):
        states, _, pooled, _ = pipe.encode_prompt(text, do_classifier_free_guidance=False)
        return states, pooled
    return pipe.encode_prompt(text, "cpu", 1, False)[0], None


@pytest.mark.parametrize("conditioning", WINDOWS)
@pytest.mark.parametrize("text", TEXTS)
def test_stable_diffusion_1(encode, sd1_clip, sd1_pipe, text, conditioning, monkeypatch):
    calls, through = [], sd1_clip.encode_from_tokens
    monkeypatch.setattr(sd1_clip, "encode_from_tokens", lambda *a, **k: calls.append(a) or through(*a, **k))
    states, _ = encoded(encode, sd1_clip, text, conditioning)
    same(states, ours(sd1_pipe, text, conditioning)[0])
    assert len(calls) == 1


def test_stable_diffusion_2_pads_with_zero_and_has_the_key_h(core, encode, base_folders):
    folder = base_folders["sd2"]
    model = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder").eval()
    clip = core.clip({"h": (model, tiny.clip_tokenizer(pad_token="!"))})
    pipe = FixClipStableDiffusionPipeline.from_pretrained(folder)
    for text in (SHORT, LONG):
        same(encoded(encode, clip, text, "chunks")[0], ours(pipe, text, "chunks")[0])


WORDS = st.sampled_from(["a red horse", "BOAT.", "Mr. Gray,", "etc. The", "end!", "(1888);", "ünïcödé", "🐙", "it's"])


@given(st.lists(WORDS, min_size=1, max_size=60), st.sampled_from(WINDOWS))
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text(encode, sd1_clip, older_clip, sd1_pipe, words, conditioning):
    text = " ".join(words).replace("(", "[").replace(")", "]")  # brackets are weights in ComfyUI
    expected, _ = ours(sd1_pipe, text, conditioning)
    for clip in (sd1_clip, older_clip):
        same(encoded(encode, clip, text, conditioning)[0], expected)


@pytest.mark.parametrize(
    "text", ["One. Two, three.\n\nFour", "A (red:1.2), big \\(old\\) horse's house.", "ÄÖÜ 🐙 Zebra"]
)
def test_the_text_is_put_together_as_it_was(encode, sd1_clip, text):
    reading = encode.read_prompt(sd1_clip, text, "stock")["l"]
    plain = text.replace("(red:1.2)", "red").replace("\\(", "(").replace("\\)", ")")
    assert reading.tokens.text == plain


@pytest.mark.parametrize("text", TEXTS)
def test_a_long_clip_in_one_pass(encode, long_clip, long_model, sd1, text):
    pipe = FixClipStableDiffusionPipeline.from_pretrained(sd1, encoder=FixClipTextEncoder.from_clip(long_model))
    states, _ = encoded(encode, long_clip, text)  # auto
    same(states, ours(pipe, text, "one_pass")[0])


def test_short_prompts_beside_a_long_clip_are_the_base_s(encode, sd1_clip, long_clip):
    short, _ = encoded(encode, sd1_clip, SHORT, long_clip=long_clip)
    same(short, encoded(encode, sd1_clip, SHORT, "stock")[0])
    long, _ = encoded(encode, sd1_clip, LONG, long_clip=long_clip)
    same(long, encoded(encode, long_clip, LONG, "one_pass")[0])


@pytest.mark.parametrize("conditioning", WINDOWS)
@pytest.mark.parametrize("text", TEXTS)
def test_stable_diffusion_xl(encode, xl_clip, xl_pipe, text, conditioning):
    states, pooled = encoded(encode, xl_clip, text, conditioning)
    expected, expected_pooled = ours(xl_pipe, text, conditioning)
    same(states, expected)
    same(pooled, expected_pooled)


@pytest.mark.parametrize("text", [SHORT, LONG])
def test_stable_diffusion_xl_with_a_long_first_encoder(core, encode, xl_clip, xl_models, long_model, text):
    clip = core.clip({"l": (long_model, tiny.clip_tokenizer(248)), "g": xl_models["g"]})
    states, _ = encoded(encode, clip, text)
    with torch.no_grad():
        ids = torch.tensor(tiny.clip_tokenizer(248)(text, padding="max_length").input_ids)[None]
        first = long_model(ids, output_hidden_states=True).hidden_states[-2]
    same(states[..., :32], first[:, : states.shape[1]])
    same(states[..., 32:], encoded(encode, xl_clip, text, "overlap")[0][..., 32:])


@pytest.mark.parametrize(
    "options",
    [
        *({"kind": kind, "mask_padding": masked} for kind in ("mlp", "attention") for masked in (False, True)),
        *(
            {"kind": "attention", "mask_padding": True, "scope": "text", "conditioning": c}
            for c in ("chunks", "overlap")
        ),
        *(
            {"kind": "attention", "mask_padding": True, "scope": scope, "short_texts": False}
            for scope in ("window", "text")
        ),
        {"kind": "attention", "mask_padding": True, "scope": "text", "rotary": True, "causal_heads": 2},
    ],
)
def test_adapters_act_as_in_the_pipeline(nodes, models_folder, sd1, sd1_clip, options, tmp_path):
    trained(**{"width": 32, "conditioning": "chunks", **options}).save_pretrained(tmp_path)
    name = f"{'-'.join(map(str, options.values()))}.safetensors"
    (models_folder / "fixclip" / name).write_bytes((tmp_path / "adapter.safetensors").read_bytes())
    (adapter,) = nodes["FixClipLoadAdapter"](name=name)
    pipe = FixClipStableDiffusionPipeline.from_pretrained(sd1, adapter=tmp_path)
    for text in (SHORT, LONG):
        ((states, more),) = nodes["FixClipEncodeLongPrompt"](sd1_clip, text, "auto", adapter)[0]
        same(states, ours(pipe, text, None)[0])
        assert "pooled_output" in more


def test_an_adapter_of_stable_diffusion_xl_goes_to_the_encoder_of_its_width(encode, xl, xl_clip):
    adapter = trained(width=32)
    pipe = FixClipStableDiffusionXLPipeline.from_pretrained(xl, adapter=(adapter, None), add_watermarker=False)
    same(encoded(encode, xl_clip, LONG, "overlap", adapter)[0], ours(pipe, LONG, "overlap")[0])


@pytest.mark.parametrize("text", TEXTS)
def test_a_pair_of_adapters_of_stable_diffusion_xl_in_either_order(encode, xl, xl_clip, text):
    options = {"kind": "attention", "scope": "text", "mask_padding": True, "conditioning": "overlap"}
    pair = tuple(trained(width=width, short_texts=width == 48, **options) for width in (32, 48))
    pipe = FixClipStableDiffusionXLPipeline.from_pretrained(xl, adapter=pair, add_watermarker=False)
    expected = ours(pipe, text, "overlap")
    for one, other in (pair, pair[::-1]):
        for found, wanted in zip(encoded(encode, xl_clip, text, adapter=one, adapter_2=other), expected, strict=True):
            same(found, wanted)
    with pytest.raises(ValueError, match=r"both adapters are for the text encoder 'l' \(width 32\)"):
        encoded(encode, xl_clip, text, adapter=pair[0], adapter_2=pair[0])


@pytest.mark.parametrize("adapter", [None, "mlp"])
def test_weights_stay_with_their_tokens(encode, sd1_clip, adapter):
    adapter = trained(width=32) if adapter else None
    text, weight = tiny.sentences(12), 1.5
    plain, _ = encoded(encode, sd1_clip, f"{text} zebra {SHORT}", "chunks", adapter)
    heavy, _ = encoded(encode, sd1_clip, f"{text} (zebra:{weight}) {SHORT}", "chunks", adapter)
    empty, _ = encoded(encode, sd1_clip, "", "chunks", adapter)
    assert heavy.shape == plain.shape
    changed = ((heavy - plain).abs() > 1e-5).any(-1)[0].nonzero()[:, 0].tolist()
    reading = encode.read_prompt(sd1_clip, f"{text} (zebra:{weight}) {SHORT}", "chunks")["l"]
    assert changed == (reading.layout.weight_NP.flatten() == weight).nonzero()[:, 0].tolist()
    (row,) = changed
    assert row > 77
    base = empty[0, row % 77]
    same(heavy[0, row], base + weight * (plain[0, row] - base))


@pytest.mark.parametrize("scope", ["window", "text"])
def test_weights_beside_an_adapter_are_those_of_the_pipeline(encode, sd1_clip, sd1, scope):
    """Above 1 ComfyUI's rule is compel's; the adapter sees states that no weight has touched."""
    adapter = trained(width=32, kind="attention", scope=scope, mask_padding=True, conditioning="overlap")
    pipe = FixClipStableDiffusionPipeline.from_pretrained(sd1, adapter=adapter, weights="compel")
    text = f"{tiny.sentences(12)} {{}} {SHORT}"
    found = encoded(encode, sd1_clip, text.format("(zebra:1.5)"), adapter=adapter)[0]
    same(found, ours(pipe, text.format("(zebra)1.5"), "overlap")[0])


def test_textual_inversions_are_not_cut(core, encode, sd1):
    model = CLIPTextModel.from_pretrained(sd1, subfolder="text_encoder").eval()
    vectors = torch.randn(5, 32)
    clip = core.clip({"l": (model, tiny.clip_tokenizer())}, {"thing": vectors})
    text = " ".join(["red"] * 73) + " embedding:thing " + SHORT
    reading = encode.read_prompt(clip, text, "chunks")["l"]
    assert len(reading.tokens) == 73 + 5 + len(tiny.clip_tokenizer()(SHORT).input_ids) - 2
    assert reading.layout.pass_tokens()[0] == (0, 73)
    window = reading.windows(True)[1]
    assert all(torch.equal(token, vector) for (token, _), vector in zip(window[1:6], vectors, strict=True))
    assert encoded(encode, clip, text, "chunks")[0].shape == (1, 154, 32)


def test_clip_skip_of_the_core(real_core, encode, sd1_clip, sd1_pipe):
    skipped = sd1_clip.clone()
    skipped.clip_layer(-2)
    for conditioning in WINDOWS:
        sd1_pipe.conditioning = conditioning
        with torch.no_grad():
            expected = sd1_pipe.encode_prompt(LONG, "cpu", 1, False, clip_skip=1)[0]
        same(encoded(encode, skipped, LONG, conditioning)[0], expected)


def test_a_lora_of_the_core(real_core, encode, sd1, sd1_clip):
    from comfy.sd import load_lora_for_models

    name = "lora_te_text_model_encoder_layers_1_self_attn_{}_proj"
    lora = {}
    for part in ("q", "v"):
        lora[f"{name.format(part)}.lora_down.weight"] = 0.3 * torch.randn(4, 32)
        lora[f"{name.format(part)}.lora_up.weight"] = torch.randn(32, 4)
        lora[f"{name.format(part)}.alpha"] = torch.tensor(2.0)
    pipe = FixClipStableDiffusionPipeline.from_pretrained(sd1)
    layer = pipe.text_encoder.get_submodule("text_model.encoder.layers.1.self_attn")
    for part in ("q", "v"):
        down, up = (lora[f"{name.format(part)}.lora_{side}.weight"] for side in ("down", "up"))
        layer.get_submodule(f"{part}_proj").weight.data += 0.5 * (2.0 / 4) * up @ down  # strength, alpha / rank
    _, patched = load_lora_for_models(None, sd1_clip, lora, 0, 0.5)
    for conditioning in WINDOWS:
        expected = ours(pipe, LONG, conditioning)[0]
        same(encoded(encode, patched, LONG, conditioning)[0], expected)
        plain, _ = encoded(encode, sd1_clip, LONG, conditioning)
        assert (plain - expected).abs().max() > 0.1  # the other object of the same weights is as it was


def test_prompts_that_fit_are_the_core_s_own(real_core, encode, sd1_clip, xl_clip):
    for clip in (sd1_clip, xl_clip):
        for text in ("", SHORT, "a (red:1.4) horse (near a boat:0.6)"):
            expected, pooled = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)
            for conditioning in ("stock", "chunks"):
                states, own_pooled = encoded(encode, clip, text, conditioning)
                same(states, expected)
                same(own_pooled, pooled)


def test_hooks_of_the_clip_stay_with_the_conditioning(nodes, sd1_clip, monkeypatch):
    """*Set CLIP Hooks* leaves them to the node that encodes, such as a LoRA for a part of the steps."""
    monkeypatch.setattr(sd1_clip, "apply_hooks_to_conds", hooks := object(), raising=False)
    (((_, more),),) = nodes["FixClipEncodeLongPrompt"](sd1_clip, LONG, "overlap")
    assert more["hooks"] is hooks


def test_a_clip_that_changes_during_sampling(encode, sd1_clip, monkeypatch):
    """Core's own call gives one entry for each part of the steps; the windows of each are joined."""
    plain = sd1_clip.encode_from_tokens

    def scheduled(tokens):
        states, pooled = plain(tokens, return_pooled=True)
        return [
            [k * states, {"pooled_output": pooled, "clip_start_percent": start}] for k, start in ((1, 0.0), (2, 0.5))
        ]

    monkeypatch.setattr(sd1_clip, "encode_from_tokens_scheduled", scheduled)
    (first, more), (second, later) = encode.encode_prompt(sd1_clip, LONG, "overlap")
    assert (more["clip_start_percent"], later["clip_start_percent"]) == (0.0, 0.5)
    same(second, 2 * first)


def test_a_checkpoint_without_a_text_encoder(nodes):
    for node in ("FixClipEncodeLongPrompt", "FixClipTokenReport"):
        with pytest.raises(ValueError, match="there is no CLIP: this checkpoint has no text encoder"):
            nodes[node](None, SHORT, "auto")


def test_the_report_reads_what_the_encoding_node_reads(encode, sd1_clip, long_clip, xl_clip):
    assert encode.report_prompt(sd1_clip, LONG, long_clip=long_clip).conditioning == "one_pass"
    assert encode.report_prompt(sd1_clip, SHORT, long_clip=long_clip).conditioning == "stock"
    adapter = trained(width=32, kind="attention")
    short = encode.report_prompt(sd1_clip, SHORT, "auto", adapter, long_clip)
    assert short.adapter == "left out"
    second = trained(width=48, kind="attention", scope="text", mask_padding=True, conditioning="chunks")
    report = encode.report_prompt(xl_clip, LONG, adapter_2=second)
    assert (report.conditioning, report.adapter) == ("chunks", "text")
    with pytest.raises(ValueError, match="both adapters are for the text encoder 'g'"):
        encode.report_prompt(xl_clip, LONG, adapter=second, adapter_2=second)


def test_token_report(nodes, sd1_clip):
    text, picture = nodes["FixClipTokenReport"](sd1_clip, LONG, "overlap")
    assert "a 77-token encoder stops before" in text
    assert "that overlap, one hidden state for each token" in text
    assert picture.ndim == 4
    assert picture.shape[-1] == 3
    assert 0 <= picture.min() < picture.max() <= 1
    blue, green = (picture[..., 2] - picture[..., 1] > 0.2), (picture[..., 1] - picture[..., 2] > 0.1)
    below_title = slice(80, None)
    assert blue[:, below_title].any()
    assert green[:, below_title].any()
    _, short = nodes["FixClipTokenReport"](sd1_clip, SHORT, "overlap")
    assert not (short[..., 1] - short[..., 2] > 0.1).any()


def test_refusals(encode, sd1_clip, long_clip):
    with pytest.raises(ValueError, match="needs a CLIP of more than 77 positions"):
        encoded(encode, sd1_clip, SHORT, "one_pass")
    with pytest.raises(ValueError, match="needs the original 77 position embeddings"):
        encoded(encode, long_clip, SHORT, "overlap")
    with pytest.raises(ValueError, match="long_clip has 77 positions"):
        encoded(encode, sd1_clip, SHORT, long_clip=sd1_clip)
    with pytest.raises(ValueError, match="adapter of width 16 on a text encoder of width 32"):
        encoded(encode, sd1_clip, SHORT, "overlap", trained(width=16))


def test_no_adapter_of_that_name(nodes):
    with pytest.raises(ValueError, match="no such file in models/fixclip"):
        nodes["FixClipLoadAdapter"](name="gone.safetensors")


def test_an_adapter_that_was_written_anew_is_loaded_anew(packs, models_folder):
    """ComfyUI asks a node whether the file behind a name has changed, else it keeps the node's last result."""
    file = models_folder / "fixclip" / "again.safetensors"
    for node in (pack["FixClipLoadAdapter"] for pack in packs):
        changed = getattr(node, "fingerprint_inputs", None) or node.IS_CHANGED
        file.unlink(missing_ok=True)
        found = [changed(name=file.name)]
        for time in (1_000, 2_000):
            file.write_bytes(b"")
            os.utime(file, (time, time))
            found.append(changed(name=file.name))
        assert found == [0.0, 1_000.0, 2_000.0]


def test_both_kinds_of_core_see_the_same_inputs(packs):
    today, older = packs
    for name, node in older.items():
        inputs = {place: port for ports in node.INPUT_TYPES().values() for place, port in ports.items()}
        assert list(inputs) == [port.id for port in today[name].define_schema().inputs]
        assert len(node.RETURN_TYPES) == len(today[name].define_schema().outputs)
        given = dict.fromkeys(inputs)
        inspect.signature(node().execute).bind(**given)
        inspect.signature(today[name].execute).bind(**given)


def loaded(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout


def test_the_package_without_diffusers():
    code = """
import sys
sys.modules["diffusers"] = None  # not installed
import fixclip_diffusion
from fixclip_diffusion import FixClipTextEncoder, TextAdapter, conditioning, prompt_tokens, token_report
assert callable(token_report)
try:
    fixclip_diffusion.FixClipStableDiffusionPipeline
except ModuleNotFoundError as error:
    print(error.name)
"""
    assert loaded(code).strip() == "diffusers"


def test_the_pack_loads_no_diffusers_though_it_is_there():
    code = """
import sys, pathlib
sys.path.insert(0, "tests/comfyui")
import conftest, stand_in
sys.modules["comfy"] = sys.modules["comfy.sd"] = type(sys)("comfy")  # a process of ComfyUI
sys.modules.update(stand_in.core_modules(pathlib.Path("."), False))
pack = conftest.load_pack()
assert "diffusers" not in sys.modules
print(*pack.NODE_CLASS_MAPPINGS)
import fixclip_diffusion, diffusers
from fixclip_diffusion import FixClipStableDiffusionPipeline
assert diffusers.FixClipStableDiffusionPipeline is FixClipStableDiffusionPipeline
"""
    assert loaded(code).split() == ["FixClipEncodeLongPrompt", "FixClipLoadAdapter", "FixClipTokenReport"]


@pytest.mark.parametrize("file", sorted((ROOT / "comfyui" / "example_workflows").glob("*.json")), ids=lambda f: f.stem)
def test_example_workflows_are_connected(packs, file):
    assert Image.open(file.with_suffix(".jpg")).width > 1000  # ComfyUI shows it beside the example's name
    workflow = json.loads(file.read_text(encoding="utf-8"))
    found = {node["id"]: node for node in workflow["nodes"]}
    for node in found.values():
        if node["type"] in packs[1]:
            ports = [*packs[1][node["type"]].INPUT_TYPES()["optional"]]
            assert [port["name"] for port in node["inputs"]] == ["clip", *ports]
    for number, source, out, target, place, kind in workflow["links"]:
        assert number in found[source]["outputs"][out]["links"]
        assert found[target]["inputs"][place]["link"] == number
        assert found[source]["outputs"][out]["type"] == found[target]["inputs"][place]["type"] == kind
