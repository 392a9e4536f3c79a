"""What every pipeline for long prompts does, whatever its base."""

import logging
import re
from collections.abc import Collection, Sequence
from contextvars import ContextVar
from inspect import Signature, signature
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.pipelines import auto_pipeline
from torch import Tensor

from fixclip_core.check import LoadError, check_finite, hub_reason, loading, refuse_stand_in
from fixclip_core.weights.files import checkpoint_file, open_weights
from fixclip_core.weights.kinds import what_it_is
from fixclip_core.weights.names import Which
from fixclip_core.weights.text_encoder import text_encoders_in
from fixclip_diffusion import builtin
from fixclip_diffusion.conditioning import CLIP_CONTEXT_LENGTH, get_conditioning, renamed
from fixclip_diffusion.families import Family, TextEncoding, Tower
from fixclip_diffusion.inversions import XL_KEYS, Place, place_inversions, read_inversions
from fixclip_diffusion.loading import (
    ELSEWHERE,
    HUB_KWARGS,
    READING_ARGUMENTS,
    TAKES_BOTH,
    check_encoder_2,
    check_family,
    check_pair,
    check_spelling,
    check_width,
    convert_stock,
    load_encoders_of_checkpoint,
)
from fixclip_diffusion.lora import (
    LORA_NAME,
    LORAS_KEY,
    load_saved_loras,
    save_loras,
    scale_of,
    without_lora_layers,
)
from fixclip_diffusion.prompt_encoder import PromptEmbeds, PromptEncoder, pad_states
from fixclip_diffusion.prompt_weights import check_syntax
from fixclip_diffusion.state_mask import mask_empty_states
from fixclip_diffusion.token_report import TokenReport
from fixclip_diffusion.tokenizer import FixClipTokenizer

logger = logging.getLogger(__name__)


# False while `from_pretrained` of our classes runs, which looks after LoRAs itself.
_LOADS_LORAS = ContextVar("_LOADS_LORAS", default=True)

_READS_HIDDEN_STATES = re.compile(r"attn2\.to_[kv]\.(lora_A|lora\.down)\b|attn2\.processor\.to_[kv]_lora\.down\b")


# torch's message for tensors that do not fit: name, shape in the file, shape in the model
_SIZE_MISMATCH = re.compile(r"size mismatch for (\S+): .*?torch\.Size\((.*?)\).*?torch\.Size\((.*?)\)", re.DOTALL)


