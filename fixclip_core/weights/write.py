"""A FixClip in the formats of other front ends: transformers, diffusers, open_clip and clip_l files."""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor

from fixclip_core.model.fixclip import FixClip
from fixclip_core.model.lora import low_rank_factors
from fixclip_core.weights.names import to_transformers_names
from fixclip_core.weights.read import ClipCheckpoint, preprocess_config

SINGLE_FILE = "clip_l_long.safetensors"
DELTA_FILE = "text_delta.safetensors"
FORMATS = ("fixclip", "transformers", "diffusers", "open_clip", "clip_l", "delta")


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
    "open_clip" a folder for `local-dir:`, "clip_l" one safetensors file of the text tower under the names that
    ComfyUI and others read, "delta" the low-rank change of the text tower alone, for people who have the base,
    "fixclip" our own folder with everything. README.md says what is where.

    Args:
        model: the model.
        folder: where to write; must not exist or be empty.
        formats: any of FORMATS; all that the model can be written in by default.
        dtype: of the written weights; our own folder keeps the model's.

    Returns:
        Lines for the user: what was written, and what could not be held.

    Raises:
        ValueError: an unknown format, a folder with something in it, or a model that a format cannot hold.
    """
    folder = Path(folder)
    if formats is None:
        formats = [name for name in FORMATS if name != "delta" or model.config.lora_rank]
    if unknown := [name for name in formats if name not in FORMATS]:
        raise ValueError(f"format {unknown[0]!r}: valid are {', '.join(FORMATS)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty; nothing was written")
    if "delta" in formats and not model.config.lora_rank:
        raise ValueError("format 'delta': the text tower was trained whole; train with model.lora_rank to have a delta")
    checkpoint = plain_clip(model)
    writers: dict[str, Callable[[Path], str]] = {
        "fixclip": lambda out: _write_fixclip(model, out),
        "transformers": lambda out: write_transformers(checkpoint, out / "transformers", dtype),
        "diffusers": lambda out: write_diffusers(checkpoint, out, dtype),
        "open_clip": lambda out: write_open_clip(checkpoint, out / "open_clip", dtype),
        "clip_l": lambda out: write_single_file(checkpoint, out / SINGLE_FILE, dtype),
        "delta": lambda out: write_delta(model, out / DELTA_FILE, dtype),
    }
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        lines = [writers[name](partial) for name in FORMATS if name in formats]
        lines += _limits(model)
        card = _card(model, lines)
        for place in (partial, partial / "transformers", partial / "open_clip"):
            if place.is_dir():
                (place / "README.md").write_text(card)
        if folder.exists():
            folder.rmdir()
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return lines


def _write_fixclip(model: FixClip, out: Path) -> str:
    model.save_pretrained(out / "fixclip")
    return "fixclip/: everything, for FixClip.from_pretrained and further training"


def _limits(model: FixClip) -> list[str]:
    """What the other formats cannot hold, in sentences."""
    config = model.config
    lines = []
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
    config = {"model_cfg": checkpoint.model_config, "preprocess_cfg": checkpoint.preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return "open_clip/: open_clip.create_model_and_transforms('local-dir:open_clip')"


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
    """
    tokenizer = make_tokenizer(checkpoint)
    config = _transformers_config(checkpoint, tokenizer).text_config
    config.architectures, config.dtype = ["CLIPTextModel"], dtype
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
    """Write the text tower into one safetensors file, under the names of a clip_l file.

    ComfyUI knows a clip_l by its name of layer 0 and a Long-CLIP by its 248 positions. It has place for
    ViT-L/14's text tower with QuickGELU alone; the returned line says where this one differs.
    """
    weights = {
        name: tensor.to(dtype)
        for name, tensor in to_transformers_names(checkpoint.state_dict).items()
        if name.startswith("text_")
    }
    save_file(weights, path, metadata={"format": "pt"})
    config = checkpoint.model_config
    sizes = (config["text_cfg"]["width"], config["text_cfg"]["layers"], checkpoint.context_length)
    line = f"{path.name}: the text tower under the names of a clip_l file, for ComfyUI and others"
    if sizes != (768, 12, 248):
        line += (
            f"; ComfyUI takes width 768, 12 layers and 248 tokens, this one has {sizes[0]}, {sizes[1]} and {sizes[2]}"
        )
    if not config.get("quick_gelu"):
        line += "; such loaders compute QuickGELU, this encoder needs GELU: its results would be wrong there"
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
        return AutoTokenizer.from_pretrained(name, model_max_length=length)
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
    if text.get("act_kwargs") or vision.get("act_kwargs"):
        raise ValueError(f"act_kwargs={text.get('act_kwargs') or vision.get('act_kwargs')}: transformers has no such")
    end = text["eos_id"] if text.get("pool_type") == "eos" else text["vocab_size"] - 1
    common = {"hidden_act": "quick_gelu" if config.get("quick_gelu") else "gelu", "projection_dim": config["embed_dim"]}
    return CLIPConfig(
        projection_dim=config["embed_dim"],
        text_config={
            **common,
            "vocab_size": text["vocab_size"],
            "hidden_size": text["width"],
            "intermediate_size": int(text["width"] * text.get("mlp_ratio", 4.0)),
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "max_position_embeddings": checkpoint.context_length,
            "layer_norm_eps": (text.get("norm_kwargs") or {}).get("eps", 1e-5),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": end,
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
