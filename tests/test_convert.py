"""Every format in and out, compared block by block in float32."""

import json
import os
import pickle
import zipfile

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from tiny_clips import (
    TOLERANCE,
    VOCAB_SIZE,
    assert_same_states,
    batch,
    open_clip_states,
    tiny_clip,
    tiny_config,
    tiny_transformers_clip,
    transformers_states,
)
from torch import nn
from transformers import CLIPImageProcessor

from fixclip_core.model.fixclip import FixClip
from fixclip_core.weights.files import load_weights
from fixclip_core.weights.load import build_clip, load_fixclip
from fixclip_core.weights.names import merge_long_clip_positions, to_open_clip_names, to_transformers_names
from fixclip_core.weights.read import read_clip

# --- names -----------------------------------------------------------------------------------------------


def test_names_round_trip():
    state_dict = tiny_clip().state_dict()
    back = to_open_clip_names(to_transformers_names(state_dict))
    assert back.keys() == state_dict.keys()
    for name, tensor in state_dict.items():
        assert torch.equal(back[name], tensor), name


def test_names_that_do_not_belong():
    with pytest.raises(ValueError, match="'logit_bias' has no place in a transformers CLIPModel"):
        to_transformers_names({"logit_bias": torch.zeros(())})
    with pytest.raises(ValueError, match=r"'visual.transformer.resblocks.0.ls_1.gamma' has no place"):
        to_transformers_names({"visual.transformer.resblocks.0.ls_1.gamma": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"'qformer.weight' has no place"):
        to_open_clip_names({"qformer.weight": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"layers.0.self_attn.k_proj.bias is missing"):
        to_open_clip_names({"text_model.encoder.layers.0.self_attn.q_proj.bias": torch.zeros(3)})


# --- files in OpenAI's layout ----------------------------------------------------------------------------


class Archive(nn.Module):
    """Holds a CLIP's weights as OpenAI's TorchScript archives do, with its three numbers beside them."""

    def __init__(self, clip):
        super().__init__()
        for name, child in clip.named_children():
            self.add_module(name, child)
        for name, parameter in clip.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self.register_buffer("input_resolution", torch.tensor(32))
        self.register_buffer("context_length", torch.tensor(77))
        self.register_buffer("vocab_size", torch.tensor(VOCAB_SIZE))

    def forward(self, x):
        return x


def test_openai_torchscript_archive(tmp_path):
    clip, path = tiny_clip(), tmp_path / "misleading.safetensors"
    torch.jit.save(torch.jit.trace(Archive(clip), torch.zeros(1)), path)
    checkpoint = read_clip(path)
    assert checkpoint.format == "OpenAI TorchScript archive"
    assert checkpoint.model_config["quick_gelu"]
    assert_same_states(open_clip_states(build_clip(checkpoint), *batch()), open_clip_states(clip, *batch()))


@pytest.mark.parametrize("legacy", [False, True])
def test_openai_state_dict(tmp_path, legacy):
    clip, path = tiny_clip(), tmp_path / "ViT.pt"
    torch.save(Archive(clip).state_dict(), path, _use_new_zipfile_serialization=not legacy)
    checkpoint = read_clip(path)
    assert checkpoint.format == "OpenAI state dict"
    assert checkpoint.preprocess["size"] == 32
    assert checkpoint.preprocess["mean"] == open_clip.OPENAI_DATASET_MEAN
    assert_same_states(open_clip_states(build_clip(checkpoint), *batch()), open_clip_states(clip, *batch()))


def test_half_precision_is_read_as_float32(tmp_path):
    torch.save(Archive(tiny_clip().half()).state_dict(), tmp_path / "half.pt")
    checkpoint = read_clip(tmp_path / "half.pt")
    assert {tensor.dtype for tensor in checkpoint.state_dict.values()} == {torch.float32}


def test_long_clip_file_merges_both_tables(tmp_path):
    clip = tiny_clip(context_length=248)
    state_dict = clip.state_dict()
    table = state_dict["positional_embedding"]
    # What counts lies in rows 0..19 of one table and 20..247 of the other; the rest must not be read.
    first, rest = torch.full_like(table, 7.0), torch.full_like(table, -7.0)
    first[:20], rest[20:] = table[:20], table[20:]
    torch.save(
        {**state_dict, "positional_embedding": first, "positional_embedding_res": rest},
        tmp_path / "longclip.pt",
    )
    checkpoint = read_clip(tmp_path / "longclip.pt")
    assert (checkpoint.format, checkpoint.context_length) == ("Long-CLIP", 248)
    assert_same_states(open_clip_states(build_clip(checkpoint), *batch(248)), open_clip_states(clip, *batch(248)))


def test_long_clip_tables_of_different_shape():
    with pytest.raises(ValueError, match=r"one shape, got \(248, 8\) and \(77, 8\)"):
        merge_long_clip_positions(torch.zeros(248, 8), torch.zeros(77, 8))


# --- open_clip -------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_model_name(tmp_path):
    """A model name known to open_clip, as `open_clip.add_model_config` lets users register theirs."""
    for name, quick_gelu in (("ViT-tiny", False), ("ViT-tiny-quickgelu", True)):
        (tmp_path / "configs").mkdir(exist_ok=True)
        (tmp_path / "configs" / f"{name}.json").write_text(json.dumps(tiny_config(quick_gelu=quick_gelu)))
    open_clip.add_model_config(tmp_path / "configs")
    return "ViT-tiny"


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_open_clip_file_with_model_name(tmp_path, tiny_model_name, quick_gelu, wrapped):
    clip, path = tiny_clip(quick_gelu=quick_gelu), tmp_path / "weights.bin"
    state_dict = clip.state_dict()
    if wrapped:  # a training checkpoint of several GPUs
        state_dict = {
            "epoch": 3,
            "state_dict": {f"module.{k}": v for k, v in state_dict.items()},
            "optimizer": {},
        }
    torch.save(state_dict, path)
    checkpoint = read_clip(path, tiny_model_name + "-quickgelu" * quick_gelu)
    assert checkpoint.model_config["quick_gelu"] is quick_gelu
    assert_same_states(open_clip_states(build_clip(checkpoint), *batch()), open_clip_states(clip, *batch()))


def test_wrong_activation_would_show():
    right, wrong = (tiny_clip(quick_gelu=quick_gelu) for quick_gelu in (True, False))
    with pytest.raises(AssertionError, match="layer 0"):
        assert_same_states(open_clip_states(wrong, *batch()), open_clip_states(right, *batch()))


def test_custom_text_layout(tmp_path, tiny_model_name):
    clip = tiny_clip(quick_gelu=False)
    custom = open_clip.model.convert_to_custom_text_state_dict(clip.state_dict())
    assert "text.positional_embedding" in custom
    save_file(custom, tmp_path / "weights.safetensors")
    checkpoint = read_clip(tmp_path / "weights.safetensors", tiny_model_name)
    assert_same_states(open_clip_states(build_clip(checkpoint), *batch()), open_clip_states(clip, *batch()))


def test_open_clip_file_without_activation_is_refused(tmp_path):
    save_file(tiny_clip().state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(
        ValueError, match=r"weights.safetensors: weights alone do not tell the activation.*--model-name"
    ):
        read_clip(tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"'ViT-B-61': not one of open_clip's \(.*ViT-B-16"):
        read_clip(tmp_path / "weights.safetensors", "ViT-B-61")


def test_open_clip_folder_and_file_beside_its_config(tmp_path):
    clip = tiny_clip(quick_gelu=False)
    preprocess = {"size": 32, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bilinear"}
    config = {"model_cfg": tiny_config(quick_gelu=False), "preprocess_cfg": preprocess}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"open_clip_model.safetensors or open_clip_pytorch_model.bin expected"):
        read_clip(tmp_path)
    save_file({"visual.trunk.patch_embed.weight": torch.zeros(1)}, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match=r"open_clip_model.safetensors is no CLIP of two transformers"):
        read_clip(tmp_path)
    (tmp_path / "open_clip_model.safetensors").unlink()
    torch.save(clip.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    for source in (tmp_path, tmp_path / "open_clip_pytorch_model.bin"):
        checkpoint = read_clip(source)
        assert checkpoint.preprocess["mean"] == [0.5, 0.5, 0.5]
        assert checkpoint.preprocess["interpolation"] == "bilinear"
        assert_same_states(open_clip_states(build_clip(checkpoint), *batch()), open_clip_states(clip, *batch()))


def test_weights_of_another_architecture(tmp_path, tiny_model_name):
    state_dict = tiny_clip().state_dict()
    state_dict = {name: tensor for name, tensor in state_dict.items() if "resblocks.1." not in name}
    save_file(state_dict, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="the configuration says 2 layers, the weights have 1"):
        build_clip(read_clip(tmp_path / "weights.safetensors", tiny_model_name))


# --- transformers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("context_length", [77, 248])
def test_transformers_folder(tmp_path, activation, context_length):
    model = tiny_transformers_clip(context_length, activation)
    model.save_pretrained(tmp_path)
    checkpoint = read_clip(tmp_path)
    assert (checkpoint.format, checkpoint.context_length) == ("transformers", context_length)
    images, ids = batch(context_length)
    assert_same_states(open_clip_states(build_clip(checkpoint), images, ids), transformers_states(model, images, ids))


def test_transformers_folder_in_shards_and_single_file(tmp_path):
    model = tiny_transformers_clip()
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    model.save_pretrained(tmp_path / "one")
    (tmp_path / "lost").mkdir()
    for path in (tmp_path / "shards").glob("*.json"):
        (tmp_path / "lost" / path.name).write_text(path.read_text())
    with pytest.raises(ValueError, match=r"model-00001-of-\d+.safetensors: no such file"):
        read_clip(tmp_path / "lost")
    for source in (tmp_path / "shards", tmp_path / "one" / "model.safetensors"):
        clip = build_clip(read_clip(source))
        assert_same_states(open_clip_states(clip, *batch()), transformers_states(model, *batch()))


def test_old_transformers_config(tmp_path):
    """The files of openai/clip-vit-* hold a second copy of each part and left-overs of text generation."""
    model = tiny_transformers_clip()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    leftovers = {"bad_words_ids": None, "max_length": 20, "num_beams": 1, "top_k": 50, "torch_dtype": None}
    for part in ("text_config", "vision_config"):
        config[f"{part}_dict"] = {k: config[part][k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers")}
        config[f"{part}_dict"] |= {"num_attention_heads": 2}
        config[part] |= leftovers
    config["text_config_dict"] |= {"vocab_size": VOCAB_SIZE, "bos_token_id": 0, "eos_token_id": 2}
    config["vision_config_dict"] |= {"image_size": 32, "patch_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same_states(
        open_clip_states(build_clip(read_clip(tmp_path)), *batch()), transformers_states(model, *batch())
    )


def test_transformers_preprocessing_is_kept(tmp_path):
    tiny_transformers_clip().save_pretrained(tmp_path)
    size = {"shortest_edge": 32}
    processor = CLIPImageProcessor(size=size, crop_size=32, image_mean=[0.1, 0.2, 0.3], image_std=[1, 2, 3], resample=2)
    processor.save_pretrained(tmp_path)
    preprocess = read_clip(tmp_path).preprocess
    assert preprocess["mean"] == (0.1, 0.2, 0.3)
    assert preprocess["std"] == (1, 2, 3)
    assert preprocess["interpolation"] == "bilinear"
    assert preprocess["size"] == 32


def test_transformers_end_token_below_added_tokens(tmp_path):
    # With added tokens (textual inversion) the end token is not the highest id, which open_clip pools at.
    model = tiny_transformers_clip(eos_token_id=VOCAB_SIZE - 3)
    model.save_pretrained(tmp_path)
    images, ids = batch()
    ids[ids == VOCAB_SIZE - 3] = 5
    ids[:, 2] = VOCAB_SIZE - 1
    ids[:, 20] = VOCAB_SIZE - 3
    assert_same_states(
        open_clip_states(build_clip(read_clip(tmp_path)), images, ids),
        transformers_states(model, images, ids),
    )


@pytest.mark.parametrize("nested", [False, True])
def test_long_clip_transformers_folder(tmp_path, nested):
    model = tiny_transformers_clip(248)
    model.save_pretrained(tmp_path)
    state_dict = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    table = state_dict["text_model.embeddings.position_embedding.weight"]
    rest = table.clone()
    rest[:20], table[20:] = 9.0, -9.0
    state_dict["text_model.embeddings.position_embedding_res" + ".weight" * (not nested)] = rest
    if nested:
        state_dict = {
            f"{name.split('.')[0]}.{name}" if name.startswith(("text_model", "vision_model")) else name: tensor
            for name, tensor in state_dict.items()
        }
        assert "text_model.text_model.embeddings.position_embedding_res" in state_dict
    save_file(state_dict, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["interpolation_keep_length"] = 20
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "longclip", "auto_map": {}}))
    checkpoint = read_clip(tmp_path)
    assert checkpoint.format == "Long-CLIP in transformers' layout"
    images, ids = batch(248)
    assert_same_states(open_clip_states(build_clip(checkpoint), images, ids), transformers_states(model, images, ids))


def test_transformers_activation_open_clip_does_not_have(tmp_path):
    tiny_transformers_clip(activation="gelu_new").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'gelu_new'.*they must be quick_gelu or gelu"):
        read_clip(tmp_path)


# --- what is refused -------------------------------------------------------------------------------------


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path, legacy):
    path, proof = tmp_path / "model.pt", tmp_path / "it-ran"
    torch.save({"weight": RunsCode(proof)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"model.pt is a pickle that wants to run code.*system"):
        read_clip(path)
    assert not proof.exists()


def test_a_plain_pickle_that_wants_to_run_code_is_refused(tmp_path):
    path, proof = tmp_path / "model.safetensors", tmp_path / "it-ran"
    path.write_bytes(pickle.dumps(RunsCode(proof)))
    with pytest.raises(ValueError, match=r"model.safetensors is a pickle that wants to run code"):
        read_clip(path)
    assert not proof.exists()


def test_a_pickled_model_is_refused(tmp_path):
    torch.save(tiny_clip(), tmp_path / "whole.pt")
    with pytest.raises(ValueError, match=r"whole.pt is a pickle that wants to run code.*open_clip"):
        read_clip(tmp_path / "whole.pt")


def test_unreadable_sources(tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        read_clip(tmp_path / "nothing.pt")
    with pytest.raises(ValueError, match=r"holds config.json .* or open_clip_config.json"):
        read_clip(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {}, "vision_config": {}}))
    with pytest.raises(ValueError, match=r"model.safetensors or pytorch_model.bin expected"):
        read_clip(tmp_path)
    path = tmp_path / "model.pt"
    for content in (b"", b"no weights at all", b"PK\x03\x04 broken", b"\x40\0\0\0\0\0\0\0{broken"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"model.pt"):
            read_clip(path)
    torch.save(tiny_clip().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=r"model.pt is a damaged archive"):
        read_clip(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/constants.pkl", b"broken")
    with pytest.raises(ValueError, match=r"model.pt is a damaged TorchScript archive"):
        read_clip(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="holds a list, not a state dict"):
        load_weights(path)
    torch.save({"a": 1}, path)
    with pytest.raises(ValueError, match="holds no tensors"):
        load_weights(path)


def test_other_models_are_named(tmp_path):
    model = FixClip.from_clip(tiny_clip(), tiny_config(), {}, num_groups=0)
    model.save_pretrained(tmp_path / "fix")
    with pytest.raises(ValueError, match=r"holds the weights of a FixClip: name its folder, .*fix"):
        read_clip(tmp_path / "fix" / "model.safetensors")
    save_file({"visual.layer1.0.conv1.weight": torch.zeros(1)}, tmp_path / "resnet.safetensors")
    with pytest.raises(ValueError, match="ResNet CLIP"):
        read_clip(tmp_path / "resnet.safetensors")
    save_file({"unet.conv.weight": torch.zeros(1)}, tmp_path / "unet.safetensors")
    with pytest.raises(ValueError, match=r"but 1 tensors, .* unet.conv.weight: visual.conv1.weight"):
        read_clip(tmp_path / "unet.safetensors")
    text_only = {name: t for name, t in tiny_transformers_clip().state_dict().items() if name.startswith("text_")}
    save_file(text_only, tmp_path / "text.safetensors")
    with pytest.raises(ValueError, match=r"no CLIP of two transformers but a text encoder alone"):
        read_clip(tmp_path / "text.safetensors")


# --- as a FixClip ---------------------------------------------------------------------------------------


def test_a_clip_of_77_tokens_is_stretched(tmp_path):
    clip = tiny_clip()
    torch.save(Archive(clip).state_dict(), tmp_path / "clip.pt")
    model = load_fixclip(tmp_path / "clip.pt", num_groups=0, num_prompts=2).eval()
    assert (model.config.context_length, model.config.num_prompts) == (248, 2)
    _, ids = batch()
    ids[:, 20], ids[:, 21:] = VOCAB_SIZE - 1, 0  # short texts lie in the rows that are kept
    ids[:, 19] = VOCAB_SIZE - 1
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(ids), clip.encode_text(ids, normalize=True), **TOLERANCE)
    wide = load_fixclip(tmp_path / "clip.pt", num_groups=0, keep=30, ratio=3)
    assert wide.config.context_length == 30 + 47 * 3
