"""Damaged and hostile files: every loader answers with one LoadError, before it builds or reads anything large."""

import copy
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import open_clip
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny_clips import tiny_clip, tiny_config, tiny_transformers_clip
from transformers import CLIPTextConfig, CLIPTextModel

from fixclip_core.check import (
    LoadError,
    check_tokenizer,
    check_tokenizer_options,
    check_vocabulary,
    is_finite,
    loading,
)
from fixclip_core.evaluation.encoders import load_encoder
from fixclip_core.model.fixclip import FixClip
from fixclip_core.weights.files import open_weights
from fixclip_core.weights.load import build_clip, load_fixclip
from fixclip_core.weights.read import read_clip
from fixclip_core.weights.text_encoder import read_text_encoder
from fixclip_core.weights.write import make_tokenizer
from fixclip_diffusion import FixClipStableDiffusionPipeline, FixClipTextEncoder, TextAdapter
from fixclip_diffusion.short_weights import read_delta
from fixclip_diffusion.tiny import clip_text_config, train_tokenizer

MILLION = 10**6
NOT_OBJECTS = ["", "[]", "3", "{", '{"a": ' * 2000, "\x00\xff"]


def set_key(values, path, value):
    """A copy of nested objects with another value at "a.b"; ... takes the key away."""
    values = copy.deepcopy(values)
    *parents, key = path.split(".")
    place = values
    for parent in parents:
        place = place[parent]
    if value is ...:
        del place[key]
    else:
        place[key] = value
    return values


def refuses(load, folder, config_name, changes):
    """`load(folder)` raises one LoadError of one line for every change to its configuration, and none without."""
    file = folder / config_name
    original = file.read_text()
    load(folder)
    texts = {text[:20]: text for text in NOT_OBJECTS}
    texts |= {f"{path}={value}": json.dumps(set_key(json.loads(original), path, value)) for path, value in changes}
    for what, text in texts.items():
        file.write_text(text)
        with pytest.raises(LoadError) as caught:
            load(folder)
        assert "\n" not in str(caught.value), what
        assert str(folder) in str(caught.value) or "architecture" in str(caught.value), what
    file.write_text(original)


def refuses_values(load, folder, weights_name):
    """`load(folder)` raises a LoadError that names the tensor for values that are not finite, and for half a file."""
    file = folder / weights_name
    original = file.read_bytes()
    weights = load_file(file)
    name = max(weights, key=lambda key: weights[key].numel())
    for value in (float("nan"), float("inf"), float("-inf")):
        changed = weights[name].clone()
        changed.view(-1)[-1] = value
        save_file({**weights, name: changed}, file, metadata={"format": "pt"})
        with pytest.raises(LoadError, match=f"{name.rpartition('.')[2]} holds NaN or infinite values"):
            load(folder)
    file.write_bytes(original[: len(original) // 2])
    with pytest.raises(LoadError):
        load(folder)
    file.write_bytes(original)


def test_a_load_error_is_what_callers_catch():
    for expected in (ValueError, OSError):
        with pytest.raises(expected, match=r"^encoder 'x': KeyError: 'y'$"), loading("encoder 'x'"):
            {}["y"]
    with pytest.raises(MemoryError), loading("encoder"):
        raise MemoryError


def test_values_of_every_kind():
    for fine in (torch.tensor([1, 2]), torch.empty(0), torch.ones(2, device="meta")):
        assert is_finite(fine)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2):
        assert is_finite(torch.tensor([-3.0, 3.0]).to(dtype))
        for value in ("nan", "inf", "-inf"):
            assert not is_finite(torch.tensor([0.0, float(value), 1.0]).to(dtype))


def test_pickles_of_every_layout(tmp_path):
    """Whatever the name says; of an archive, as torch.save writes it, tensors stay on the disk until they are used."""
    weights = {"a": torch.randn(64, 64), "b": torch.arange(7)}
    for name, archive in (("new.ckpt", True), ("new.safetensors", True), ("old.ckpt", False)):
        torch.save({"state_dict": weights}, tmp_path / name, _use_new_zipfile_serialization=archive)
        file = open_weights(tmp_path / name)
        assert file.shapes == {"a": (64, 64), "b": (7,)}
        found = file.load(weights)
        assert all(torch.equal(found[key], weights[key]) for key in weights)
        assert (name in Path("/proc/self/maps").read_text()) == (name == "new.ckpt")
        del file, found  # nothing may be read of a map of a file that becomes shorter
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-2000])
        with pytest.raises(LoadError, match=name):
            open_weights(tmp_path / name)


