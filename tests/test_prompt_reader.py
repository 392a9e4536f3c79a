"""How a prompt is read is chosen in one place: `fixclip tokens`, which loads no weights, says what a pipeline does."""

import subprocess
import sys

import pytest
import tiny
import torch
from command_line import error_of, run
from transformers import CLIPTextModel

from fixclip_cli.app import CONDITIONING_NAMES, OLD_CONDITIONING_NAMES
from fixclip_core import builtin
from fixclip_diffusion import FixClipStableDiffusionPipeline, TextAdapter
from fixclip_diffusion.auto import load_pipeline
from fixclip_diffusion.conditioning import ALIASES, CONDITIONINGS, default_conditioning
from fixclip_diffusion.prompt_reader import PromptReader
from fixclip_diffusion.tiny import clip_text_config

LONG = tiny.sentences(14)
WEIGHTED = f"(a red boat:1.4) and {LONG}"


@pytest.fixture(scope="module")
def models(sd1, tmp_path_factory):
    """Folders: a trained encoder, adapters for overlapping windows and for none in particular, a pipeline that was
    saved with a conditioning and a syntax of its own, and one of version 0.1."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(5)
    config = clip_text_config(max_position_embeddings=248, bos_token_id=49406)
    CLIPTextModel(config).save_pretrained(folder / "encoder")
    TextAdapter(config.hidden_size, conditioning="overlap").save_pretrained(folder / "overlap_adapter")
    TextAdapter(config.hidden_size).save_pretrained(folder / "adapter")
    pipe = FixClipStableDiffusionPipeline.from_pretrained(sd1, conditioning="chunks", weights="a1111")
    pipe.save_pretrained(folder / "saved")
    index = (folder / "saved" / "model_index.json").read_text()
    pipe.conditioning = None
    pipe.save_pretrained(folder / "old")
    old = index.replace('"conditioning": "chunks"', '"conditioning": null')
    assert '"long_prompt": null' in old
    (folder / "old" / "model_index.json").write_text(old.replace('"long_prompt": null', '"long_prompt": "truncate_77"'))
    return folder


@pytest.mark.parametrize(
    ("adapter", "conditioning", "short", "long"),
    [
        (None, "overlap", None, None),
        ({}, "overlap", "text", "window"),
        ({}, "one_pass", "text", "text"),
        ({"short_texts": False}, "overlap", "left out", "window"),
        ({"short_texts": False}, "one_pass", "left out", "text"),
        ({"scope": "text", "mask_padding": True}, "overlap", "text", "text"),
        ({"scope": "text", "mask_padding": True, "short_texts": False}, "overlap", "left out", "text"),
    ],
)
def test_a_report_says_what_an_adapter_sees(sd1, tmp_path, adapter, conditioning, short, long):
    if adapter is not None:
        width = clip_text_config().hidden_size
        torch.manual_seed(0)
        module = TextAdapter(width, kind="attention", conditioning=conditioning, num_heads=2, **adapter)
        torch.nn.init.normal_(module.blocks[-1].out_proj.weight)
        module.save_pretrained(tmp_path / "adapter")
    options = {"base": str(sd1), "conditioning": conditioning}
    plain = load_pipeline(**options)
    options |= {} if adapter is None else {"adapter": str(tmp_path / "adapter")}
    pipe, reader = load_pipeline(**options), PromptReader.from_pretrained(**options)
    for text, expected in (("a red boat", short), (LONG, long)):
        report = pipe.token_report(text)
        assert report == reader.report(text)
        assert report.adapter == expected
        acts = not torch.equal(*(each.prompt_encoder.encode([[text]]).embeds_BLD for each in (pipe, plain)))
        assert acts == (expected in ("text", "window")) == ("refines" in str(report))
        assert ("adapter" in str(report)) == (adapter is not None)


@pytest.mark.parametrize(
    ("options", "conditioning"),
    [
        ({"base": "SD1"}, "overlap"),
        ({"base": "SD1", "encoder": "encoder"}, "one_pass"),
        ({"base": "SD1", "encoder": "encoder", "adapter": "adapter"}, "one_pass"),
        ({"base": "SD1", "adapter": "adapter"}, "overlap"),
        ({"base": "SD1", "adapter": "overlap_adapter"}, "overlap"),
        ({"base": "SD1", "adapter": "overlap_adapter", "conditioning": "one_pass"}, "one_pass"),
        ({"base": "saved"}, "chunks"),
        ({"base": "saved", "encoder": "encoder", "conditioning": "one_pass", "weights": "compel"}, "one_pass"),
        ({"base": "saved", "encoder": "encoder"}, "one_pass"),
        ({"base": "saved", "adapter": "overlap_adapter"}, "overlap"),
        ({"base": "old"}, "stock"),
        ({"base": "old", "encoder": "encoder"}, "one_pass"),
        ({"base": "old", "adapter": "overlap_adapter"}, "overlap"),
        ({"base": "builtin:scenes"}, "overlap"),
        ({"base": "builtin:scenes", "encoder": "builtin:scenes/encoder"}, "one_pass"),
        ({"base": "builtin:scenes", "conditioning": "truncate"}, "one_pass"),
        ({"base": "builtin:scenes/base"}, "overlap"),
        ({"base": "builtin:scenes/base", "adapter": "builtin:scenes/overlap_adapter"}, "overlap"),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else value,
)
@pytest.mark.filterwarnings("ignore:long_prompt")
def test_configurations_alone_tell_how_a_pipeline_reads(sd1, models, options, conditioning):
    if options["base"].startswith("builtin:") and not builtin.is_available():
        pytest.skip("this copy has no embedded weights")
    options = {
        name: str(sd1) if value == "SD1" else str(models / value) if (models / value).exists() else value
        for name, value in options.items()
    }
    pipe = load_pipeline(**options)
    reader = PromptReader.from_pretrained(**options)
    assert reader.conditioning.name == pipe.conditioning == conditioning
    assert reader.context == pipe.prompt_encoder.encodings[0].context
    assert reader.report(LONG) == pipe.token_report(LONG)
    command = [part for name, value in options.items() for part in (f"--{name}", value)]
    result = run("tokens", LONG, *command)
    assert result.output == f"{pipe.token_report(LONG)}\n"


def test_a_report_takes_the_options_of_a_call(sd1):
    pipe = FixClipStableDiffusionPipeline.from_pretrained(sd1)
    for name in CONDITIONINGS:
        for weights in (None, "a1111"):
            found = pipe.token_report(WEIGHTED, conditioning=name, weights=weights)
            assert found.conditioning == name
            other = FixClipStableDiffusionPipeline(
                **pipe.components, requires_safety_checker=False, conditioning=name, weights=weights
            )
            assert found == other.token_report(WEIGHTED)
    assert pipe.conditioning == "overlap", "the call's options are not the pipeline's"
    with pytest.raises(ValueError, match="conditioning='none': valid are"):
        pipe.token_report(LONG, conditioning="none")
    with pytest.raises(ValueError, match="weights"):
        pipe.token_report(LONG, weights="none")


def test_stock_configurations_are_read_too():
    assert default_conditioning(clip_text_config()) == "overlap"
    assert default_conditioning(clip_text_config(max_position_embeddings=248)) == "one_pass"


def test_the_command_line_knows_the_registrys_names():
    assert tuple(CONDITIONINGS) == CONDITIONING_NAMES
    assert set(OLD_CONDITIONING_NAMES) == set(ALIASES)


@pytest.mark.parametrize(
    ("arguments", "message", "without"),
    [
        (
            ["--conditioning", "overlapp"],
            "conditioning='overlapp': valid are stock, chunks, overlap, one_pass",
            "torch",
        ),
        (
            ["--base", "nobody/nothing", "--adapter", "no/adapter/here"],
            "adapter 'no/adapter/here' is neither",
            "diffusers",
        ),
        (["--encoder", "/no/encoder"], "encoder '/no/encoder' is neither a folder nor a hub name", "diffusers"),
        (["--adapter", "builtin:scenes/none"], "'builtin:scenes/none': there is no such built-in model", "diffusers"),
        (["--lora", "builtin:scenes/none:0.5"], "'builtin:scenes/none': there is no such built-in model", "diffusers"),
    ],
)
def test_what_a_name_alone_tells_is_refused_before_libraries_are_imported(arguments, message, without):
    code = (
        "import sys; from fixclip_cli.main import app; "
        "code = app(sys.argv[2:], standalone_mode=False); sys.exit(f'{code} {sys.argv[1] in sys.modules}')"
    )
    command = [sys.executable, "-c", code, without, "generate", "a cat", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    *_, error, end = done.stderr.splitlines()
    assert end == "2 False"
    assert message in error


def test_a_wrong_adapter_is_told_before_weights_are_read(sd1, tmp_path):
    """The base's weights are no weights here, which only reading them would find."""
    import shutil

    shutil.copytree(sd1, tmp_path / "base")
    (tmp_path / "base" / "text_encoder" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="adapter 'someone/nothing'"):
        FixClipStableDiffusionPipeline.from_pretrained(tmp_path / "base", adapter="someone/nothing")


