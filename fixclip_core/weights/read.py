"""Everybody's CLIP weights in; `export` writes them out again, `load_fixclip` makes models of them.

All formats meet in open_clip's layout (`ClipCheckpoint`): its state dict, model config and preprocess config.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import open_clip
from torch import Tensor

from fixclip_core import builtin
from fixclip_core.check import LoadError, check_finite, check_layers, check_tokenizer_options, count_layers, loading
from fixclip_core.weights.files import load_weights
from fixclip_core.weights.kinds import what_it_is
from fixclip_core.weights.names import LONG_CLIP_KEEP, merge_long_clip_positions, to_open_clip_names

CLIP_VOCAB_SIZE = 49408
OPENAI_METADATA = ("input_resolution", "context_length", "vocab_size")
TEXT_LAYERS, IMAGE_LAYERS = "transformer.resblocks", "visual.transformer.resblocks"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")


@dataclass(frozen=True)
class ClipCheckpoint:
    """A CLIP's weights in open_clip's layout, float32 on the CPU.

    Attributes:
        format: what the source was recognised as.
        state_dict: weights under the names of `open_clip.CLIP`.
        model_config: `embed_dim`, `vision_cfg`, `text_cfg`, `quick_gelu`; arguments of `open_clip.CLIP`.
        preprocess: open_clip's preprocess config (size, mean, std, interpolation, resize_mode).
    """

    format: str
    state_dict: dict[str, Tensor]
    model_config: dict[str, Any]
    preprocess: dict[str, Any]

    @property
    def context_length(self) -> int:
        return self.model_config["text_cfg"]["context_length"]


# --- reading ---------------------------------------------------------------------------------------------


def read_clip(source: str | Path, model_name: str | None = None) -> ClipCheckpoint:
    """Read a CLIP of any known format; the format is recognised from the content, not from the name.

    Known are OpenAI's TorchScript archives and state dicts, open_clip's .bin, .pt and .safetensors files and
    folders, transformers' CLIPModel folders, Long-CLIP's .pt files and transformers folders (its two tables
    of positions become one). Nothing in a file is ever run: pickles are read with `weights_only=True`, and of
    a TorchScript archive the state dict is read without its code.

    Args:
        source: file, folder or built-in name.
        model_name: an open_clip model name such as "ViT-B-16-quickgelu", for files that do not say which
            activation they were trained with.

    Raises:
        LoadError: nothing there, an unknown or damaged format, a pickle that wants to run code, weights that are not
            finite, an architecture that does not follow from the file, or a model name for a source that says itself
            what it is.
    """
    path = Path(builtin.resolve(source))
    with loading(str(source)):
        if path.is_dir():
            refuse_model_name(source, model_name)
            checkpoint = _read_folder(path, source)
        elif path.is_file():
            checkpoint = _read_file(path, model_name)
        else:
            fetch = f"; of the hub: hf download {source} --local-dir FOLDER" if str(source).count("/") == 1 else ""
            raise LoadError(f"{source}: no such file or folder, and no model of open_clip{_nearest(source)}{fetch}")
        check_finite(checkpoint.state_dict, str(source))
        return checkpoint


def _read_folder(folder: Path, source: str | Path) -> ClipCheckpoint:
    if (folder / "open_clip_config.json").is_file():
        return _read_open_clip_folder(folder)
    if (folder / "config.json").is_file():
        return _read_transformers_folder(folder)
    if (folder / "text_encoder" / "config.json").is_file():
        inside = next((name for name in ("fixclip", "transformers", "open_clip") if (folder / name).is_dir()), None)
        hint = f"; {Path(source) / inside} is one" if inside else ""
        if not hint and folder.with_name("clip").is_dir():
            hint = f"; {Path(source).with_name('clip')} has both"
        raise LoadError(f"{source} holds a text encoder alone, a whole CLIP has an image tower, too{hint}")
    raise LoadError(
        f"{folder}: a model folder holds config.json (transformers, FIX-CLIP) or open_clip_config.json "
        "(open_clip); this one holds neither"
    )


def _read_file(path: Path, model_name: str | None) -> ClipCheckpoint:
    state_dict, is_torchscript = load_weights(path)
    if any(name.startswith("vision_model.") for name in state_dict):
        if not (path.parent / "config.json").is_file():
            raise LoadError(f"{path} has transformers' names: its config.json is expected beside it, in {path.parent}")
        return _from_transformers(path, state_dict, path.parent)
    _require_vision_transformer(path, state_dict)
    has_metadata = all(name in state_dict for name in OPENAI_METADATA)
    state_dict = {name: tensor for name, tensor in state_dict.items() if name not in OPENAI_METADATA}
    if "positional_embedding_res" in state_dict:
        rest_TD = state_dict.pop("positional_embedding_res")
        state_dict["positional_embedding"] = merge_long_clip_positions(state_dict["positional_embedding"], rest_TD)
        format, quick_gelu = "Long-CLIP", True
    elif is_torchscript or has_metadata:
        format, quick_gelu = "OpenAI TorchScript archive" if is_torchscript else "OpenAI state dict", True
    else:
        return _from_open_clip_file(path, state_dict, model_name)
    refuse_model_name(path, model_name)
    config = infer_model_config(state_dict, quick_gelu)
    return ClipCheckpoint(format, state_dict, config, preprocess_config(config))


def refuse_model_name(source: str | Path, model_name: str | None) -> None:
    """Refuse a name that would not act.

    Raises:
        LoadError: there is one.
    """
    if model_name is not None:
        raise LoadError(f"{source} says itself what it is: leave out the model name {model_name!r}")


def _require_vision_transformer(path: Path, state_dict: Mapping[str, Tensor]) -> None:
    if "kept_positions" in state_dict:
        raise LoadError(f"{path} holds the weights of a FixClip: name its folder, {path.parent}")
    if "visual.layer1.0.conv1.weight" in state_dict:
        raise LoadError(f"{path} is a ResNet CLIP; FIX-CLIP needs a vision transformer")
    needed = (
        "visual.conv1.weight",
        "visual.proj",
        "positional_embedding",
        "token_embedding.weight",
        "text_projection",
        "visual.transformer.resblocks.0.mlp.c_fc.weight",
        "transformer.resblocks.0.mlp.c_fc.weight",
    )
    if missing := [name for name in needed if name not in state_dict]:
        raise LoadError(
            f"{path} is no CLIP of two transformers but {what_it_is(state_dict)}: {', '.join(missing)} missing"
        )


def _from_open_clip_file(path: Path, state_dict: dict[str, Tensor], model_name: str | None) -> ClipCheckpoint:
    if model_name is None:
        if (path.parent / "open_clip_config.json").is_file():
            return _read_open_clip_folder(path.parent, state_dict)
        raise LoadError(
            f"{path}: weights alone do not tell the activation (GELU or QuickGELU). Name the model, for "
            "example --model-name ViT-B-16, or ViT-B-16-quickgelu for weights that come from OpenAI's, or "
            f"put the open_clip_config.json they were published with into {path.parent}"
        )
    config = open_clip_config(model_name)
    return _from_open_clip(path, state_dict, config, preprocess_config(config), "open_clip")


def open_clip_config(model_name: str) -> dict[str, Any]:
    """open_clip's model config of a model name.

    Raises:
        LoadError: there is no such model.
    """
    config = open_clip.get_model_config(model_name)
    if config is None:
        raise LoadError(f"model name {model_name!r}: not one of open_clip's{_nearest(model_name)}")
    return config


def _nearest(model_name: str | Path) -> str:
    close = get_close_matches(str(model_name), open_clip.list_models(), n=3, cutoff=0.6)
    return f" ({', '.join(close)}?)" if close else " (open_clip.list_models() names them)"


def _read_open_clip_folder(folder: Path, state_dict: dict[str, Tensor] | None = None) -> ClipCheckpoint:
    config = read_json(folder / "open_clip_config.json")
    if state_dict is None:
        names = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
        files = [folder / name for name in names if (folder / name).is_file()]
        if not files:
            raise LoadError(f"{folder}: {' or '.join(names)} expected beside open_clip_config.json")
        state_dict, _ = load_weights(files[0])
        _require_vision_transformer(files[0], state_dict)
    model_config = config.get("model_cfg", config)
    if model_config.get("text_cfg", {}).get("hf_tokenizer_name") and (folder / "tokenizer.json").is_file():
        model_config["text_cfg"]["hf_tokenizer_name"] = str(folder.resolve())
    preprocess = open_clip.transform.merge_preprocess_dict(
        preprocess_config(model_config), config.get("preprocess_cfg", {})
    )
    return _from_open_clip(folder, state_dict, model_config, preprocess, "open_clip folder")


def _from_open_clip(
    source: Path,
    state_dict: dict[str, Tensor],
    model_config: Mapping[str, Any],
    preprocess: dict[str, Any],
    format: str,
) -> ClipCheckpoint:
    vision_cfg, text_cfg = model_config["vision_cfg"], model_config["text_cfg"]
    for key in ("hf_model_name", "timm_model_name"):  # open_clip would ask the hub for them
        if name := {**vision_cfg, **text_cfg}.get(key):
            raise LoadError(f"{source}: {key}={name!r}; FixClip needs CLIP's own two transformers")
    check_tokenizer_options(text_cfg)
    check_layers(text_cfg["layers"], state_dict, TEXT_LAYERS, str(source))
    check_layers(vision_cfg["layers"], state_dict, IMAGE_LAYERS, str(source))
    model_config = {
        "embed_dim": model_config["embed_dim"],
        "vision_cfg": vision_cfg,
        # The table's length decides, so that files of stretched models read with the name of their base.
        "text_cfg": {**text_cfg, "context_length": len(state_dict["positional_embedding"])},
        "quick_gelu": model_config.get("quick_gelu", False),
    }
    return ClipCheckpoint(format, state_dict, model_config, preprocess)


def preprocess_config(model_config: Mapping[str, Any], **overrides: Any) -> dict[str, Any]:
    """OpenAI's preprocessing at the model's image size, with other values where given."""
    defaults = open_clip.transform.PreprocessCfg(size=model_config["vision_cfg"]["image_size"])
    return {**asdict(defaults), **overrides}


def infer_model_config(state_dict: Mapping[str, Tensor], quick_gelu: bool) -> dict[str, Any]:
    """Read the architecture off the shapes of an OpenAI-like state dict, whose heads are all 64 wide."""
    vision_width, _, patch_size, _ = state_dict["visual.conv1.weight"].shape
    grid = round((len(state_dict["visual.positional_embedding"]) - 1) ** 0.5)
    context_length, text_width = state_dict["positional_embedding"].shape
    if vision_width % 64 or text_width % 64:
        raise LoadError(f"widths {vision_width} and {text_width}: OpenAI's towers consist of heads 64 wide")
    return {
        "embed_dim": state_dict["text_projection"].shape[1],
        "vision_cfg": {
            "image_size": grid * patch_size,
            "layers": count_layers(state_dict, IMAGE_LAYERS),
            "width": vision_width,
            "patch_size": patch_size,
            "mlp_ratio": len(state_dict["visual.transformer.resblocks.0.mlp.c_fc.weight"]) / vision_width,
        },
        "text_cfg": {
            "context_length": context_length,
            "vocab_size": len(state_dict["token_embedding.weight"]),
            "width": text_width,
            "heads": text_width // 64,
            "layers": count_layers(state_dict, TEXT_LAYERS),
            "mlp_ratio": len(state_dict["transformer.resblocks.0.mlp.c_fc.weight"]) / text_width,
        },
        "quick_gelu": quick_gelu,
    }


# --- transformers folders --------------------------------------------------------------------------------


def _read_transformers_folder(folder: Path) -> ClipCheckpoint:
    index_names = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
    state_dict: dict[str, Tensor] = {}
    for index_name in index_names:
        if not state_dict and (folder / index_name).is_file():
            shards = set(read_json(folder / index_name).get("weight_map", {}).values())
            for shard in sorted(shards):
                state_dict |= load_weights(folder / shard)[0]
    for name in ("model.safetensors", "pytorch_model.bin"):
        if not state_dict and (folder / name).is_file():
            state_dict, _ = load_weights(folder / name)
    if not state_dict:
        raise LoadError(f"{folder}: model.safetensors or pytorch_model.bin expected beside config.json")
    return _from_transformers(folder, state_dict, folder)


def _from_transformers(source: Path, state_dict: dict[str, Tensor], folder: Path) -> ClipCheckpoint:
    config = read_json(folder / "config.json")
    if "text_config" not in config or "vision_config" not in config:
        raise LoadError(f"{folder / 'config.json'} describes no CLIPModel: text_config or vision_config is missing")
    # Long-CLIP's published folders nest both towers once more and keep its two tables of positions.
    state_dict = {re.sub(r"^(text|vision)_model\.\1_model\.", r"\1_model.", name): t for name, t in state_dict.items()}
    table = "text_model.embeddings.position_embedding"
    rest_TD = state_dict.pop(f"{table}_res", state_dict.pop(f"{table}_res.weight", None))
    format = "transformers"
    if rest_TD is not None:
        keep = config["text_config"].get("interpolation_keep_length", LONG_CLIP_KEEP)
        state_dict[f"{table}.weight"] = merge_long_clip_positions(state_dict[f"{table}.weight"], rest_TD, keep)
        format = "Long-CLIP in transformers' layout"
    try:
        renamed = to_open_clip_names(state_dict)
    except ValueError as error:
        raise LoadError(f"{source}: {error}") from None
    _require_vision_transformer(source, renamed)
    model_config = _from_transformers_config(folder, config, renamed)
    return ClipCheckpoint(format, renamed, model_config, _transformers_preprocess(folder, model_config))


def _from_transformers_config(folder: Path, config: dict[str, Any], state_dict: dict[str, Tensor]) -> dict[str, Any]:
    from transformers import CLIPConfig

    clip_config = CLIPConfig.from_dict({**config, "model_type": "clip"})
    text, vision = clip_config.text_config, clip_config.vision_config
    check_layers(text.num_hidden_layers, state_dict, TEXT_LAYERS, str(folder))
    check_layers(vision.num_hidden_layers, state_dict, IMAGE_LAYERS, str(folder))
    if text.hidden_act != vision.hidden_act or text.hidden_act not in ("quick_gelu", "gelu"):
        raise LoadError(
            f"{folder / 'config.json'}: activations {text.hidden_act!r} (text) and {vision.hidden_act!r} "
            "(vision); they must be quick_gelu or gelu, the same in both towers"
        )
    vocab_size = len(state_dict["token_embedding.weight"])
    text_cfg: dict[str, Any] = {
        "context_length": len(state_dict["positional_embedding"]),
        "vocab_size": vocab_size,
        "width": text.hidden_size,
        "heads": text.num_attention_heads,
        "layers": text.num_hidden_layers,
        "mlp_ratio": text.intermediate_size / text.hidden_size,
    }
    # transformers pools at the first end token (legacy configs that say 2: at the highest id), open_clip at
    # the highest id unless told.
    if text.eos_token_id not in (2, vocab_size - 1):
        text_cfg |= {"pool_type": "eos", "eos_id": text.eos_token_id}
    has_tokenizer = any((folder / name).is_file() for name in TOKENIZER_FILES)
    if vocab_size != CLIP_VOCAB_SIZE and has_tokenizer:
        text_cfg["hf_tokenizer_name"] = str(folder.resolve())
    vision_cfg: dict[str, Any] = {
        "image_size": vision.image_size,
        "layers": vision.num_hidden_layers,
        "width": vision.hidden_size,
        "head_width": vision.hidden_size // vision.num_attention_heads,
        "patch_size": vision.patch_size,
        "mlp_ratio": vision.intermediate_size / vision.hidden_size,
    }
    for tower_cfg, tower in ((text_cfg, text), (vision_cfg, vision)):
        if tower.layer_norm_eps != 1e-5:
            tower_cfg["norm_kwargs"] = {"eps": tower.layer_norm_eps}
    return {
        "embed_dim": state_dict["text_projection"].shape[1],
        "vision_cfg": vision_cfg,
        "text_cfg": text_cfg,
        "quick_gelu": text.hidden_act == "quick_gelu",
    }


def _transformers_preprocess(folder: Path, model_config: dict[str, Any]) -> dict[str, Any]:
    from PIL import Image

    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            config = read_json(folder / name)
            config = config.get("image_processor", config)
            break
    else:
        return preprocess_config(model_config)
    overrides: dict[str, Any] = {}
    if "image_mean" in config and "image_std" in config:
        overrides |= {"mean": tuple(config["image_mean"]), "std": tuple(config["image_std"])}
    if "resample" in config:
        overrides["interpolation"] = Image.Resampling(config["resample"]).name.lower()
    return preprocess_config(model_config, **overrides)


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{path} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise LoadError(f"{path} holds a {type(content).__name__}, not an object")
    return content
