"""The drop-in components: a CLIP text encoder of 248 tokens and its tokenizer.

Swap `text_encoder` and `tokenizer` of any diffusers pipeline that takes a CLIP text encoder for these two.
Shapes: B batch, T tokens, D width.
"""

import html
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ftfy
import torch
from huggingface_hub.dataclasses import strict
from tokenizers import Regex, normalizers, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    # diffusers looks these two up in the module that model_index.json names.
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.modeling_clip import CLIPPreTrainedModel, CLIPTextEmbeddings
from transformers.utils import logging as transformers_logging

from fixclip_core.model.positional import stretch_positions, stretched_length
from fixclip_diffusion import builtin
from fixclip_diffusion.adapter import TextAdapter

__all__ = [
    "CleanText",
    "FixClipTextConfig",
    "FixClipTextEncoder",
    "FixClipTokenizer",
    "PreTrainedModel",
    "PreTrainedTokenizerFast",
]

CLIP_CONTEXT_LENGTH = 77
CLIP_EOS_TOKEN_ID = 49407
WINDOW_STRIDE = 35  # tokens between the beginnings of overlapping windows
NO_WINDOW = -1  # fills the ids behind a text's last window
# CLIP matches without regard to case, which makes the long ſ an s and loses the iota subscript U+0345, whose capital
# is a letter while it is none itself.
WORD_PATTERN = r"'[sſ]|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}\x{0345}]+"


class CleanText(str):
    """Text that is cleaned already; `FixClipTokenizer` takes it as it is (cleaning twice is not cleaning once)."""

    __slots__ = ()


class FixClipTokenizer(CLIPTokenizer):
    """CLIP's tokenizer with 248 tokens and with the cleaning that CLIP's training texts went through.

    Without that cleaning (ftfy, HTML entities twice, white space) the stock tokenizer gives other ids than
    open_clip for curly quotes, entities and mojibake. The text is lowercased by the backend, not here, so
    that mixed-case tokens of textual inversions are still found.

    Args:
        context_length: tokens of a full sequence, start and end included.
        clean_text: False gives exactly the ids of the stock `CLIPTokenizer`.
        **kwargs: of `CLIPTokenizer`; a stock folder's `model_max_length` gives way to `context_length`.
    """

    def __init__(
        self,
        vocab: str | dict[str, int] | None = None,
        merges: str | list[Any] | None = None,
        unk_token: str = "<|endoftext|>",
        bos_token: str = "<|startoftext|>",
        eos_token: str = "<|endoftext|>",
        pad_token: str = "<|endoftext|>",
        context_length: int = 248,
        clean_text: bool = True,
        **kwargs: Any,
    ):
        if context_length < 3:
            raise ValueError(f"context_length={context_length}: at least 3 (start, one token, end)")
        if vocab is None:  # transformers would go on with a vocabulary of no words
            where = kwargs.get("name_or_path") or "tokenizer"
            raise ValueError(
                f'{where}: no tokenizer files there; a Stable Diffusion model keeps them in subfolder="tokenizer"'
            )
        kwargs["model_max_length"] = context_length
        # A pad token that is an ordinary piece of the vocabulary ("!" in Stable Diffusion 2) must not become
        # a special token: every "!" of a prompt would turn into padding.
        plain_pad = str(pad_token) not in (str(unk_token), str(bos_token), str(eos_token))
        if plain_pad and clean_text:
            added = kwargs.get("added_tokens_decoder") or {}
            kwargs["added_tokens_decoder"] = {
                index: token for index, token in added.items() if str(token) != str(pad_token)
            }
        super().__init__(
            vocab=vocab,
            merges=merges,
            unk_token=unk_token,
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=eos_token if plain_pad and clean_text else pad_token,
            context_length=context_length,
            clean_text=clean_text,
            **kwargs,
        )
        self.context_length = context_length
        self.clean_text = clean_text
        if clean_text:
            self.pad_token = str(pad_token)
            # ftfy has composed the text already; composing again after the entities would differ from CLIP.
            self._tokenizer.normalizer = normalizers.Lowercase()
            self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="removed", invert=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any) -> Any:
        """Stock loading, which takes built-in names too."""
        name, kwargs = builtin.resolve_component(pretrained_model_name_or_path, "tokenizer", kwargs)
        return super().from_pretrained(name, *args, **kwargs)

    def clean(self, text: str) -> CleanText:
        """The text as CLIP's training saw it, in its original case: ftfy, entities, white space."""
        if isinstance(text, CleanText):
            return text
        if not self.clean_text:
            return CleanText(text)
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
        text = " ".join(text.split())
        if "Σ" in text:
            # The backend lowercases letter by letter and misses the final sigma. İ alone changes length.
            lower = text.replace("İ", "I").lower()
            text = "".join(low if char == "Σ" else char for char, low in zip(text, lower, strict=True))
        return CleanText(text)

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs: Any
    ) -> list[str]:
        """Pieces of the vocabulary, added tokens in their own case.

        The stock method gives added tokens in lower case, so diffusers misses mixed-case textual inversions of
        several vectors.
        """
        ids = self._encode_plus(text, pair, add_special_tokens=add_special_tokens, **kwargs)["input_ids"]
        added = self.added_tokens_decoder
        return [
            added[index].content if index in added else piece
            for index, piece in zip(ids, self.convert_ids_to_tokens(ids), strict=True)
        ]

    def _encode_plus(self, text: Any, text_pair: Any = None, **kwargs: Any) -> Any:
        if not kwargs.get("is_split_into_words"):
            text = _map_text(self.clean, text)
            text_pair = _map_text(self.clean, text_pair)
        # Texts longer than one pass are this project's daily bread, not worth transformers' warning.
        return super()._encode_plus(text=text, text_pair=text_pair, **{**kwargs, "verbose": False})


