"""FixClip: open_clip's towers with stretched text, regional prompts, a short branch and hierarchical features.

The model turns a batch into features; losses and loops live elsewhere. Shapes: B batch, T tokens, D width,
E embedding, L layers, G aligned groups, C H W image.
"""

import copy
import dataclasses
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import open_clip
import torch
import torch.nn.functional as F
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fixclip_core.check import LoadError, check_finite, check_layers, check_vocabulary, loading, refuse_stand_in
from fixclip_core.files import write_atomically
from fixclip_core.model.config import FixClipConfig, HiddenState
from fixclip_core.model.image_tower import ImageTower, check_image_tower, masked_patches
from fixclip_core.model.positional import copied_rows
from fixclip_core.model.text_tower import TextTower, check_text_tower
from fixclip_core.model.windows import WINDOW_LENGTH

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
# Of a vocabulary of the base's own; CLIP's comes with open_clip.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
MAX_LOG_SCALE = math.log(100.0)


class CaptionedImages(Protocol):
    """What `FixClip.forward` reads of a batch."""

    image: Tensor  # (B, C, H, W)
    long_ids: Tensor  # (B, T)
    short_ids: Tensor  # (B, T), or (K, B, T) of K captions an image; not read where the short branch is off
    plain_ids: Tensor | None  # (B, T') plain wordings of the long captions, read by state alignment only
    seeds: Tensor  # (B,) int64, one a sample, the only source of randomness


@dataclass
class FixClipOutput:
    """Normalised features of a batch; None where a branch is off.

    `text_states` holds the hidden states of every caption's tokens, a matrix (tokens, D) each, all long captions
    before all short ones; empty unless `FixClip.forward` is asked for them. `text_short_BE` is (K, B, E) where images
    have K short captions.
    """

    image_long_BE: Tensor | None
    text_long_BE: Tensor | None
    image_short_BE: Tensor | None
    text_short_BE: Tensor | None
    image_mid_GBE: Tensor | None
    text_mid_GBE: Tensor | None
    logit_scale: Tensor  # scalar, at most 100
    text_states: tuple[Tensor, ...] = ()


