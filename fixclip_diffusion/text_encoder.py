"""A CLIP text encoder of 248 tokens that any diffusers pipeline takes as `text_encoder`.

Shapes: B batch, T tokens, D width.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    # diffusers looks these two up in the module that model_index.json names.
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.modeling_clip import CLIPPreTrainedModel, CLIPTextEmbeddings
from transformers.utils import logging as transformers_logging

from fixclip_core.check import LoadError, check_finite, check_folder_or_hub_name, check_layers, hub_reason, loading
from fixclip_core.model.positional import stretch_positions
from fixclip_core.weights.files import open_weights
from fixclip_core.weights.names import Which, find_text_towers, text_tower_names
from fixclip_core.weights.text_encoder import read_text_encoder, text_encoders_in
from fixclip_diffusion import builtin
from fixclip_diffusion.adapter import TextAdapter, check_fits
from fixclip_diffusion.conditioning import CLIP_CONTEXT_LENGTH, default_conditioning, get_conditioning, short_length
from fixclip_diffusion.short_weights import (
    POSITIONS,
    LongRows,
    add_low_rank,
    check_delta,
    factors_of,
    make_short_model,
    read_delta,
)
from fixclip_diffusion.siblings import check_siblings
from fixclip_diffusion.text_config import (
    CLASS_FIELDS,
    FixClipTextConfig,
    describe_source,
    encoder_subfolder,
    load_clip_text_config,
    long_config,
)
from fixclip_diffusion.tokenizer import FixClipTokenizer

__all__ = [
    "FixClipTextEncoder",
    "PreTrainedModel",
    "PreTrainedTokenizerFast",
]

logger = logging.getLogger(__name__)

MAX_LAYERS = 1000  # of what a configuration may say where its weights cannot be looked at first


class FixClipTextEmbeddings(CLIPTextEmbeddings):
    """Token and position embeddings, with the original positions for texts that fit into them."""

    def __init__(self, config: FixClipTextConfig):
        super().__init__(config)
        self.config = config
        self.short_position_embedding: nn.Embedding | None = None
        if config.short_position_embeddings:
            self.short_position_embedding = nn.Embedding(config.short_position_embeddings, config.hidden_size)
        self.as_long = False  # see `LongTextEncoder.read_as_long`

    @property
    def masks_padding(self) -> bool:
        """Whether texts that fit are the base's in longer passes too, with zeros behind every text."""
        return self.config.padding == "mask" and not self.as_long

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Ids (B, T) to embeddings (B, T, D).

        T up to 77: the original positions. Longer: the long ones, but with `padding="mask"` a row whose text ends
        before position 77 has the original ones there, so that its first 77 hidden states are those of T = 77.
        """
        short = self.short_position_embedding
        given = input_ids if input_ids is not None else inputs_embeds
        if short is None or position_ids is not None or given is None:
            return super().forward(input_ids, position_ids, inputs_embeds)
        if inputs_embeds is None:
            inputs_embeds = self.token_embedding(input_ids)
        num_tokens, limit = given.shape[1], short.num_embeddings
        if num_tokens <= limit:
            return inputs_embeds + short(self.position_ids[:, :num_tokens])
        if not self.masks_padding or input_ids is None or num_tokens > self.config.max_position_embeddings:
            return super().forward(None, None, inputs_embeds)
        long_1TD = self.position_embedding(self.position_ids[:, :num_tokens])
        short_1TD = torch.cat([short(self.position_ids[:, :limit]), long_1TD[:, limit:]], dim=1)
        fits_B11 = (text_lengths(input_ids, self.config.eos_token_id) <= limit)[:, None, None]
        return inputs_embeds + torch.where(fits_B11, short_1TD, long_1TD)


def text_lengths(ids_BT: Tensor, eos_token_id: int) -> Tensor:
    """(B,) tokens of each row up to the end-of-text token behind its text, that one included; T for a row without.

    That is the first of those that fill up the row, or the last one where another token does: the text goes on behind
    one that somebody wrote into it. With 9 for end-of-text, (1, 5, 9, 6, 9, 9) has 5 and (1, 5, 9, 6, 9, 0) too.
    """
    end_BT = ids_BT == eos_token_id
    place_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    last_end_B = torch.where(end_BT, place_T, -1).amax(1)
    last_other_B = torch.where(end_BT, -1, place_T).amax(1)
    length_B = torch.where(end_BT[:, -1], last_other_B + 2, last_end_B + 1)
    return torch.where(end_BT.any(1), length_B, ids_BT.shape[1])


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """A text model is read out of whatever checkpoint holds one; transformers lists all that is left over."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


