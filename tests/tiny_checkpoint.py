"""Whole checkpoints in one file, in the layout of the original Stable Diffusion, of tiny diffusers pipelines.

diffusers turns these names into its own and not back; the tests read the files with stock `from_single_file`.
"""

import re

import torch
from safetensors.torch import save_file

from fixclip_core.weights.names import to_open_clip_names

UNET_NAMES = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
RESNET_NAMES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_NAMES = {
    "mid_block.attentions.0.group_norm": "mid.attn_1.norm",
    "mid_block.attentions.0.to_q": "mid.attn_1.q",
    "mid_block.attentions.0.to_k": "mid.attn_1.k",
    "mid_block.attentions.0.to_v": "mid.attn_1.v",
    "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
}


def _renamed(name, names):
    """`a.b.c` with those of its parts, in a row, that `names` lists, under their new names."""
    for old, new in names.items():
        name = re.sub(rf"(?<![^.]){re.escape(old)}(?![^.])", new, name)
    return name


def unet_state(unet):
    """A UNet's weights under `model.diffusion_model.`"""
    count = unet.config.layers_per_block + 1
    attends = ["CrossAttn" in kind for kind in unet.config.up_block_types]

    def place(match):
        side, block, part, index = match[1], int(match[2]), match[3], int(match[4])
        if part == "downsamplers":
            return f"input_blocks.{(block + 1) * count}.0.op"
        if part == "upsamplers":
            return f"output_blocks.{block * count + count - 1}.{1 + attends[block]}.conv"
        number = block * count + index
        branch = 0 if part == "resnets" else 1
        return f"input_blocks.{number + 1}.{branch}" if side == "down" else f"output_blocks.{number}.{branch}"

    state = {}
    for name, tensor in unet.state_dict().items():
        if ".resnets." in name:
            name = _renamed(name, RESNET_NAMES)
        name = re.sub(r"^(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)(\.conv)?", place, name)
        state[f"model.diffusion_model.{_renamed(name, UNET_NAMES)}"] = tensor.contiguous()
    return state


def vae_state(vae):
    """An autoencoder's weights under `first_stage_model.`"""
    last = len(vae.config.block_out_channels) - 1
    state = {}
    for name, tensor in vae.state_dict().items():
        name = _renamed(name, VAE_NAMES)
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda match: f"up.{last - int(match[1])}.block.", name)
        name = re.sub(r"down_blocks\.(\d+)\.", r"down.\1.", name)
        name = re.sub(r"up_blocks\.(\d+)\.", lambda match: f"up.{last - int(match[1])}.", name)
        if ".attn_1." in name and name.endswith("weight") and tensor.ndim == 2:
            tensor = tensor[..., None, None]  # linear layers are 1x1 convolutions there
        state[f"first_stage_model.{name}"] = tensor.contiguous()
    return state


def text_state(model, prefix, layout="transformers"):
    """A text encoder's weights behind a prefix: under `text_model.`, or under open_clip's names."""
    names = model.state_dict().items()
    state = {name if name.startswith("text_") else f"text_model.{name}": tensor for name, tensor in names}
    state = state if layout == "transformers" else to_open_clip_names(state)
    return {prefix + name: tensor.contiguous() for name, tensor in state.items()}


def checkpoint_state(pipe, text):
    """All of a checkpoint; `text`: the weights of its text encoders."""
    return {**text, **unet_state(pipe.unet), **vae_state(pipe.vae)}


def save_checkpoint(path, pipe, text, metadata=None):
    """Write it as .safetensors, or as .ckpt: a pickle of tensors under "state_dict"."""
    state = checkpoint_state(pipe, text)
    if path.suffix == ".ckpt":
        torch.save({"state_dict": state, "global_step": 7}, path)
    else:
        save_file(state, path, metadata)
    return path
