"""A CLIP text encoder out of any file that holds one: alone, in a whole CLIP, or in a Stable Diffusion checkpoint.

Needs neither open_clip nor diffusers.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fixclip_core.check import (
    CLIP_END_ID,
    LoadError,
    Shapes,
    check_finite,
    check_layers,
    check_shapes,
    count_layers,
    loading,
)
from fixclip_core.weights.files import WeightFile, open_weights
from fixclip_core.weights.kinds import what_it_is
from fixclip_core.weights.names import (
    POSITIONS_RES,
    TextTower,
    Which,
    find_text_towers,
    text_tower_names,
    to_text_model_names,
)

CONFIG_KEY = "fixclip_text_config"  # in the metadata of our own files
LAYERS = "text_model.encoder.layers"
HEAD_WIDTH = 64
# What the files of each kind were trained with; OpenAI's CLIPs computed QuickGELU, open_clip's large ones do not.
ACTIVATIONS = {"l": "quick_gelu", "h": "gelu", "g": "gelu"}
# What this project's encoders hold beside a CLIP's tensors; what to make of it stands in their config.json.
OWN_NAMES = re.compile(
    r"(^|\.)embeddings\.short_position_embedding\.|^short_text_model\.|^adapter\.blocks\.\d+\."
    r"|(^|\btext_model\.)encoder\.layers\.\d+\..+\.lora_[AB](\.|$)"
)
CONFIG_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
    "projection_dim",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "padding",  # of this project's encoders, which stock transformers carries along: `FixClipTextConfig.padding`
)


@dataclass(frozen=True)
class TextEncoderWeights:
    """The weights and the configuration of a CLIP text encoder.

    Attributes:
        state_dict: under transformers' names, `text_model.*`, and `text_projection.weight` (E, D) where the file has
            one; fp16, bf16 or fp32 as in the file.
        config: arguments of transformers' `CLIPTextConfig`.
        which: "l", "h" or "g", None for a CLIP of another width.
    """

    state_dict: dict[str, Tensor]
    config: dict[str, Any]
    which: Which | None

    @property
    def has_projection(self) -> bool:
        return "text_projection.weight" in self.state_dict


def text_encoders_in(file: str | Path) -> list[Which | None]:
    """Which CLIP text encoders a file holds, e.g. ["l", "g"] for Stable Diffusion XL; [] for a file of another kind.

    Of a safetensors file the header alone is read.

    Raises:
        LoadError: the file is missing or damaged, or a pickle that wants to run code.
    """
    return [tower.which for tower in find_text_towers(open_weights(file).shapes)]


def choose_text_encoder(file: str | Path, pooled: bool) -> Which | None:
    """Of a file with several text encoders bigG where a pooled vector is read, else ViT-L; None where it holds one.

    Raises:
        LoadError: see `text_encoders_in`.
    """
    return ("g" if pooled else "l") if len(text_encoders_in(file)) > 1 else None


def holds_text_encoders_alone(file: str | Path) -> bool:
    """Whether a file holds CLIP text encoders and no image tower: no whole CLIP.

    Raises:
        LoadError: see `text_encoders_in`.
    """
    shapes = open_weights(file).shapes
    has_images = any(re.search(r"(^|\.)(visual|vision_model)\.", name) for name in shapes)
    return bool(find_text_towers(shapes)) and not has_images


def read_text_encoder(file: str | Path, which: Which | None = None, **config: Any) -> TextEncoderWeights:
    """Read a text encoder out of a safetensors file (or a pickle of tensors): weights and configuration.

    Known are a text encoder alone under OpenAI's, open_clip's or transformers' names (with and without `text_model.`),
    with prefixes such as `clip_l.`, `module.` or `model.`; Long-CLIP's files; whole CLIPs; and Stable Diffusion
    checkpoints: 1 (`cond_stage_model.transformer.`), 2 (`cond_stage_model.model.`), XL (`conditioner.embedders.0.` and
    `.1.`), 3 (`text_encoders.clip_l.`). Sizes follow from the tensors: heads are 64 wide, as in all CLIPs that
    Stable Diffusion reads; ViT-L has QuickGELU, ViT-H and bigG have GELU. Files that this project writes bring their
    configuration along. Stable Diffusion 2 reads ViT-H's penultimate layer; its file holds 24, and so does the result.

    Args:
        file: the file. Of safetensors, the header is judged before any tensor is read.
        which: "l", "h" or "g", for files of several text encoders.
        **config: fields of `CLIPTextConfig` that count instead of the file's, e.g. num_attention_heads=4.

    Raises:
        LoadError: the file is missing, damaged or of another kind (the message says which), holds several text
            encoders or another one than `which`, its sizes contradict each other, a weight is not finite, or it is one
            of this project's encoders, which the file alone does not hold.
    """
    what = f"text encoder {str(file)!r}"
    source, tower, names, values = _find(file, which, config, what)
    tensors = {name: _plain_dtype(tensor) for name, tensor in source.load(names).items()}
    state_dict = {name: tensor.contiguous() for name, tensor in to_text_model_names(tower, tensors).items()}
    check_finite(state_dict, what)
    return TextEncoderWeights(state_dict, values, tower.which)


def read_text_config(file: str | Path, which: Which | None = None, **config: Any) -> dict[str, Any]:
    """The configuration of `read_text_encoder`; of a safetensors file the header alone is read.

    Raises:
        LoadError: see `read_text_encoder`, except for what the tensors' values show.
    """
    return _find(file, which, config, f"text encoder {str(file)!r}")[-1]


def _find(
    file: str | Path, which: Which | None, config: dict[str, Any], what: str
) -> tuple[WeightFile, TextTower, list[str], dict[str, Any]]:
    """The open file, the tower in it, the names of the tower's tensors, and the configuration."""
    source = open_weights(file)
    tower = _choose(source, which, what)
    names = text_tower_names(tower, source.shapes)
    with loading(what):
        # The same renaming on tensors without values finds everything out before the values are read.
        empty = {name: torch.empty(source.shapes[name], device="meta") for name in names}
        shapes = {name: tuple(tensor.shape) for name, tensor in to_text_model_names(tower, empty).items()}
        values = infer_text_config(shapes, tower.which) | _known_config(source) | config
        _check_config(values, what)
        check_layers(values["num_hidden_layers"], shapes, LAYERS, what)
        check_shapes(text_model_shapes(values, "text_projection.weight" in shapes), shapes, what)
    return source, tower, names, values


