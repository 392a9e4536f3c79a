"""Every format out, reloaded by its own library and compared with the model layer by layer in float32."""

import json
import shutil

import open_clip
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_clips import (
    TOLERANCE,
    assert_same_states,
    batch,
    collect,
    full_vocabulary_clip,
    open_clip_states,
    tiny_config,
    tiny_transformers_clip,
    transformers_states,
)
from transformers import (
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)
from typer.testing import CliRunner

from fixclip_cli.main import app
from fixclip_core.evaluation.encoders import load_encoder
from fixclip_core.model.fixclip import FixClip
from fixclip_core.weights.files import load_weights
from fixclip_core.weights.load import build_clip, load_fixclip
from fixclip_core.weights.read import ClipCheckpoint, read_clip
from fixclip_core.weights.text_encoder import CONFIG_FIELDS, CONFIG_KEY, read_text_encoder
from fixclip_core.weights.write import export, plain_clip, single_file_format, write_single_file
from fixclip_diffusion import FixClipTextEncoder, FixClipTextEncoderWithProjection, FixClipTokenizer
from fixclip_diffusion.tiny import train_tokenizer


@pytest.fixture(scope="module")
def trained():
    """A FixClip whose new parameters have moved away from where they start."""
    model = FixClip.from_clip(*full_vocabulary_clip(), num_prompts=3, num_groups=1, first_group=1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "out"
    lines = export(trained, folder)
    return folder, lines


PROMPTS = ["a cat", "a " + "very " * 150 + "long caption of a dog", "two red boats on a lake, at dawn"]


@torch.no_grad()
def fixclip_states(model, images, ids):
    """CLS after every image layer without prompts, the image feature; end of text after every layer, the feature."""
    image, cls_tokens = model.visual.encode(
        model.visual.sequence(model.visual.patch_tokens(images)), first_layer=0, prompts=False
    )
    text, end_tokens = model.text.encode(ids, first_layer=0)
    return [*cls_tokens, image, *end_tokens, text]


def read_tokens(states, ids):
    """Of full states, what `fixclip_states` holds: CLS of the image layers, the end token of the text layers."""
    rows, ends = torch.arange(len(ids)), ids.argmax(-1)
    return [state if state.ndim == 2 else state[:, 0] if i < 3 else state[rows, ends] for i, state in enumerate(states)]


def full_batch(model):
    ids = model.tokenizer()(PROMPTS)
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2)), ids


def test_export_to_transformers(trained, exported):
    folder, _ = exported
    images, ids = full_batch(trained)
    model = CLIPModel.from_pretrained(folder / "transformers").eval()
    assert model.config.text_config.max_position_embeddings == trained.config.context_length == 248
    assert_same_states(read_tokens(transformers_states(model, images, ids), ids), fixclip_states(trained, images, ids))
    torch.testing.assert_close(model.logit_scale, trained.logit_scale, **TOLERANCE)


def test_export_to_open_clip(trained, exported):
    folder, _ = exported
    images, ids = full_batch(trained)
    clip, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder / 'open_clip'}")
    assert_same_states(
        read_tokens(open_clip_states(clip.eval(), images, ids), ids), fixclip_states(trained, images, ids)
    )
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder / 'open_clip'}")
    assert torch.equal(tokenizer(PROMPTS), ids)
    picture = Image.effect_noise((50, 40), 80).convert("RGB")
    assert torch.equal(transform(picture), trained.preprocess(train=False)(picture))


def test_a_vocabulary_of_its_own_travels_with_an_open_clip_export(tmp_path):
    model = load_fixclip("builtin:scenes/clip", num_prompts=0)
    model.save_pretrained(tmp_path / "model")
    export(load_fixclip(tmp_path / "model"), tmp_path / "exported", ["open_clip", "fixclip"])
    shutil.rmtree(tmp_path / "model")
    moved = (tmp_path / "exported").rename(tmp_path / "moved")
    assert str(tmp_path) not in (moved / "open_clip" / "open_clip_config.json").read_text()
    texts = ["a large red ring at the top left", "the star is blue"]
    expected = load_fixclip(moved / "fixclip").tokenizer()(texts)
    assert torch.equal(open_clip.get_tokenizer(f"local-dir:{moved / 'open_clip'}")(texts), expected)
    for source in (moved / "open_clip", f"local-dir:{moved / 'open_clip'}"):
        assert torch.equal(load_encoder(source).tokenizer(texts), expected)
    with pytest.raises(ValueError, match=r"moved: a model folder holds config.json"):
        read_clip(moved)