def _map_text(function: Any, text: Any) -> Any:
    if isinstance(text, str):
        return function(text)
    if isinstance(text, (list, tuple)):
        return type(text)(_map_text(function, item) for item in text)
    return text


@strict
class FixClipTextConfig(CLIPTextConfig):
    """`CLIPTextConfig` plus what a stretched encoder needs.

    Attributes:
        short_position_embeddings: rows of the original table of positions, kept for short texts; 0 without.
        adapter: configuration of the `TextAdapter`, or None.
    """

    model_type = "fixclip_text_model"

    short_position_embeddings: int = 0
    adapter: dict | None = None


AutoConfig.register(FixClipTextConfig.model_type, FixClipTextConfig, exist_ok=True)


class FixClipTextEmbeddings(CLIPTextEmbeddings):
    """Token and position embeddings, with the original positions for sequences that fit into them."""

    def __init__(self, config: FixClipTextConfig):
        super().__init__(config)
        self.short_position_embedding: nn.Embedding | None = None
        if config.short_position_embeddings:
            self.short_position_embedding = nn.Embedding(config.short_position_embeddings, config.hidden_size)

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        short = self.short_position_embedding
        given = input_ids if input_ids is not None else inputs_embeds
        if short is None or position_ids is not None or given is None or given.shape[1] > short.num_embeddings:
            return super().forward(input_ids, position_ids, inputs_embeds)
        if inputs_embeds is None:
            inputs_embeds = self.token_embedding(input_ids)
        return inputs_embeds + short(self.position_ids[:, : given.shape[1]])


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """A text model is read out of whatever checkpoint holds one; transformers lists all that is left over."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


class FixClipTextEncoder(CLIPTextModel):
    """A CLIP text encoder of 248 tokens that fits wherever diffusers takes a `CLIPTextModel`.

    It wraps a real child `text_model`, because diffusers' clip_skip and all common LoRA layouts look for one.
    The adapter sits behind the final LayerNorm, so that `last_hidden_state` and clip_skip both go through it
    and no pipeline can forget it.
    """

    config: FixClipTextConfig
    config_class = FixClipTextConfig
    base_model_prefix = "text_model"

    def __init__(self, config: FixClipTextConfig):
        CLIPPreTrainedModel.__init__(self, config)
        self.text_model = CLIPTextModel._from_config(config)
        self.text_model.embeddings = FixClipTextEmbeddings(config)
        self.text_model.post_init()
        self.adapter: TextAdapter | None = None
        if config.adapter is not None:
            self.adapter = TextAdapter(**config.adapter)
        self.text_model.final_layer_norm.register_forward_hook(self._apply_adapter)
        self.post_init()

    def _apply_adapter(self, module: nn.Module, inputs: tuple, states_BTD: Tensor) -> Tensor:
        return states_BTD if self.adapter is None else self.adapter(states_BTD)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, TextAdapter):
            module.reset_parameters()
        elif not any(module is part for part in (self.adapter.modules() if self.adapter is not None else ())):
            super()._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.embeddings.token_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.embeddings.token_embedding = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Token ids (B, T), T at most 248, to the outputs of `CLIPTextModel`; the states are the adapted ones.

        `hidden_states[-1]` is the state before the final LayerNorm and the adapter, as in the stock class.
        """
        return self.text_model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)

    @property
    def context_length(self) -> int:
        """Tokens that one pass reads, start and end included."""
        return self.config.max_position_embeddings

    @property
    def short_context_length(self) -> int:
        """Tokens up to which the original positions are used; 0 for an encoder that has none."""
        return self.config.short_position_embeddings

    def set_adapter_module(self, adapter: TextAdapter | None) -> None:
        """Put `adapter` behind the final LayerNorm, or take it away with None.

        Raises:
            ValueError: the adapter's width is not the encoder's, or it reads fewer tokens than the encoder.
        """
        if adapter is not None:
            width = adapter.config["width"]
            if width != self.config.hidden_size:
                raise ValueError(f"adapter of width {width} on a text encoder of width {self.config.hidden_size}")
            if adapter.config["kind"] == "attention" and adapter.config["max_tokens"] < self.context_length:
                raise ValueError(
                    f"adapter for {adapter.config['max_tokens']} tokens on a text encoder of {self.context_length}"
                )
            adapter = adapter.to(device=self.device, dtype=self.dtype).train(self.training)
        self.adapter = adapter
        self.config.adapter = None if adapter is None else dict(adapter.config)

    @classmethod
    def from_clip(
        cls,
        source: CLIPTextModel | CLIPTextModelWithProjection,
        keep: int = 20,
        ratio: int = 4,
        num_hidden_layers: int | None = None,
    ) -> "FixClipTextEncoder":
        """Make the encoder from a CLIP text model in memory; its weights are copied.

        A model of at most 77 positions is stretched and keeps its own table for short texts. One with more
        (Long-CLIP, an exported FIX-CLIP) is taken as it is.

        Args:
            source: the text model, with or without projection; the projection is left out.
            keep, ratio: see `stretch_positions`.
            num_hidden_layers: keep only the first layers. Stable Diffusion 2 reads ViT-H's penultimate layer,
                that is 23 of 24 layers.

        Raises:
            ValueError: more layers are asked for than the model has; keep or ratio out of range.
        """
        text_model = getattr(source, "text_model", source)
        config = source.config
        layers = config.num_hidden_layers if num_hidden_layers is None else num_hidden_layers
        if not 1 <= layers <= config.num_hidden_layers:
            raise ValueError(f"num_hidden_layers={layers}: the text encoder has {config.num_hidden_layers}")
        positions = config.max_position_embeddings
        stretch = positions <= CLIP_CONTEXT_LENGTH
        values = config.to_dict()
        for name in ("model_type", "architectures", "transformers_version", "dtype"):
            values.pop(name, None)
        if config.eos_token_id == 2:
            # The legacy value makes transformers pool at the largest id, which an added token would be.
            values["eos_token_id"] = min(CLIP_EOS_TOKEN_ID, config.vocab_size - 1)
        values.update(
            num_hidden_layers=layers,
            max_position_embeddings=stretched_length(positions, keep, ratio) if stretch else positions,
            short_position_embeddings=positions if stretch else 0,
        )
        new_config = FixClipTextConfig(**values)
        new_config._attn_implementation = config._attn_implementation
        encoder = cls(new_config).to(device=source.device, dtype=source.dtype)
        state = {
            name: tensor
            for name, tensor in text_model.state_dict().items()
            if not (name.startswith("encoder.layers.") and int(name.split(".")[2]) >= layers)
        }
        if stretch:
            own = state["embeddings.position_embedding.weight"]
            state["embeddings.short_position_embedding.weight"] = own
            state["embeddings.position_embedding.weight"] = stretch_positions(own, keep, ratio)
        encoder.text_model.load_state_dict(state)
        return encoder.train(source.training)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *args: Any,
        keep: int = 20,
        ratio: int = 4,
        **kwargs: Any,
    ) -> Any:
        """Load a saved FixClipTextEncoder, or make one from a CLIP text model; a folder, hub name or built-in name.

        Args:
            pretrained_model_name_or_path: holds a FixClipTextEncoder, CLIPTextModel,
                CLIPTextModelWithProjection or whole CLIPModel.
            keep, ratio: see `stretch_positions`; used for models of at most 77 positions only.
            **kwargs: of `PreTrainedModel.from_pretrained` (dtype, subfolder, revision, cache_dir, ...);
                `num_hidden_layers` cuts the last layers off.

        Raises:
            ValueError: there is no CLIP text model there, or some of its weights are missing or damaged.
        """
        name, kwargs = builtin.resolve_component(pretrained_model_name_or_path, "text_encoder", kwargs)
        return_info = kwargs.pop("output_loading_info", False)
        layers = kwargs.pop("num_hidden_layers", None)
        config = load_clip_text_config(name, **kwargs)
        ours = isinstance(config, FixClipTextConfig)
        loader: Any = super() if ours else CLIPTextModel
        try:
            with _quiet_loading():
                model, info = loader.from_pretrained(name, *args, config=config, output_loading_info=True, **kwargs)
        except Exception as error:
            raise ValueError(f"text encoder {_where(name, kwargs)}: {error}") from error
        missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
        if missing:
            raise ValueError(
                f"text encoder {_where(name, kwargs)}: {len(missing)} weights are missing or of another shape, "
                f"the first is {missing[0]}"
            )
        if not ours or (layers is not None and layers != config.num_hidden_layers):
            if ours:
                raise ValueError(
                    f"text encoder {_where(name, kwargs)} has {config.num_hidden_layers} layers, {layers} are wanted"
                )
            model = cls.from_clip(model, keep, ratio, layers)
        return (model, info) if return_info else model