def _choose(source: WeightFile, which: Which | None, what: str) -> TextTower:
    towers = find_text_towers(source.shapes)
    if not towers:
        raise LoadError(f"{what}: there is no CLIP text encoder in this file, it is {what_it_is(source.shapes)}")
    if any(name.endswith("text_model.head.weight") for name in source.shapes):
        raise LoadError(f"{what}: this is a SigLIP, whose text encoder is no CLIP's")
    with loading(what):
        _refuse_part_of_folder(source, what)
    fitting = [tower for tower in towers if which is None or tower.which in (which, None)]
    if len(fitting) == 1:
        return fitting[0]
    held = ", ".join(f"CLIP-{(tower.which or '?').upper()} ({tower.prefix or 'no prefix'})" for tower in towers)
    if fitting:
        raise LoadError(f"{what}: the file holds {len(towers)} text encoders, {held}; say which one")
    raise LoadError(f"{what}: CLIP-{str(which).upper()} is needed here, the file holds {held}")


def _refuse_part_of_folder(source: WeightFile, what: str) -> None:
    """Of an encoder of this project the file alone would be read as another encoder: without what is in OWN_NAMES."""
    beside = _config_beside(source)
    part = next((name for name in source.shapes if OWN_NAMES.search(name)), None)
    if part is None and beside.get("short_weights"):
        part = f"short_weights={beside['short_weights']!r} of its config.json"
    if part is not None:
        folder = (
            f"its folder, {source.path.parent}" if beside else "the folder that it was saved in, with its config.json"
        )
        raise LoadError(
            f"{what}: an encoder of this project, whose {part} would be lost with the file alone: name {folder}"
        )


