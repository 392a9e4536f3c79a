"""Stable Diffusion that reads prompts of any length."""

import difflib
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from safetensors import safe_open
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
)

from fixclip_diffusion import builtin
from fixclip_diffusion.adapter import TextAdapter
from fixclip_diffusion.conditioning import get_conditioning, renamed
from fixclip_diffusion.families import STABLE_DIFFUSION, TextEncoding, check_clip_skip
from fixclip_diffusion.prompt_encoder import PromptEncoder, pad_states
from fixclip_diffusion.prompt_weights import check_syntax
from fixclip_diffusion.state_mask import mask_empty_states
from fixclip_diffusion.text_encoder import (
    FixClipTextConfig,
    FixClipTextEncoder,
    check_folder_or_hub_name,
    load_clip_text_config,
)
from fixclip_diffusion.token_report import TokenReport
from fixclip_diffusion.tokenizer import FixClipTokenizer

LORA_NAME = "fixclip"  # of a whole model's LoRA, for `set_adapters` and `delete_adapters`
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "proxies")


class FixClipStableDiffusionPipeline(StableDiffusionPipeline):
    """`StableDiffusionPipeline` that reads prompts of any length.

    Prompts that fit into 77 tokens give exactly the picture of the stock pipeline, unless the encoder was trained. How
    longer ones are read is the conditioning's affair. Everything else is stock. A prompt is drawn the same alone and in
    a batch with longer ones.

    Args:
        text_encoder, tokenizer: the FixClip components, which belong together.
        conditioning: how prompts are read that do not fit into 77 tokens: "overlap", "one_pass", "chunks" or "stock",
            see `conditioning`. By default what the encoder or its adapter was trained for: "one_pass" for a trained
            encoder, and for a base's own "overlap", the best that needs no training.
        weights: syntax of prompt weights, "a1111" (`(word:1.3)`) or "compel" (`word++`); None takes prompts literally.
        long_prompt: name of `conditioning` in version 0.1.

    Raises:
        ValueError: only one of text encoder and tokenizer is FixClip's, or they differ in length, or the
            encoder's width is not the UNet's, or it cannot be read by that conditioning.
    """

    family = STABLE_DIFFUSION

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: FixClipTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        safety_checker: StableDiffusionSafetyChecker,
        feature_extractor: CLIPImageProcessor,
        image_encoder: CLIPVisionModelWithProjection = None,
        requires_safety_checker: bool = True,
        conditioning: str | None = None,
        weights: str | None = None,
        long_prompt: str | None = None,
    ):
        _check_components(text_encoder, tokenizer)
        if text_encoder is not None and unet is not None:
            _check_width(text_encoder.config, unet.config.cross_attention_dim)
        super().__init__(
            vae,
            text_encoder,
            tokenizer,
            unet,
            scheduler,
            safety_checker,
            feature_extractor,
            image_encoder,
            requires_safety_checker,
        )
        name = renamed(conditioning, long_prompt)
        self._conditioning = None if name is None else get_conditioning(name).name
        self._weights = check_syntax(weights)
        self.register_to_config(conditioning=self._conditioning, weights=weights, long_prompt=None)
        if text_encoder is not None and tokenizer is not None:
            self.prompt_encoder  # noqa: B018 -- refuses an encoder that this conditioning cannot use

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path,
        encoder: str | Path | FixClipTextEncoder | None = None,
        adapter: str | Path | TextAdapter | None = None,
        **kwargs: Any,
    ) -> "FixClipStableDiffusionPipeline":
        """Load a Stable Diffusion 1.x or 2.x model and give it the long text encoder.

        Args:
            base: folder or hub name, stock or saved by this pipeline; or a whole model such as `builtin:scenes` (see
                `builtin`), which brings its own encoder, and to that its adapter and its LoRA, named "fixclip".
            encoder: folder or hub name of a FixClipTextEncoder, CLIPTextModel, CLIPTextModelWithProjection or
                CLIPModel, or an encoder in memory. By default the whole model's, else the base's own, stretched.
            adapter: folder or hub name of a `TextAdapter`, or one in memory. By default the whole model's if the
                encoder is, else the encoder's own, if any.
            **kwargs: of `StableDiffusionPipeline.from_pretrained`, and `conditioning` and `weights`.

        Raises:
            ValueError: the base or the encoder is unknown, damaged or of another width than the UNet; an encoder
                was passed without its tokenizer. Found out from configurations, before any weights are fetched.
        """
        if encoder is not None and "text_encoder" in kwargs:
            raise ValueError("pass either encoder= or text_encoder=, not both")
        if isinstance(encoder, torch.nn.Module):
            kwargs["text_encoder"], encoder = encoder, None
        parts = builtin.ModelParts(builtin.base_of(base), adapter=adapter)
        if "text_encoder" not in kwargs:
            parts = builtin.complete(base, encoder, adapter)
        base, adapter = builtin.resolve(parts.base), parts.adapter
        encoder = None if parts.encoder is None else builtin.resolve(parts.encoder)
        conditioning = renamed(kwargs.get("conditioning"), kwargs.pop("long_prompt", None))
        if conditioning is not None:
            kwargs["conditioning"] = get_conditioning(conditioning).name
        check_syntax(kwargs.get("weights"))
        _check_spelling(kwargs)
        hub_kwargs = {key: kwargs[key] for key in HUB_KWARGS if key in kwargs}
        index = _load_index(base, hub_kwargs)
        if "text_encoder" not in kwargs:
            kwargs["text_encoder"] = _load_encoder(base, index, encoder, kwargs, hub_kwargs)
        elif kwargs["text_encoder"] is not None:
            kwargs["text_encoder"] = _as_fixclip(kwargs["text_encoder"])
            _check_width(kwargs["text_encoder"].config, _unet_width(base, kwargs, hub_kwargs))
        text_encoder = kwargs["text_encoder"]
        if "tokenizer" not in kwargs and text_encoder is not None:
            kwargs["tokenizer"] = FixClipTokenizer.from_pretrained(
                base, subfolder="tokenizer", context_length=text_encoder.context_length, **hub_kwargs
            )
        _check_components(text_encoder, kwargs.get("tokenizer"))
        if adapter is not None:
            if text_encoder is None:
                raise ValueError("adapter= needs a text encoder, but text_encoder=None was passed")
            if not isinstance(adapter, TextAdapter):
                adapter = TextAdapter.from_pretrained(adapter, **hub_kwargs)
            text_encoder.set_adapter_module(adapter)
        try:
            pipe = super().from_pretrained(base, **kwargs)
        except Exception as error:
            raise ValueError(f"base {base!r} could not be loaded: {error}") from error
        if parts.lora is not None and pipe.unet is not None:
            pipe.load_lora_weights(parts.lora, adapter_name=LORA_NAME)
        return pipe

    def load_lora_weights(
        self, pretrained_model_name_or_path_or_dict: str | Path | dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Stock loading, which takes built-in names too."""
        source = pretrained_model_name_or_path_or_dict
        super().load_lora_weights(source if isinstance(source, dict) else builtin.resolve(source), *args, **kwargs)

    @property
    def conditioning(self) -> str:
        """Name of the conditioning that prompts are read by; may be set."""
        return self.prompt_encoder.conditioning.name

    @conditioning.setter
    def conditioning(self, name: str | None) -> None:
        before, self._conditioning = self._conditioning, None if name is None else get_conditioning(name).name
        try:
            self.prompt_encoder  # noqa: B018
        except ValueError:
            self._conditioning = before
            raise
        self.register_to_config(conditioning=self._conditioning)

    @property
    def prompt_encoder(self) -> PromptEncoder:
        """What turns prompts into embeds, made of the components as they are now."""
        encodings = [
            TextEncoding(getattr(self, tower.encoder), getattr(self, tower.tokenizer), tower)
            for tower in self.family.towers
        ]
        return PromptEncoder(encodings, self._conditioning, self._weights)

    @functools.wraps(StableDiffusionPipeline.__call__)
    def __call__(
        self,
        *args: Any,
        conditioning: str | None = None,
        weights: str | None = None,
        long_prompt: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """The stock call; `conditioning` and `weights` are those of this call."""
        conditioning = renamed(conditioning, long_prompt)
        before = self._conditioning, self._weights
        try:
            if conditioning is not None:
                self._conditioning = get_conditioning(conditioning).name
            if weights is not None:
                self._weights = check_syntax(weights)
            return super().__call__(*args, **kwargs)
        finally:
            self._conditioning, self._weights = before

    @classmethod
    def load_lora_into_text_encoder(
        cls,
        state_dict: dict[str, Any],
        network_alphas: Any,
        text_encoder: Any,
        prefix: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Stock loading; the flat keys that LoRAs of transformers 5 carry are given the child's name.

        A LoRA for the UNet alone is no reason for the warning that stock diffusers gives.
        """
        prefix = cls.text_encoder_name if prefix is None else prefix
        if not any(key.startswith(f"{prefix}.") for key in state_dict):
            return
        flat = f"{prefix}.encoder."
        state_dict = {
            f"{prefix}.text_model.{key.removeprefix(f'{prefix}.')}" if key.startswith(flat) else key: value
            for key, value in state_dict.items()
        }
        super().load_lora_into_text_encoder(state_dict, network_alphas, text_encoder, prefix=prefix, **kwargs)

    def token_report(self, prompt: str) -> TokenReport:
        """Length of the prompt in tokens, where the 77th falls, and in which passes it is read.

        Raises:
            ValueError: the prompt is not text.
        """
        if not isinstance(prompt, str):
            raise ValueError(f"token_report takes one text, got {type(prompt).__name__}")
        return self.prompt_encoder.report(prompt)

    def maybe_convert_prompt(self, prompt: str | list[str], tokenizer: FixClipTokenizer) -> Any:
        """Nothing to do: the tokenizer expands textual inversions itself."""
        return prompt

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device | str,
        num_images_per_prompt: int,
        do_classifier_free_guidance: bool,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The stock method for prompts of any length; both halves of guidance come out equally long.

        The embeds may be passed to any other Stable Diffusion pipeline as prompt_embeds and negative_prompt_embeds.
        Rows behind a prompt that is shorter than others are 0; see `state_mask`.

        Returns:
            Hidden states (B * num_images_per_prompt, L, D) of the prompts and, with guidance, of the negative prompts.
            L is 77 if all texts fit and the encoder kept its original positions, else as long as the longest needs.

        Raises:
            ValueError: a prompt that is no text, another number of negative prompts, or too large a clip_skip.
        """
        if self.text_encoder is not None:
            check_clip_skip(clip_skip, self.text_encoder.config.num_hidden_layers)
        texts = as_texts(prompt) if prompt_embeds is None else None
        batch_size = len(texts) if texts is not None else prompt_embeds.shape[0]  # type: ignore[union-attr]
        if texts is not None:
            encoded = self.prompt_encoder.encode([texts], device, clip_skip, lora_scale)
            prompt_embeds = encoded.embeds_BLD
        if do_classifier_free_guidance and negative_prompt_embeds is None:
            negatives = negative_texts(negative_prompt, batch_size)
            # Stock diffusers reads negative prompts without clip_skip.
            negative_prompt_embeds = self.prompt_encoder.encode([negatives], device, None, lora_scale).embeds_BLD
        if prompt_embeds is not None and negative_prompt_embeds is not None:
            length = max(prompt_embeds.shape[1], negative_prompt_embeds.shape[1])
            prompt_embeds = pad_states(prompt_embeds, length)
            negative_prompt_embeds = pad_states(negative_prompt_embeds, length)
        if self.unet is not None:
            mask_empty_states(self.unet)
        return super().encode_prompt(
            None,
            device,
            num_images_per_prompt,
            do_classifier_free_guidance,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
        )


def as_texts(prompt: str | Sequence[str] | None) -> list[str]:
    """A prompt or a list of them, checked, as a list.

    Raises:
        ValueError: it is neither, or the list is empty.
    """
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list) or not prompts or not all(isinstance(text, str) for text in prompts):
        raise ValueError(f"a prompt must be a text or a list of texts, got {prompt!r}")
    return prompts


def negative_texts(negative_prompt: str | list[str] | None, batch_size: int) -> list[str]:
    """One negative prompt for each of `batch_size` prompts.

    Raises:
        ValueError: a list of another length.
    """
    texts = as_texts("" if negative_prompt is None else negative_prompt)
    if negative_prompt is None or isinstance(negative_prompt, str):
        return texts * batch_size
    if len(texts) != batch_size:
        raise ValueError(f"{len(texts)} negative prompts for {batch_size} prompts")
    return texts


def _check_spelling(kwargs: dict[str, Any]) -> None:
    """diffusers ignores an unknown argument with a line in the log; ours must not get lost that way."""
    for name in kwargs:
        near = difflib.get_close_matches(name, ["encoder", "adapter", "conditioning", "weights"], 1, cutoff=0.8)
        if near and near[0] != name and name not in ("text_encoder",):
            raise ValueError(f"unknown argument {name}=: did you mean {near[0]}=?")


def _check_components(text_encoder: Any, tokenizer: Any) -> None:
    if text_encoder is None or tokenizer is None:
        return
    if not isinstance(text_encoder, FixClipTextEncoder) or not isinstance(tokenizer, FixClipTokenizer):
        raise ValueError(
            f"text_encoder is a {type(text_encoder).__name__} and tokenizer a {type(tokenizer).__name__}: this "
            "pipeline needs FixClipTextEncoder and FixClipTokenizer together, else prompts stay cut at 77 tokens; "
            "FixClipStableDiffusionPipeline.from_pretrained(base) makes both"
        )
    if text_encoder.context_length != tokenizer.context_length:
        raise ValueError(
            f"the text encoder reads {text_encoder.context_length} tokens and the tokenizer gives "
            f"{tokenizer.context_length}; pass context_length={text_encoder.context_length} to the tokenizer"
        )


def _check_width(config: Any, unet_width: Any) -> None:
    if isinstance(unet_width, int) and config.hidden_size != unet_width:
        raise ValueError(
            f"the text encoder is {config.hidden_size} wide, but the UNet's cross-attention takes {unet_width}: "
            "Stable Diffusion 1.x needs a ViT-L/14 (768), 2.x a ViT-H/14 (1024)"
        )


def _as_fixclip(text_encoder: Any) -> FixClipTextEncoder:
    if isinstance(text_encoder, FixClipTextEncoder):
        return text_encoder
    if isinstance(text_encoder, (CLIPTextModel, CLIPTextModelWithProjection)):
        return FixClipTextEncoder.from_clip(text_encoder)
    raise ValueError(f"text_encoder is a {type(text_encoder).__name__}; a CLIP text model is needed")


def _load_index(base: str, hub_kwargs: dict[str, Any]) -> dict[str, Any]:
    """model_index.json of a base, checked: a Stable Diffusion 1.x or 2.x model whose local weights are readable."""
    folder = Path(base)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise ValueError(f"base {base!r} is a folder without model_index.json: not a diffusers model")
    check_folder_or_hub_name("base", base)
    try:
        index = dict(StableDiffusionPipeline.load_config(base, **hub_kwargs))
    except Exception as error:
        raise ValueError(
            f"base {base!r}: its model_index.json could not be read, from a folder or from the hub ({error})"
        ) from error
    missing = [name for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler") if name not in index]
    if missing or "text_encoder_2" in index:
        raise ValueError(
            f"base {base!r} is a {index.get('_class_name')}, not a Stable Diffusion 1.x or 2.x model"
            + (f": it has no {', '.join(missing)}" if missing else "")
        )
    if folder.is_dir():
        _check_local_weights(folder, index)
    return index


def _check_local_weights(folder: Path, index: dict[str, Any]) -> None:
    for name, value in index.items():
        if isinstance(value, list) and value[0] is not None:
            if not (folder / name).is_dir():
                raise ValueError(f"base {str(folder)!r}: model_index.json names {name}, but there is no such folder")
            for file in sorted((folder / name).glob("*.safetensors")):
                try:
                    with safe_open(file, framework="pt"):
                        pass
                except Exception as error:
                    raise ValueError(f"base {str(folder)!r}: {name}/{file.name} is damaged ({error})") from error


def _unet_width(base: str, kwargs: dict[str, Any], hub_kwargs: dict[str, Any]) -> Any:
    unet = kwargs.get("unet")
    if unet is not None:
        return unet.config.cross_attention_dim
    try:
        return UNet2DConditionModel.load_config(base, subfolder="unet", **hub_kwargs).get("cross_attention_dim")
    except Exception as error:
        raise ValueError(f"base {base!r}: unet/config.json could not be read ({error})") from error


def _load_encoder(
    base: str,
    index: dict[str, Any],
    encoder: str | Path | None,
    kwargs: dict[str, Any],
    hub_kwargs: dict[str, Any],
) -> FixClipTextEncoder:
    """The encoder to use with this base, after its configuration was compared with the UNet's."""
    own = {"subfolder": "text_encoder", **hub_kwargs}
    own_config = load_clip_text_config(base, **own)
    name, where = base, own
    if encoder is not None:
        name = str(encoder)
        # `fixclip export` writes text_encoder/ beside tokenizer/; its parent folder is welcome too.
        nested = (Path(name) / "text_encoder" / "config.json").is_file()
        where = {key: value for key, value in hub_kwargs.items() if key != "revision"}
        where |= {"subfolder": "text_encoder"} if nested else {}
    config = own_config if encoder is None else load_clip_text_config(name, **where)
    _check_width(config, _unet_width(base, kwargs, hub_kwargs))
    load_kwargs: dict[str, Any] = dict(where)
    dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
    dtype = dtype.get("text_encoder", dtype.get("default")) if isinstance(dtype, dict) else dtype
    load_kwargs["dtype"] = dtype or torch.float32
    if encoder is None and kwargs.get("variant") is not None:
        load_kwargs["variant"] = kwargs["variant"]
    layers = own_config.num_hidden_layers
    if not isinstance(config, FixClipTextConfig) and config.num_hidden_layers > layers:
        # Stable Diffusion 2 reads ViT-H's penultimate layer: its own encoder lacks the last one.
        load_kwargs["num_hidden_layers"] = layers
    return FixClipTextEncoder.from_pretrained(name, **load_kwargs)


# diffusers finds a pipeline class by name in itself, and asks this table which methods load a component.
FixClipStableDiffusionPipeline.__module__ = "fixclip_diffusion"
setattr(diffusers, FixClipStableDiffusionPipeline.__name__, FixClipStableDiffusionPipeline)
LOADABLE_CLASSES["fixclip_diffusion"] = {
    "PreTrainedModel": ["save_pretrained", "from_pretrained"],
    "PreTrainedTokenizerFast": ["save_pretrained", "from_pretrained"],
}