@pytest.mark.parametrize("what", ["base", "encoder", "adapter"])
def test_errors_about_the_hub_are_in_our_words(sd1, what):
    arguments = {"base": str(sd1), what: "someone/nothing"}
    message = error_of(
        run("generate", "a cat", *[part for name, value in arguments.items() for part in (f"--{name}", value)])
    )
    assert "someone/nothing" in message
    assert "HF_HUB_OFFLINE" in message or "hub cannot be reached" in message
    for foreign in ("outgoing traffic", "cached_download", "http", "transformers", "local_files_only", "snapshot"):
        assert foreign not in message, message


@pytest.mark.parametrize("adapter", ["someone/nothing", "no/such/folder", "empty"])
def test_what_is_no_adapter_of_stable_diffusion_xl_is_refused_as_the_pipeline_refuses_it(sdxl, tmp_path, adapter):
    if adapter == "empty":
        adapter = str(tmp_path)
    with pytest.raises(ValueError, match="adapter ") as loading:
        load_pipeline(str(sdxl), adapter=adapter)
    with pytest.raises(ValueError, match="adapter ") as reading:
        PromptReader.from_pretrained(str(sdxl), adapter=adapter)
    assert str(reading.value) == str(loading.value)


@pytest.mark.parametrize(("width", "tokens"), [(48, 248), (32, 100)])
def test_an_adapter_that_does_not_fit_is_refused_as_the_pipeline_refuses_it(sd1, tmp_path, width, tokens):
    TextAdapter(width, kind="attention", num_heads=2, max_tokens=tokens).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=rf"adapter (of width {width}|for {tokens} tokens) on a text encoder"
    ) as loading:
        load_pipeline(str(sd1), adapter=TextAdapter.from_pretrained(tmp_path))
    result = run("tokens", LONG, "--base", sd1, "--adapter", tmp_path)
    assert str(loading.value).partition("adapter ")[2] in error_of(result)
