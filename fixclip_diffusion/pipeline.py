"""Stable Diffusion that reads prompts of any length."""

import difflib
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import diffusers
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from diffusers.utils import scale_lora_layers, unscale_lora_layers
from safetensors import safe_open
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from fixclip_diffusion import builtin
from fixclip_diffusion.adapter import TextAdapter
from fixclip_diffusion.conditioning import TokenReport, split_windows, token_report
from fixclip_diffusion.text_encoder import (
    CLIP_CONTEXT_LENGTH,
    NO_WINDOW,
    CleanText,
    FixClipTextConfig,
    FixClipTextEncoder,
    FixClipTokenizer,
    check_folder_or_hub_name,
    join_overlapping,
    load_clip_text_config,
    overlapping_windows,
)

LongPrompt = Literal["windows", "truncate", "overlap_77", "windows_77", "truncate_77"]
LONG_PROMPT_MODES: tuple[str, ...] = get_args(LongPrompt)
LORA_NAME = "fixclip"  # of a whole model's LoRA, for `set_adapters` and `delete_adapters`
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "proxies")


class FixClipStableDiffusionPipeline(StableDiffusionPipeline):
    """`StableDiffusionPipeline` with the 248-token encoder.

    Prompts that fit into 77 tokens go through an encoder that was only stretched exactly as in the stock
    pipeline; up to 248 tokens take one pass; longer ones are read in windows. Everything else is stock.

    Args:
        text_encoder, tokenizer: the FixClip components, which belong together.
        long_prompt: `windows` cuts a text of more than 248 tokens at sentence, clause or word ends and joins the
            states; `truncate` drops the rest and says what was dropped. `windows_77` and `truncate_77` do the same
            with the original 77 positions: what chunking tools and stock diffusers do, for comparison. `overlap_77`
            reads a text of any length in windows of 77 that overlap, and joins one state for each token.

    Raises:
        ValueError: only one of text encoder and tokenizer is FixClip's, or they differ in length, or the
            encoder's width is not the UNet's.
    """

    def __init__(
        self,
        vae: Any,
        text_encoder: FixClipTextEncoder,
        tokenizer: FixClipTokenizer,
        unet: UNet2DConditionModel,
        scheduler: Any,
        safety_checker: Any,
        feature_extractor: Any,
        image_encoder: Any = None,
        requires_safety_checker: bool = True,
        long_prompt: str = "windows",
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
        self.long_prompt = _check_long_prompt(long_prompt)
        self.register_to_config(long_prompt=long_prompt)

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
            **kwargs: of `StableDiffusionPipeline.from_pretrained`, and `long_prompt`.

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
        _check_long_prompt(kwargs.get("long_prompt", "windows"))
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

    @functools.wraps(StableDiffusionPipeline.__call__)
    def __call__(self, *args: Any, long_prompt: LongPrompt | None = None, **kwargs: Any) -> Any:
        if long_prompt is None:
            return super().__call__(*args, **kwargs)
        before, self.long_prompt = self.long_prompt, _check_long_prompt(long_prompt)
        try:
            return super().__call__(*args, **kwargs)
        finally:
            self.long_prompt = before

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
        """Length of the prompt in tokens, where the 77th and the 248th fall, and the windows it takes."""
        if not isinstance(prompt, str):
            raise ValueError(f"token_report takes one text, got {type(prompt).__name__}")
        return token_report(self.tokenizer, self.maybe_convert_prompt(prompt, self.tokenizer))

    def maybe_convert_prompt(self, prompt: str | list[str], tokenizer: FixClipTokenizer) -> Any:
        """Stock expansion of textual inversions; a `CleanText` was expanded before and is left alone."""
        if isinstance(prompt, list):
            return [self.maybe_convert_prompt(text, tokenizer) for text in prompt]
        return prompt if isinstance(prompt, CleanText) else super().maybe_convert_prompt(prompt, tokenizer)

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

        The states may be passed to any other Stable Diffusion pipeline as prompt_embeds and
        negative_prompt_embeds.

        Returns:
            Text states (B * num_images_per_prompt, T, D) of the prompts and, with guidance, of the negative prompts.
            T is 77 if all texts fit and the encoder kept its original positions, else a multiple of 248, or of 77
            with `windows_77`.

        Raises:
            ValueError: a prompt that is no text, another number of negative prompts, or a `_77` mode with an
                encoder that was trained and has no original positions any more.
        """
        layers = self.text_encoder.config.num_hidden_layers if self.text_encoder is not None else None
        if clip_skip is not None and layers is not None and not 0 <= clip_skip <= layers:
            raise ValueError(f"clip_skip={clip_skip}: this text encoder has {layers} layers to skip")
        texts = self._as_clean_texts(prompt) if prompt_embeds is None else None
        batch_size = len(texts) if texts is not None else prompt_embeds.shape[0]  # type: ignore[union-attr]
        negative_texts = None
        if do_classifier_free_guidance and negative_prompt_embeds is None:
            negative_texts = self._as_clean_texts("" if negative_prompt is None else negative_prompt)
            if negative_prompt is None or isinstance(negative_prompt, str):
                negative_texts = negative_texts * batch_size
            elif len(negative_texts) != batch_size:
                raise ValueError(f"{len(negative_texts)} negative prompts for {batch_size} prompts")
        if texts is not None or negative_texts is not None:
            given = prompt_embeds if prompt_embeds is not None else negative_prompt_embeds
            context_length, windows = self._plan([*(texts or []), *(negative_texts or [])], given)
            encode = functools.partial(
                self._encode_windows,
                context_length=context_length,
                num_windows=windows,
                device=device,
                lora_scale=lora_scale,
            )
            if self.long_prompt == "overlap_77" and windows > 1:
                encode = functools.partial(self._encode_overlapping, device=device, lora_scale=lora_scale)
            if texts is not None:
                prompt_embeds = encode(texts, clip_skip=clip_skip)
            if negative_texts is not None:
                # Stock diffusers reads negative prompts without clip_skip.
                negative_prompt_embeds = encode(negative_texts)
            if prompt_embeds is not None and negative_prompt_embeds is not None:
                prompt_embeds, negative_prompt_embeds = self._pad_to_equal(
                    prompt_embeds, negative_prompt_embeds, encode
                )
        return super().encode_prompt(
            None,
            device,
            num_images_per_prompt,
            do_classifier_free_guidance,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
        )

    def _as_clean_texts(self, prompt: str | list[str] | None) -> list[CleanText]:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, list) or not prompts or not all(isinstance(text, str) for text in prompts):
            raise ValueError(f"a prompt must be a text or a list of texts, got {prompt!r}")
        return [self.tokenizer.clean(self.maybe_convert_prompt(text, self.tokenizer)) for text in prompts]

    def _plan(self, texts: list[CleanText], given_embeds: Tensor | None) -> tuple[int, int]:
        """Tokens of a pass and the number of passes that hold the longest of the texts."""
        short, context_length = self.text_encoder.short_context_length, self.text_encoder.context_length
        mode = self.long_prompt
        if mode.endswith("_77"):
            if not short:
                raise ValueError(f"long_prompt={mode!r} needs the original positions, which this encoder has not")
            context_length = short
        longest = max(len(ids) for ids in self.tokenizer(texts).input_ids)
        if longest <= short and (given_embeds is None or given_embeds.shape[1] == short):
            return short, 1
        if longest <= context_length or mode.startswith("truncate"):
            return context_length, 1
        return context_length, max(len(split_windows(self.tokenizer, text, context_length)) for text in texts)

    def _encode_windows(
        self,
        texts: list[CleanText],
        context_length: int,
        num_windows: int,
        device: torch.device | str,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> Tensor:
        """Texts to states (B, num_windows * context_length, D), each window by the stock method."""
        if num_windows == 1:
            passes = [texts]
        else:
            windows = [split_windows(self.tokenizer, text, context_length) for text in texts]
            filled = [[*pieces, *[CleanText("")] * (num_windows - len(pieces))] for pieces in windows]
            passes = [list(column) for column in zip(*filled, strict=True)]
        with self._context_length(context_length):
            states = [
                super(FixClipStableDiffusionPipeline, self).encode_prompt(
                    column, device, 1, False, lora_scale=lora_scale, clip_skip=clip_skip
                )[0]
                for column in passes
            ]
        return torch.cat(states, dim=1)

    def _encode_overlapping(
        self,
        texts: list[CleanText],
        device: torch.device | str,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> Tensor:
        """Texts to states (B, T, D) of overlapping windows; T is 77 if all of them fit, else a multiple of 248."""
        encoder = self.text_encoder
        num_tokens_B = torch.tensor([len(ids) for ids in self.tokenizer(texts).input_ids])
        longest = int(num_tokens_B.max())
        fits = longest <= CLIP_CONTEXT_LENGTH
        length = CLIP_CONTEXT_LENGTH if fits else -(-longest // encoder.context_length) * encoder.context_length
        ids_BT = self.tokenizer(texts, padding="max_length", max_length=length, return_tensors="pt").input_ids
        ids_BWT = overlapping_windows(ids_BT.to(device), num_tokens_B)

        def encode(ids_WT: Tensor) -> Tensor:
            if clip_skip is None:
                return encoder(ids_WT).last_hidden_state
            hidden = encoder(ids_WT, output_hidden_states=True).hidden_states[-(clip_skip + 1)]
            return encoder.text_model.final_layer_norm(hidden)

        if lora_scale is not None:
            self._lora_scale = lora_scale  # read by LoRA layers, as in the stock method
            scale_lora_layers(encoder, lora_scale)
        try:
            states_WTD = encode(ids_BWT[ids_BWT[..., 0] != NO_WINDOW])
        finally:
            if lora_scale is not None:
                unscale_lora_layers(encoder, lora_scale)
        states_BWTD = states_WTD.new_zeros(*ids_BWT.shape, states_WTD.shape[-1])
        states_BWTD[ids_BWT[..., 0] != NO_WINDOW] = states_WTD
        return join_overlapping(states_BWTD, num_tokens_B, length)

    @contextmanager
    def _context_length(self, context_length: int) -> Iterator[None]:
        """The stock method pads and cuts at the tokenizer's `model_max_length`."""
        before = self.tokenizer.model_max_length
        self.tokenizer.model_max_length = context_length
        try:
            yield
        finally:
            self.tokenizer.model_max_length = before

    @staticmethod
    def _pad_to_equal(prompt_embeds: Tensor, negative_embeds: Tensor, encode: Any) -> tuple[Tensor, Tensor]:
        """Continue the shorter half with the states of the empty text, so that nothing of the longer one is cut."""
        length = max(prompt_embeds.shape[1], negative_embeds.shape[1])
        padded = []
        for embeds in (prompt_embeds, negative_embeds):
            missing = length - embeds.shape[1]
            if missing:
                empty = encode([CleanText("")]).to(embeds)
                empty = empty.repeat(embeds.shape[0], -(-missing // empty.shape[1]), 1)
                embeds = torch.cat([embeds, empty[:, :missing]], dim=1)
            padded.append(embeds)
        return padded[0], padded[1]


def _check_long_prompt(value: str) -> str:
    if value not in LONG_PROMPT_MODES:
        raise ValueError(f"long_prompt={value!r}: valid are {', '.join(LONG_PROMPT_MODES)}")
    return value


def _check_spelling(kwargs: dict[str, Any]) -> None:
    """diffusers ignores an unknown argument with a line in the log; ours must not get lost that way."""
    for name in kwargs:
        near = difflib.get_close_matches(name, ["encoder", "adapter", "long_prompt"], 1, cutoff=0.8)
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
