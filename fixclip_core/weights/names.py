"""The names of a CLIP's weights in every layout that people have: one table, and where a text tower stands in a file.

Layouts: OpenAI and open_clip (`transformer.resblocks.0.ln_1.weight`), and transformers, diffusers and ComfyUI
(`text_model.encoder.layers.0.layer_norm1.weight`, in newer folders without `text_model.`). Long-CLIP is either of them
with a second table of positions. Files put prefixes in front, see `find_text_towers`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LONG_CLIP_KEEP = 20

Which = Literal["l", "h", "g"]

# open_clip's names and transformers' names; "|" marks a matrix that is stored transposed.
TOP_LEVEL_NAMES = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight|",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight|",
}
TOWER_NAMES = {
    "transformer.resblocks": "text_model.encoder.layers",
    "visual.transformer.resblocks": "vision_model.encoder.layers",
}
BLOCK_NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


def to_transformers_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename open_clip's state dict to that of transformers' `CLIPModel`.

    Raises:
        ValueError: a name that a plain CLIP does not have.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        tower, block, rest = _split_block(name, TOWER_NAMES)
        if name in TOP_LEVEL_NAMES:
            target = TOP_LEVEL_NAMES[name]
            renamed[target.rstrip("|")] = tensor.T.contiguous() if target.endswith("|") else tensor
        elif tower and rest.startswith("attn.in_proj_"):
            kind = rest.removeprefix("attn.in_proj_")
            for part, chunk in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{tower}.{block}.self_attn.{part}_proj.{kind}"] = chunk.contiguous()
        elif tower and rest.rpartition(".")[0] in BLOCK_NAMES:
            module, _, kind = rest.rpartition(".")
            renamed[f"{tower}.{block}.{BLOCK_NAMES[module]}.{kind}"] = tensor
        else:
            raise ValueError(f"{name!r} has no place in a transformers CLIPModel")
    return renamed


def to_open_clip_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the state dict of transformers' `CLIPModel` to open_clip's.

    Raises:
        ValueError: a name that a plain CLIP does not have, or a part of an attention that is missing.
    """
    top_level = {target.rstrip("|"): (name, target.endswith("|")) for name, target in TOP_LEVEL_NAMES.items()}
    modules = {target: name for name, target in BLOCK_NAMES.items()}
    towers = {target: name for name, target in TOWER_NAMES.items()}
    renamed: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        tower, block, rest = _split_block(name, towers)
        match = re.fullmatch(r"self_attn\.([qkv])_proj\.(weight|bias)", rest)
        if name in top_level:
            target, transposed = top_level[name]
            renamed[target] = tensor.T.contiguous() if transposed else tensor
        elif tower and match and match[1] == "q":
            parts = [name.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
            if missing := [part for part in parts if part not in state_dict]:
                raise ValueError(f"{missing[0]} is missing")
            renamed[f"{tower}.{block}.attn.in_proj_{match[2]}"] = torch.cat([state_dict[part] for part in parts])
        elif tower and rest.rpartition(".")[0] in modules:
            module, _, kind = rest.rpartition(".")
            renamed[f"{tower}.{block}.{modules[module]}.{kind}"] = tensor
        elif not (tower and match) and not name.endswith(".position_ids"):
            raise ValueError(f"{name!r} has no place in a CLIP")
    return renamed


def _split_block(name: str, towers: Mapping[str, str]) -> tuple[str, str, str]:
    """Split 'transformer.resblocks.3.ln_1.weight' into (new name of the tower, '3', 'ln_1.weight')."""
    for tower, new_tower in towers.items():
        if match := re.fullmatch(rf"{re.escape(tower)}\.(\d+)\.(.+)", name):
            return new_tower, match[1], match[2]
    return "", "", ""


def merge_long_clip_positions(first_TD: Tensor, rest_TD: Tensor, keep: int = LONG_CLIP_KEEP) -> Tensor:
    """Make one table of Long-CLIP's two: rows before `keep` of the first one, the others of the second."""
    if first_TD.shape != rest_TD.shape:
        raise ValueError(
            "Long-CLIP's two tables of positions must have one shape, got "
            f"{tuple(first_TD.shape)} and {tuple(rest_TD.shape)}"
        )
    return torch.cat([first_TD[:keep], rest_TD[keep:]])


# --- text towers in files of any kind ----------------------------------------------------------------------

# CLIP ViT-L/14 (Stable Diffusion 1, XL, 3, FLUX), OpenCLIP ViT-H/14 (Stable Diffusion 2) and bigG/14 (XL, 3).
WIDTHS: dict[int, Which] = {768: "l", 1024: "h", 1280: "g"}
# Read where the width is none of these.
PREFIXES: tuple[tuple[str, Which], ...] = (
    (r"(^|\.)clip_l\.", "l"),
    (r"(^|\.)clip_h\.", "h"),
    (r"(^|\.)clip_g\.", "g"),
    (r"^conditioner\.embedders\.0\.", "l"),
    (r"^conditioner\.embedders\.1\.", "g"),
    (r"^cond_stage_model\.transformer\.", "l"),
    (r"^cond_stage_model\.model\.", "h"),
)
# Long-CLIP's second table of positions.
POSITIONS_RES = (
    "positional_embedding_res",
    "embeddings.position_embedding_res",
    "embeddings.position_embedding_res.weight",
)
OPEN_CLIP_NAME = re.compile(
    r"token_embedding\.weight|positional_embedding(_res)?|ln_final\.(weight|bias)|transformer\.resblocks\.\d+\..+"
)
TRANSFORMERS_NAME = re.compile(
    r"(text_model\.)*(embeddings\.(token_embedding\.weight|position_embedding\.weight|position_embedding_res(\.weight)?)"
    r"|final_layer_norm\.(weight|bias)|encoder\.layers\.\d+\..+)"
)


@dataclass(frozen=True)
class TextTower:
    """Where a CLIP text tower stands in a file.

    Attributes:
        prefix: of its tensors, e.g. "cond_stage_model.transformer." in a Stable Diffusion 1 checkpoint.
        layout: of the names behind the prefix.
        which: "l", "h" or "g" by its width, else by the prefix; None for another CLIP.
    """

    prefix: str
    layout: Literal["open_clip", "transformers"]
    which: Which | None


def find_text_towers(shapes: Mapping[str, Sequence[int]]) -> list[TextTower]:
    """The CLIP text towers among a file's tensors, found by their token embeddings.

    Args:
        shapes: the shape of each tensor, as a safetensors header tells it.
    """
    towers = []
    for name, shape in shapes.items():
        match = re.fullmatch(r"(|.*\.)token_embedding\.weight", name)
        if match and len(shape) == 2:
            prefix, is_transformers = match[1].removesuffix("embeddings."), match[1].endswith("embeddings.")
            if is_transformers:
                prefix = re.sub(r"(?<![^.])(text_model\.)+$", "", prefix)
            hints = (which for pattern, which in PREFIXES if re.search(pattern, prefix))
            which = WIDTHS.get(shape[1]) or next(hints, None)
            towers.append(TextTower(prefix, "transformers" if is_transformers else "open_clip", which))
    return towers


def text_tower_names(tower: TextTower, names: Iterable[str]) -> list[str]:
    """The names of a tower's tensors in its file, projection included."""
    pattern = TRANSFORMERS_NAME if tower.layout == "transformers" else OPEN_CLIP_NAME
    names, prefix = list(names), tower.prefix
    found = [name for name in names if name.startswith(prefix) and pattern.fullmatch(name.removeprefix(prefix))]
    # ComfyUI keeps the projection beside "transformer.", transformers inside.
    places = dict.fromkeys((prefix, prefix.removesuffix("transformer."), f"{prefix}text_model."))
    projections = [f"{place}{name}" for place in places for name in ("text_projection", "text_projection.weight")]
    return found + [name for name in projections if name in names][:1]


def to_text_model_names(tower: TextTower, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a tower's tensors to `text_model.*` and `text_projection.weight`; Long-CLIP's two tables become one.

    Raises:
        ValueError: a name that a plain CLIP does not have, or two tables of different shapes.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("text_projection"):
            renamed["text_projection.weight"] = tensor.T.contiguous()
        elif name.endswith("text_projection.weight"):
            renamed["text_projection.weight"] = tensor
        else:
            renamed[re.sub(r"^(text_model\.)+", "", name.removeprefix(tower.prefix))] = tensor
    projection = {name: renamed.pop(name) for name in ("text_projection.weight",) if name in renamed}
    table = "positional_embedding" if tower.layout == "open_clip" else "embeddings.position_embedding.weight"
    for rest in POSITIONS_RES:
        if rest in renamed:
            renamed[table] = merge_long_clip_positions(renamed[table], renamed.pop(rest))
    if tower.layout == "open_clip":
        return to_transformers_names(renamed) | projection
    return {f"text_model.{name}": tensor for name, tensor in renamed.items()} | projection