class LongTextEncoder(CLIPPreTrainedModel):
    """What both text encoders of 248 tokens have in common: positions, adapter, padding, and where they are made of.

    They wrap a real child `text_model`, because diffusers' clip_skip and all common LoRA layouts look for one. The
    adapter sits behind the hidden state that the UNet reads, so that no pipeline can forget it.
    """

    config: FixClipTextConfig
    config_class = FixClipTextConfig
    base_model_prefix = "text_model"
    _no_split_modules = ["FixClipTextEmbeddings", "CLIPEncoderLayer"]  # noqa: RUF012 -- as transformers has it
    text_model: CLIPTextModel
    stock_class: type[CLIPPreTrainedModel]

    def _prepare(self) -> None:
        """The part of construction that follows the stock class's."""
        config = self.config
        self.text_model.embeddings = FixClipTextEmbeddings(config)
        self.text_model.post_init()
        self._long_rows = LongRows()
        if config.delta_rank:
            add_low_rank(self.text_model, config.delta_rank, self._long_rows)
        self.short_text_model: CLIPTextModel | None = None
        if config.short_text_model is not None:
            self.short_text_model = make_short_model(config.short_text_model, self.get_input_embeddings())
        self.adapter: TextAdapter | None = None
        if config.adapter is not None:
            self.adapter = TextAdapter(**config.adapter)
        self._leave_adapter_out = False
        self._reads_windows = False  # whether passes of 77 are parts of longer texts
        self._is_laid_out = False  # whether passes come from a conditioning
        self._state_read: int | None = None  # place of the one hidden state that will be read, if that is known
        self._has_warned = False
        self._is_short = False  # whether the base's copy read the pass that ran last
        self._short_rows: Tensor | None = None  # (B, 1, 1), True where it read a row of a pass of more positions
        self._text_BT: Tensor | None = None  # True up to each text's end, in the pass that runs or ran last
        self.text_model.final_layer_norm.register_forward_hook(self._finish_last)
        self.post_init()

    def _finish_last(self, module: nn.Module, inputs: tuple, states_BTD: Tensor) -> Tensor:
        if self._is_short and self.short_text_model is not None:  # diffusers' clip_skip, for the pass that ran last
            return self.short_text_model.final_layer_norm(*inputs)
        finished_BTD = self._finish(states_BTD) if self.config.hidden_state == "last" else states_BTD
        if self._short_rows is not None and self.short_text_model is not None:  # clip_skip, as above
            short_BTD = self.short_text_model.final_layer_norm(*inputs)[:, : self.short_context_length]
            return self._with_short_rows(finished_BTD, short_BTD)
        return finished_BTD

    def _with_short_rows(self, states_BTD: Tensor, short_BSD: Tensor) -> Tensor:
        """The states with those of the base's copy, then zeros, in rows whose text fits into its S positions."""
        assert self._short_rows is not None
        if len(self._short_rows) != len(states_BTD):
            return states_BTD  # a LayerNorm called by itself, for another batch
        short_BTD = nn.functional.pad(short_BSD, (0, 0, 0, states_BTD.shape[1] - short_BSD.shape[1]))
        return torch.where(self._short_rows, short_BTD, states_BTD)

    def _read_short_rows(
        self, output: Any, input_ids: Tensor | None, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        """The outputs of a pass of more than 77 positions, in which the base's copy reads the texts that fit."""
        if self._short_rows is None or self.short_text_model is None or input_ids is None:
            return output
        size, rows_B1 = self.short_context_length, self._short_rows[:, 0]
        mask_BS = None if attention_mask is None else attention_mask[:, :size]
        short = self.short_text_model(input_ids=input_ids[:, :size], attention_mask=mask_BS, **kwargs)

        def merged(long: Any, own: Any) -> Any:
            if isinstance(long, tuple):
                return tuple(map(merged, long, own))
            if not isinstance(long, Tensor) or long.ndim > 3:
                return long  # attentions, which stay the trained encoder's
            return torch.where(rows_B1, own, long) if long.ndim == 2 else self._with_short_rows(long, own)

        if isinstance(output, tuple):
            return merged(output, short)
        for name in output:
            output[name] = merged(output[name], short[name])
        return output

    def _finish(self, states_BTD: Tensor) -> Tensor:
        """The adapter, then zeros behind the text if the padding is masked."""
        text_BT = self._text_BT
        if text_BT is not None and text_BT.shape != states_BTD.shape[:2]:
            text_BT = None  # diffusers' clip_skip calls the LayerNorm by itself, for the pass that ran last
        num_tokens, short = states_BTD.shape[1], self.config.short_position_embeddings
        if self.adapter is not None and not self._leave_adapter_out:
            states_BTD = self._adapted(self.adapter, states_BTD, text_BT)
        if self.text_model.embeddings.masks_padding and num_tokens > short and text_BT is not None:
            fits_B1 = text_BT[:, short:].logical_not().all(1, keepdim=True) & (short > 0)
            place_1T = torch.arange(num_tokens, device=states_BTD.device)[None]
            states_BTD = states_BTD * (text_BT | (fits_B1 & (place_1T < short)))[..., None]
        return states_BTD

    def _adapted(self, adapter: TextAdapter, states_BTD: Tensor, text_BT: Tensor | None) -> Tensor:
        """The states through the adapter, but for texts that fit into the original positions if it leaves those as they
        are."""
        num_tokens, short = states_BTD.shape[1], self.config.short_position_embeddings
        if adapter.config["short_texts"] or not short or self._reads_windows:
            return adapter(states_BTD, text_BT)
        if num_tokens <= short:
            return states_BTD
        fits_B11 = torch.zeros(len(states_BTD), 1, 1, dtype=torch.bool, device=states_BTD.device)
        if text_BT is not None and not self.text_model.embeddings.as_long:
            fits_B11 = text_BT[:, short:].logical_not().all(1)[:, None, None]
        return torch.where(fits_B11, states_BTD, adapter(states_BTD, text_BT))

    def _find_texts(self, input_ids: Tensor | None, position_ids: Tensor | None) -> None:
        """Where the texts of the coming pass end, which of them are long, and whether the base's copy reads it."""
        self._text_BT, self._long_rows.mask, self._is_short, self._short_rows = None, None, False, None
        if input_ids is None:
            return
        length_B1 = text_lengths(input_ids, self.config.eos_token_id)[:, None]
        self._text_BT = torch.arange(input_ids.shape[1], device=input_ids.device)[None] < length_B1
        short = self.short_context_length
        if input_ids.shape[1] > short and not (self._is_laid_out or torch.compiler.is_compiling()):
            check_siblings(self, input_ids.shape[1])
            self._warn_of_one_pass(length_B1)
        fits = input_ids.shape[1] <= short and position_ids is None
        self._is_short = fits and self.short_text_model is not None
        if fits:
            return
        # In a longer pass a text that fits is the base's, too, where the padding is masked.
        as_base_B1 = (length_B1 <= short) & self.text_model.embeddings.masks_padding & (position_ids is None)
        if self.config.delta_rank:
            self._long_rows.mask = as_base_B1.logical_not()[..., None]
        if self.short_text_model is not None and (torch.compiler.is_compiling() or as_base_B1.any()):
            self._short_rows = as_base_B1[..., None]

    def _warn_of_one_pass(self, length_B1: Tensor) -> None:
        """Say once that this encoder should read texts of so many tokens in windows, and is given them at once."""
        if self._has_warned or not get_conditioning(self.conditioning).needs_short:
            return
        num_tokens = int(length_B1.max())
        if num_tokens <= self.short_context_length:
            return
        self._has_warned = True
        logger.warning(
            "this text encoder is given %d tokens at once, as stock pipelines do, and was made to read them by "
            "conditioning=%r: the prompt is followed worse. Encode it with a pipeline of fixclip_diffusion and pass "
            'prompt_embeds= on; docs/diffusers.md, "In other pipelines", shows how.',
            num_tokens,
            self.conditioning,
        )

    def _finish_penultimate(self, output: Any) -> Any:
        """All states up to the penultimate, of which clip_skip reads one; or that one, where it is known."""
        if self.config.hidden_state == "penultimate" and output.hidden_states is not None:
            states = list(output.hidden_states)
            for place in range(len(states) - 1) if self._state_read is None else [self._state_read]:
                states[place] = self._finish(states[place])
            output.hidden_states = tuple(states)
        return output

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        adapter = self._modules.get("adapter")  # the stock constructor initialises before there is one
        if isinstance(module, TextAdapter):
            module.reset_parameters()
        elif adapter is None or not any(module is part for part in adapter.modules()):
            super()._init_weights(module)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Stock saving, whole or not at all; without the base's copy where `name_short_weights` named the base.

        Raises:
            ValueError: there are LoRA layers, beside which transformers leaves the encoder's own weights out.
        """
        if getattr(self, "_hf_peft_config_loaded", False):
            raise ValueError(
                "this text encoder has LoRA layers, and transformers would save them without the encoder: save it in a "
                "pipeline of fixclip_diffusion, such as FixClipStableDiffusionPipeline.from_pipe(pipe), which keeps "
                "both, or delete_adapter() or merge them first"
            )
        if self.config.short_weights is not None:
            state = kwargs.pop("state_dict", None) or self.state_dict()
            kwargs["state_dict"] = {k: t for k, t in state.items() if not k.startswith("short_text_model.")}
        super().save_pretrained(*args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.embeddings.token_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.embeddings.token_embedding = value
        if (short := getattr(self, "short_text_model", None)) is not None:
            short.embeddings.token_embedding.trained = [value]

    @property
    def context_length(self) -> int:
        """Tokens that one pass reads, start and end included."""
        return self.config.max_position_embeddings

    @property
    def short_context_length(self) -> int:
        """Tokens up to which the original positions are used; 0 for an encoder that has none."""
        return short_length(self.config)

    @property
    def is_trained(self) -> bool:
        """Whether weights of its own read texts of more than 77 tokens, be the base's kept for others or not."""
        return not self.short_context_length or self.short_text_model is not None or self.config.delta_rank > 0

    @property
    def conditioning(self) -> str:
        """The name of the conditioning for prompts that do not fit into 77 tokens: `default_conditioning`."""
        return default_conditioning(self.config)

    @property
    def joint_adapter(self) -> TextAdapter | None:
        """The adapter, if it reads the joined hidden states of all passes of a prompt; see `adapter_left_out`."""
        return self.adapter if self.adapter is not None and self.adapter.config["scope"] == "text" else None

    @contextmanager
    def adapter_left_out(self) -> Iterator[None]:
        """Hidden states without the adapter while the block runs."""
        self._leave_adapter_out = True
        try:
            yield
        finally:
            self._leave_adapter_out = False

    @contextmanager
    def reading_windows(self) -> Iterator[None]:
        """Passes of up to 77 tokens are windows of longer texts while the block runs; see `TextAdapter`."""
        self._reads_windows = True
        try:
            yield
        finally:
            self._reads_windows = False

    @contextmanager
    def read_as_long(self) -> Iterator[None]:
        """Texts in passes of more than 77 positions are read as if they did not fit while the block runs: by the
        weights and positions of long texts, and with the hidden states of the padding behind them, whatever the
        encoder's `padding`."""
        self.text_model.embeddings.as_long = True
        try:
            yield
        finally:
            self.text_model.embeddings.as_long = False

    @contextmanager
    def laid_out(self, state_read: int | None = None) -> Iterator[None]:
        """Passes are those of a conditioning while the block runs, so none of them is warned of.

        Args:
            state_read: place in `hidden_states` of the one that will be read, with `hidden_state="penultimate"`: the
                adapter is spared the others.
        """
        before = self._is_laid_out, self._state_read
        self._is_laid_out, self._state_read = True, state_read
        try:
            yield
        finally:
            self._is_laid_out, self._state_read = before

    def set_adapter_module(self, adapter: TextAdapter | None) -> None:
        """Put `adapter` behind the hidden state that the UNet reads, or take it away with None.

        Raises:
            ValueError: the adapter's width is not the encoder's, or it reads fewer tokens than the encoder.
        """
        if adapter is not None:
            check_fits(adapter.config, self.config.hidden_size, self.context_length)
            adapter = adapter.to(device=self.device, dtype=self.dtype).train(self.training)
        self.adapter = adapter
        self.config.adapter = None if adapter is None else dict(adapter.config)

    def set_short_weights(self, source: CLIPTextModel | CLIPTextModelWithProjection | None) -> None:
        """Read passes of up to 77 tokens with a copy of the base's text model, or with the trained one alone (None).

        Adapter and LoRA act on longer passes only. Prompts that do not fit are read in one pass by default.

        Raises:
            ValueError: the source has more than 77 positions, or another size than this encoder; or this one has a
                text projection (the second text encoder of Stable Diffusion XL).
        """
        self._refuse_projection("short weights")
        self.config.short_weights = None
        if source is None:
            self.short_text_model, self.config.short_text_model = None, None
            return
        config = source.config
        if config.max_position_embeddings > CLIP_CONTEXT_LENGTH:
            raise ValueError(
                f"short weights from a text encoder of {config.max_position_embeddings} positions: the base, of "
                f"{CLIP_CONTEXT_LENGTH}, is needed"
            )
        if (config.hidden_size, config.num_hidden_layers) != (self.config.hidden_size, self.config.num_hidden_layers):
            raise ValueError(
                f"short weights of width {config.hidden_size} and {config.num_hidden_layers} layers on a text encoder "
                f"of {self.config.hidden_size} and {self.config.num_hidden_layers}"
            )
        left_out = (*CLASS_FIELDS, "_name_or_path")
        values = {name: value for name, value in config.to_dict().items() if name not in left_out}
        model = make_short_model(values, self.get_input_embeddings())
        model.load_state_dict(getattr(source, "text_model", source).state_dict())
        self.short_text_model = model.to(device=self.device, dtype=self.dtype).train(self.training)
        self.config.short_text_model = values
        self.config.conditioning = self.config.conditioning or "one_pass"

    def name_short_weights(self, name: str | None) -> None:
        """Have `save_pretrained` write the name of the base in place of the weights that `set_short_weights` copied.

        Args:
            name: folder, hub or built-in name of a Stable Diffusion with those weights; None: the copy is written.

        Raises:
            ValueError: there are no such weights.
        """
        if self.short_text_model is None:
            raise ValueError(f"short weights of {name!r}: this text encoder reads short texts by its own weights")
        self.config.short_weights = name

    def load_delta(self, path: str | Path) -> None:
        """Add what `fixclip export --format delta` wrote: long texts are then read by the trained encoder.

        Texts of up to 77 tokens are read without it, bit for bit as before. The encoder must be made of the base that
        the delta was trained from.

        Raises:
            ValueError: this encoder has not the base's own 77 positions, has a delta already, or has a text projection;
                or see `read_delta` and `check_delta`.
        """
        self._refuse_projection("a delta")
        if not self.config.short_position_embeddings or self.config.delta_rank:
            raise ValueError("a delta goes onto a text encoder of 77 positions that is as it was before training")
        tensors, rank, kept = read_delta(path)
        check_delta(tensors, kept, self.text_model)
        add_low_rank(self.text_model, rank, self._long_rows)
        self.text_model.load_state_dict({**self.text_model.state_dict(), **factors_of(tensors)})
        embeddings = self.text_model.embeddings
        positions_PD = tensors[POSITIONS].to(embeddings.position_embedding.weight)
        embeddings.position_embedding = nn.Embedding.from_pretrained(positions_PD, freeze=False)
        embeddings.position_ids = torch.arange(len(positions_PD), device=positions_PD.device)[None]
        self.config.max_position_embeddings = self.text_model.config.max_position_embeddings = len(positions_PD)
        self.config.delta_rank, self.config.conditioning = rank, "one_pass"

    def _refuse_projection(self, what: str) -> None:
        if hasattr(self, "text_projection"):
            raise ValueError(f"{what} on a {type(self).__name__}: only text encoders without projection have it")

    @classmethod
    def from_clip(
        cls,
        source: CLIPTextModel | CLIPTextModelWithProjection,
        keep: int = 20,
        ratio: int = 4,
        num_hidden_layers: int | None = None,
        hidden_state: str | None = None,
    ) -> Any:
        """Make the encoder from a CLIP text model in memory; its weights are copied.

        A model of at most 77 positions is stretched and keeps its own table for short texts. One with more
        (Long-CLIP, an exported FIX-CLIP) is taken as it is.

        Args:
            source: the text model; its projection is left out by `FixClipTextEncoder` and needed by
                `FixClipTextEncoderWithProjection`.
            keep, ratio: see `stretch_positions`.
            num_hidden_layers: keep only the first layers. Stable Diffusion 2 reads ViT-H's penultimate layer,
                that is 23 of 24 layers.
            hidden_state: see `FixClipTextConfig`; by default the source's own, "last" for stock models.

        Raises:
            ValueError: more layers are asked for than the model has; keep or ratio out of range; no projection.
        """
        text_model = getattr(source, "text_model", source)
        config = source.config
        new_config = long_config(config, keep, ratio, num_hidden_layers, hidden_state)
        layers, stretch = new_config.num_hidden_layers, bool(new_config.short_position_embeddings)
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
        if hasattr(encoder, "text_projection"):
            if not hasattr(source, "text_projection"):
                raise ValueError(f"a {type(source).__name__} has no text projection, and {cls.__name__} needs one")
            encoder.text_projection.load_state_dict(source.text_projection.state_dict())
        return encoder.train(source.training)

    @classmethod
    def from_file(
        cls,
        file: str | Path,
        which: Which | None = None,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> Any:
        """Make the encoder from a single file: a text encoder alone, or a whole CLIP or Stable Diffusion checkpoint.

        Args:
            file: see `fixclip_core.weights.text_encoder.read_text_encoder`.
            which: "l", "h" or "g", for files of several text encoders.
            dtype: of the weights.
            **options: of `from_clip`.

        Raises:
            ValueError: the file holds no such text encoder; the message says what it is.
        """
        return cls.from_clip(_stock_from_file(cls.stock_class, file, which).to(dtype), **options)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | None,
        *args: Any,
        keep: int = 20,
        ratio: int = 4,
        delta: str | Path | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a saved FixClipTextEncoder, or make one from a CLIP text model; a folder, hub name or built-in name.

        Args:
            pretrained_model_name_or_path: holds a FixClipTextEncoder, CLIPTextModel,
                CLIPTextModelWithProjection or whole CLIPModel. None goes with config= and state_dict=, as in
                transformers.
            keep, ratio: see `stretch_positions`; used for models of at most 77 positions only.
            delta: what `fixclip export --format delta` wrote, to be added to the base it was trained from.
            **kwargs: of `PreTrainedModel.from_pretrained` (dtype, subfolder, revision, cache_dir, config, ...) and
            fields of
                the configuration such as attention_dropout=0.1; `num_hidden_layers` cuts the last layers off,
                `hidden_state` is that of `from_clip`.

        Raises:
            LoadError: there is no CLIP text model there, or some of its weights are missing, damaged or not finite.
        """
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *args, **kwargs)
        name, kwargs = builtin.resolve_component(pretrained_model_name_or_path, "text_encoder", kwargs)
        return_info = kwargs.pop("output_loading_info", False)
        layers, hidden_state = kwargs.pop("num_hidden_layers", None), kwargs.pop("hidden_state", None)
        config = kwargs.pop("config", None) or load_clip_text_config(name, **kwargs)
        for field in [key for key in kwargs if key in config.to_dict() and key not in ("dtype", "torch_dtype")]:
            setattr(config, field, kwargs.pop(field))
        ours = isinstance(config, FixClipTextConfig)
        loader: Any = super() if ours else cls.stock_class
        what = f"text encoder {describe_source(name, kwargs)}"
        short_weights = config.short_weights if ours else None
        if short_weights is not None:
            config.short_text_model = config.short_weights = None
        with loading(what), _quiet_loading():
            _check_layers(config, Path(name) / (kwargs.get("subfolder") or ""), what)
            model, info = loader.from_pretrained(name, *args, config=config, output_loading_info=True, **kwargs)
        missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
        if missing:
            raise LoadError(
                f"{what}: {len(missing)} weights are missing or of another shape, the first is {missing[0]}"
            )
        check_finite(model, what)
        if not ours or (layers is not None and layers != config.num_hidden_layers):
            if ours:
                raise ValueError(f"{what} has {config.num_hidden_layers} layers, {layers} are wanted")
            model = cls.from_clip(model, keep, ratio, layers, hidden_state)
        elif hidden_state is not None and hidden_state != model.config.hidden_state:
            raise ValueError(
                f"{what} was made for hidden_state={model.config.hidden_state!r}, and this base reads {hidden_state!r}"
            )
        if short_weights is not None:
            model.set_short_weights(base_text_model(short_weights, what))
        if delta is not None:
            model.load_delta(delta)
        return (model, info) if return_info else model


class FixClipTextEncoder(LongTextEncoder, CLIPTextModel):
    """A CLIP text encoder of 248 tokens that fits wherever diffusers takes a `CLIPTextModel`."""

    stock_class = CLIPTextModel

    def __init__(self, config: FixClipTextConfig):
        CLIPPreTrainedModel.__init__(self, config)
        self.text_model = CLIPTextModel._from_config(config)
        self._prepare()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Token ids (B, T), T at most 248, to the outputs of `CLIPTextModel`.

        `last_hidden_state` went through the adapter. With `padding="mask"` and T > 77 it is 0 behind each text, or from
        position 77 on for a text that ends before. `hidden_states[-1]` is the state before the final LayerNorm, as in
        the stock class. With `hidden_state="penultimate"` all this holds for `hidden_states[-2]` instead, and for those
        before it, which clip_skip reads. With the base's own weights for short texts (`short_weights`) all states of T
        up to 77 are the base's, and with `padding="mask"` those of a text that fits into 77 tokens in a longer pass.
        """
        self._find_texts(input_ids, position_ids)
        if self._is_short and self.short_text_model is not None:
            return self.short_text_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        output = self.text_model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs
        )
        return self._read_short_rows(self._finish_penultimate(output), input_ids, attention_mask, **kwargs)


class FixClipTextEncoderWithProjection(LongTextEncoder, CLIPTextModelWithProjection):
    """The same with the projected end-of-text state, in place of a `CLIPTextModelWithProjection`."""

    stock_class = CLIPTextModelWithProjection

    def __init__(self, config: FixClipTextConfig):
        CLIPTextModelWithProjection.__init__(self, config)
        self._prepare()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Token ids (B, T), T at most 248, to the outputs of `CLIPTextModelWithProjection`; see `FixClipTextEncoder`.

        `text_embeds` (B, E) is the projection of the end-of-text state, which no adapter changes with
        `hidden_state="penultimate"`.
        """
        self._find_texts(input_ids, position_ids)
        output = CLIPTextModelWithProjection.forward(
            self, input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs
        )
        return self._finish_penultimate(output)


def _stock_from_file(stock_class: Any, file: str | Path, which: Which | None) -> Any:
    """transformers' own text encoder from a single file; see `from_file`."""
    weights = read_text_encoder(file, which)
    needs = stock_class is CLIPTextModelWithProjection
    if needs and not weights.has_projection:
        raise ValueError(f"text encoder {str(file)!r} has no text projection, which is needed here")
    model = stock_class(CLIPTextConfig(**weights.config))
    state = {name: t for name, t in weights.state_dict.items() if needs or name != "text_projection.weight"}
    if not needs:
        state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    model.load_state_dict(state, strict=False)  # position_ids are in some files and not in others
    return model.eval()


def base_text_model(name: str, what: str) -> CLIPTextModel:
    """The first text encoder of a Stable Diffusion, in float32: a folder, hub or built-in name, a checkpoint in a
    single file, or a text encoder alone in a folder or a file.

    Args:
        name: of the base.
        what: needs it, for the error.

    Raises:
        LoadError: there is none.
    """
    try:
        if Path(name).is_file():
            first: Which | None = "l" if len(text_encoders_in(name)) > 1 else None
            return cast(CLIPTextModel, _stock_from_file(CLIPTextModel, name, first))
        folder = builtin.resolve(builtin.base_of(name))
        check_folder_or_hub_name("base", folder)
        if Path(folder).is_dir() and encoder_subfolder(folder) is None:
            load_clip_text_config(folder)  # is it a text encoder itself?
            return CLIPTextModel.from_pretrained(folder, dtype=torch.float32)
        return CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise LoadError(
            f"{what}: the text encoder of {name!r}, which is to read short prompts, could not be loaded: "
            f"{hub_reason(error)}"
        ) from error


def _check_layers(config: CLIPTextConfig, folder: Path, what: str) -> None:
    """Compare the configuration with a local file's own tensors, before a million layers are built.

    Raises:
        LoadError: another number of layers, or more than any CLIP has.
    """
    adapter = getattr(config, "adapter", None)
    layers = [config.num_hidden_layers, adapter.get("num_layers", 1) if adapter else 1]
    if not all(isinstance(count, int) and 0 < count <= MAX_LAYERS for count in layers):
        raise LoadError(f"{what}: config.json says {max(layers, key=str)} layers; 1 to {MAX_LAYERS} are possible")
    if not (folder / "model.safetensors").is_file():
        return
    shapes = open_weights(folder / "model.safetensors").shapes
    for tower in find_text_towers(shapes)[:1]:
        inside = (name.removeprefix(tower.prefix) for name in text_tower_names(tower, shapes))
        names = [name.replace("text_model.", "") for name in inside]
        check_layers(config.num_hidden_layers, names, "encoder.layers", what)


# What model_index.json records; independent of how the package is cut into files.
for _component in (FixClipTextEncoder, FixClipTextEncoderWithProjection):
    _component.__module__ = "fixclip_diffusion"
AutoModel.register(FixClipTextConfig, FixClipTextEncoder, exist_ok=True)
AutoTokenizer.register(FixClipTextConfig, fast_tokenizer_class=FixClipTokenizer, exist_ok=True)
