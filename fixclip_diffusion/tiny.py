"""A tiny Stable Diffusion with random weights, for trying the whole path without a download. Its pictures are noise."""

import json

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

WIDTH = 32


def train_tokenizer(texts: list[str], vocab_size: int = 1024, pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """A CLIP tokenizer of 77 tokens whose merges are learned from a few texts; it still reads any text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    # Without room for the second alphabet, of letters that end a word, the trainer would stop too early.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False
    )
    backend.train_from_iterator((text.lower() for text in texts), trainer)
    merges = [tuple(merge) for merge in json.loads(backend.to_str())["model"]["merges"]]
    pieces = dict.fromkeys([*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)])
    vocab = {piece: index for index, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=77)


def clip_text_config(**changes: object) -> CLIPTextConfig:
    values = {
        "vocab_size": 49408,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "projection_dim": WIDTH,
        "hidden_act": "quick_gelu",
        "eos_token_id": 2,  # the legacy value of Stable Diffusion 1.5
        # At the usual 0.02, tiny random encoders hardly tell one text from another.
        "initializer_factor": 5.0,
    }
    return CLIPTextConfig(**{**values, **changes})


def unet(**changes: object) -> UNet2DConditionModel:
    values = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 8,
    }
    return UNet2DConditionModel(**{**values, **changes})


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        sample_size=16,
    )


def scheduler(prediction_type: str = "epsilon") -> DDIMScheduler:
    """The noise schedule of Stable Diffusion 1.x and 2.x."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


def stable_diffusion(tokenizer: CLIPTokenizer, kind: str = "sd1", seed: int = 0) -> StableDiffusionPipeline:
    """A stock pipeline in the manner of Stable Diffusion 1.x (`sd1`) or 2.x (`sd2`: gelu, v-prediction).

    Args:
        tokenizer: decides the vocabulary, and by its pad token the padding.
        kind: `sd1` or `sd2`.
        seed: of the random weights; the global generator is left as it was.
    """
    changes: dict[str, object] = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id}
    if kind == "sd2":
        changes |= {"hidden_act": "gelu", "eos_token_id": tokenizer.eos_token_id}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return StableDiffusionPipeline(
            vae=vae(),
            text_encoder=CLIPTextModel(clip_text_config(**changes)),
            tokenizer=tokenizer,
            unet=unet(),
            scheduler=scheduler("epsilon" if kind == "sd1" else "v_prediction"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def stable_diffusion_xl(
    tokenizer: CLIPTokenizer, tokenizer_2: CLIPTokenizer, seed: int = 0
) -> StableDiffusionXLPipeline:
    """A stock pipeline in the manner of Stable Diffusion XL: encoders of widths 32 and 48, a pooled vector of 24.

    Args:
        tokenizer, tokenizer_2: with one vocabulary; CLIP-L pads with the end token, bigG with id 0.
        seed: of the random weights; the global generator is left as it was.
    """
    ids: dict[str, object] = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    second = {"hidden_size": 48, "intermediate_size": 96, "projection_dim": 24, "hidden_act": "gelu"}
    conditions = {
        "cross_attention_dim": WIDTH + 48,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24 + 6 * 8,
        "use_linear_projection": True,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return StableDiffusionXLPipeline(
            vae=vae(),
            text_encoder=CLIPTextModel(clip_text_config(**ids)),
            text_encoder_2=CLIPTextModelWithProjection(clip_text_config(**{**ids, **second})),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=unet(**conditions),
            scheduler=scheduler(),
            add_watermarker=False,
        )
