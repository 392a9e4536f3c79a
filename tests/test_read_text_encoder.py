"""Text encoders out of every kind of file that people have, compared with open_clip layer by layer."""

import json
import subprocess
import sys

import pytest
import torch
from command_line import error_of, run
from safetensors.torch import save_file
from tiny_clips import TOLERANCE, VOCAB_SIZE, batch, collect, tiny_clip
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from fixclip_core.check import LoadError
from fixclip_core.weights import text_encoder
from fixclip_core.weights.names import to_transformers_names
from fixclip_core.weights.text_encoder import CONFIG_KEY, read_text_config, read_text_encoder, text_encoders_in
from fixclip_diffusion import FixClipTextEncoder


def open_clip_text(clip):
    return {name: tensor for name, tensor in clip.state_dict().items() if not name.startswith("visual.")}


def transformers_text(clip):
    named = to_transformers_names(open_clip_text(clip)).items()
    return {name: tensor for name, tensor in named if name.startswith("text_")}


def flat(clip):
    return {name.removeprefix("text_model."): tensor for name, tensor in transformers_text(clip).items()}


def two_tables(state_dict, table, rest):
    """As Long-CLIP stores positions: rows 0..19 of one table count, and 20..247 of the other."""
    first, second = torch.full_like(state_dict[table], 7.0), torch.full_like(state_dict[table], -7.0)
    first[:20], second[20:] = state_dict[table][:20], state_dict[table][20:]
    return {**state_dict, table: first, rest: second}


def prefixed(prefix, state_dict):
    return {prefix + name: tensor for name, tensor in state_dict.items()}


def checkpoint(prefix, state_dict):
    """A Stable Diffusion file: beside the text encoder stand UNet and VAE."""
    others = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(2), "first_stage_model.x": torch.zeros(2)}
    return prefixed(prefix, state_dict) | others


# What the file does not say by a prefix or a width is passed, as it must be for CLIPs of other widths than 768.
QUICK, GELU = {"hidden_act": "quick_gelu"}, {"hidden_act": "gelu"}
FILES = {
    "openai state dict": (lambda clip: clip.state_dict() | {"input_resolution": torch.tensor(224)}, {}),
    "open_clip": (open_clip_text, GELU),
    "open_clip with text.": (lambda clip: prefixed("text.", open_clip_text(clip)), GELU),
    "module.": (lambda clip: prefixed("module.", open_clip_text(clip)), GELU),
    "model.": (lambda clip: prefixed("model.", transformers_text(clip)), QUICK),
    "net.text_model.text_model.": (lambda clip: prefixed("net.text_model.", transformers_text(clip)), QUICK),
    "transformers": (transformers_text, QUICK),
    "transformers, flat": (flat, QUICK),
    "clip_l.": (lambda clip: prefixed("clip_l.", transformers_text(clip)), {}),
    "clip_g.": (lambda clip: prefixed("clip_g.transformer.", transformers_text(clip)), {}),
    "ComfyUI": (lambda clip: prefixed("text_encoders.clip_l.transformer.", transformers_text(clip)), {}),
    "Stable Diffusion 1": (
        lambda clip: checkpoint("cond_stage_model.transformer.", transformers_text(clip)),
        {},
    ),
    "Stable Diffusion 2": (lambda clip: checkpoint("cond_stage_model.model.", open_clip_text(clip)), {}),
}
IS_GELU = ("open_clip", "open_clip with text.", "module.", "clip_g.", "Stable Diffusion 2")


def assert_same_encoder(weights, clip, context_length=77):
    """All tokens after every layer, and the pooled vector, against open_clip's own modules."""
    model = CLIPTextModelWithProjection(CLIPTextConfig(**weights.config)).eval()
    model.load_state_dict(weights.state_dict)
    _, ids = batch(context_length)
    *expected, pooled = collect(clip.transformer.resblocks, lambda: clip.encode_text(ids))
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
    for actual, state in zip(output.hidden_states[1:], expected, strict=True):
        torch.testing.assert_close(actual, state, **TOLERANCE)
    torch.testing.assert_close(output.text_embeds, pooled, **TOLERANCE)


