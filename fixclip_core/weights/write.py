"""A FixClip in the formats of other front ends: transformers, diffusers, open_clip and clip_l files."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor

from fixclip_core.check import loading
from fixclip_core.model.fixclip import FixClip
from fixclip_core.model.lora import low_rank_factors
from fixclip_core.weights.names import to_transformers_names
from fixclip_core.weights.read import CLIP_VOCAB_SIZE, ClipCheckpoint, preprocess_config
from fixclip_core.weights.text_encoder import (
    CONFIG_KEY,
    TextEncoderWeights,
    infer_text_config,
    read_text_encoder,
    text_encoders_in,
)

DELTA_FILE = "text_delta.safetensors"
FORMATS = ("fixclip", "transformers", "diffusers", "open_clip", "clip_l", "clip_g", "delta")


@dataclass(frozen=True)
class SingleFile:
    """What loaders of a clip_l or clip_g file expect: ViT-L/14's text tower, or OpenCLIP bigG's."""

    width: int
    layers: int
    activation: str


SINGLE_FILES = {"clip_l": SingleFile(768, 12, "quick_gelu"), "clip_g": SingleFile(1280, 32, "gelu")}


def plain_clip(model: FixClip) -> ClipCheckpoint:
    """The CLIP inside a FixClip, in open_clip's layout, without what only a FixClip has.

    Left out are the regional prompts, the mask embedding and the heads of the hierarchical alignment. The last
    two serve training only; without the prompts the image features are those of
    `FixClip.encode_image(prompts=False)`.

    Raises:
        ValueError: the text projection has a bias, which no plain CLIP has a place for.
    """
    state_dict: dict[str, Tensor] = {"logit_scale": model.logit_scale}
    for name, tensor in model.visual.state_dict().items():
        if name not in ("prompts", "mask_embedding"):
            state_dict[f"visual.{name}"] = tensor
    state_dict |= model.text.plain_state_dict()
    if "text_projection.bias" in state_dict:
        raise ValueError("the text projection has a bias, which a plain CLIP has no place for")
    if "text_projection.weight" in state_dict:
        state_dict["text_projection"] = state_dict.pop("text_projection.weight").T
    config = model.config.clip
    text_cfg = {**config["text_cfg"], "context_length": model.config.context_length, "proj_bias": False}
    state_dict = {name: tensor.detach().float().cpu().contiguous() for name, tensor in state_dict.items()}
    preprocess = {**preprocess_config(config), **model.config.preprocess}
    return ClipCheckpoint("FixClip", state_dict, {**config, "text_cfg": text_cfg}, preprocess)


def export(
    model: FixClip, folder: str | Path, formats: Sequence[str] | None = None, dtype: torch.dtype = torch.float32
) -> list[str]:
    """Write a FixClip in the formats of other front ends; the folder appears only when all of it is written.

    "transformers" is a CLIPModel folder with its processor, "diffusers" the folders text_encoder/ and tokenizer/,
    "open_clip" a folder for `local-dir:`, "clip_l" or "clip_g" one safetensors file of the text tower under the names
    that ComfyUI and others read, "delta" the low-rank change of the text tower alone, for people who have the base,
    "fixclip" our own folder with everything. README.md says what is where.

    Args:
        model: the model.
        folder: where to write; must not exist or be empty.
        formats: any of FORMATS; None for all that can hold the model.
        dtype: of the written weights; our own folder keeps the model's.

    Returns:
        Lines for the user: what was written, and what could not be held.

    Raises:
        ValueError: an unknown format, a folder with something in it, or a model that a format cannot hold.
    """
    folder = Path(folder)
    if unknown := [name for name in formats or () if name not in FORMATS]:
        raise ValueError(f"format {unknown[0]!r}: valid are {', '.join(FORMATS)}")
    _check_free(folder)
    if "delta" in (formats or ()) and not model.config.lora_rank:
        raise ValueError("format 'delta': the text tower was trained whole; train with model.lora_rank to have a delta")
    checkpoint = plain_clip(model)
    single_file = single_file_format(checkpoint)
    if formats is None:
        fitting = {"delta": bool(model.config.lora_rank)} | {name: name == single_file for name in SINGLE_FILES}
        formats = [name for name in FORMATS if fitting.get(name, True)]
    for name in formats:
        if name in SINGLE_FILES and name != single_file:
            raise ValueError(f"format {name}: {_why_no(name, checkpoint)}")
    writers: dict[str, Callable[[Path], str]] = {
        "fixclip": lambda out: _write_fixclip(model, out),
        "transformers": lambda out: write_transformers(checkpoint, out / "transformers", dtype),
        "diffusers": lambda out: write_diffusers(checkpoint, out, dtype),
        "open_clip": lambda out: write_open_clip(checkpoint, out / "open_clip", dtype),
        **dict.fromkeys(
            SINGLE_FILES, lambda out: write_single_file(checkpoint, out / f"{single_file}_long.safetensors", dtype)
        ),
        "delta": lambda out: write_delta(model, out / DELTA_FILE, dtype),
    }
    with all_or_nothing(folder) as partial:
        lines = [writers[name](partial) for name in FORMATS if name in formats]
        lines += _limits(model, single_file)
        card = _card(model, lines)
        for place in (partial, partial / "transformers", partial / "open_clip"):
            if place.is_dir():
                (place / "README.md").write_text(card)
    return lines


def _check_free(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty; nothing was written")


@contextmanager
def all_or_nothing(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that takes its place in the end, or goes away if anything fails."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            folder.rmdir()
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_fixclip(model: FixClip, out: Path) -> str:
    model.save_pretrained(out / "fixclip")
    return "fixclip/: everything, for FixClip.from_pretrained and further training"


def _limits(model: FixClip, single_file: str | None) -> list[str]:
    """What the other formats cannot hold, in sentences."""
    config = model.config
    lines = []
    if single_file is None:
        lines.append(f"There is no single file for ComfyUI: {NO_SINGLE_FILE}.")
    if config.num_prompts:
        lines.append(
            f"A plain CLIP has no place for the {config.num_prompts} regional prompts of each image layer: a FixClip "
            "folder alone keeps them. Image features of the other formats are those of "
            "FixClip.encode_image(prompts=False); text features are the same everywhere."
        )
    if config.num_groups or "mask_embedding" in dict(model.visual.named_parameters()):
        lines.append("What training alone reads (mask embedding, alignment heads) is kept in a FixClip folder, too.")
    return lines


def _card(model: FixClip, lines: list[str]) -> str:
    clip = model.config.clip
    activation = "QuickGELU" if clip.get("quick_gelu") else "GELU"
    points = "\n".join(f"- {line}" for line in lines)
    return (
        "---\nlibrary_name: transformers\npipeline_tag: zero-shot-image-classification\n---\n"
        "# FIX-CLIP export\n\n"
        f"Context length {model.config.context_length} tokens, embedding width {clip['embed_dim']}, {activation}.\n\n"
        f"{points}\n"
    )


def write_open_clip(checkpoint: ClipCheckpoint, folder: Path, dtype: torch.dtype = torch.float32) -> str:
    """Write weights and config the way `open_clip.create_model("local-dir:FOLDER")` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.to(dtype) for name, tensor in checkpoint.state_dict.items()}
    save_file(weights, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    model_config = checkpoint.model_config
    if Path(model_config["text_cfg"].get("hf_tokenizer_name") or "").is_absolute():  # a vocabulary of its own
        make_tokenizer(checkpoint).save_pretrained(folder)
        # open_clip reads the tokenizer of a local-dir: from that folder, whatever the name is.
        model_config = {**model_config, "text_cfg": {**model_config["text_cfg"], "hf_tokenizer_name": "."}}
    config = {"model_cfg": model_config, "preprocess_cfg": checkpoint.preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return "open_clip/: open_clip.create_model_and_transforms('local-dir:OUTPUT/open_clip')"


def write_transformers(checkpoint: ClipCheckpoint, folder: Path, dtype: torch.dtype = torch.float32) -> str:
    """Write a CLIPModel folder with the files of its processor.

    Raises:
        ValueError: the architecture has parts that transformers' CLIP lacks.
    """
    from transformers import CLIPModel, CLIPProcessor

    tokenizer = make_tokenizer(checkpoint)
    model = CLIPModel(_transformers_config(checkpoint, tokenizer))
    model.load_state_dict(to_transformers_names(checkpoint.state_dict))
    model.to(dtype).save_pretrained(folder)
    CLIPProcessor(_image_processor(checkpoint.preprocess), tokenizer).save_pretrained(folder)
    return "transformers/: CLIPModel.from_pretrained and CLIPProcessor.from_pretrained"


def write_diffusers(checkpoint: ClipCheckpoint, folder: Path, dtype: torch.dtype = torch.float32) -> str:
    """Write text_encoder/ and tokenizer/, two components of a Stable Diffusion folder.

    The weights have the prefix `text_model.`, which every version of transformers and most other tools read;
    transformers 5 itself would write names that its older versions load nothing from.

    The configuration says `padding="mask"` to `FixClipTextEncoder`: no loss reads the states behind a text's end, and
    pictures are better without them (docs/results.md).
    """
    tokenizer = make_tokenizer(checkpoint)
    config = _transformers_config(checkpoint, tokenizer).text_config
    config.architectures, config.dtype, config.padding = ["CLIPTextModel"], dtype, "mask"
    config.save_pretrained(folder / "text_encoder")
    weights = to_transformers_names(checkpoint.state_dict)
    save_file(
        {name: tensor.to(dtype) for name, tensor in weights.items() if name.startswith("text_model.")},
        folder / "text_encoder" / "model.safetensors",
        metadata={"format": "pt"},
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    return "text_encoder/, tokenizer/: for diffusers; FixClipTextEncoder.from_pretrained reads them too"


def write_single_file(checkpoint: ClipCheckpoint, path: Path, dtype: torch.dtype = torch.float32) -> str:
    """Write the text tower into one safetensors file, under the names of a clip_l or clip_g file.

    The file's metadata holds the configuration, which `read_text_encoder` reads. ComfyUI tells the two apart by their
    number of layers, takes any number of positions, and computes what `SINGLE_FILES` says; the returned line says
    where this tower differs.
    """
    weights = {
        name: tensor.to(dtype)
        for name, tensor in to_transformers_names(checkpoint.state_dict).items()
        if name.startswith("text_")
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    values = infer_text_config(shapes, None) | _text_values(checkpoint) | {"padding": "mask"}  # as `write_diffusers`
    save_file(weights, path, metadata={"format": "pt", CONFIG_KEY: json.dumps(values)})
    name = single_file_format(checkpoint) or "clip_l"
    expected, width, layers = SINGLE_FILES[name], values["hidden_size"], values["num_hidden_layers"]
    line = f"{path.name}: the text tower under the names of a {name} file, for ComfyUI and others"
    if (width, layers) != (expected.width, expected.layers):
        line += (
            f"; ComfyUI takes width {expected.width} and {expected.layers} layers, this one has {width} and {layers}"
        )
    if values["hidden_act"] != expected.activation:
        spelling = {"quick_gelu": "QuickGELU", "gelu": "GELU"}
        line += (
            f"; such loaders compute {spelling[expected.activation]}, this encoder needs "
            f"{spelling[values['hidden_act']]}: its results would be wrong there"
        )
    return line


NO_SINGLE_FILE = "it takes 23 to 30 layers for a ViT-H, whose table of positions it keeps at 77 rows"


def single_file_format(checkpoint: ClipCheckpoint) -> str | None:
    """How ComfyUI files the text tower: by its layers, whatever the file's name. None where it could not load it."""
    layers = checkpoint.model_config["text_cfg"]["layers"]
    return "clip_g" if layers > 30 else "clip_l" if layers < 23 else None


def _why_no(name: str, checkpoint: ClipCheckpoint) -> str:
    layers, fitting = checkpoint.model_config["text_cfg"]["layers"], single_file_format(checkpoint)
    if fitting is None:
        return f"ComfyUI could not load this text tower of {layers} layers: {NO_SINGLE_FILE}"
    return f"ComfyUI would take this text tower of {layers} layers for a {fitting}: choose --format {fitting}"


def write_text_encoders(file: str | Path, folder: str | Path, **config: Any) -> list[str]:
    """Write the text encoders of a file into the folders of a diffusers pipeline, as they are, without stretching.

    A file of one text encoder makes text_encoder/ and tokenizer/, a checkpoint of Stable Diffusion XL or 3 also
    text_encoder_2/ and tokenizer_2/. `FixClipTextEncoder.from_pretrained` reads them, and stretches 77 positions.

    Args:
        file: see `read_text_encoder`.
        folder: where to write; must not exist or be empty.
        **config: see `read_text_encoder`.

    Returns:
        Lines for the user.

    Raises:
        LoadError: see `read_text_encoder`.
        ValueError: there is something in the folder.
    """
    folder = Path(folder)
    _check_free(folder)
    encoders = [read_text_encoder(file, which, **config) for which in text_encoders_in(file) or [None]]
    with all_or_nothing(folder) as partial:
        return [
            _write_text_encoder(weights, partial, f"_{number}" if number > 1 else "")
            for number, weights in enumerate(encoders, 1)
        ]


def _write_text_encoder(weights: TextEncoderWeights, folder: Path, suffix: str) -> str:
    from transformers import CLIPTextConfig

    config = CLIPTextConfig(**weights.config)
    config.architectures = ["CLIPTextModelWithProjection" if weights.has_projection else "CLIPTextModel"]
    config.dtype = next(iter(weights.state_dict.values())).dtype
    config.save_pretrained(folder / f"text_encoder{suffix}")
    save_file(weights.state_dict, folder / f"text_encoder{suffix}" / "model.safetensors", metadata={"format": "pt"})
    length = config.max_position_embeddings
    line = f"text_encoder{suffix}/: CLIP-{(weights.which or '?').upper()}, width {config.hidden_size}, {length} tokens"
    if config.vocab_size < CLIP_VOCAB_SIZE:
        return f"{line}; its vocabulary of {config.vocab_size} is not CLIP's: it needs its own tokenizer{suffix}/"
    pad_token = "!" if config.pad_token_id == 0 else "<|endoftext|>"
    clip_tokenizer(length, pad_token).save_pretrained(folder / f"tokenizer{suffix}")
    return line


def write_delta(model: FixClip, path: Path, dtype: torch.dtype = torch.float32) -> str:
    """Write the low-rank change of the text tower and its positions into one safetensors file.

    Names are those of transformers and PEFT, for example `text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight`
    (r, I) and `...lora_B.weight` (O, r), to be added as B A; `text_model.embeddings.position_embedding.weight` (248, D)
    is the long table. The metadata hold the rank and how many of its first rows are the base's.
    """
    weights = {"text_model.embeddings.position_embedding.weight": model.text.positions().detach()}
    for (layer, name), factors in low_rank_factors(model.text.blocks).items():
        place = f"text_model.encoder.layers.{layer}.{'mlp' if name.startswith('fc') else 'self_attn'}.{name}"
        weights |= {f"{place}.lora_{part}.weight": factor for part, factor in zip("AB", factors, strict=True)}
    weights = {name: tensor.to(dtype).cpu().contiguous() for name, tensor in weights.items()}
    metadata = {"format": "pt", "fixclip": "text_delta", "rank": str(model.config.lora_rank)}
    metadata["kept_positions"] = str(model.config.keep)
    save_file(weights, path, metadata=metadata)
    size = path.stat().st_size / 2**20
    return f"{path.name}: the text tower's change, {size:.1f} MiB; FixClipTextEncoder.from_pretrained(BASE, delta=FILE)"


def make_tokenizer(checkpoint: ClipCheckpoint) -> Any:
    """transformers' tokenizer of the model, at its context length; pads with the end token as Stable Diffusion."""
    from transformers import AutoTokenizer

    length = checkpoint.context_length
    if name := checkpoint.model_config["text_cfg"].get("hf_tokenizer_name"):
        with loading(f"tokenizer {name!r}"):
            return AutoTokenizer.from_pretrained(name, model_max_length=length, trust_remote_code=False)
    return clip_tokenizer(length)


def clip_tokenizer(context_length: int = 77, pad_token: str = "<|endoftext|>") -> Any:
    """transformers' `CLIPTokenizer` with CLIP's own vocabulary, which open_clip ships."""
    from transformers import CLIPTokenizer

    bpe = open_clip.SimpleTokenizer()
    specials = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocab = {specials.get(piece, piece): index for piece, index in bpe.encoder.items()}
    merges = list(bpe.bpe_ranks)
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=context_length)


def _transformers_config(checkpoint: ClipCheckpoint, tokenizer: Any) -> Any:
    from transformers import CLIPConfig

    config = checkpoint.model_config
    text, vision = config["text_cfg"], config["vision_cfg"]
    values = _text_values(checkpoint)
    if text.get("act_kwargs") or vision.get("act_kwargs"):
        raise ValueError(f"act_kwargs={text.get('act_kwargs') or vision.get('act_kwargs')}: transformers has no such")
    common = {"hidden_act": values["hidden_act"], "projection_dim": config["embed_dim"]}
    return CLIPConfig(
        projection_dim=config["embed_dim"],
        text_config={
            **common,
            "vocab_size": text["vocab_size"],
            "hidden_size": text["width"],
            "intermediate_size": int(text["width"] * text.get("mlp_ratio", 4.0)),
            "num_hidden_layers": text["layers"],
            "max_position_embeddings": checkpoint.context_length,
            **{key: values[key] for key in ("num_attention_heads", "layer_norm_eps", "eos_token_id")},
            "bos_token_id": tokenizer.bos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            **common,
            "hidden_size": vision["width"],
            "intermediate_size": int(vision["width"] * vision.get("mlp_ratio", 4.0)),
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision.get("head_width", 64),
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "layer_norm_eps": (vision.get("norm_kwargs") or {}).get("eps", 1e-5),
        },
    )


def _text_values(checkpoint: ClipCheckpoint) -> dict[str, Any]:
    """What the text tower's tensors do not tell, under the names of transformers' `CLIPTextConfig`."""
    config, text = checkpoint.model_config, checkpoint.model_config["text_cfg"]
    return {
        "hidden_act": "quick_gelu" if config.get("quick_gelu") else "gelu",
        "num_attention_heads": text["heads"],
        "layer_norm_eps": (text.get("norm_kwargs") or {}).get("eps", 1e-5),
        "eos_token_id": text["eos_id"] if text.get("pool_type") == "eos" else text["vocab_size"] - 1,
    }


def _image_processor(preprocess: Mapping[str, Any]) -> Any:
    from PIL import Image
    from transformers import CLIPImageProcessor

    size = preprocess["size"]
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    shortest = preprocess["resize_mode"] == "shortest"
    return CLIPImageProcessor(
        size={"shortest_edge": min(height, width)} if shortest else {"height": height, "width": width},
        crop_size={"height": height, "width": width},
        do_center_crop=shortest,
        image_mean=list(preprocess["mean"]),
        image_std=list(preprocess["std"]),
        resample=Image.Resampling[preprocess["interpolation"].upper()],
    )