class FixClip(nn.Module):
    """A CLIP that reads long captions.

    Build it with `weights.load.load_fixclip` (any CLIP), `from_clip` or `from_pretrained`. Weights of the base keep
    open_clip's names under `visual.` and `text.`; `new_parameters` lists what FIX-CLIP adds.

    Args:
        config: the model's configuration.
        clip: an open_clip model at the base's context length; its modules are taken over, not copied.

    Raises:
        ValueError: the base is no CLIP with a CLS vision transformer and causal text, or its number of layers is
            no multiple of the number of groups.
    """

    def __init__(self, config: FixClipConfig, clip: Any):
        super().__init__()
        text = clip.text if hasattr(clip, "text") else clip
        check_image_tower(clip.visual)
        check_text_tower(text)
        if getattr(clip, "logit_bias", None) is not None:
            raise ValueError("unsupported base: it has a logit bias (SigLIP); FixClip trains with CLIP's softmax loss")
        self.config = config
        masks = config.short_branch == "masked" and config.masking == "replace"
        self.visual = ImageTower(clip.visual, config.num_prompts, config.prompt_flow, mask_embedding=masks)
        self.text = TextTower(text, config.keep, config.ratio, config.positions, config.lora_rank)
        self.logit_scale = nn.Parameter(clip.logit_scale.detach().clone().reshape(()))
        if config.num_groups:
            embed_dim = config.clip["embed_dim"]
            self.image_first_layer = self._first_layer("image", self.visual)
            self.text_first_layer = self._first_layer("text", self.text)
            text_projection = self.text.text_projection
            if isinstance(text_projection, nn.Linear):
                text_projection = text_projection.weight.T
            self.image_groups = self._group_heads(self.visual.ln_post, self.visual.proj, embed_dim)
            self.text_groups = self._group_heads(self.text.ln_final, text_projection, embed_dim)

    # -- building ------------------------------------------------------------------------------------------

    @classmethod
    def from_clip(
        cls, clip: Any, model_cfg: dict[str, Any], preprocess: dict[str, Any], **config_fields: Any
    ) -> "FixClip":
        """Make a FixClip of an open_clip model in memory, which must not be used afterwards.

        Args:
            clip: an open_clip CLIP or CustomTextCLIP; its modules are taken over.
            model_cfg: its configuration (embed_dim, vision_cfg, text_cfg, ...).
            preprocess: its preprocessing (size, mean, std, interpolation, resize_mode).
            config_fields: other fields of `FixClipConfig`.
        """
        check_image_tower(clip.visual)
        model_cfg = copy.deepcopy({key: value for key, value in model_cfg.items() if key != "custom_text"})
        activation = type(clip.visual.transformer.resblocks[0].mlp.gelu).__name__
        model_cfg["quick_gelu"] = activation == "QuickGELU"
        return cls(FixClipConfig(clip=model_cfg, preprocess=dict(preprocess), **config_fields), clip)

    @classmethod
    def from_config(cls, config: FixClipConfig) -> "FixClip":
        """A model with fresh weights of this configuration."""
        return cls(config, open_clip.CLIP(**copy.deepcopy(config.clip)))

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> "FixClip":
        """Load what `save_pretrained` wrote, bit for bit. Any other CLIP: `fixclip_core.weights.load.load_fixclip`.

        Raises:
            LoadError: a file is missing or damaged, the weights do not fit the configuration, or are not finite.
        """
        folder = Path(folder)
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (folder / name).is_file():
                raise LoadError(f"{folder} is no FixClip folder: it has no {name} (load_fixclip reads other CLIPs)")
        with loading(str(folder)):
            values = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
            if (folder / "tokenizer.json").is_file():
                values["clip"]["text_cfg"]["hf_tokenizer_name"] = str(folder.resolve())
            config = FixClipConfig.from_dict(values)
            refuse_stand_in(folder / WEIGHTS_NAME)
            weights = load_file(folder / WEIGHTS_NAME)
            for tower, field in (("text", "text_cfg"), ("visual", "vision_cfg")):
                layers = f"{tower}.transformer.resblocks"
                check_layers(config.clip[field]["layers"], weights, layers, str(folder / WEIGHTS_NAME))
            # Weights are about to be assigned, so random ones are not worth drawing.
            with torch.device("meta"):
                model = cls.from_config(config)
        with loading(f"{folder / WEIGHTS_NAME} does not fit {CONFIG_NAME}"):
            model.load_state_dict(weights, assign=True)
        check_finite(model, str(folder / WEIGHTS_NAME))
        return model

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json, model.safetensors and a tokenizer of the base's own, each by way of a temporary file."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = Path(self.config.clip["text_cfg"].get("hf_tokenizer_name") or "")
        for name in TOKENIZER_FILES:
            if tokenizer.name and (tokenizer / name).is_file() and tokenizer.resolve() != folder.resolve():
                write_atomically(folder / name, (tokenizer / name).read_bytes())
        weights = {name: tensor.detach().contiguous().cpu() for name, tensor in self.state_dict().items()}
        write_atomically(folder / WEIGHTS_NAME, lambda path: save_file(weights, path, metadata={"format": "pt"}))
        write_atomically(folder / CONFIG_NAME, lambda path: path.write_text(self.config.to_json()))

    def _first_layer(self, tower_name: str, tower: ImageTower | TextTower) -> int:
        """First layer, counted from 0, of the first aligned group."""
        layers, groups = len(tower.blocks), self.config.num_groups
        if layers % groups:
            raise ValueError(
                f"num_groups={groups}: the {tower_name} tower's {layers} layers do not split into equal groups"
            )
        return (self.config.first_group - 1) * (layers // groups)

    def _group_heads(self, norm: nn.LayerNorm, projection_DE: Tensor | None, embed_dim: int) -> nn.ModuleList:
        """One linear projection and LayerNorm a group.

        The projections start as the tower's own, gain of its last LayerNorm included, so that image and text
        groups start in the space that CLIP has aligned already.
        """
        heads = nn.ModuleList()
        for _ in range(self.config.num_groups - self.config.first_group + 1):
            linear = nn.Linear(norm.normalized_shape[0], embed_dim)
            if projection_DE is not None:
                with torch.no_grad():
                    linear.weight.copy_((norm.weight[:, None] * projection_DE).T)
                    linear.bias.zero_()
            heads.append(nn.Sequential(linear, nn.LayerNorm(embed_dim)))
        return heads

    # -- features ------------------------------------------------------------------------------------------

    def encode_image(self, image_BCHW: Tensor, normalize: bool = True, prompts: bool = True) -> Tensor:
        """Features of whole images, (B, E); `prompts=False` leaves the regional prompts out."""
        x_BTD = self.visual.sequence(self.visual.patch_tokens(image_BCHW))
        feature_BE, _ = self.visual.encode(x_BTD, prompts=prompts)
        return F.normalize(feature_BE, dim=-1) if normalize else feature_BE

    def encode_text(self, ids_BT: Tensor, normalize: bool = True) -> Tensor:
        """Features of texts, (B, E)."""
        feature_BE, _ = self.text.encode(ids_BT)
        return F.normalize(feature_BE, dim=-1) if normalize else feature_BE

    @torch.no_grad()
    def prompt_similarity(self, image_BCHW: Tensor) -> Tensor:
        """Cosine between each image's features with and without the regional prompts, (B,).

        At initialisation this is how close the model stays to its base: 1 is no distance.
        """
        return (self.encode_image(image_BCHW) * self.encode_image(image_BCHW, prompts=False)).sum(dim=-1)

    def forward(self, batch: CaptionedImages, state: HiddenState | None = None) -> FixClipOutput:
        """Features of both branches for training.

        Args:
            batch: images, token ids of both captions, and one seed a sample for the masks.
            state: return these hidden states of the captions' tokens, from the pass that makes the features. Short
                captions are then read even where the short branch is off.

        Returns:
            Normalised features; `image_short_BE` is None in the PCA branch, whose features are made of the
            whole global batch (`losses.pca_reconstruction`).
        """
        image_long_BE, image_short_BE, image_tokens = self._encode_images(batch)
        text_long_BE, text_short_BE, text_tokens, text_states = self._encode_texts(batch, state)
        # CLIP clamps after each step; here no training loop can forget it.
        with torch.no_grad():
            self.logit_scale.clamp_(max=MAX_LOG_SCALE)
        aligned = bool(self.config.num_groups)
        return FixClipOutput(
            image_long_BE=normalize(image_long_BE),
            text_long_BE=normalize(text_long_BE),
            image_short_BE=normalize(image_short_BE),
            text_short_BE=normalize(text_short_BE),
            image_mid_GBE=self._mid_features(image_tokens, self.image_groups) if aligned else None,
            text_mid_GBE=self._mid_features(text_tokens, self.text_groups) if aligned else None,
            logit_scale=self.logit_scale.exp(),
            text_states=text_states,
        )

    def _encode_images(self, batch: CaptionedImages) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Features of the long and the short branch, and CLS tokens of the aligned one."""
        config, visual = self.config, self.visual
        patches_BND = visual.patch_tokens(batch.image)
        collect = self.image_first_layer if config.num_groups else None
        if not config.short_is_encoded:
            feature_BE, tokens = visual.encode(visual.sequence(patches_BND), first_layer=collect)
            whole = config.short_branch == "masked"
            return feature_BE, feature_BE if whole else None, tokens
        kept_BK, mask_BN = masked_patches(batch.seeds, visual.num_patches, config.mask_ratio)
        align_long = config.hierarchy_branch == "long"
        if config.masking == "replace":
            masked_BND = torch.where(mask_BN[..., None], visual.mask_embedding.to(patches_BND.dtype), patches_BND)
            both_BND = torch.cat([patches_BND, masked_BND])
            features, tokens = visual.encode(visual.sequence(both_BND), first_layer=collect)
            long_BE, short_BE = features.chunk(2)
            return long_BE, short_BE, [token.chunk(2)[0 if align_long else 1] for token in tokens]
        long_BE, long_tokens = visual.encode(visual.sequence(patches_BND), first_layer=collect if align_long else None)
        short_BE, short_tokens = visual.encode(
            visual.sequence(patches_BND, kept_BK), kept_BK, first_layer=None if align_long else collect
        )
        return long_BE, short_BE, long_tokens if align_long else short_tokens

    def _encode_texts(
        self, batch: CaptionedImages, state: HiddenState | None
    ) -> tuple[Tensor, Tensor | None, list[Tensor], tuple[Tensor, ...]]:
        """Features of long and short captions from one pass, end-of-text tokens of the aligned ones, hidden states."""
        collect = self.text_first_layer if self.config.num_groups else None
        off = self.config.short_branch == "off"
        if off and state is None:
            feature_BE, tokens = self.text.encode(batch.long_ids, first_layer=collect)
            return feature_BE, None, tokens, ()
        short_ids, size = batch.short_ids, len(batch.long_ids)
        ids_BT = torch.cat([batch.long_ids, short_ids.flatten(0, -2)])
        features, tokens, states = self.text.encode_states(ids_BT, state, first_layer=collect)
        long_BE, short_BE = features[:size], features[size:].unflatten(0, short_ids.shape[:-1])
        begin = 0 if self.config.hierarchy_branch == "long" else size  # of several short captions the first is aligned
        return long_BE, None if off else short_BE, [token[begin : begin + size] for token in tokens], states

    def _mid_features(self, tokens: list[Tensor], heads: nn.ModuleList) -> Tensor:
        """Normalised middle feature of each aligned group, (G, B, E), from its layers' tokens."""
        groups_GBD = group_token_aggregation(torch.stack(tokens), len(heads))
        features = [F.normalize(head(group), dim=-1) for head, group in zip(heads, groups_GBD, strict=True)]
        return torch.stack(features)

    def base_text_tower(self) -> TextTower:
        """A frozen copy of the text tower that reads 77 tokens at the base's own positions, as before stretching.

        With a `lora_rank` the base is kept beside the change. Without one, the model must have been just made of its
        base: the positions are read back from the rows that stretching copied, every other weight is the model's own.

        Raises:
            ValueError: the base has not 77 positions (Long-CLIP has 248).
        """
        config = self.config
        if config.base_context_length != WINDOW_LENGTH:
            raise ValueError(
                f"a base of {config.base_context_length} text positions: the states of a CLIP of {WINDOW_LENGTH} are "
                "needed; start from the CLIP that this one was made of"
            )
        return self.text.base(copied_rows(config.base_context_length, config.positions, config.keep, config.ratio))

    # -- everything else -------------------------------------------------------------------------------------

    def tokenizer(self) -> Callable[[list[str]], Tensor]:
        """The base's tokenizer at this model's context length: list of strings to ids, (B, context_length)."""
        text_cfg = self.config.clip["text_cfg"]
        kwargs = dict(text_cfg.get("tokenizer_kwargs") or {}, context_length=self.config.context_length)
        if name := text_cfg.get("hf_tokenizer_name"):
            mode = text_cfg.get("tokenizer_mode")
            with loading(f"tokenizer {name!r}"):
                return HFTokenizer(name, tokenizer_mode=mode, trust_remote_code=False, **kwargs)
        tokenizer = SimpleTokenizer(**kwargs)
        check_vocabulary(tokenizer.eot_token_id, self.text.token_embedding.num_embeddings, "CLIP's tokenizer")
        return tokenizer

    def preprocess(self, train: bool, **augmentation: Any) -> Callable[[Any], Tensor]:
        """The base's image transform, PIL image to (C, H, W).

        Args:
            train: random resized crops instead of a resize and a centre crop.
            augmentation: fields of open_clip's AugmentationCfg, for training.
        """
        known = {field.name for field in dataclasses.fields(PreprocessCfg)}
        cfg = {key: value for key, value in self.config.preprocess.items() if key in known}
        return image_transform_v2(PreprocessCfg(**cfg), is_train=train, aug_cfg=augmentation if train else None)

    def new_parameters(self) -> set[str]:
        """Names of the parameters that FIX-CLIP adds to the base; the rest are the backbone's."""
        new = ("visual.prompts", "visual.mask_embedding", "image_groups.", "text_groups.")
        names = [name for name, _ in self.named_parameters()]
        return {name for name in names if name.startswith(new) or name.endswith((".lora_A", ".lora_B"))}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each layer's input for the backward pass and compute the rest again."""
        self.visual.grad_checkpointing = self.text.grad_checkpointing = enable

    def compile_blocks(self, **kwargs: Any) -> None:
        """torch.compile every layer in place; one compilation serves all layers of a tower."""
        for tower in (self.visual, self.text):
            for block in tower.blocks:
                block.compile(**kwargs)


def group_token_aggregation(tokens_LBD: Tensor, num_groups: int) -> Tensor:
    """Blend each group's layers with Gaussian weights whose peak is the group's last layer.

    Weight j of S layers is exp(-(j - S)^2 / 2), j = 1..S, divided by their sum.

    Args:
        tokens_LBD: one token a layer, (L, B, D), the groups one after another.
        num_groups: how many groups they are.

    Returns:
        (num_groups, B, D).

    Raises:
        ValueError: L is no multiple of num_groups.
    """
    if num_groups < 1 or len(tokens_LBD) % num_groups:
        raise ValueError(f"num_groups={num_groups}: {len(tokens_LBD)} layers do not split into equal groups")
    size = len(tokens_LBD) // num_groups
    dtype = torch.promote_types(tokens_LBD.dtype, torch.float32)
    distance_S = torch.arange(size - 1, -1, -1, dtype=dtype, device=tokens_LBD.device)
    weight_S = torch.exp(-(distance_S**2) / 2)
    weight_S = (weight_S / weight_S.sum()).to(tokens_LBD.dtype)
    return torch.einsum("gsbd,s->gbd", tokens_LBD.unflatten(0, (num_groups, size)), weight_S)


def normalize(feature_BE: Tensor | None) -> Tensor | None:
    return None if feature_BE is None else F.normalize(feature_BE, dim=-1)