def infer_text_config(shapes: Shapes, which: Which | None) -> dict[str, Any]:
    """Arguments of `CLIPTextConfig` as far as they follow from the shapes of `text_model.*` tensors.

    The end token is CLIP's 49407, or the last id of a smaller vocabulary; ids behind it are added tokens.

    Raises:
        KeyError: a tensor is missing that sizes are read from.
    """
    vocab_size, width = shapes["text_model.embeddings.token_embedding.weight"]
    end = min(CLIP_END_ID, vocab_size - 1)
    values: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": count_layers(shapes, LAYERS),
        "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
        "layer_norm_eps": 1e-5,
        "projection_dim": shapes.get("text_projection.weight", (width,))[0],
        "bos_token_id": end - 1,
        "eos_token_id": end,
        "pad_token_id": 0 if which in ("h", "g") else end,  # OpenCLIP's own padding, and Stable Diffusion 1's
    }
    if width % HEAD_WIDTH == 0:
        values["num_attention_heads"] = width // HEAD_WIDTH
    if which is not None:
        values["hidden_act"] = ACTIVATIONS[which]
    return values


def _config_beside(source: WeightFile) -> dict[str, Any]:
    """The config.json beside a `model.safetensors`, {} where there is none."""
    file = source.path.with_name("config.json")
    if not source.path.name.startswith(("model.", "pytorch_model.")) or not file.is_file():
        return {}
    values = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"its configuration is a {type(values).__name__}, not an object")
    return values


def _known_config(source: WeightFile) -> dict[str, Any]:
    """What the file itself says of its configuration, or the config.json beside a `model.safetensors`."""
    if CONFIG_KEY in source.metadata:
        values = json.loads(source.metadata[CONFIG_KEY])
    elif beside := _config_beside(source):
        values = beside.get("text_config", beside)
    elif any(name.endswith(("input_resolution", *POSITIONS_RES)) for name in source.shapes):
        return {"hidden_act": "quick_gelu"}  # OpenAI's archives and Long-CLIP's files
    else:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"its configuration is a {type(values).__name__}, not an object")
    known = {key: values[key] for key in CONFIG_FIELDS if values.get(key) is not None}
    if "eos_token_id" in known and known["eos_token_id"] <= 2:
        known = {key: value for key, value in known.items() if not key.endswith("_token_id")}  # legacy values
    return known


def _check_config(values: Mapping[str, Any], what: str) -> None:
    if "num_attention_heads" not in values:
        raise LoadError(
            f"{what}: its width {values['hidden_size']} does not split into heads of {HEAD_WIDTH}; pass "
            "num_attention_heads=N (fixclip convert: --set num_attention_heads=N)"
        )
    if "hidden_act" not in values:
        raise LoadError(
            f"{what}: weights of width {values['hidden_size']} do not tell the activation; pass "
            "hidden_act='quick_gelu' for those that descend from OpenAI's, else hidden_act='gelu' "
            "(fixclip convert: --set hidden_act=gelu)"
        )
    heads, width = values["num_attention_heads"], values["hidden_size"]
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise LoadError(f"{what}: {heads} heads do not divide the width {width}")
    if not 0 <= values["eos_token_id"] < values["vocab_size"]:
        raise LoadError(f"{what}: the end token {values['eos_token_id']} is none of {values['vocab_size']} tokens")


def text_model_shapes(values: Mapping[str, Any], projection: bool) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a `CLIPTextModel` of this configuration, under `text_model.*`."""
    width, inner = values["hidden_size"], values["intermediate_size"]
    layer = {
        "layer_norm1": (width,),
        "layer_norm2": (width,),
        **{f"self_attn.{part}_proj": (width, width) for part in ("q", "k", "v", "out")},
        "mlp.fc1": (inner, width),
        "mlp.fc2": (width, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "text_model.embeddings.token_embedding.weight": (values["vocab_size"], width),
        "text_model.embeddings.position_embedding.weight": (values["max_position_embeddings"], width),
    }
    for index in range(values["num_hidden_layers"]):
        for name, shape in layer.items():
            shapes[f"text_model.encoder.layers.{index}.{name}.weight"] = shape
            shapes[f"text_model.encoder.layers.{index}.{name}.bias"] = shape[:1]
    shapes |= {f"text_model.final_layer_norm.{kind}": (width,) for kind in ("weight", "bias")}
    if projection:
        shapes["text_projection.weight"] = (values["projection_dim"], width)
    return shapes


def _plain_dtype(tensor: Tensor) -> Tensor:
    """float8 and float64 as float32; what encoders compute in, as it is."""
    if tensor.dtype in (torch.float16, torch.bfloat16, torch.float32):
        return tensor
    return tensor.float()