_CONFIG_KWARGS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "token",
    "revision",
    "subfolder",
    "proxies",
)


def load_clip_text_config(name: str, **kwargs: Any) -> CLIPTextConfig | FixClipTextConfig:
    """The configuration of the CLIP text model in a folder or hub repository; no weights are read.

    Raises:
        ValueError: there is no readable config.json, or it describes something else.
    """
    hub_kwargs = {key: kwargs[key] for key in _CONFIG_KWARGS if key in kwargs}
    where = _where(name, kwargs)
    check_folder_or_hub_name("text encoder", name)
    try:
        values, _ = CLIPTextConfig.get_config_dict(name, **hub_kwargs)
    except Exception as error:
        raise ValueError(f"text encoder {where}: no readable config.json there ({error})") from error
    if not values:
        raise ValueError(f"text encoder {where}: no config.json there")
    kind = values.get("model_type")
    if kind == FixClipTextConfig.model_type:
        return FixClipTextConfig.from_dict(values)
    if kind in ("clip_text_model", "clip"):
        return CLIPTextConfig.from_pretrained(name, **hub_kwargs)
    raise ValueError(
        f"text encoder {where}: model_type is {kind!r}; valid are {FixClipTextConfig.model_type}, "
        "clip_text_model and clip"
    )


def overlapping_windows(ids_BT: Tensor, num_tokens_B: Tensor) -> Tensor:
    """Ids (B, W, 77) of windows of 75 tokens that begin every 35 tokens, so that each overlaps the one before by 40.

    A text that fits into 77 tokens is one window, with its padding. Windows behind a text's last are NO_WINDOW.

    Args:
        ids_BT: padded ids, T at least 77.
        num_tokens_B: tokens of each text, start and end included, at most T.
    """
    size, room = CLIP_CONTEXT_LENGTH, CLIP_CONTEXT_LENGTH - 2
    counts = num_overlapping(num_tokens_B).tolist()
    ids_BWT = ids_BT.new_full((len(ids_BT), max(counts), size), NO_WINDOW)
    for text, (ids_T, tokens, count) in enumerate(zip(ids_BT, num_tokens_B.tolist(), counts, strict=True)):
        if count == 1:
            ids_BWT[text, 0] = ids_T[:size]
            continue
        words_T, start, end = ids_T[1 : tokens - 1], ids_T[:1], ids_T[tokens - 1]
        for window in range(count):
            piece = torch.cat([start, words_T[WINDOW_STRIDE * window :][:room]])
            # What pads the last window is never read: no token sees it, and `join_overlapping` leaves it out.
            ids_BWT[text, window] = torch.cat([piece, end.repeat(size - len(piece))])
    return ids_BWT