class Nested(torch.nn.Module):
    """Everything beside parameters and buffers that a TorchScript archive may hold, and tensors of several kinds."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3).half()])
        self.tied = self.layers[0].weight
        self.scale = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.bfloat16))
        self.register_buffer("turned", torch.arange(6.0).view(2, 3).T)
        self.register_buffer("part", torch.arange(10)[3:5])
        self.register_buffer("nothing", torch.empty(0, dtype=torch.bool))
        self.neither = torch.ones(2)
        self.table = {"a": torch.ones(1)}
        self.numbers = [1, 2]

    def forward(self, x):
        return self.layers[0](x) + self.neither.sum() + self.table["a"] + self.numbers[0]


class WritesAFile(torch.nn.Module):
    """`torch.jit.load` runs `__setstate__`, which may write files."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))

    @torch.jit.export
    def __getstate__(self):
        return self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]):
        torch.save(torch.arange(3), "written")
        self.weight = state[0]
        self.training = state[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_torchscript_archives_are_read_as_torch_reads_them(tmp_path):
    for name, module in (
        ("scripted", torch.jit.script(Nested())),
        ("traced", torch.jit.trace(torch.nn.BatchNorm2d(3).eval(), torch.zeros(1, 3, 2, 2))),
    ):
        module.save(tmp_path / name)
        file, expected = open_weights(tmp_path / name), torch.jit.load(tmp_path / name).state_dict()
        found = file.load(file.shapes)
        assert file.is_torchscript
        assert list(found) == list(expected)
        for key, tensor in expected.items():
            assert found[key].dtype == tensor.dtype
            assert torch.equal(found[key], tensor), key


def test_torchscript_archives_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.jit.script(WritesAFile()).save("hostile.pt")
    torch.jit.load("hostile.pt")
    Path("written").unlink()  # it works where it is let
    for load in (open_weights, read_clip, load_fixclip, load_encoder, read_text_encoder, FixClipTextEncoder.from_file):
        with pytest.raises(LoadError, match=r"hostile.pt is a TorchScript archive that wants to run code \(.*WritesAF"):
            load("hostile.pt")
    assert not Path("written").exists()


class Calls:
    """A pickle that calls a function of Python's."""

    def __reduce__(self):
        return open, ("written", "w")


def write_archive(path, records):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            if content is not None:
                archive.writestr(name, content)


def test_damaged_torchscript_archives(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.jit.script(Nested()).save("honest.pt")
    with zipfile.ZipFile("honest.pt") as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    write_archive("same.pt", records)
    assert open_weights("same.pt").shapes == open_weights("honest.pt").shapes
    pickled, storage = "honest/data.pkl", "honest/data/0"
    code = next(name for name in records if name.endswith(".py") and b"class Nested(" in records[name])
    pickles = (pickle.dumps(Calls(), 2), pickle.dumps({"a": Calls()}, 2), pickle.dumps([1], 2), b"", b"broken")
    for changes in (
        *({pickled: content} for content in pickles),
        {pickled: records[pickled].replace(b"_rebuild_tensor_v2", b"_rebuild_qtensor")},
        {pickled: records[pickled].replace(b"FloatStorage", b"OtherStorage")},
        {storage: records[storage][:8]},
        {storage: None},
        {code: b""},
        {code: records[code].replace(b'"turned"', b'"table"')},
        {code: records[code].replace(b'"turned"', b'"no_such_attribute"')},
        {code: None},
    ):
        write_archive("damaged.pt", records | changes)
        with pytest.raises(LoadError, match=r"damaged.pt is a damaged TorchScript archive") as caught:
            open_weights("damaged.pt")
        assert "\n" not in str(caught.value)
    assert not Path("written").exists()


def test_text_encoders(tmp_path):
    CLIPTextModel(clip_text_config(vocab_size=64, eos_token_id=63)).save_pretrained(tmp_path / "stock")
    changes = [
        *(("num_hidden_layers", value) for value in (MILLION, 2, 0, -1, "three", None)),
        *(("num_attention_heads", value) for value in (0, 5, "four")),
        *(("hidden_size", value) for value in (0, "wide", 48)),
        *(("vocab_size", value) for value in (-1, "many", 63)),
        ("hidden_act", "no_such_activation"),
        ("hidden_act", ["gelu"]),
        ("max_position_embeddings", 10**5),
        ("model_type", "bert"),
        ("model_type", ...),
    ]
    refuses(FixClipTextEncoder.from_pretrained, tmp_path / "stock", "config.json", changes)
    refuses_values(FixClipTextEncoder.from_pretrained, tmp_path / "stock", "model.safetensors")
    encoder = FixClipTextEncoder.from_pretrained(tmp_path / "stock")
    encoder.set_adapter_module(TextAdapter(32))
    encoder.save_pretrained(tmp_path / "ours")
    changes = [
        ("short_position_embeddings", "a"),
        ("adapter", [1]),
        ("adapter.num_layers", MILLION),
        ("adapter.kind", "none"),
        ("adapter.strange", 1),
    ]
    refuses(FixClipTextEncoder.from_pretrained, tmp_path / "ours", "config.json", changes)


def test_adapters(tmp_path):
    TextAdapter(32, "attention", num_heads=4).save_pretrained(tmp_path)
    changes = [
        *(("num_layers", value) for value in (MILLION, 0, "two", ...)),
        *(("width", value) for value in (10**12, 0, "wide", ...)),
        *(("num_heads", value) for value in (0, 5, None)),
        ("max_tokens", 10**12),
        ("kind", ["mlp"]),
        ("strange", 1),
    ]
    refuses(TextAdapter.from_pretrained, tmp_path, "adapter_config.json", changes)
    refuses_values(TextAdapter.from_pretrained, tmp_path, "adapter.safetensors")


@pytest.mark.parametrize("text", NOT_OBJECTS, ids=range(len(NOT_OBJECTS)))
def test_what_says_no_object_is_no_model(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    for load in (load_fixclip, load_encoder, read_clip):
        with pytest.raises(LoadError, match=r"config\.json"):
            load(tmp_path)


def test_fixclip_folders(tmp_path):
    config = tiny_config(quick_gelu=False)
    FixClip.from_clip(tiny_clip(quick_gelu=False), config, {"size": 32}, num_groups=0).save_pretrained(tmp_path)
    changes = [
        *((f"clip.text_cfg.{key}", 0) for key in ("heads", "width", "vocab_size", "context_length")),
        *((f"clip.{tower}.layers", value) for tower in ("text_cfg", "vision_cfg") for value in (MILLION, "2", [2])),
        ("clip.text_cfg.hf_model_name", "roberta-base"),
        ("clip.vision_cfg.timm_model_name", "vit_base_patch16_224"),
        ("clip.vision_cfg.head_width", 0),
        ("clip.strange", 1),
        ("clip", [1]),
        ("clip", ...),
        *(("num_prompts", value) for value in (MILLION, "four", -1)),
        *(("ratio", value) for value in (0, "x")),
        ("num_groups", "x"),
        ("strange", 1),
    ]
    refuses(FixClip.from_pretrained, tmp_path, "config.json", changes)
    refuses_values(load_fixclip, tmp_path, "model.safetensors")


def build(folder):
    return build_clip(read_clip(folder))


def test_transformers_folders(tmp_path):
    tiny_transformers_clip().save_pretrained(tmp_path)
    changes = [
        *((f"{tower}.num_hidden_layers", MILLION) for tower in ("text_config", "vision_config")),
        *((f"{tower}.num_attention_heads", value) for tower in ("text_config", "vision_config") for value in (0, "x")),
        *((f"{tower}.hidden_size", value) for tower in ("text_config", "vision_config") for value in (0, 64, "x")),
        ("vision_config.patch_size", 0),
        ("text_config", [1]),
        ("vision_config", ...),
    ]
    refuses(build, tmp_path, "config.json", changes)
    refuses_values(build, tmp_path, "model.safetensors")
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": 3, "image_std": [1], "resample": 99}')
    with pytest.raises(LoadError):
        build(tmp_path)


def test_open_clip_folders_ask_no_hub(tmp_path):
    save_file(tiny_clip(quick_gelu=False).state_dict(), tmp_path / "open_clip_model.safetensors")
    config = {"model_cfg": tiny_config(quick_gelu=False), "preprocess_cfg": {"size": 32}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    changes = [
        ("model_cfg.text_cfg.hf_model_name", "roberta-base"),
        ("model_cfg.vision_cfg.timm_model_name", "vit_base_patch16_224"),
        *((f"model_cfg.{tower}.layers", value) for tower in ("text_cfg", "vision_cfg") for value in (MILLION, [1, 2])),
        *(("model_cfg.text_cfg.heads", value) for value in (0, 3, "x")),
        *(("model_cfg.text_cfg.width", value) for value in (10**9, 0, "x", ...)),
        ("model_cfg.vision_cfg.image_size", "x"),
        ("model_cfg.vision_cfg.patch_size", 0),
        ("model_cfg", [1]),
        ("preprocess_cfg", 3),
    ]
    refuses(build, tmp_path, "open_clip_config.json", changes)


def test_no_tokenizer_of_a_folder_runs_its_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tiny_config(quick_gelu=False)
    config["text_cfg"] |= {"hf_tokenizer_name": "x"}
    preprocess = {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
    clip, ours = tmp_path / "clip", tmp_path / "ours"
    FixClip.from_clip(tiny_clip(quick_gelu=False), config, preprocess, num_groups=0).save_pretrained(ours)
    clip.mkdir()
    save_file(tiny_clip(quick_gelu=False).state_dict(), clip / "open_clip_model.safetensors")
    (clip / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    for folder in (clip, ours):
        (folder / "tokenizer.json").write_text("{}")
        auto_map = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
        (folder / "tokenizer_config.json").write_text(json.dumps(auto_map))
        (folder / "evil.py").write_text(f"open({str(tmp_path / 'written')!r}, 'w').close()\nclass Evil: pass\n")
    loaders = (
        (load_encoder, ours, ours),
        (lambda folder: load_fixclip(folder).tokenizer(), ours, ours),
        (load_encoder, clip, clip),
        (lambda folder: make_tokenizer(read_clip(folder)), clip, clip),
        (load_encoder, f"local-dir:{clip}", clip),
    )
    for load, source, _ in loaders:
        with pytest.raises(LoadError, match="it needs code that comes with it, and no code is run"):
            load(source)
    loaders = (*loaders, (FixClip.from_pretrained, ours, ours), (load_fixclip, f"local-dir:{clip}", clip))
    for name, value in (("trust_remote_code", True), ("subfolder", "x"), ("context_length", 7)):
        for load, source, folder in loaders:
            file = folder / ("config.json" if folder == ours else "open_clip_config.json")
            original = file.read_text()
            place = "clip" if folder == ours else "model_cfg"
            values = set_key(
                json.loads(original), f"{place}.text_cfg.tokenizer_kwargs", {"clean": "lower", name: value}
            )
            file.write_text(json.dumps(values))
            with pytest.raises(LoadError, match=rf"tokenizer_kwargs: {name}={value!r} is no option of open_clip's"):
                load(source)
            file.write_text(original)
    assert not (tmp_path / "written").exists()


def test_options_of_open_clips_own_tokenizers_act(tmp_path):
    config = tiny_config(quick_gelu=False)
    config["text_cfg"] |= {"vocab_size": 49408, "tokenizer_kwargs": {"clean": "canonicalize"}}
    model = FixClip.from_clip(open_clip.CLIP(**config), config, {"size": 32}, num_groups=0)
    model.save_pretrained(tmp_path)
    tokenizer = load_fixclip(tmp_path).tokenizer()
    assert torch.equal(tokenizer(["a, b."]), tokenizer(["a b"]))
    for name in open_clip.list_models():
        check_tokenizer_options(open_clip.get_model_config(name)["text_cfg"])


def test_what_is_given_in_the_place_of_another_is_named(tmp_path, sd1):
    TextAdapter(32).save_pretrained(tmp_path)
    with pytest.raises(LoadError, match=r"no readable config.json there; adapter.safetensors there is an adapter of"):
        FixClipTextEncoder.from_pretrained(tmp_path)
    for place in (sd1 / "text_encoder", sd1 / "text_encoder" / "model.safetensors"):
        with pytest.raises(LoadError, match=r"adapter_config.json and .*; model.safetensors there is a text encoder"):
            TextAdapter.from_pretrained(place)


def test_loras(tmp_path, sd1):
    pipe = FixClipStableDiffusionPipeline.from_pretrained(sd1)
    name = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q.lora"
    down, up = torch.ones(2, 32), torch.ones(32, 2)
    for weights, message in (
        ({f"{name}_A.weight": down * float("nan"), f"{name}_B.weight": up}, "lora_A.weight holds NaN"),
        ({"unet.no_such_module.lora_A.weight": down, "unet.no_such_module.lora_B.weight": up}, "no_such_module"),
        ({f"{name}_A.weight": torch.ones(2, 7), f"{name}_B.weight": up}, "for another base: .* has the shape"),
        ({"decoder.conv_in.weight": up}, "LoRA"),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        save_file(weights, folder / "pytorch_lora_weights.safetensors")
        with pytest.raises(LoadError, match=message) as caught:
            pipe.load_lora_weights(folder)
        assert str(folder) in str(caught.value)
    pipe.load_lora_weights({f"{name}_A.weight": down, f"{name}_B.weight": up})


def test_what_git_or_a_browser_left_in_place_of_weights(tmp_path, sd1):
    base = tmp_path / "base"
    shutil.copytree(sd1, base)
    encoder, adapter, fixclip = tmp_path / "encoder", tmp_path / "adapter", tmp_path / "fixclip"
    FixClipTextEncoder.from_clip(CLIPTextModel(clip_text_config())).save_pretrained(encoder)
    TextAdapter(width=32, num_layers=1).save_pretrained(adapter)
    FixClip.from_clip(tiny_clip(), tiny_config(), {"size": 32}, num_groups=0).save_pretrained(fixclip)
    pipe = FixClipStableDiffusionPipeline.from_pretrained(sd1)
    loaders = (
        (FixClipStableDiffusionPipeline.from_pretrained, base, base / "unet/diffusion_pytorch_model.safetensors"),
        (FixClipTextEncoder.from_pretrained, encoder, encoder / "model.safetensors"),
        (TextAdapter.from_pretrained, adapter, adapter / "adapter.safetensors"),
        (TextAdapter.from_file, adapter / "adapter.safetensors", adapter / "adapter.safetensors"),
        (load_fixclip, fixclip, fixclip / "model.safetensors"),
        (read_delta, tmp_path / "text_delta.safetensors", tmp_path / "text_delta.safetensors"),
        (read_text_encoder, tmp_path / "clip_l.safetensors", tmp_path / "clip_l.safetensors"),
        (pipe.load_lora_weights, tmp_path / "lora.safetensors", tmp_path / "lora.safetensors"),
    )
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    for content, message in (
        (pointer, "is a pointer of Git LFS to the weights: run `git lfs pull` in that folder"),
        (b"\n<!DOCTYPE html><html><body>Log in</body></html>", "is a web page in place of weights"),
    ):
        for load, source, file in loaders:
            file.write_bytes(content)
            with pytest.raises(LoadError) as caught:
                load(source)
            assert f"{file} {message}" in str(caught.value)
            assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_model(tmp_path, sd1):
    small = train_tokenizer(["a red cat and a blue dog"], vocab_size=560)
    config = CLIPTextConfig(vocab_size=len(small), bos_token_id=small.bos_token_id, eos_token_id=small.eos_token_id)
    check_tokenizer(small, config, "both")
    check_tokenizer(small, CLIPTextConfig(vocab_size=len(small), eos_token_id=2), "legacy")
    with pytest.raises(LoadError, match=r"embeddings for \d+ tokens, but its tokenizer gives ids up to 49407"):
        check_tokenizer(tiny.clip_tokenizer(), config, "both")
    with pytest.raises(LoadError, match=r"ends texts with id \d+, but the text encoder was trained with 49407"):
        check_tokenizer(small, CLIPTextConfig(vocab_size=49408, eos_token_id=49407), "both")
    with pytest.raises(LoadError, match="ids up to 10"):
        check_vocabulary(10, 10, "encoder")
    # A whole pipeline with the tokenizer of another: found before it draws.
    shutil.copytree(sd1, tmp_path / "mixed")
    shutil.rmtree(tmp_path / "mixed" / "text_encoder")
    CLIPTextModel(clip_text_config(vocab_size=64, eos_token_id=63)).save_pretrained(tmp_path / "mixed" / "text_encoder")
    with pytest.raises(LoadError, match=r"embeddings for 64 tokens"):
        FixClipStableDiffusionPipeline.from_pretrained(tmp_path / "mixed")


def test_evaluation_and_training_look_at_the_vocabulary(tmp_path):
    FixClip.from_clip(tiny_clip(), tiny_config(), {"size": 32}, num_groups=0).save_pretrained(tmp_path / "fixclip")
    save_file(tiny_clip().state_dict() | {"input_resolution": torch.tensor(32)}, tmp_path / "clip.safetensors")
    with pytest.raises(LoadError, match="embeddings for 50 tokens"):
        load_encoder(tmp_path / "fixclip")
    with pytest.raises(LoadError, match="embeddings for 50 tokens"):
        load_fixclip(tmp_path / "fixclip").tokenizer()


def test_a_vocabulary_of_its_own_travels_with_the_folder(tmp_path):
    tokenizer = train_tokenizer(["a red cat and a blue dog"], vocab_size=560)
    tiny_transformers_clip(vocab_size=len(tokenizer), eos_token_id=len(tokenizer) - 1).save_pretrained(tmp_path / "in")
    tokenizer.save_pretrained(tmp_path / "in")
    expected = load_fixclip(tmp_path / "in", num_groups=0)
    expected.save_pretrained(tmp_path / "fixclip")
    shutil.rmtree(tmp_path / "in")
    (tmp_path / "fixclip").rename(tmp_path / "moved")
    ids = load_fixclip(tmp_path / "moved").tokenizer()(["a red cat"])
    assert ids[0, :3].tolist() == tokenizer("a red cat").input_ids[:3]
