"""The names of a CLIP's weights in the layouts of open_clip and transformers: one table, both ways."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

LONG_CLIP_KEEP = 20

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