def num_overlapping(num_tokens_B: Tensor) -> Tensor:
    """(B,) windows of texts with so many tokens, start and end included."""
    beyond_B = (num_tokens_B - CLIP_CONTEXT_LENGTH).clamp(min=0)
    return 1 + -(-beyond_B // WINDOW_STRIDE)


def join_overlapping(states_BWTD: Tensor, num_tokens_B: Tensor, length: int) -> Tensor:
    """States (B, W, 77, D) of `overlapping_windows` to one state for each token: (B, length, D), 0 behind the text.

    A token's state is that of the first window that holds it. There at least 40 tokens stand before it, or all there
    are: so no sentence is cut, and what a state says of its place does not depend on where sentences end. The
    start's state is the first window's, the end's the last one's. Zeros divert less of the attention of a UNet that was
    trained on less padding than the encoder's padding does (docs/results.md). A text that fits into 77 tokens keeps it.
    """
    place_T = torch.arange(length, device=states_BWTD.device)
    window_T = -(-(place_T - CLIP_CONTEXT_LENGTH + 2).clamp(min=0) // WINDOW_STRIDE)
    num_tokens_B = num_tokens_B.to(place_T.device)
    window_BT = torch.minimum(window_T, num_overlapping(num_tokens_B)[:, None] - 1)
    offset_BT = (place_T - WINDOW_STRIDE * window_BT).clamp(max=CLIP_CONTEXT_LENGTH - 1)
    text_B1 = torch.arange(len(states_BWTD), device=place_T.device)[:, None]
    read_BT = place_T < num_tokens_B.clamp(min=CLIP_CONTEXT_LENGTH)[:, None]
    return states_BWTD[text_B1, window_BT, offset_BT] * read_BT[..., None]


def check_folder_or_hub_name(what: str, name: str) -> None:
    """Say so at once where a name can be neither; the hub client would retry, or explain its own rules.

    Raises:
        ValueError: it is a file, or no folder and not like owner/model.
    """
    path = Path(name)
    if path.is_file():
        raise ValueError(f"{what} {name!r} is a file; a folder or a hub name like owner/model is needed")
    if not path.is_dir() and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise ValueError(f"{what} {name!r} is neither a folder nor a hub name like owner/model")


def _where(name: str, kwargs: dict[str, Any]) -> str:
    subfolder = kwargs.get("subfolder")
    return repr(f"{name}/{subfolder}" if subfolder else name)


# What model_index.json records; independent of how the package is cut into files.
for _component in (FixClipTextEncoder, FixClipTokenizer):
    _component.__module__ = "fixclip_diffusion"
