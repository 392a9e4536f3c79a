"""Pre-train the miniature's base: what stands in for the years of GPU time behind CLIP and Stable Diffusion.

`accelerate launch pipelines/scenes/pretrain.py STAGE RECIPE [section.key=value ...]`, with four stages: `clip`
(image and text tower at 77 tokens), `vae` (AutoencoderKL), `robust` (the VAE again, with noise on its latents) and
`unet` (text to image, with clip's text tower frozen).
Their results are the standard folders of transformers and diffusers. Nothing here knows FIX-CLIP: the
stretched encoder and the adapter are trained by train_encoder.py and train_adapter.py, as at any other size.

One thing here no real CLIP has: `clip` also learns to read place, shape, colour and size off the last token
of each object's sentence. Contrastive training on 400 million pairs teaches a tower to bind words; on two
cores and half an hour it does not, and this auxiliary loss takes its place. It is part of the base alone.

Scene i of step s is a function of (seed, s, i), so a resumed run repeats an uninterrupted one.

Shapes: B samples, T tokens, D width, E embedding, O described objects of a batch, C H W image or latents.
"""

import copy
import itertools
import math
import random
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, cast

import open_clip
import torch
import torch.nn.functional as F
import typer
from accelerate import PartialState
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTextModel, CLIPTokenizer

from fixclip_cli.app import Commands
from fixclip_cli.train import DryRun, Overrides, RecipeArgument, Resume, Smoke, run, training_errors
from fixclip_core import scenes
from fixclip_core.evaluation.retrieval import retrieval_metrics
from fixclip_core.files import write_atomically
from fixclip_core.training.encoder.losses.contrastive import contrastive_loss
from fixclip_core.training.memory import activation_bytes
from fixclip_core.training.metrics import MetricsLog
from fixclip_core.training.optim import check_finite
from fixclip_core.training.recipe import OptimSection, OutputSection, RunSection, Section, load_recipe, naming_places
from fixclip_core.training.trainer import Trainer, changed
from fixclip_diffusion import tiny
from fixclip_diffusion.adapter_training.objectives import noise_target
from fixclip_diffusion.adapter_training.objectives.draws import HIGH_NOISE_FROM

CONTEXT_LENGTH = 77
MAX_LOG_SCALE = math.log(100.0)
KINDS: dict[str, tuple[str, ...]] = {
    "place": scenes.PLACES,
    "shape": tuple(entry.name for entry in scenes.WORLD.shapes),
    "colour": tuple(entry.name for entry in scenes.WORLD.colours),
    "size": tuple(entry.name for entry in scenes.WORLD.sizes),
}


# -- recipes -------------------------------------------------------------------------------------------------


class StageRecipe(Section):
    """What the stages share."""

    seed: int = Field(default=0, ge=0)
    optim: OptimSection
    train: RunSection
    output: OutputSection
    eval_every: int = Field(default=500, ge=1, description="steps between two evaluations on held-out scenes")
    eval_scenes: int = Field(default=256, ge=1)


class TextStageRecipe(StageRecipe):
    """What the stages that learn from captions share."""

    reference_share: float = Field(
        default=0.0, ge=0, le=1, description="of the long captions: those in which a sentence refers to another one"
    )


class ClipRecipe(TextStageRecipe):
    width: int = Field(default=192, ge=32, multiple_of=32, description="of both towers and the embedding")
    layers: int = Field(default=4, ge=1)
    heads: int = Field(default=6, ge=1)
    patch_size: int = Field(default=12, ge=1)
    weight_binding: float = Field(default=1.0, ge=0, description="of the auxiliary loss, see the top of the file")


class VaeRecipe(StageRecipe):
    channels: list[int] = Field(min_length=1, description="of the blocks; each but the last halves the picture")
    layers_per_block: int = Field(default=1, ge=1)
    latent_channels: int = Field(default=16, ge=1)
    weight_kl: float = Field(default=2e-5, ge=0, description="of the mean KL divergence of a latent")


class RobustRecipe(StageRecipe):
    vae: str = Field(min_length=1, description="folder of the stage vae, which is trained on")
    noise: float = Field(default=1.0, gt=0, description="largest std of the noise, in stds of the latents")