@pytest.mark.parametrize("kind", FILES)
def test_files_of_every_kind(tmp_path, kind):
    make, config = FILES[kind]
    clip = tiny_clip(quick_gelu=kind not in IS_GELU)
    save_file({name: t.contiguous() for name, t in make(clip).items()}, tmp_path / "file.safetensors")
    weights = read_text_encoder(tmp_path / "file.safetensors", **config)
    assert weights.has_projection
    assert weights.config["num_attention_heads"] == 2
    assert weights.config["eos_token_id"] == VOCAB_SIZE - 1
    assert_same_encoder(weights, clip)


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "net"])
def test_wrapped_pickles(tmp_path, wrapper):
    clip = tiny_clip()
    torch.save({wrapper: open_clip_text(clip), "epoch": 3}, tmp_path / "file.ckpt")
    assert_same_encoder(read_text_encoder(tmp_path / "file.ckpt", **QUICK), clip)


@pytest.mark.parametrize("layout", ["open_clip", "transformers", "flat"])
def test_long_clip_of_the_community(tmp_path, layout):
    clip = tiny_clip(248)
    table, rest = "positional_embedding", "positional_embedding_res"
    state_dict = open_clip_text(clip)
    if layout != "open_clip":
        table = "text_model." * (layout == "transformers") + "embeddings.position_embedding.weight"
        rest = table.replace(".weight", "_res.weight" if layout == "flat" else "_res")
        state_dict = transformers_text(clip) if layout == "transformers" else flat(clip)
    save_file(two_tables(state_dict, table, rest), tmp_path / "long.safetensors")
    weights = read_text_encoder(tmp_path / "long.safetensors")  # Long-CLIP is known to have QuickGELU
    assert weights.config["max_position_embeddings"] == 248
    assert_same_encoder(weights, clip, 248)


def test_a_file_of_two_text_encoders(tmp_path):
    first, second = tiny_clip(seed=1), tiny_clip(quick_gelu=False, seed=2)
    path = tmp_path / "sdxl.safetensors"
    both = checkpoint("conditioner.embedders.0.transformer.", transformers_text(first))
    save_file(both | prefixed("conditioner.embedders.1.model.", open_clip_text(second)), path)
    assert text_encoders_in(path) == ["l", "g"]
    for which, clip, pad in (("l", first, VOCAB_SIZE - 1), ("g", second, 0)):
        weights = read_text_encoder(path, which)
        assert weights.config["pad_token_id"] == pad
        assert_same_encoder(weights, clip)
    with pytest.raises(LoadError, match=r"2 text encoders, CLIP-L \(conditioner.embedders.0.*CLIP-G .*say which"):
        read_text_encoder(path)
    with pytest.raises(LoadError, match=r"CLIP-H is needed here, the file holds CLIP-L"):
        read_text_encoder(path, "h")


