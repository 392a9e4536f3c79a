"""Trained text encoders that read short texts with the base's own weights, bit for bit."""

import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny_clips import VOCAB_SIZE, tiny_clip, tiny_config
from transformers import CLIPTextModel, CLIPTextModelWithProjection
from typer.testing import CliRunner

from fixclip_cli.main import app
from fixclip_core.check import LoadError
from fixclip_core.model.fixclip import FixClip
from fixclip_core.weights.read import ClipCheckpoint
from fixclip_core.weights.text_encoder import read_text_config, read_text_encoder
from fixclip_core.weights.write import export, plain_clip, write_delta, write_diffusers
from fixclip_diffusion import FixClipStableDiffusionPipeline, TextAdapter
from fixclip_diffusion.conditioning import Context, PromptTokens, get_conditioning, short_length
from fixclip_diffusion.short_weights import POSITIONS
from fixclip_diffusion.text_config import load_clip_text_config
from fixclip_diffusion.text_encoder import FixClipTextEncoder, FixClipTextEncoderWithProjection
from fixclip_diffusion.tiny import clip_text_config

PREPROCESS = {"size": 32, "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
SHORT, LONG = (3, 20, 77), (78, 150, 248)


def texts(lengths, width):
    ids = torch.full((len(lengths), width), VOCAB_SIZE - 1)  # padded with the end token, as Stable Diffusion does
    generator = torch.Generator().manual_seed(1)
    for row, length in zip(ids, lengths, strict=True):
        row[: length - 1] = torch.randint(1, VOCAB_SIZE - 1, (length - 1,), generator=generator)
    return ids


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders: the base's text encoder, the trained one merged, the delta between them."""
    folder = tmp_path_factory.mktemp("models")
    base = ClipCheckpoint("open_clip", tiny_clip().state_dict(), tiny_config(), PREPROCESS)
    write_diffusers(base, folder / "base")
    model = FixClip.from_clip(tiny_clip(), tiny_config(), PREPROCESS, lora_rank=2, num_prompts=0, num_groups=0)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    write_diffusers(plain_clip(model), folder / "trained")
    export(model, folder / "export", ["delta"])
    return folder


@pytest.fixture(scope="module")
def base(models):
    return CLIPTextModel.from_pretrained(models / "base", subfolder="text_encoder")


@pytest.fixture(scope="module")
def trained(models):
    return CLIPTextModel.from_pretrained(models / "trained", subfolder="text_encoder")


def with_copy(models, base):
    encoder = FixClipTextEncoder.from_pretrained(models / "trained", subfolder="text_encoder")
    encoder.set_short_weights(base)
    return encoder


def with_delta(models, base):
    return FixClipTextEncoder.from_pretrained(models / "base", subfolder="text_encoder", delta=models / "export")


@torch.no_grad()
def states(encoder, ids):
    output = encoder(ids, output_hidden_states=True)
    return [*output.hidden_states, output.last_hidden_state, output.pooler_output]


def assert_equal(found, expected):
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("make", [with_copy, with_delta])
def test_short_texts_are_the_bases_and_long_ones_the_trained_encoders(models, base, trained, make, tmp_path):
    encoder = make(models, base)
    encoder.save_pretrained(tmp_path)
    for one in (encoder, FixClipTextEncoder.from_pretrained(tmp_path)):
        assert (one.short_context_length, one.context_length) == (77, 248)
        assert one.conditioning == "one_pass"
        assert_equal(states(one, texts(SHORT, 77)), states(base, texts(SHORT, 77)))
        found, expected = states(one, texts(LONG, 248)), states(trained, texts(LONG, 248))
        for row, length in enumerate(LONG):
            for a, b in zip(found[:-1], expected[:-1], strict=True):
                torch.testing.assert_close(a[row, :length], b[row, :length], atol=1e-4, rtol=1e-4)
        assert not torch.allclose(found[-2][0, :20], states(base, texts(LONG, 248)[:, :77])[-2][0, :20], atol=1e-3)


def test_the_base_named_in_place_of_a_copy(models, base, tmp_path):
    """The file is as small as the trained encoder's; what is loaded from it is complete, and is saved as a whole."""
    encoder = with_copy(models, base)
    encoder.name_short_weights(str(models / "base"))
    encoder.save_pretrained(tmp_path / "named")
    loaded = FixClipTextEncoder.from_pretrained(tmp_path / "named")
    loaded.save_pretrained(tmp_path / "whole")
    for one in (loaded, FixClipTextEncoder.from_pretrained(tmp_path / "whole")):
        assert short_length(one.config) == 77
        assert_equal(states(one, texts(SHORT, 77)), states(base, texts(SHORT, 77)))
        assert_equal(states(one, texts(LONG, 248)), states(encoder, texts(LONG, 248)))
    named, whole = (tmp_path / name / "model.safetensors" for name in ("named", "whole"))
    trained = models / "trained" / "text_encoder" / "model.safetensors"
    assert named.stat().st_size == pytest.approx(trained.stat().st_size, rel=0.02)
    assert whole.stat().st_size > 1.5 * named.stat().st_size
    # Configuration alone, as reports read it, says the same before and after.
    assert short_length(load_clip_text_config(str(tmp_path / "named"))) == 77


def with_adapter(encoder, kind):
    adapter = TextAdapter(encoder.config.hidden_size, kind)
    encoder.set_adapter_module(adapter)
    return encoder


def named(encoder, base):
    encoder.name_short_weights(base)
    return encoder


@pytest.mark.parametrize("kind", ["delta", "copy", "name", "stretched", "mlp", "attention"])
def test_the_file_of_an_encoder_is_not_read_without_its_folder(models, base, sd1, tmp_path, kind):
    """It would be another encoder: without delta, short weights, short positions or adapter."""
    encoders = {
        "delta": lambda: with_delta(models, base),
        "copy": lambda: with_copy(models, base),
        "name": lambda: named(with_copy(models, base), str(models / "base")),
        "stretched": lambda: FixClipTextEncoder.from_clip(base),
    }
    make = encoders.get(kind) or (lambda: with_adapter(FixClipTextEncoder.from_clip(base), kind))
    make().save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "model.safetensors"
    loaders = (
        FixClipTextEncoder.from_file,
        read_text_encoder,
        read_text_config,
        lambda file: FixClipStableDiffusionPipeline.from_pretrained(sd1, encoder=file),
    )
    for load in loaders:
        with pytest.raises(LoadError, match=r"would be lost with the file alone: name its folder, .*saved$"):
            load(str(file))
    result = CliRunner().invoke(app, ["convert", str(file), str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "name its folder" in " ".join(result.output.split())
    if kind != "name":  # only the configuration tells
        file.rename(tmp_path / "elsewhere.safetensors")
        with pytest.raises(LoadError, match=r"name the folder that it was saved in, with its config.json"):
            read_text_config(tmp_path / "elsewhere.safetensors")


def test_what_else_is_in_a_file_harms_nothing(models, base, tmp_path):
    path = models / "base" / "text_encoder"
    weights = load_file(path / "model.safetensors")
    others = (
        "text_model.embeddings.position_ids",
        "logit_scale",
        "vision_model.post_layernorm.weight",
        "vision_model.encoder.layers.0.mlp.fc1.lora_A",
        "adapter.weight",
    )
    others = {name: torch.zeros(1) for name in (*others, "model.diffusion_model.input_blocks.0.0.weight")}
    save_file(weights | others, tmp_path / "model.safetensors")
    shutil.copy(path / "config.json", tmp_path / "config.json")
    expected, found = (read_text_encoder(place / "model.safetensors") for place in (path, tmp_path))
    assert found.config == expected.config
    assert found.state_dict.keys() == expected.state_dict.keys()
    assert_equal(found.state_dict.values(), expected.state_dict.values())
    trained = FixClipTextEncoder.from_file(models / "trained" / "text_encoder" / "model.safetensors")
    folder = FixClipTextEncoder.from_pretrained(models / "trained" / "text_encoder")
    assert trained.state_dict().keys() == folder.state_dict().keys()
    assert_equal(trained.state_dict().values(), folder.state_dict().values())


def test_a_named_base_that_is_not_there(models, base, tmp_path):
    encoder = with_copy(models, base)
    encoder.name_short_weights(str(tmp_path / "gone"))
    encoder.save_pretrained(tmp_path / "named")
    with pytest.raises(LoadError, match=r"named.*text encoder of '.*gone', which is to read short prompts"):
        FixClipTextEncoder.from_pretrained(tmp_path / "named")
    encoder.set_short_weights(None)
    with pytest.raises(ValueError, match="by its own weights"):
        encoder.name_short_weights("base")


@torch.no_grad()
@pytest.mark.parametrize("make", [with_copy, with_delta])
def test_a_short_text_in_a_longer_pass_is_the_bases(models, base, make):
    """As stock pipelines read it, which pad every prompt to 248 tokens, and beside a long one in a batch."""
    encoder, ids = make(models, base), texts((20, 200), 248)
    long = encoder(ids[1:]).last_hidden_state
    alone = base(ids[:1, :77], output_hidden_states=True)
    for rows in (slice(0, 1), slice(0, 2)):
        output = encoder(ids[rows], output_hidden_states=True)
        skipped = encoder.text_model.final_layer_norm(output.hidden_states[-2])  # diffusers' clip_skip=1
        expected = base.final_layer_norm(alone.hidden_states[-2])
        for found, wanted in ((output.last_hidden_state, alone.last_hidden_state), (skipped, expected)):
            torch.testing.assert_close(found[:1, :77], wanted, atol=1e-5, rtol=1e-5)
            assert not found[0, 77:].any()
        torch.testing.assert_close(output.pooler_output[:1], alone.pooler_output, atol=1e-5, rtol=1e-5)
        as_tuple = encoder(ids[rows], output_hidden_states=True, return_dict=False)
        assert torch.equal(as_tuple[0], output.last_hidden_state)
    torch.testing.assert_close(output.last_hidden_state[1:], long, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_short_part_beside_a_long_one_is_the_bases(models, base):
    """What follows a BREAK changes nothing of what stands before it."""
    encoder = with_copy(models, base)
    short, both = texts((20,), 77), texts((20, 120), 120)
    states_BTD = encoder(both).last_hidden_state
    assert torch.equal(states_BTD[0, :77], base(short).last_hidden_state[0])
    adapter = TextAdapter(encoder.config.hidden_size)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    encoder.set_adapter_module(adapter)
    assert torch.equal(encoder(both).last_hidden_state[0, :77], states_BTD[0, :77])
    assert not torch.allclose(encoder(both).last_hidden_state[1, :120], states_BTD[1, :120])


@pytest.mark.parametrize("make", [with_copy, with_delta])
def test_clip_skip_of_short_texts_reads_the_bases_layer_norm(models, base, make):
    encoder, ids = make(models, base), texts(SHORT, 77)
    skipped = states(encoder, ids)[-4]
    with torch.no_grad():
        found = encoder.text_model.final_layer_norm(skipped)
        assert torch.equal(found, base.final_layer_norm(states(base, ids)[-4]))


@pytest.mark.parametrize("make", [with_copy, with_delta])
def test_prompts_of_up_to_77_tokens_are_laid_out_as_stock_lays_them_out(models, base, make):
    """The base's copy reads them with their padding, so that a pipeline's embeds are those of the stock pipeline."""
    encoder = make(models, base)
    context = Context(248, short_length(encoder.config), VOCAB_SIZE - 2, VOCAB_SIZE - 1, 0, encoder.config.padding)
    tokens = PromptTokens("a b c", (3, 4, 5), ((0, 1), (2, 3), (4, 5)), (2, 2, 2), (1.0, 1.0, 1.0))
    layout = get_conditioning(encoder.conditioning).lay_out(tokens, context)
    assert layout.ids_NP.shape == (1, 77)
    with torch.no_grad():
        embeds = layout.join(encoder(layout.ids_NP).last_hidden_state)
        assert torch.equal(embeds, base(layout.ids_NP).last_hidden_state[0])


def test_added_tokens_are_read_in_short_texts_too(models, base):
    encoder = with_copy(models, base)
    encoder.resize_token_embeddings(VOCAB_SIZE + 1)
    vector = torch.randn(encoder.config.hidden_size)
    with torch.no_grad():
        encoder.get_input_embeddings().weight[VOCAB_SIZE] = vector
    ids = texts((20,), 77)
    assert_equal(states(encoder, ids), states(base, ids))
    ids[0, 3] = VOCAB_SIZE
    found = states(encoder, ids)[0][0, 3]
    torch.testing.assert_close(found, vector + base.embeddings.position_embedding.weight[3].detach())


def test_a_delta_is_small_and_half_precision_is_enough(models, base, trained, tmp_path):
    whole = (models / "trained" / "text_encoder" / "model.safetensors").stat().st_size
    assert (models / "export" / "text_delta.safetensors").stat().st_size < whole / 5
    encoder = with_delta(models, base).half()
    found = states(encoder.float(), texts(LONG, 248))[-2]
    expected = states(trained, texts(LONG, 248))[-2]
    torch.testing.assert_close(found[2], expected[2], atol=0.05, rtol=0.05)


def test_peft_reads_a_delta(models, trained):
    """As a LoRA of a stock text model, whose positions are then those of the file."""
    delta = load_file(models / "export" / "text_delta.safetensors")
    model = CLIPTextModel.from_pretrained(models / "base", subfolder="text_encoder")
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    peft = get_peft_model(model, LoraConfig(r=2, lora_alpha=2, target_modules=names))
    inside = "text_model." if any(name.startswith("text_model.") for name in names) else ""
    positions = delta.pop(POSITIONS)
    state = {f"base_model.model.{inside}{name.removeprefix('text_model.')}": value for name, value in delta.items()}
    result = set_peft_model_state_dict(peft, state)
    assert not result.unexpected_keys
    assert len(state) == 2 * len(names)
    module = next(module for name, module in peft.named_modules() if name.endswith("embeddings"))
    module.position_embedding = torch.nn.Embedding.from_pretrained(positions)
    module.position_ids = torch.arange(248)[None]
    model.config.max_position_embeddings = 248
    for found, expected in zip(states(model, texts(LONG, 248)), states(trained, texts(LONG, 248)), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_what_is_no_delta_of_this_base_is_refused(models, base, trained, tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        FixClipTextEncoder.from_pretrained(models / "base", subfolder="text_encoder", delta=tmp_path / "none")
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, other)
    with pytest.raises(ValueError, match="is none"):
        FixClipTextEncoder.from_pretrained(models / "base", subfolder="text_encoder", delta=other)
    other.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="is damaged"):
        FixClipTextEncoder.from_pretrained(models / "base", subfolder="text_encoder", delta=other)
    clip = tiny_clip(seed=5)
    stranger = FixClip.from_clip(clip, tiny_config(), PREPROCESS, lora_rank=2, num_prompts=0, num_groups=0)
    write_delta(stranger, other)
    with pytest.raises(ValueError, match="another base"):
        FixClipTextEncoder.from_pretrained(models / "base", subfolder="text_encoder", delta=other)
    with pytest.raises(ValueError, match="77 positions"):
        FixClipTextEncoder.from_pretrained(models / "trained", subfolder="text_encoder", delta=models / "export")


def test_a_text_encoder_with_a_projection_takes_neither(models, base):
    """The second one of Stable Diffusion XL, whose pooled vector is a part of what the UNet reads."""
    config = clip_text_config(hidden_size=32, projection_dim=16)
    encoder = FixClipTextEncoderWithProjection.from_clip(CLIPTextModelWithProjection(config))
    refused = "FixClipTextEncoderWithProjection: only text encoders without projection"
    with pytest.raises(ValueError, match=f"short weights on a {refused}"):
        encoder.set_short_weights(base)
    with pytest.raises(ValueError, match=f"a delta on a {refused}"):
        encoder.load_delta(models / "export")


def test_a_copy_of_another_size_is_refused(models, base, trained):
    encoder = FixClipTextEncoder.from_pretrained(models / "trained", subfolder="text_encoder")
    with pytest.raises(ValueError, match="248 positions"):
        encoder.set_short_weights(trained)


def test_export_puts_the_bases_copy_beside_the_trained_weights(models, base, tmp_path, monkeypatch):
    model = FixClip.from_clip(tiny_clip(seed=3), tiny_config(), PREPROCESS, num_prompts=0, num_groups=0)
    model.save_pretrained(tmp_path / "run")
    command = ["export", tmp_path / "run", tmp_path / "out", "--format", "diffusers", "--short-weights"]
    done = CliRunner().invoke(app, [str(part) for part in [*command, models / "base"]])
    assert done.exit_code == 0, done.output
    encoder = FixClipTextEncoder.from_pretrained(tmp_path / "out", subfolder="text_encoder")
    assert_equal(states(encoder, texts(SHORT, 77)), states(base, texts(SHORT, 77)))
    named = [tmp_path / "named" if part == tmp_path / "out" else part for part in command]
    monkeypatch.chdir(models)  # a folder's name is that from anywhere
    for source in ("base", "base/text_encoder", "base/text_encoder/model.safetensors"):
        shutil.rmtree(tmp_path / "named", ignore_errors=True)
        done = CliRunner().invoke(app, [str(part) for part in [*named, source, "--by-name"]])
        assert done.exit_code == 0, done.output
        with monkeypatch.context() as elsewhere:
            elsewhere.chdir(tmp_path)
            small, large = (tmp_path / name / "text_encoder" / "model.safetensors" for name in ("named", "out"))
            assert small.stat().st_size < 0.7 * large.stat().st_size
            encoder = FixClipTextEncoder.from_pretrained(tmp_path / "named", subfolder="text_encoder")
        assert_equal(states(encoder, texts(SHORT, 77)), states(base, texts(SHORT, 77)))
    for source, message in (
        (tmp_path / "nothing", "neither a folder nor a hub name"),
        (tmp_path / "run", "two towers"),
    ):
        wrong = CliRunner().invoke(app, [str(part) for part in [*command, source]])
        assert wrong.exit_code == 2
        assert message in wrong.output
    CLIPTextModel(clip_text_config(hidden_size=64)).save_pretrained(tmp_path / "wide")
    failed = [tmp_path / "failed" if part == tmp_path / "out" else part for part in command]
    wrong = CliRunner().invoke(app, [str(part) for part in [*failed, tmp_path / "wide"]])
    assert (wrong.exit_code, wrong.stdout) == (2, "")
    assert "short weights of width 64" in wrong.stderr
    assert not (tmp_path / "failed").exists(), "all of it or nothing"


def test_a_tower_that_was_trained_whole_has_no_delta(tmp_path):
    model = FixClip.from_clip(tiny_clip(), tiny_config(), PREPROCESS, num_prompts=0, num_groups=0)
    with pytest.raises(ValueError, match="'delta': the text tower was trained whole"):
        export(model, tmp_path / "out", ["delta"])
