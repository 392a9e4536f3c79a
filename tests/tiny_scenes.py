"""A whole model of the scenes world in the layout of `builtin:scenes`, tiny and with random weights."""

import json

import torch
from diffusers import AutoencoderKL
from tiny_adapter import randomize
from transformers import CLIPTextModel

from fixclip_core.scenes import long_caption, sample_scene
from fixclip_diffusion import FixClipTextEncoder, FixClipTokenizer, TextAdapter, tiny
from fixclip_diffusion.adapter_training.trainer import add_lora, save_lora
from fixclip_diffusion.fingerprint import MADE_FOR, fingerprint


def write_model(folder):
    """All parts in fp16: 9x9 latents of 16 channels, 72x72 pixels; each part changes the pictures."""
    captions = [long_caption(sample_scene(i), i).text for i in range(50)]
    pipe = tiny.stable_diffusion(tiny.train_tokenizer(captions, vocab_size=1400), "sd2")
    pipe.unet = tiny.unet(sample_size=9, in_channels=16, out_channels=16)
    pipe.vae = AutoencoderKL(
        block_out_channels=(4, 4, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=16,
        sample_size=72,
    )
    pipe.to(torch.float16).save_pretrained(folder / "base")
    change_json(folder / "base" / "model_index.json", _scenes_world=True)

    config = tiny.clip_text_config(**{**pipe.text_encoder.config.to_dict(), "max_position_embeddings": 248})
    CLIPTextModel(config).half().save_pretrained(folder / "encoder" / "text_encoder")
    for part in ("base", "encoder"):
        # transformers 5 loads in the type that is named here, diffusers the UNet in float32: they must be the same.
        change_json(folder / part / "text_encoder" / "config.json", dtype="float32")
    pipe.tokenizer.model_max_length = 248
    pipe.tokenizer.save_pretrained(folder / "encoder" / "tokenizer")

    randomize(TextAdapter(tiny.WIDTH), std=0.2).half().save_pretrained(folder / "adapter")
    encoder = FixClipTextEncoder.from_pretrained(folder / "encoder", subfolder="text_encoder", dtype=torch.float32)
    tokenizer = FixClipTokenizer.from_pretrained(folder / "base", subfolder="tokenizer")
    (folder / "adapter" / MADE_FOR).write_text(json.dumps(fingerprint(encoder, tokenizer)))

    randomize(TextAdapter(tiny.WIDTH, "attention", num_heads=4), std=0.2).half().save_pretrained(
        folder / "overlap_adapter"
    )
    base = FixClipTextEncoder.from_pretrained(folder / "base", subfolder="text_encoder", dtype=torch.float32)
    (folder / "overlap_adapter" / MADE_FOR).write_text(json.dumps(fingerprint(base, tokenizer)))

    unet = pipe.unet.float()
    state = {name: 0.1 * torch.randn_like(parameter).half() for name, parameter in add_lora(unet, 2).items()}
    save_lora(unet, state, folder / "lora")
    return folder


def change_json(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}, indent=2) + "\n")