@pytest.mark.parametrize(("width", "which", "activation"), [(768, "l", "quick_gelu"), (1024, "h", "gelu")])
def test_the_width_tells_which_clip_it_is(width, which, activation):
    names = {"text_model.embeddings.token_embedding.weight": (49410, width)}
    names |= {"text_model.embeddings.position_embedding.weight": (77, width)}
    names |= {"text_model.encoder.layers.0.mlp.fc1.weight": (4 * width, width)}
    (tower,) = text_encoder.find_text_towers(names)
    config = text_encoder.infer_text_config(names, tower.which)
    assert (tower.which, config["hidden_act"], config["num_attention_heads"]) == (which, activation, width // 64)
    assert config["eos_token_id"] == 49407  # the two behind it are added tokens


def test_a_file_that_brings_its_configuration(tmp_path):
    """Of widths that heads of 64 do not divide, a file says in its metadata what its tensors do not."""
    clip = tiny_clip(quick_gelu=False)
    config = {"num_attention_heads": 4, "hidden_act": "gelu", "layer_norm_eps": 1e-6}
    path = tmp_path / "file.safetensors"
    save_file(transformers_text(clip), path, metadata={CONFIG_KEY: json.dumps(config)})
    assert read_text_encoder(path).config.items() >= config.items()
    assert read_text_encoder(path, hidden_act="quick_gelu").config["hidden_act"] == "quick_gelu"
    for wrong in ({"num_attention_heads": 5}, {"num_attention_heads": 0}, {"num_hidden_layers": 10**6}, [1]):
        save_file(transformers_text(clip), path, metadata={CONFIG_KEY: json.dumps(wrong)})
        with pytest.raises(LoadError, match=r"5 heads|0 heads|says 1000000 layers, the weights have 2|is a list"):
            read_text_encoder(path, hidden_act="gelu")


def test_what_the_file_does_not_tell_is_asked_for(tmp_path):
    path = tmp_path / "file.safetensors"
    save_file(open_clip_text(tiny_clip()), path)
    with pytest.raises(LoadError, match=r"of width 128 do not tell the activation; pass hidden_act='quick_gelu'"):
        read_text_encoder(path)


OTHER_KINDS = {
    "a VAE": ["decoder.conv_in.weight", "encoder.down.0.block.0.conv1.weight"],
    "a UNet": ["down_blocks.0.attentions.0.norm.weight", "conv_in.weight"],
    "a checkpoint without its text encoder": ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.x"],
    "a LoRA": ["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"],
    "a textual inversion": ["emb_params"],
    "an adapter of this project": ["blocks.0.fc1.weight", "blocks.0.norm.weight"],
    "a T5 text encoder": ["shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"],
    "a ControlNet": ["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"],
    "a transformer": ["double_blocks.0.img_attn.norm.key_norm.scale"],
    "an image encoder": ["vision_model.encoder.layers.0.mlp.fc1.weight"],
    "2 tensors, the first are a, b": ["a", "b"],
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_files_of_another_kind_are_named_by_their_header(tmp_path, kind):
    path = tmp_path / "file.safetensors"
    save_file({name: torch.zeros(64, 64) for name in OTHER_KINDS[kind]}, path)
    path.write_bytes(path.read_bytes()[:-16384] + bytes([255]) * 16384)  # NaN: nobody looks at the values
    with pytest.raises(LoadError, match=f"no CLIP text encoder in this file, it is {kind}"):
        read_text_encoder(path)
    assert text_encoders_in(path) == []


def test_damage_is_one_error(tmp_path):
    path, state_dict = tmp_path / "file.safetensors", transformers_text(tiny_clip())
    layer = "text_model.encoder.layers.1.mlp.fc2.weight"
    for change, message in (
        ({layer: None}, r"1 of 37 weights are missing, the first is .*layers.1.mlp.fc2.weight"),
        ({layer: torch.zeros(128, 4)}, r"fc2.weight: \(128, 4\), where the configuration makes \(128, 512\)"),
        ({layer: torch.full((128, 512), float("nan"))}, r"layers.1.mlp.fc2.weight holds NaN or infinite values"),
        ({layer: torch.full((128, 512), float("-inf"))}, r"layers.1.mlp.fc2.weight holds NaN or infinite values"),
        ({"text_model.embeddings.position_embedding.weight": None}, "KeyError: .*position_embedding"),
        ({"text_model.head.weight": torch.zeros(2)}, "this is a SigLIP"),
    ):
        changed = {name: tensor for name, tensor in (state_dict | change).items() if tensor is not None}
        save_file(changed, path)
        with pytest.raises(LoadError, match=message):
            read_text_encoder(path, **QUICK)
    save_file(state_dict | {layer: torch.full((128, 512), float("nan"))}, path)
    assert read_text_config(path, **QUICK)["hidden_size"] == 128  # of the header alone
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(LoadError, match="is a damaged safetensors file"):
        read_text_encoder(path)
    with pytest.raises(LoadError, match="no such file"):
        read_text_encoder(tmp_path / "nothing")


def test_reading_a_text_encoder_needs_no_training_library():
    code = "import sys, fixclip_core.weights.text_encoder; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not {"open_clip", "diffusers", "transformers"} & set(done.stdout.split())


# --- as folders of a pipeline --------------------------------------------------------------------------------


def test_convert_writes_the_text_encoders_of_a_checkpoint(tmp_path):
    first, second = tiny_clip(seed=1), tiny_clip(quick_gelu=False, seed=2)
    path = tmp_path / "sdxl.safetensors"
    both = checkpoint("conditioner.embedders.0.transformer.", transformers_text(first))
    save_file(both | prefixed("conditioner.embedders.1.model.", open_clip_text(second)), path)
    result = run("convert", path, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "CLIP-G, width 128, 77 tokens; its vocabulary of 50 is not CLIP's" in result.output
    for folder, clip in (("text_encoder", first), ("text_encoder_2", second)):
        model = CLIPTextModelWithProjection.from_pretrained(tmp_path / "out" / folder).eval()
        stretched = FixClipTextEncoder.from_pretrained(tmp_path / "out" / folder).eval()
        _, ids = batch()
        *expected, pooled = collect(clip.transformer.resblocks, lambda clip=clip, ids=ids: clip.encode_text(ids))
        with torch.no_grad():
            torch.testing.assert_close(model(ids).text_embeds, pooled, **TOLERANCE)
            torch.testing.assert_close(stretched(ids).last_hidden_state, clip.ln_final(expected[-1]), **TOLERANCE)
    for arguments, message in (((path, tmp_path / "out"), "not empty"), ((path, path), "is a file")):
        assert message in error_of(run("convert", *arguments))


def test_convert_asks_for_the_activation_and_refuses_other_kinds(tmp_path):
    path = tmp_path / "clip.safetensors"
    save_file(open_clip_text(tiny_clip(quick_gelu=False)), path)
    for arguments, message in (
        ((), "do not tell the activation"),
        (("--set", "num_prompts=0"), "a name of hidden_act, num_attention_heads; "),
        (("--set", "num_prompts=0"), "holds no image tower, so it makes no FixClip"),
        (("--set", "hidden_act=gelu", "--model-name", "ViT-L-14"), "both name the activation: leave one out"),
        (("--set", "hidden_act=gelu", "--set", "num_attention_heads=3"), "3 heads do not divide the width"),
        (("--model-name", "ViT-Z"), "'ViT-Z': not one of open_clip's"),
    ):
        assert message in error_of(run("convert", path, tmp_path / "out", *arguments))
        assert not any((tmp_path / "out").glob("*"))
    assert run("convert", path, tmp_path / "out", "--model-name", "ViT-L-14").exit_code == 0
    config = json.loads((tmp_path / "out" / "text_encoder" / "config.json").read_text())
    assert (config["hidden_act"], config["architectures"]) == ("gelu", ["CLIPTextModelWithProjection"])
    chosen = ("--set", "hidden_act=quick_gelu", "--set", "num_attention_heads=1")
    assert run("convert", path, tmp_path / "chosen", *chosen).exit_code == 0
    config = json.loads((tmp_path / "chosen" / "text_encoder" / "config.json").read_text())
    assert (config["hidden_act"], config["num_attention_heads"]) == ("quick_gelu", 1)
    save_file({"decoder.conv_in.weight": torch.zeros(2)}, tmp_path / "vae.safetensors")
    error = error_of(run("convert", tmp_path / "vae.safetensors", tmp_path / "new"))
    assert "no CLIP of two transformers but a VAE" in error