@torch.no_grad()
def test_export_to_diffusers(trained, exported):
    """Every token of every layer, because Stable Diffusion reads them all."""
    folder, _ = exported
    encoder, info = CLIPTextModel.from_pretrained(folder / "text_encoder", output_loading_info=True)
    encoder.eval()
    assert not any(info.values())
    assert encoder.config.dtype == torch.float32
    weights = load_file(folder / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in weights)  # what older versions and other tools read
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    assert tokenizer.model_max_length == 248
    ids = tokenizer(PROMPTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert ids.shape == (3, 248)
    clip = build_clip(plain_clip(trained))
    *expected, _ = collect(clip.transformer.resblocks, lambda: clip.encode_text(ids))
    output = encoder(ids, output_hidden_states=True)
    assert len(output.hidden_states) == len(expected) + 1
    for layer, (actual, state) in enumerate(zip(output.hidden_states[1:], expected, strict=True)):
        torch.testing.assert_close(actual, state, **TOLERANCE, msg=lambda text, layer=layer: f"layer {layer}: {text}")
    torch.testing.assert_close(output.last_hidden_state, clip.ln_final(expected[-1]), **TOLERANCE)
    _, ends = fixclip_states(trained, torch.zeros(3, 3, 32, 32), ids)[-3:-1]
    torch.testing.assert_close(output.hidden_states[-1][torch.arange(3), ids.argmax(-1)], ends, **TOLERANCE)


@torch.no_grad()
def test_exported_components_are_taken_by_fixclip_diffusion(trained, exported):
    folder, _ = exported
    encoder = FixClipTextEncoder.from_pretrained(folder / "text_encoder").eval()
    tokenizer = FixClipTokenizer.from_pretrained(folder / "tokenizer")
    assert (encoder.context_length, encoder.short_context_length) == (248, 0)
    ids = tokenizer(PROMPTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    stock = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
    states, wanted = encoder(ids).last_hidden_state, stock(ids).last_hidden_state
    assert encoder.config.padding == "mask"
    for row, (own, theirs) in enumerate(zip(states, wanted, strict=True)):
        length = int((ids[row] == tokenizer.eos_token_id).nonzero()[0]) + 1
        torch.testing.assert_close(own[:length], theirs[:length], **TOLERANCE)
        assert not own[length:].any()


def test_tokenizers_agree(trained, exported):
    folder, _ = exported
    plain = ["a photo of a cat", "It's 12 o'clock! (again)", "  two   spaces\nand a line ", ""]
    # The stock tokenizer does not clean its text as CLIP's does, ours does.
    messy = [*plain, "“quoted” &amp; café, 3½"]
    for tokenizer, texts in (
        (CLIPProcessor.from_pretrained(folder / "transformers").tokenizer, plain),
        (CLIPTokenizer.from_pretrained(folder / "tokenizer"), plain),
        (FixClipTokenizer.from_pretrained(folder / "tokenizer"), messy),
    ):
        own = trained.tokenizer()(texts)
        ids = tokenizer(texts, padding="max_length", truncation=True, max_length=248, return_tensors="pt").input_ids
        for row, (ours, theirs) in enumerate(zip(own, ids, strict=True)):
            length = int(ours.argmax()) + 1
            assert ours[:length].tolist() == theirs[:length].tolist(), texts[row]


def test_processor_prepares_images_like_the_model(trained, exported):
    folder, _ = exported
    processor = CLIPProcessor.from_pretrained(folder / "transformers")
    picture = Image.effect_noise((48, 32), 80).convert("RGB")  # no resampling: libraries differ there by rounding
    actual = processor(images=picture, return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(actual, trained.preprocess(train=False)(picture), **TOLERANCE)


def test_single_file_has_the_keys_of_a_clip_l_file(trained, exported):
    folder, _ = exported
    weights, _ = load_weights(folder / "clip_l_long.safetensors")
    # What ComfyUI tells the encoder and its length by.
    assert "text_model.encoder.layers.0.mlp.fc1.weight" in weights
    assert weights["text_model.embeddings.position_embedding.weight"].shape == (248, 64)
    prefix = "text_model."
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    reloaded = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    assert reloaded.keys() == encoder.state_dict().keys()
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(reloaded[name], tensor), name
    assert weights.keys() - {prefix + name for name in reloaded} == {"text_projection.weight"}
    torch.testing.assert_close(weights["text_projection.weight"].T, trained.text.text_projection)


def text_tower(layers, width=64, quick_gelu=True):
    config = tiny_config(248, quick_gelu)
    config["text_cfg"] |= {"width": width, "layers": layers, "heads": width // 64, "vocab_size": 64}
    return ClipCheckpoint("", open_clip.CLIP(**config).state_dict(), config, {})


@pytest.mark.parametrize(
    ("layers", "width", "quick_gelu", "said"),
    [
        (12, 768, True, []),
        (12, 768, False, ["a clip_l file", "compute QuickGELU, this encoder needs GELU"]),
        (12, 64, True, ["takes width 768 and 12 layers, this one has 64 and 12"]),
        (
            32,
            64,
            True,
            ["a clip_g file", "takes width 1280", "compute GELU, this encoder needs QuickGELU"],
        ),
    ],
)
def test_single_file_says_where_it_does_not_fit(tmp_path, layers, width, quick_gelu, said):
    line = write_single_file(text_tower(layers, width, quick_gelu), tmp_path / "file.safetensors")
    assert all(words in line for words in said), line
    assert (";" in line) == bool(said)


def test_single_file_brings_its_configuration(trained, exported):
    weights = read_text_encoder(exported[0] / "clip_l_long.safetensors")
    encoder = CLIPTextModel.from_pretrained(exported[0] / "text_encoder")
    for field in CONFIG_FIELDS:
        assert weights.config[field] == getattr(encoder.config, field), field
    assert weights.config["num_attention_heads"] == 2  # heads of 32: the tensors do not tell
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(weights.state_dict[f"text_model.{name}"], tensor), name


@torch.no_grad()
def test_a_clip_g_file_is_read_again(tmp_path):
    """By transformers alone, from the file's tensors and metadata, and by our reader."""
    config = tiny_config(quick_gelu=False)
    config["text_cfg"] |= {"width": 64, "layers": 32, "heads": 1}
    torch.manual_seed(6)
    _, _, preprocess = full_vocabulary_clip()
    model = FixClip.from_clip(open_clip.CLIP(**config), config, preprocess, num_groups=0).eval()
    for parameter in model.text.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    lines = export(model, tmp_path / "out", ["clip_g"])
    assert any("the names of a clip_g file" in line for line in lines)
    file = tmp_path / "out" / "clip_g_long.safetensors"
    weights = load_file(file)
    assert {name for name in weights if not name.startswith("text_model.")} == {"text_projection.weight"}
    with safe_open(file, framework="pt") as opened:
        values = json.loads(opened.metadata()[CONFIG_KEY])
    assert (values["hidden_act"], values["num_hidden_layers"]) == ("gelu", 32)
    assert (values["max_position_embeddings"], values["padding"]) == (248, "mask")
    plain = CLIPTextModelWithProjection(CLIPTextConfig(**values)).eval()
    plain.load_state_dict(weights)
    ours = FixClipTextEncoderWithProjection.from_file(file)
    assert (ours.context_length, ours.short_context_length) == (248, 0)
    _, ids = batch(248)
    clip = build_clip(plain_clip(model))
    *expected, pooled = collect(clip.transformer.resblocks, lambda: clip.encode_text(ids))
    assert len(expected) == 32
    for encoder in (plain, ours):
        output = encoder(ids, output_hidden_states=True)
        for layer, (actual, state) in enumerate(zip(output.hidden_states[1:], expected, strict=True)):
            for row, end in enumerate(ids.argmax(-1)):  # ours makes 0 what stands behind
                error = (actual[row, : end + 1] - state[row, : end + 1]).abs().max()
                assert error < 1e-5 * state.abs().max(), f"layer {layer}"
        torch.testing.assert_close(output.text_embeds, pooled, atol=1e-5 * float(pooled.abs().max()), rtol=0)


def test_single_file_is_named_as_comfyui_files_it(tmp_path):
    """31 layers and more are a clip_g there, 23 to 30 a ViT-H, whose 248 positions it cannot load."""
    assert [single_file_format(text_tower(layers)) for layers in (12, 24, 32)] == ["clip_l", None, "clip_g"]
    clip, config, preprocess = full_vocabulary_clip()
    short = config | {"text_cfg": config["text_cfg"] | {"layers": 24, "vocab_size": 64}}
    model = FixClip.from_clip(open_clip.CLIP(**short), short, preprocess, num_groups=0)
    lines = export(model, tmp_path / "all", ["open_clip"])
    assert any("no single file for ComfyUI" in line for line in lines)
    with pytest.raises(ValueError, match=r"format clip_g: ComfyUI could not load this text tower of 24 layers"):
        export(model, tmp_path / "one", ["clip_g"])
    plain = FixClip.from_clip(clip, config, preprocess, num_groups=0)
    with pytest.raises(ValueError, match=r"text tower of 2 layers for a clip_l: choose --format clip_l"):
        export(plain, tmp_path / "one", ["clip_g"])


def test_what_a_plain_clip_cannot_hold_is_said_and_kept(trained, exported):
    folder, lines = exported
    said = next(line for line in lines if "regional prompts" in line)
    assert "no place for the 3 regional prompts of each image layer" in said
    for place in (folder, folder / "transformers", folder / "open_clip"):
        assert said in (place / "README.md").read_text()
    images, ids = full_batch(trained)
    kept = FixClip.from_pretrained(folder / "fixclip").eval()
    with torch.no_grad():
        torch.testing.assert_close(kept.encode_image(images), trained.encode_image(images), **TOLERANCE)
        torch.testing.assert_close(kept.encode_text(ids), trained.encode_text(ids), **TOLERANCE)
        assert not torch.allclose(trained.encode_image(images), trained.encode_image(images, prompts=False), atol=1e-3)
    plain = FixClip.from_clip(*full_vocabulary_clip(), num_prompts=0, num_groups=0, short_branch="off")
    assert not any("prompts" in line for line in export(plain, folder.parent / "plain", ["clip_l"]))


def test_exports_come_back_as_fixclip(trained, exported):
    folder, _ = exported
    images, ids = full_batch(trained)
    for source in (folder / "transformers", folder / "open_clip", folder / "fixclip"):
        fields = {} if source.name == "fixclip" else {"num_prompts": 0, "num_groups": 0}
        model = load_fixclip(source, **fields).eval()
        assert model.config.context_length == 248
        assert_same_states(fixclip_states(model, images, ids), fixclip_states(trained, images, ids))


def test_a_training_run_is_found_by_its_folder(trained, tmp_path):
    trained.save_pretrained(tmp_path / "model")
    assert load_fixclip(tmp_path).config == trained.config


def test_a_vocabulary_of_its_own_goes_in_and_out(tmp_path):
    tokenizer = train_tokenizer(["a red cat and a blue dog"], vocab_size=560)
    model = tiny_transformers_clip(vocab_size=len(tokenizer), eos_token_id=len(tokenizer) - 1)
    model.save_pretrained(tmp_path / "in")
    tokenizer.save_pretrained(tmp_path / "in")
    fixclip = load_fixclip(tmp_path / "in", num_groups=0, num_prompts=0).eval()
    texts = ["a red cat", "two dogs and a cat"]
    ids = fixclip.tokenizer()(texts)
    assert ids.shape == (2, 248)
    export(fixclip, tmp_path / "out", ["transformers"])
    out = CLIPModel.from_pretrained(tmp_path / "out" / "transformers").eval()
    exported_tokenizer = CLIPProcessor.from_pretrained(tmp_path / "out" / "transformers").tokenizer
    out_ids = exported_tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(out_ids, ids)
    with torch.no_grad():
        features = torch.nn.functional.normalize(out.get_text_features(out_ids).pooler_output, dim=-1)
        torch.testing.assert_close(features, fixclip.encode_text(ids), **TOLERANCE)
        base = model.get_text_features(ids[:, :20]).pooler_output  # short texts read as before
        torch.testing.assert_close(features, torch.nn.functional.normalize(base, dim=-1), **TOLERANCE)


def test_fields_of_a_fixclip_cannot_be_changed(exported):
    with pytest.raises(ValueError, match="has num_prompts=3, not 0; fields of a FixClip cannot be changed"):
        load_fixclip(exported[0] / "fixclip", num_prompts=0)


def test_half_precision_export(trained, tmp_path):
    export(trained, tmp_path / "half", ["clip_l", "transformers"], torch.float16)
    assert load_file(tmp_path / "half" / "clip_l_long.safetensors")["text_projection.weight"].dtype == torch.float16
    assert sorted(path.name for path in (tmp_path / "half").iterdir()) == [
        "README.md",
        "clip_l_long.safetensors",
        "transformers",
    ]


def test_export_refuses_and_leaves_nothing_behind(trained, tmp_path):
    with pytest.raises(ValueError, match="'onnx': valid are fixclip, transformers"):
        export(trained, tmp_path / "out", ["onnx"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"full exists and is not empty"):
        export(trained, tmp_path / "full")
    clip, config, preprocess = full_vocabulary_clip()
    config["vision_cfg"]["act_kwargs"] = {"approximate": "tanh"}
    with pytest.raises(ValueError, match="act_kwargs="):
        export(FixClip.from_clip(clip, config, preprocess, num_groups=0), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


@pytest.mark.parametrize("formats", [["foo"], ["delta"]])
def test_a_refused_export_leaves_no_folder(trained, tmp_path, formats):
    """Nor does a conversion; a folder that was there stays."""
    trained.save_pretrained(tmp_path / "run")
    (tmp_path / "there").mkdir()
    command = ["export", tmp_path / "run", "--format", *formats]
    for arguments in (command, ["convert", tmp_path / "run", "--set", "num_groups=3"]):
        for output in (tmp_path / "out", tmp_path / "there"):
            words = [str(word) for word in [*arguments[:2], output, *arguments[2:]]]
            assert CliRunner().invoke(app, words).exit_code != 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "there"]