class UnetRecipe(TextStageRecipe):
    clip: str = Field(min_length=1, description="folder of the stage clip")
    vae: str = Field(min_length=1, description="folder of the stage robust; latents are made with its encoder")
    channels: list[int] = Field(min_length=1)
    layers_per_block: int = Field(default=1, ge=1)
    heads: int = Field(default=6, ge=1, description="of the attention, at every resolution")
    max_objects_long: int = Field(default=4, ge=1, le=9, description="what a long caption fits into 77 tokens")
    max_objects_short: int = Field(default=5, ge=1, le=9, description="what a short caption fits into 77 tokens")
    latents: int = Field(default=16384, ge=1, description="scenes whose latents are made once and kept")
    noise_draws: int = Field(default=4, ge=1, description="noises and timesteps a caption; batch_size counts draws")
    high_noise_share: float = Field(default=0.5, ge=0, le=1)
    caption_dropout: float = Field(default=0.1, ge=0, lt=1)


# -- text ----------------------------------------------------------------------------------------------------


def scenes_tokenizer(words: Sequence[str] = scenes.vocabulary()) -> CLIPTokenizer:
    """CLIP's tokenizer without the merges that no caption needs: the same pieces for captions, any text readable."""
    clip = open_clip.SimpleTokenizer()
    needed: set[tuple[str, str]] = set()
    for word in words:
        pieces = [clip.byte_encoder[byte] for byte in word.encode()]
        pieces[-1] += "</w>"
        while len(pieces) > 1:
            pairs = list(itertools.pairwise(pieces))
            best = min(pairs, key=lambda pair: clip.bpe_ranks.get(pair, math.inf))
            if best not in clip.bpe_ranks:
                break
            needed.add(best)
            at = pairs.index(best)
            pieces[at : at + 2] = ["".join(best)]
    merges = [pair for pair in clip.bpe_ranks if pair in needed]
    letters = list(clip.byte_encoder.values())
    kept = dict.fromkeys([*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)])
    vocab = {piece: index for index, piece in enumerate([*kept, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token="<|endoftext|>", model_max_length=CONTEXT_LENGTH)


def refers(key: str, share: float) -> bool:
    """Whether the caption of this key is one of the `share` of captions that refer."""
    return random.Random(f"refers/{key}").random() < share


def referring_scene(key: str) -> scenes.Scene:
    """A scene of two or three objects that has something to refer to."""
    kind = random.Random(f"kind/{key}").choice(scenes.KINDS)
    return scenes.reference_scene(key, kind, num_objects=(2, 3))


def referring_caption(scene: scenes.Scene, key: str) -> scenes.Caption:
    """A caption of a `referring_scene` in which a sentence refers to another one, within 77 tokens."""
    return scenes.reference_caption(scene, key, distances=("under 40",), max_tokens=70, split="all")


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """Ids (B, T), cut at 77 tokens and padded to the longest."""
    options = {"padding": "longest", "truncation": True, "max_length": CONTEXT_LENGTH, "return_tensors": "pt"}
    return tokenizer(list(texts), **options).input_ids


def sample_scenes(seed: int, step: int, rank: int, number: int, objects: tuple[int, int]) -> list[scenes.Scene]:
    return [scenes.sample_scene(f"pretraining/{seed}/{step}/{rank}/{i}", num_objects=objects) for i in range(number)]


def pictures(sampled: Sequence[scenes.Scene]) -> Tensor:
    """(B, 3, H, W) from -1 to 1."""
    return scenes.render_batch(sampled).float() / 127.5 - 1


def share_right(image_BCHW: Tensor, sampled: Sequence[scenes.Scene]) -> dict[str, float]:
    """Shares of all objects that are right, and whose colour is, in pictures from 0 to 1."""
    objects = [item for check in scenes.check_batch(image_BCHW, sampled) for item in check.objects]
    return {name: sum(getattr(o, name) for o in objects) / len(objects) for name in ("right", "colour_right")}


# -- stage clip ----------------------------------------------------------------------------------------------


@dataclass
class ClipBatch:
    image_BCHW: Tensor
    ids_BT: Tensor
    sample_O: Tensor
    token_O: Tensor
    labels: dict[str, Tensor] = field(default_factory=dict)


class Clip(nn.Module):
    """A CLIPModel with the heads of the binding loss."""

    def __init__(self, recipe: ClipRecipe):
        super().__init__()
        self.recipe = recipe
        self.tokenizer = scenes_tokenizer()
        tower = {
            "hidden_size": recipe.width,
            "intermediate_size": 4 * recipe.width,
            "num_hidden_layers": recipe.layers,
            "num_attention_heads": recipe.heads,
            "projection_dim": recipe.width,
            "hidden_act": "quick_gelu",
        }
        size = scenes.WORLD.image_size
        specials = {"bos_token_id": self.tokenizer.bos_token_id, "eos_token_id": self.tokenizer.eos_token_id}
        config = CLIPConfig(
            projection_dim=recipe.width,
            text_config={
                **tower,
                **specials,
                "pad_token_id": self.tokenizer.pad_token_id,
                "vocab_size": len(self.tokenizer),
                "max_position_embeddings": CONTEXT_LENGTH,
            },
            vision_config={**tower, "image_size": size, "patch_size": recipe.patch_size},
        )
        # Fused attention is slow backwards on CPUs at such small heads.
        config._attn_implementation = "eager"
        self.clip = CLIPModel(config)
        initialise(self.clip)
        self.heads = nn.ModuleDict({kind: nn.Linear(recipe.width, len(names)) for kind, names in KINDS.items()})

    def batch(self, seed: int, step: int, rank: int, number: int) -> ClipBatch:
        """Scenes with one caption each: long and cut at 77 tokens, or short."""
        sampled = sample_scenes(seed, step, rank, number, (1, len(scenes.PLACES)))
        captions = []
        for i, scene in enumerate(sampled):
            key = f"{seed}/{step}/{rank}/{i}"
            if i % 2 and refers(key, self.recipe.reference_share):
                sampled[i] = referring_scene(key)
                captions.append(referring_caption(sampled[i], key))
            elif i % 2:
                captions.append(scenes.long_caption(scene, key, split="all"))
            else:
                captions.append(scenes.short_caption(scene, key, max_objects=1 + i // 2 % 4, split="all"))
        return self.described(sampled, captions)

    def described(self, sampled: Sequence[scenes.Scene], captions: Sequence[scenes.Caption]) -> ClipBatch:
        encoded = self.tokenizer([c.text for c in captions], return_offsets_mapping=True)
        rows: list[tuple[int, int, dict[str, int]]] = []
        for i, (scene, caption) in enumerate(zip(sampled, captions, strict=True)):
            offsets = encoded["offset_mapping"][i][1:-1]
            objects = {item.place: item for item in scene.objects}
            later = {reference.place for reference in caption.references if reference.kind == "remainder"}
            for span, (_, last) in zip(caption.spans, scenes.token_ranges(caption, offsets), strict=True):
                # A colour that only a later sentence gives cannot be read off an object's own sentence.
                if span.place is not None and span.place not in later and last <= CONTEXT_LENGTH - 2:
                    item = objects[span.place]
                    rows.append((i, last, {kind: names.index(getattr(item, kind)) for kind, names in KINDS.items()}))
        return ClipBatch(
            pictures(sampled),
            tokenize(self.tokenizer, [c.text for c in captions]),
            torch.tensor([i for i, _, _ in rows]),
            torch.tensor([last for _, last, _ in rows]),
            {kind: torch.tensor([labels[kind] for _, _, labels in rows]) for kind in KINDS},
        )

    def features(self, batch: ClipBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised image and text features (B, E), and the text's states (B, T, D)."""
        image = self.clip.vision_model(pixel_values=batch.image_BCHW).pooler_output
        text = self.clip.text_model(input_ids=batch.ids_BT)
        image_BE = F.normalize(self.clip.visual_projection(image), dim=-1)
        text_BE = F.normalize(self.clip.text_projection(text.pooler_output), dim=-1)
        return image_BE, text_BE, text.last_hidden_state

    def forward(self, batch: ClipBatch) -> dict[str, Tensor]:
        image_BE, text_BE, states_BTD = self.features(batch)
        with torch.no_grad():
            self.clip.logit_scale.clamp_(max=MAX_LOG_SCALE)
        losses = {"loss_contrast": contrastive_loss(image_BE, text_BE, self.clip.logit_scale.exp())}
        read_OD = states_BTD[batch.sample_O, batch.token_O]
        for kind, head in self.heads.items():
            losses[f"loss_{kind}"] = F.cross_entropy(head(read_OD).float(), batch.labels[kind])
        binding = torch.stack([losses[f"loss_{kind}"] for kind in KINDS]).sum()
        return {"loss": losses["loss_contrast"] + self.recipe.weight_binding * binding, **losses}

    @torch.no_grad()
    def evaluate(self, number: int) -> dict[str, float]:
        """Retrieval by short captions, and how often all four properties are read off a sentence of a long one."""
        sampled = sample_scenes(0, -1, 0, number, (1, len(scenes.PLACES)))
        batch = self.described(sampled, [scenes.short_caption(s, i, split="all") for i, s in enumerate(sampled)])
        image_BE, text_BE, _ = self.features(batch)
        recalls = retrieval_metrics(image_BE.float(), text_BE.float(), torch.arange(number))
        batch = self.described(sampled, [scenes.long_caption(s, i, split="all") for i, s in enumerate(sampled)])
        read_OD = self.features(batch)[2][batch.sample_O, batch.token_O]
        right = [self.heads[kind](read_OD).argmax(1) == batch.labels[kind] for kind in KINDS]
        bound = torch.stack(right).all(0).float().mean()
        return {**{k: v for k, v in recalls.items() if k.endswith("at_1")}, "bound": float(bound)}

    def save(self, folder: Path) -> None:
        self.clip.save_pretrained(folder)
        size = {"height": scenes.WORLD.image_size, "width": scenes.WORLD.image_size}
        images = CLIPImageProcessor(
            size={"shortest_edge": scenes.WORLD.image_size}, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3
        )
        CLIPProcessor(images, self.tokenizer).save_pretrained(folder)


def initialise(clip: CLIPModel) -> None:
    """Weights of variance 1 / fan-in, shrunk where they add to the residual stream, and sinusoidal positions.

    At CLIP's own scale of 0.02 a tower this small hardly tells words and positions apart at first.
    """
    for name, module in clip.named_modules():
        if isinstance(module, nn.Linear):
            shrink = math.sqrt(2 * clip.config.text_config.num_hidden_layers)
            adds = name.endswith(("out_proj", "fc2"))
            nn.init.normal_(module.weight, std=module.in_features**-0.5 / (shrink if adds else 1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    text, vision = clip.text_model.embeddings, clip.vision_model.embeddings
    nn.init.normal_(text.token_embedding.weight, std=0.5)
    nn.init.normal_(vision.class_embedding, std=0.5)
    for table in (text.position_embedding, vision.position_embedding):
        with torch.no_grad():
            table.weight.copy_(0.5 * sinusoids(*table.weight.shape))


def sinusoids(number: int, width: int) -> Tensor:
    """(number, width): sines and cosines of the position, wavelengths from 2 pi to 2,000 pi."""
    frequency = torch.exp(torch.linspace(0, -math.log(1000.0), width // 2))
    angle = torch.arange(number)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


# -- stage vae -----------------------------------------------------------------------------------------------


class Vae(nn.Module):
    """An AutoencoderKL, trained on squared error and a little KL."""

    def __init__(self, recipe: VaeRecipe):
        super().__init__()
        self.recipe = recipe
        blocks = len(recipe.channels)
        self.vae = AutoencoderKL(
            block_out_channels=tuple(recipe.channels),
            layers_per_block=recipe.layers_per_block,
            latent_channels=recipe.latent_channels,
            norm_num_groups=8,
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            mid_block_add_attention=False,
            sample_size=scenes.WORLD.image_size,
        )

    def batch(self, seed: int, step: int, rank: int, number: int) -> Tensor:
        return pictures(sample_scenes(seed, step, rank, number, (5, len(scenes.PLACES))))

    def forward(self, image_BCHW: Tensor) -> dict[str, Tensor]:
        posterior = self.vae.encode(image_BCHW).latent_dist
        error = F.mse_loss(self.vae.decode(posterior.sample()).sample.float(), image_BCHW)
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).float().mean()
        return {"loss": error + self.recipe.weight_kl * kl, "loss_error": error, "loss_kl": kl}

    @torch.no_grad()
    def evaluate(self, number: int) -> dict[str, float]:
        """Share of objects that survive encoding and decoding, out of nine in each picture."""
        sampled = sample_scenes(0, -1, 0, number, (9, 9))
        image = pictures(sampled)
        back = [self.vae.decode(self.vae.encode(part).latent_dist.mode()).sample for part in image.split(32)]
        decoded = torch.cat(back).float()
        right = share_right((decoded / 2 + 0.5).clamp(0, 1), sampled)["right"]
        return {"objects_right": right, "root_mean_square": float(F.mse_loss(decoded, image).sqrt())}

    def save(self, folder: Path) -> None:
        save_whitened(self.vae, folder)


@torch.no_grad()
def save_whitened(vae: AutoencoderKL, folder: Path) -> None:
    image = pictures(sample_scenes(0, -2, 0, 512, (1, 9)))
    whiten(vae, [vae.encode(part).latent_dist for part in image.split(32)])
    vae.save_pretrained(folder)


@torch.no_grad()
def whiten(vae: AutoencoderKL, posteriors: Sequence[Any], floor: float = 0.05) -> None:
    """Give the latents' principal directions nearly equal variance; what is decoded stays the same.

    Without it four fifths of the latents' variance is brightness, and a UNet learns colours and shapes late: its
    loss hardly sees them, and noise drowns them early. The map A (z - mean) and its inverse become part of the 1x1
    convolutions on both sides of the latents. Directions of a variance below `floor` stay small, as they hold
    little but the posterior's own noise; its variance becomes a constant.

    Args:
        vae: changed in place, its scaling factor included.
        posteriors: of pictures of all kinds, before the change.
    """
    latents_CN = torch.cat([p.mean for p in posteriors]).transpose(0, 1).flatten(1)
    noise_C = torch.cat([p.var for p in posteriors]).mean((0, 2, 3))
    mean_C = latents_CN.mean(1)
    variance_C, directions_CC = torch.linalg.eigh(torch.cov(latents_CN))
    map_CC = directions_CC @ torch.diag((variance_C + floor).rsqrt()) @ directions_CC.T
    new_CN = map_CC @ (latents_CN - mean_C[:, None])
    channels = len(mean_C)
    before, after = cast(nn.Conv2d, vae.quant_conv), cast(nn.Conv2d, vae.post_quant_conv)
    assert before.bias is not None
    assert after.bias is not None
    weight, bias = before.weight[:, :, 0, 0], before.bias
    weight[:channels], bias[:channels] = map_CC @ weight[:channels], map_CC @ (bias[:channels] - mean_C)
    weight[channels:], bias[channels:] = 0.0, (map_CC.square() @ noise_C).log()
    weight = after.weight[:, :, 0, 0]
    after.bias += weight @ mean_C
    weight.copy_(weight @ torch.linalg.inv(map_CC))
    vae.register_to_config(scaling_factor=round(1 / float(new_CN.std()), 5))


# -- stage robust --------------------------------------------------------------------------------------------


class Robust(nn.Module):
    """The VAE, trained on with noise on its latents: it must forgive what a UNet gets slightly wrong.

    Its group norms span the whole picture, so that a little noise anywhere shifts the colours everywhere: with a
    std of 0.3 on the latents, 16 % of the objects came out in another colour before. With the encoder in training,
    what tells objects apart is spread over many latents, and a UNet settles it while there is still much noise.
    """

    def __init__(self, recipe: RobustRecipe):
        super().__init__()
        self.recipe = recipe
        self.vae = AutoencoderKL.from_pretrained(recipe.vae)

    def batch(self, seed: int, step: int, rank: int, number: int) -> Tensor:
        return pictures(sample_scenes(seed, step, rank, number, (1, len(scenes.PLACES))))

    def decode_noisy(self, image_BCHW: Tensor, std_B: Tensor) -> Tensor:
        """The picture (B, C, H, W) after noise of the latents' own covariance times `std_B` squared.

        So no encoder can evade the noise by larger latents, or by directions that have little of it.
        """
        latents = self.vae.encode(image_BCHW).latent_dist.mode().float()
        with torch.autocast("cpu", enabled=False):
            covariance_CC = torch.cov(latents.transpose(0, 1).flatten(1))
            root_CC = torch.linalg.cholesky(covariance_CC + 1e-3 * covariance_CC.diagonal().diag())
            noise = torch.einsum("cd,bdhw->bchw", root_CC, torch.randn_like(latents))
        return self.vae.decode(latents + std_B[:, None, None, None] * noise).sample.float()

    def forward(self, image_BCHW: Tensor) -> dict[str, Tensor]:
        std_B = self.recipe.noise * torch.rand(len(image_BCHW))
        return {"loss": F.mse_loss(self.decode_noisy(image_BCHW, std_B), image_BCHW)}

    @torch.no_grad()
    def evaluate(self, number: int) -> dict[str, float]:
        """Share of nine objects that survive encoding, noise and decoding."""
        sampled = sample_scenes(0, -1, 0, number, (9, 9))
        found = {}
        for std in (0.0, 0.3, 0.6, 1.0):
            torch.manual_seed(0)
            parts = pictures(sampled).split(32)
            decoded = torch.cat([self.decode_noisy(part, torch.full((len(part),), std)) for part in parts])
            found[f"objects_right_at_{std}"] = share_right((decoded / 2 + 0.5).clamp(0, 1), sampled)["right"]
        return found

    def save(self, folder: Path) -> None:
        save_whitened(self.vae, folder)


# -- stage unet ----------------------------------------------------------------------------------------------


@dataclass
class UnetBatch:
    noisy: Tensor
    target: Tensor
    timestep: Tensor
    states: Tensor


def scenes_scheduler() -> DDIMScheduler:
    """Velocity, and a schedule that ends in pure noise (Lin et al. 2024), as plain backgrounds need."""
    config = tiny.scheduler("v_prediction").config
    return DDIMScheduler.from_config(config, rescale_betas_zero_snr=True, timestep_spacing="trailing")


class Unet(nn.Module):
    """A UNet between a frozen text encoder and the latents of a frozen VAE."""

    def __init__(self, recipe: UnetRecipe):
        super().__init__()
        self.recipe = recipe
        # In a list, so that neither is registered here: checkpoints and averages stay small.
        tokenizer = CLIPTokenizer.from_pretrained(recipe.clip, model_max_length=CONTEXT_LENGTH)
        self.text = [CLIPTextModel.from_pretrained(recipe.clip).eval().requires_grad_(False)]
        self.vae = [AutoencoderKL.from_pretrained(recipe.vae).eval().requires_grad_(False)]
        self.tokenizer = tokenizer
        config = cast(Any, self.vae[0].config)
        self.scaling_factor = float(config.scaling_factor)
        self.scheduler = DDPMScheduler.from_config(scenes_scheduler().config)
        blocks = len(recipe.channels)
        self.unet = UNet2DConditionModel(
            sample_size=scenes.WORLD.image_size // 2 ** (len(config.block_out_channels) - 1),
            in_channels=config.latent_channels,
            out_channels=config.latent_channels,
            layers_per_block=recipe.layers_per_block,
            block_out_channels=tuple(recipe.channels),
            down_block_types=("CrossAttnDownBlock2D",) * blocks,
            up_block_types=("CrossAttnUpBlock2D",) * blocks,
            cross_attention_dim=self.text[0].config.hidden_size,
            attention_head_dim=recipe.heads,  # a misnomer of diffusers'
            norm_num_groups=16,
        )
        self.unet.set_attn_processor(AttnProcessor())  # fused attention is slow backwards on CPUs
        self.empty_TD = self.states([""])[0]
        self.latents = torch.empty(0)

    def scene(self, index: int) -> scenes.Scene:
        """Even numbers are for short captions, odd ones for long captions, which take more words an object."""
        limits = (self.recipe.max_objects_short, self.recipe.max_objects_long)
        if index % 2 and refers(f"latents/{index}", self.recipe.reference_share):
            return referring_scene(f"latents/{index}")
        return scenes.sample_scene(f"latents/{index}", num_objects=(1, limits[index % 2]))

    def make_latents(self, folder: Path) -> None:
        """Latents of all scenes, (N, C, H, W) in fp16, made once."""
        file = folder / "latents.safetensors"
        if not file.exists():
            sampled = [self.scene(i) for i in range(self.recipe.latents)]
            parts = [sampled[i : i + 64] for i in range(0, len(sampled), 64)]
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                encoded = [self.encode(pictures(part)).half() for part in tqdm(parts, "latents")]
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(file, lambda path: save_file({"latents": torch.cat(encoded)}, path))
        self.latents = load_file(file)["latents"]

    def encode(self, image_BCHW: Tensor) -> Tensor:
        return self.vae[0].encode(image_BCHW).latent_dist.mode().float() * self.scaling_factor

    @torch.no_grad()
    def states(self, texts: Sequence[str]) -> Tensor:
        """Text states (B, 77, D), padded as a pipeline does."""
        options = {"padding": "max_length", "truncation": True, "max_length": CONTEXT_LENGTH, "return_tensors": "pt"}
        return self.text[0](self.tokenizer(list(texts), **options).input_ids)[0]

    def batch(self, seed: int, step: int, rank: int, number: int) -> UnetBatch:
        """`number` draws: `noise_draws` of each caption; half of the captions are long, half short."""
        recipe, draws = self.recipe, self.recipe.noise_draws
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * 65_537 + rank)
        index = torch.randint(len(self.latents), (number // draws,), generator=generator)
        captions = []
        for i, k in enumerate(index.tolist()):
            scene, key = self.scene(k), f"{seed}/{step}/{rank}/{i}"
            if k % 2 and refers(f"latents/{k}", recipe.reference_share):
                captions.append(referring_caption(scene, key).text)
            elif k % 2:
                captions.append(scenes.long_caption(scene, key, split="all").text)
            else:
                captions.append(scenes.short_caption(scene, key, max_objects=9, split="all").text)
        dropped = torch.rand(len(index), generator=generator) < recipe.caption_dropout
        states = torch.where(dropped[:, None, None], self.empty_TD, self.states(captions))
        latents = self.latents[index].float().repeat_interleave(draws, 0)
        noise = torch.randn(latents.shape, generator=generator)
        where, high = torch.rand((2, len(latents)), generator=generator)
        lowest = (high < recipe.high_noise_share) * HIGH_NOISE_FROM
        steps = cast(Any, self.scheduler.config).num_train_timesteps
        timestep = (steps * (lowest + (1 - lowest) * where)).long().clamp(max=steps - 1)
        target = noise_target(self.scheduler, latents, noise, timestep)
        return UnetBatch(
            self.scheduler.add_noise(latents, noise, timestep), target, timestep, states.repeat_interleave(draws, 0)
        )

    def forward(self, batch: UnetBatch) -> dict[str, Tensor]:
        predicted = self.unet(batch.noisy, batch.timestep, batch.states).sample
        return {"loss": F.mse_loss(predicted.float(), batch.target)}

    def pipeline(self) -> StableDiffusionPipeline:
        return StableDiffusionPipeline(
            vae=self.vae[0],
            text_encoder=self.text[0],
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=scenes_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    @torch.no_grad()
    def evaluate(self, number: int) -> dict[str, float]:
        """Objects right, of held-out scenes described by short captions; guidance 2, 20 steps."""
        sampled = sample_scenes(0, -1, 0, number, (1, self.recipe.max_objects_short))
        prompts = [scenes.short_caption(s, i, max_objects=9, split="all").text for i, s in enumerate(sampled)]
        pipe = self.pipeline()
        pipe.set_progress_bar_config(disable=True)
        made = []
        for start_at in range(0, number, 32):
            noise = torch.Generator().manual_seed(start_at)
            options = {"guidance_scale": 2.0, "num_inference_steps": 20, "generator": noise, "output_type": "pt"}
            made.append(pipe(prompts[start_at : start_at + 32], **options).images.float())
        return {f"objects_{name}": share for name, share in share_right(torch.cat(made), sampled).items()}

    def save(self, folder: Path) -> None:
        self.pipeline().save_pretrained(folder)


# -- the trainer ---------------------------------------------------------------------------------------------

STAGES: dict[str, tuple[type[StageRecipe], Callable[[Any], nn.Module]]] = {
    "clip": (ClipRecipe, Clip),
    "vae": (VaeRecipe, Vae),
    "robust": (RobustRecipe, Robust),
    "unet": (UnetRecipe, Unet),
}


class StageTrainer(Trainer):
    """Trains a stage; `module` is it. What comes out is a folder in the standard layout of its library."""

    recipe: StageRecipe
    cpu = True  # models of this size are no faster on a GPU

    def __init__(self, recipe: StageRecipe):
        if recipe.train.steps is None:
            raise ValueError("train.steps: missing; scenes have no end, so an epoch has none")
        super().__init__(recipe)

    def build_model(self) -> nn.Module:
        stage = next(stage for schema, stage in STAGES.values() if schema is type(self.recipe))
        return stage(self.recipe)

    def build_data(self) -> None:
        """Scenes are made as they are needed; the latents of some are made here, once."""
        if hasattr(self.module, "make_latents"):
            with self.accelerator.main_process_first():
                self.module.make_latents(self.folder)

    def count_steps(self) -> int:
        assert self.recipe.train.steps is not None
        return self.recipe.train.steps

    def inputs(self) -> range:
        return range(self.state.step, self.total_steps)

    def forward_backward(self, item: int) -> dict[str, Tensor]:
        batch = self.module.batch(self.recipe.seed, item, self.accelerator.process_index, self.batch_size)
        losses = self.model(batch)
        self.accelerator.backward(losses["loss"])
        return {name: loss.detach() for name, loss in losses.items()}

    @property
    def evaluate_every(self) -> int | None:
        return self.recipe.eval_every

    def evaluate(self, log: MetricsLog) -> None:
        """What the stage measures on held-out scenes; the main process alone, as there are few."""
        if not self.accelerator.is_main_process:
            return
        averaged = self.ema_module.eval()
        with self.accelerator.autocast():
            values = averaged.evaluate(self.recipe.eval_scenes)
        self.model.train()
        log.write(self.state.step, values)
        tqdm.write(
            f"step {self.state.step}: " + ", ".join(f"{name} {value:.3f}" for name, value in values.items()),
            file=sys.stderr,
        )

    def save(self) -> Path:
        """Write the stage's folder so that it appears whole."""
        check_finite(self.model)
        folder = self.folder / "model"
        if self.accelerator.is_main_process:
            partial = folder.with_name(f".{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            copy.deepcopy(self.ema_module).save(partial)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        self.accelerator.wait_for_everyone()
        return folder

    def describe(self) -> dict[str, str]:
        weights = sum(p.numel() for p in self.module.parameters() if p.requires_grad)
        return {
            "stage": type(self.module).__name__.lower(),
            "trained": f"{weights / 1e6:.2f}M parameters",
            "data": f"new scenes at every step; {self.recipe.eval_scenes} others for evaluation",
        }

    def memory(self) -> dict[str, int]:
        weights = sum(p.numel() * p.element_size() for p in self.module.parameters())
        module, accelerator = self.module, self.accelerator
        pass_ = activation_bytes(lambda: module(module.batch(0, 0, accelerator.process_index, self.batch_size)), module)
        return {
            "weights, gradients and AdamW": weights * (5 if self.ema is not None else 4),
            "activations": pass_,
        }

    @classmethod
    def smoke_trainer(cls, recipe: StageRecipe, folder: str) -> Self:
        """The same model with two steps of a few scenes."""
        changes: dict[str, dict[str, Any]] = {
            "train": {"steps": 2, "epochs": 1, "batch_size": 4 * PartialState().num_processes},
            "output": {"folder": folder, "log_every": 1, "keep_last": 1, "trackers": []},
        }
        few = {"eval_scenes": 4, "latents": 8, "noise_draws": 2}
        return cls(changed(recipe, changes).model_copy(update={k: v for k, v in few.items() if hasattr(recipe, k)}))


app = typer.Typer(cls=Commands, pretty_exceptions_enable=False, help="Pre-train a part of the miniature's base.")


def command(schema: type[StageRecipe]) -> Callable[..., None]:
    def pretrain(
        recipe: RecipeArgument,
        overrides: Overrides = None,
        resume: Resume = "auto",
        dry_run: DryRun = False,
        smoke: Smoke = False,
    ) -> None:
        with training_errors():
            chosen = load_recipe(schema, recipe, overrides or [])
            with naming_places(chosen, recipe, overrides or []):
                run(StageTrainer, chosen, resume=resume, dry_run=dry_run, smoke=smoke)

    return pretrain


for _name, (_schema, _stage) in STAGES.items():
    app.command(_name, help=f"Train the stage {_name}.")(command(_schema))


if __name__ == "__main__":
    app()