class LongPromptMixin:
    """Goes before a stock diffusers pipeline: reads prompts by a conditioning; `family` says with which text
    encoders."""

    family: ClassVar[Family]
    _conditioning: str | None = None
    _weights: str | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give `__call__` the stock arguments beside ours, for help() and for callers that look an argument up."""
        super().__init_subclass__(**kwargs)
        if cls.__call__ is not LongPromptMixin.__call__:
            return

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            return LongPromptMixin.__call__(self, *args, **kwargs)

        own, stock = (signature(kind.__call__).parameters for kind in (LongPromptMixin, cls._stock_class()))
        named = [item for item in own.values() if item.kind == item.KEYWORD_ONLY]
        last = [item for item in stock.values() if item.kind == item.VAR_KEYWORD]
        first = [item for item in stock.values() if item.kind != item.VAR_KEYWORD]
        call.__name__, call.__qualname__, call.__doc__ = (
            "__call__",
            f"{cls.__qualname__}.__call__",
            cls.__call__.__doc__,
        )
        vars(call)["__signature__"] = Signature([*first, *named, *last])
        cls.__call__ = call  # type: ignore[method-assign]

    def _check_text(self, **components: Any) -> None:
        """Called before the stock constructor.

        Raises:
            ValueError: text encoders and tokenizers do not belong together, or do not fit the UNet.
        """
        widths = {}
        for tower in self.family.towers:
            check_pair(tower, components.get(tower.encoder), components.get(tower.tokenizer))
            if components.get(tower.encoder) is not None:
                widths[tower.encoder] = components[tower.encoder].config.hidden_size
        if widths and components.get("unet") is not None:
            check_width(widths, components["unet"].config.cross_attention_dim, self.family)

    def _set_reading(self, conditioning: str | None, weights: str | None, long_prompt: str | None) -> None:
        """Called behind the stock constructor.

        Raises:
            ValueError: an unknown conditioning or syntax, or one that an encoder cannot be read by.
        """
        name = renamed(conditioning, long_prompt)
        self._conditioning = None if name is None else get_conditioning(name).name
        self._weights = check_syntax(weights)
        self.register_to_config(conditioning=self._conditioning, weights=self._weights, long_prompt=None)
        if not self._missing_text:
            self.prompt_encoder  # noqa: B018 -- refuses an encoder that this conditioning cannot use

    @property
    def towers(self) -> list[Tower]:
        """The family's text encoders that this model has; the refiner of Stable Diffusion XL lacks the first one."""
        # Not by getattr, which finds the names of classes in the configuration where a component was deleted.
        present = [tower for tower in self.family.towers if vars(self).get(tower.encoder) is not None]
        return present or list(self.family.towers)

    @property
    def _missing_text(self) -> list[str]:
        """Names of the components that reading prompts needs and that are not there."""
        parts = [part for tower in self.towers for part in (tower.encoder, tower.tokenizer)]
        return [part for part in parts if vars(self).get(part) is None]

    @property
    def conditioning(self) -> str:
        """Name of the conditioning that prompts are read by; may be set."""
        return self.prompt_encoder.conditioning.name

    @conditioning.setter
    def conditioning(self, name: str | None) -> None:
        name = None if name is None else get_conditioning(name).name
        if not self._missing_text:
            self._prompt_encoder_of(name, self._weights)  # refuses what an encoder cannot be read by
        self._conditioning = name
        self.register_to_config(conditioning=name)

    @property
    def weights(self) -> str | None:
        """Syntax of prompt weights, "a1111" or "compel"; None or "literal" takes prompts literally. May be set."""
        return self._weights

    @weights.setter
    def weights(self, syntax: str | None) -> None:
        self._weights = check_syntax(syntax)
        self.register_to_config(weights=self._weights)

    @property
    def prompt_encoder(self) -> PromptEncoder:
        """What turns prompts into embeds, made of the components as they are now.

        Raises:
            ValueError: a text encoder or a tokenizer is missing or not FixClip's.
        """
        return self._prompt_encoder_of(self._conditioning, self._weights)

    def _prompt_encoder_of(self, conditioning: str | None, weights: str | None) -> PromptEncoder:
        # Errors are ValueErrors: for an AttributeError diffusers would say that there is no such property.
        if self._missing_text:
            pooled = ", with pooled_prompt_embeds= of both" if any(t.pooled for t in self.family.towers) else ""
            raise ValueError(
                f"there is no {', no '.join(self._missing_text)} to read prompts with: pass prompt_embeds= and "
                f"negative_prompt_embeds={pooled}"
            )
        encodings = [TextEncoding(getattr(self, t.encoder), getattr(self, t.tokenizer), t) for t in self.towers]
        for encoding in encodings:
            if not hasattr(encoding.encoder, "laid_out") or not hasattr(encoding.tokenizer, "context_length"):
                check_pair(encoding.tower, encoding.encoder, encoding.tokenizer)
        return PromptEncoder(encodings, conditioning, weights)

    def __call__(
        self,
        *args: Any,
        conditioning: str | None = None,
        weights: str | None = None,
        long_prompt: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """The stock call; `conditioning` and `weights` are those of this call, and without them the pipeline's.

        weights="literal" takes prompts literally where the pipeline has a syntax.

        Raises:
            ValueError: an argument is nearly one of these two.
        """
        check_spelling(kwargs.keys() - signature(self._stock_class().__call__).parameters.keys(), READING_ARGUMENTS)
        conditioning = renamed(conditioning, long_prompt)
        before = self._conditioning, self._weights
        try:
            if conditioning is not None:
                self._conditioning = get_conditioning(conditioning).name
            if weights is not None:
                self._weights = check_syntax(weights)
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._conditioning, self._weights = before

    def token_report(
        self, prompt: str, conditioning: str | None = None, weights: str | None = None, long_prompt: str | None = None
    ) -> TokenReport:
        """Length of the prompt in tokens, where the 77th falls, and in which passes it is read.

        Args:
            prompt: one text.
            conditioning, weights, long_prompt: as for a call of the pipeline, which reads the prompt likewise.

        Raises:
            ValueError: the prompt is not text, its weights cannot be parsed, or the encoder cannot be read that way.
        """
        if not isinstance(prompt, str):
            raise ValueError(f"token_report takes one text, got {type(prompt).__name__}")
        how = renamed(conditioning, long_prompt) or self._conditioning
        syntax = self._weights if weights is None else check_syntax(weights)
        return self._prompt_encoder_of(how, syntax).report(prompt)

    def maybe_convert_prompt(self, prompt: str | list[str], tokenizer: FixClipTokenizer) -> Any:
        """Nothing to do: the tokenizer expands textual inversions itself."""
        return prompt

    def load_textual_inversion(
        self,
        pretrained_model_name_or_path: Any,
        token: str | list[str] | None = None,
        tokenizer: Any = None,
        text_encoder: Any = None,
        **kwargs: Any,
    ) -> None:
        """Stock loading, which looks at everything first: an inversion that is refused leaves all as it was.

        Args:
            pretrained_model_name_or_path: a file, a folder, a hub name, the tensors of a file, or a list of these. Of
                Stable Diffusion XL, vectors of both text encoders, `clip_l` and `clip_g`, go into both at once.
            token: what the prompt will say, one for each; needed for vectors of both text encoders.
            tokenizer, text_encoder: of one text encoder; by default the first one's, or each one's. Either brings its
                other half.
            **kwargs: of the stock method, such as weight_name and revision.

        Raises:
            LoadError: there is no textual inversion, it is damaged, holds NaN or infinite values, was made for another
                base, or its name could not be told from another one.
            ValueError: more or fewer tokens than inversions.
        """
        places = self._inversion_places(tokenizer, text_encoder)
        inversions = read_inversions(pretrained_model_name_or_path, token, **kwargs)
        for place, states in place_inversions(inversions, places):
            super().load_textual_inversion(  # type: ignore[misc]
                states, tokenizer=place.tokenizer, text_encoder=place.encoder
            )

    def unload_textual_inversion(
        self, tokens: str | list[str] | None = None, tokenizer: Any = None, text_encoder: Any = None
    ) -> None:
        """Stock unloading, from all text encoders and with all vectors of a name.

        Args:
            tokens: names of textual inversions; by default all.
            tokenizer, text_encoder: of one text encoder, to unload from that alone.

        Raises:
            ValueError: no text encoder has an inversion of that name.
        """
        wanted = [tokens] if isinstance(tokens, str) else tokens
        places = self._inversion_places(tokenizer, text_encoder)
        loaded = [place.inversions() for place in places]
        known = list(dict.fromkeys(name for own in loaded for name in own))
        for name in wanted or []:
            if name not in known:
                raise ValueError(f"there is no textual inversion {name!r} to unload; loaded: {known or 'none'}")
        for place, own in zip(places, loaded, strict=True):
            names = [vector for name in own if wanted is None or name in wanted for vector in own[name]]
            if names:
                super().unload_textual_inversion(  # type: ignore[misc]
                    names, tokenizer=place.tokenizer, text_encoder=place.encoder
                )
                place.encoder.config.vocab_size = place.encoder.get_input_embeddings().num_embeddings

    def _inversion_places(self, tokenizer: Any, text_encoder: Any) -> list[Place]:
        """The text encoder with its tokenizer that one of them names; without names each of this model."""
        places = []
        for tower in self.towers:
            own = getattr(self, tower.encoder), getattr(self, tower.tokenizer)
            if (text_encoder or own[0]) is own[0] and (tokenizer or own[1]) is own[1]:
                places.append(Place(*own, XL_KEYS[tower.encoder] if len(self.family.towers) > 1 else None))
        places = places or [Place(text_encoder, tokenizer)]
        if any(place.encoder is None or place.tokenizer is None for place in places):
            raise ValueError(
                "a textual inversion needs a text encoder and its tokenizer, which this pipeline has not: give "
                "text_encoder= and tokenizer="
            )
        return places

    def load_lora_weights(
        self, pretrained_model_name_or_path_or_dict: str | Path | dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Stock loading, which takes built-in names too, and leaves the model's own LoRA acting beside the new one.

        Stock diffusers lets the LoRA that was loaded last act alone; `set_adapters` decides otherwise.

        Raises:
            LoadError: there is no LoRA, it is damaged, holds NaN or infinite values, or belongs to another model.
        """
        source = pretrained_model_name_or_path_or_dict
        source = source if isinstance(source, dict) else builtin.resolve(source)
        pipe: Any = self
        before = [name for name in pipe.get_active_adapters() if name == LORA_NAME]
        scales = [scale_of(pipe, name) for name in before]
        with loading(_lora_name(source)):
            if not isinstance(source, dict) and Path(source).is_file():
                refuse_stand_in(Path(source))
            try:
                super().load_lora_weights(source, *args, **kwargs)  # type: ignore[misc]
            except RuntimeError as error:
                shapes = _SIZE_MISMATCH.search(str(error))
                if shapes is None:
                    raise
                layer, own, here = shapes.groups()
                raise ValueError(f"it was made for another base: {layer} has the shape {own}, here {here}") from error
        new = [name for name in pipe.get_active_adapters() if name != LORA_NAME]
        if before and new:
            pipe.set_adapters([*before, *new], [*scales, *(scale_of(pipe, name) for name in new)])

    @classmethod
    def lora_state_dict(cls, pretrained_model_name_or_path_or_dict: str | Path | dict[str, Any], **kwargs: Any) -> Any:
        """Stock reading, and a look at the values.

        Raises:
            LoadError: a value is not finite, or there are layers of a text encoder that this kind of base has not.
        """
        source = pretrained_model_name_or_path_or_dict
        found = super().lora_state_dict(source, **kwargs)  # type: ignore[misc]
        state = found[0] if isinstance(found, tuple) else found
        check_finite(state, _lora_name(source))
        own = {tower.encoder for tower in cls.family.towers}
        other = {key.partition(".")[0] for key in state if key.startswith("text_encoder")} - own
        if other:
            raise LoadError(
                f"{_lora_name(source)}: it has layers of {', '.join(sorted(other))}, which {cls.family.name} has not: "
                "it was made for another base"
            )
        return found

    @classmethod
    def load_lora_into_unet(cls, state_dict: dict[str, Any], network_alphas: Any, unet: Any, **kwargs: Any) -> None:
        """Stock loading, of a LoRA for a UNet of this width.

        Raises:
            ValueError: its layers of the cross-attention read hidden states of another width.
        """
        own = unet.config.cross_attention_dim
        for name, tensor in state_dict.items():
            width = tensor.shape[-1] if _READS_HIDDEN_STATES.search(name) and tensor.ndim == 2 else own
            if isinstance(own, int) and width != own:
                raise ValueError(
                    f"it was made for another base: its UNet reads hidden states of width {width} ({name}), this one "
                    f"{own} (Stable Diffusion 1.x 768, 2.x 1024, XL 2048)"
                )
        super().load_lora_into_unet(state_dict, network_alphas, unet, **kwargs)  # type: ignore[misc]

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Stock saving. Loaded LoRAs are not mixed into the weights: each is a file in the folder lora/.

        `from_pretrained` of this class loads them again, with their weights of `set_adapters`. Stock diffusers reads
        the folder without them, and one by `pipe.load_lora_weights(folder, subfolder="lora", weight_name=...)`.

        Raises:
            ValueError: see `lora.save_loras`.
        """
        pipe: Any = self
        saved = save_loras(pipe, Path(save_directory))
        if saved or LORAS_KEY in pipe.config:
            pipe.register_to_config(**{LORAS_KEY: saved})
        with without_lora_layers([part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]):
            super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    @classmethod
    def _load_stock(cls, base: str, kwargs: dict[str, Any], has_own_encoders: bool) -> Any:
        """Stock `from_pretrained`; with the LoRAs of `save_pretrained` if the text encoders are those of the base, to
        which they belong.

        Raises:
            ValueError: the base could not be loaded.
        """
        token = _LOADS_LORAS.set(False)
        try:
            pipe = super().from_pretrained(base, **kwargs)  # type: ignore[misc]
        except Exception as error:
            raise ValueError(f"base {base!r} could not be loaded: {error}") from error
        finally:
            _LOADS_LORAS.reset(token)
        hub_kwargs = {key: kwargs[key] for key in HUB_KWARGS if key in kwargs}
        saved = pipe._saved_loras(base, hub_kwargs)
        if has_own_encoders:
            pipe._load_saved_loras(base, saved, hub_kwargs)
        elif pipe.unet is not None:
            pipe.unet.delete_adapters([name for name in saved if name in getattr(pipe.unet, "peft_config", {})])
        return pipe

    def register_to_config(self, **kwargs: Any) -> None:
        """Stock; and, where a pipeline has been loaded from a folder, the LoRAs that `save_pretrained` wrote there.

        `DiffusionPipeline.from_pretrained` finds this class in model_index.json and makes it without asking
        `from_pretrained` of this class; the last thing that it does is to register the name of the folder.
        """
        super().register_to_config(**kwargs)  # type: ignore[misc]
        if kwargs.get("_name_or_path") is None or LORAS_KEY in kwargs or not _LOADS_LORAS.get():
            return
        base, here = str(kwargs["_name_or_path"]), {"local_files_only": True}
        try:
            saved = self._saved_loras(base, here)
        except OSError:
            return  # in another cache
        try:
            self._load_saved_loras(base, saved, here)
        except OSError as error:
            logger.warning(
                "%s was saved with LoRAs, which could not be loaded (%s): they do not act. %s.from_pretrained loads "
                "them with token=, revision= and so on.",
                base,
                error,
                type(self).__name__,
            )

    def _saved_loras(self, base: str, hub_kwargs: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """What `save_loras` returned when `base` was saved."""
        return dict(self.load_config(base, **hub_kwargs).get(LORAS_KEY) or {})  # type: ignore[attr-defined]

    def _load_saved_loras(self, base: str, saved: dict[str, dict[str, Any]], hub_kwargs: dict[str, Any]) -> None:
        """Load the LoRAs that `save_pretrained` wrote into `base`."""
        if not saved:
            return
        if getattr(self, "unet", None) is None:
            logger.warning("%s was saved with LoRAs, which do not act: there is no UNet to load them into", base)
            return
        load_saved_loras(self, base, saved, **hub_kwargs)

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

        A LoRA for the UNet alone is no reason for the warning that stock diffusers gives, and where there is no text
        encoder, the UNet's part is loaded alone.
        """
        prefix = cls.text_encoder_name if prefix is None else prefix  # type: ignore[attr-defined]
        if text_encoder is None or not any(key.startswith(f"{prefix}.") for key in state_dict):
            return
        flat = f"{prefix}.encoder."
        state_dict = {
            f"{prefix}.text_model.{key.removeprefix(f'{prefix}.')}" if key.startswith(flat) else key: value
            for key, value in state_dict.items()
        }
        super().load_lora_into_text_encoder(  # type: ignore[misc]
            state_dict, network_alphas, text_encoder, prefix=prefix, **kwargs
        )

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path: str | Path,
        encoder: Any = None,
        encoder_2: Any = None,
        adapter: Any = None,
        conditioning: str | None = None,
        weights: str | None = None,
        long_prompt: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """A checkpoint in one file, with long text encoders.

        Args:
            pretrained_model_link_or_path: .safetensors or .ckpt (tensors alone), a file or a URL of the hub, which is
                fetched into the hub's cache first and read like a file.
            encoder, encoder_2: files, folders or hub names of other text encoders, or modules; by default the
                checkpoint's own: stretched, or as they are where they were trained for more than 77 tokens.
            adapter: as for `from_pretrained`.
            conditioning, weights, long_prompt: as for `from_pretrained`.
            **kwargs: of stock `from_single_file`; `config=` names a folder or hub repository of the same kind of base,
                which stock diffusers looks up on the hub otherwise.

        Raises:
            ValueError: the file is of another kind, an encoder does not fit, or the hub cannot be reached for the
                layout of such a model.
        """
        check_spelling(kwargs)
        conditioning = renamed(conditioning, long_prompt)
        name = str(pretrained_model_link_or_path)
        check_encoder_2(cls.family, encoder_2, f"checkpoint {name!r}")
        file = str(checkpoint_file(name, kwargs))
        held = cls._text_encoders_in(file, name, kwargs)
        # What the file holds is read by ours, which takes encoders of any length.
        given = {"text_encoder": encoder, "text_encoder_2": encoder_2}
        elsewhere = {key: kwargs[key] for key in ELSEWHERE if key in kwargs}
        adapters = cls._adapters(adapter, **elsewhere)
        encoders = load_encoders_of_checkpoint(cls.family, file, held, given, adapters, kwargs)
        try:
            stock = cls._stock_class().from_single_file(file, **encoders, **kwargs)
        except OSError as error:
            if kwargs.get("config") is not None:
                raise
            raise ValueError(
                f"checkpoint {name!r}: diffusers looks up the layout of such a model on the hub, once: "
                f"{hub_reason(error)}; or give config=FOLDER of a model of the same kind"
            ) from error
        return cls._of_stock(stock, encoders, adapters, conditioning, weights, elsewhere)

    @classmethod
    def _text_encoders_in(cls, file: str, name: str, components: Collection[str]) -> list[Which | None]:
        """Text encoders of a checkpoint in one file, which is of this family.

        Args:
            file: the file.
            name: file or URL, as somebody wrote it.
            components: names of those that are given.

        Raises:
            ValueError: it is no checkpoint of this family.
        """
        held = text_encoders_in(file)
        if not held and any(tower.encoder not in components for tower in cls.family.towers):
            kind = what_it_is(open_weights(file).shapes)
            raise ValueError(f"checkpoint {name!r}: there is no text encoder in this file, it is {kind}")
        is_xl = any(tower.pooled for tower in cls.family.towers)
        if held and ("g" in held) != is_xl:
            kind = "of Stable Diffusion XL" if "g" in held else "not of Stable Diffusion XL"
            raise ValueError(
                f"checkpoint {name!r} is {kind}, and {cls.__name__} is for {cls.family.name}: {TAKES_BOTH}"
            )
        return held

    @classmethod
    def from_pipe(
        cls,
        pipeline: Any,
        encoder: Any = None,
        encoder_2: Any = None,
        adapter: Any = None,
        conditioning: str | None = None,
        weights: str | None = None,
        long_prompt: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Another pipeline's components, its text encoders made long; nothing is loaded twice.

        Unlike stock `from_pipe`, which casts all components to float32 without dtype=, it leaves them as they are.

        Args:
            pipeline: any pipeline of the same family, stock or of this class. It goes on as it was: a text encoder that
                is to have an adapter here is copied.
            encoder, encoder_2, adapter, conditioning, weights, long_prompt: as for `from_single_file`. By default the
                conditioning of `pipeline`; beside another encoder or adapter what that was trained for.
            **kwargs: components and options of stock `from_pipe`; token, cache_dir and so on for hub names.

        Raises:
            ValueError: components are missing or do not fit.
        """
        check_spelling(kwargs)
        conditioning = renamed(conditioning, long_prompt)
        check_family(cls.family, type(pipeline).__name__, pipeline.components.keys() | kwargs.keys())
        check_encoder_2(cls.family, encoder_2, cls.family.name)
        elsewhere = {key: kwargs.pop(key) for key in ELSEWHERE if key in kwargs}
        encoders, adapters = {"text_encoder": encoder, "text_encoder_2": encoder_2}, cls._adapters(adapter, **elsewhere)
        others = (*encoders.values(), *adapters.values(), *map(kwargs.get, encoders))
        dtypes: dict[Any, torch.dtype] = {}
        if not kwargs.keys() & {"dtype", "torch_dtype"}:
            modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
            dtypes = {module: next(module.parameters()).dtype for module in modules}
            kwargs["dtype"] = next(iter(dtypes.values())) if len(set(dtypes.values())) == 1 else torch.float32
        stock = cls._stock_class().from_pipe(pipeline, **kwargs)
        for module, dtype in dtypes.items():
            if next(module.parameters()).dtype != dtype:  # of several dtypes all became float32, which loses nothing
                module.to(dtype)
        # Of one of ours; a stock pipeline that was made of one of ours keeps what it does not know with an underscore.
        known = {name.removeprefix("_"): value for name, value in pipeline.config.items()}
        if conditioning is None and all(part is None for part in others):
            conditioning = known.get("conditioning")
        weights = known.get("weights") if weights is None else weights
        return cls._of_stock(stock, encoders, adapters, conditioning, weights, elsewhere)

    @classmethod
    def _stock_class(cls) -> Any:
        """The diffusers pipeline that this class derives from."""
        return next(base for base in cls.__mro__ if base.__module__.startswith("diffusers.pipelines"))

    @classmethod
    def _adapters(cls, adapter: Any, **hub_kwargs: Any) -> dict[str, Any]:
        """{tower's component name: adapter} of what `from_pretrained` takes as adapter=."""
        return {} if adapter is None else {cls.family.towers[0].encoder: adapter}

    @classmethod
    def _of_stock(
        cls,
        stock: Any,
        encoders: dict[str, Any],
        adapters: dict[str, Any],
        conditioning: str | None,
        weights: str | None,
        elsewhere: dict[str, Any],
    ) -> Any:
        parts = convert_stock(cls.family, stock.components, encoders, adapters, elsewhere)
        names, _ = cls._get_signature_keys(cls)  # type: ignore[attr-defined]
        options = {
            name: stock.config[name]
            for name in ("requires_safety_checker", "force_zeros_for_empty_prompt", "add_watermarker")
            if name in stock.config
        }
        pipe = cls(
            **{name: parts.get(name) for name in names},
            **options,
            conditioning=conditioning,  # type: ignore[call-arg]
            weights=weights,
        )
        # A stock pipeline's LoRAs are in its components, if it has any.
        name = stock.config.get("_name_or_path")
        pipe.register_to_config(_name_or_path=name, **{LORAS_KEY: {}})
        # What stock `from_pipe` keeps for the pipeline that is made of this one, as _requires_aesthetics_score of the
        # refiner of Stable Diffusion XL.
        known = pipe.config.keys()  # type: ignore[attr-defined]
        others = {key for key in stock.config if key.startswith("_") and not {key, key[1:]} & known}
        pipe.register_to_config(**{key: stock.config[key] for key in others})
        return pipe

    def _encode(
        self,
        prompts: Sequence[list[str]],
        device: torch.device | str | None,
        clip_skip: int | None,
        lora_scale: float | None,
        positive_BLD: Tensor | None = None,
    ) -> PromptEmbeds:
        """Embeds of prompts, or of negative prompts beside those of their prompts."""
        encoder = self.prompt_encoder
        for encoding in encoder.encodings:
            encoding.check_clip_skip(clip_skip)
        beside_long = None if positive_BLD is None else positive_BLD[:, CLIP_CONTEXT_LENGTH:].flatten(1).any(1).tolist()
        return encoder.encode(prompts, device, clip_skip, lora_scale, beside_long)

    def _equally_long(self, *embeds: Tensor | None) -> list[Tensor | None]:
        """All of them filled up with zeros to the longest, which the UNet is told to pass over."""
        length = max((part.shape[1] for part in embeds if part is not None), default=0)
        if getattr(self, "unet", None) is not None:
            mask_empty_states(self.unet)  # type: ignore[attr-defined]
        return [None if part is None else pad_states(part, length) for part in embeds]


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


def link_tasks(name: str, text_to_image: Any, image_to_image: Any, inpainting: Any) -> None:
    """Let `AutoPipelineFor...` find the classes of each task for one of our pipelines.

    With controlnet= or enable_pag= it looks for a class of our name with ControlNet or PAG in it: that name stands for
    the stock class, which has no conditionings.
    """
    auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING[name] = text_to_image
    auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING[name] = image_to_image
    auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING[name] = inpainting
    stock = text_to_image._stock_class().__name__
    parts = ("ControlNet", "PAG", "ControlNetPAG", "ControlNetUnion")
    others = {stock.replace("Pipeline", f"{part}Pipeline") for part in parts}
    auto_pipeline.SUPPORTED_TASKS_MAPPINGS.append(
        {
            model: type(f"FixClip{kind.__name__}", (), {})
            for model, kind in auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING.items()
            if kind.__name__ in others
        }
    )


def _lora_name(source: str | Path | dict[str, Any]) -> str:
    return "LoRA in memory" if isinstance(source, dict) else f"LoRA {str(source)!r}"
