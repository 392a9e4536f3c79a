"""How a pipeline would read prompts, from its parts' configurations and tokenizer: no weights are loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from transformers import CLIPTextConfig

from fixclip_core.check import LoadError, check_folder_or_hub_name, hub_reason
from fixclip_core.files import parse_json
from fixclip_core.weights.files import checkpoint_file
from fixclip_core.weights.text_encoder import choose_text_encoder, read_text_config, text_encoders_in
from fixclip_core.weights.write import clip_tokenizer
from fixclip_diffusion import builtin
from fixclip_diffusion.adapter import CONFIG_NAME, XL_ENCODERS, adapter_folders, check_fits, read_adapter_config
from fixclip_diffusion.conditioning import Conditioning, Context, choose_conditioning, renamed
from fixclip_diffusion.prompt_tokens import context_of_config
from fixclip_diffusion.prompt_weights import check_syntax
from fixclip_diffusion.text_config import FixClipTextConfig, encoder_subfolder, load_clip_text_config, long_config
from fixclip_diffusion.token_report import TokenReport, token_report
from fixclip_diffusion.tokenizer import FixClipTokenizer


@dataclass(frozen=True)
class PromptReader:
    """What decides how prompts are read.

    Attributes:
        tokenizer: of the first text encoder.
        context: of that encoder and its tokenizer.
        conditioning: what `pipe.conditioning` of these parts would be.
        weights: syntax of prompt weights, or None.
        adapter: configuration of the first text encoder's adapter, or None.
    """

    tokenizer: FixClipTokenizer
    context: Context
    conditioning: Conditioning
    weights: str | None
    adapter: dict[str, Any] | None = None

    @classmethod
    def from_pretrained(
        cls,
        base: str,
        encoder: str | None = None,
        adapter: str | None = None,
        conditioning: str | None = None,
        weights: str | None = None,
        encoder_2: str | None = None,
    ) -> "PromptReader":
        """The reader of the pipeline that `from_pretrained` of the pipelines makes of the same arguments.

        `adapter="none"` leaves out the one that the base holds. A base of which there is only tokenizer/ is taken for
        an untrained one of 77 positions. A checkpoint in one file has CLIP's own vocabulary.

        Raises:
            ValueError: a part is unknown or damaged, or the encoder cannot be read by that conditioning.
        """
        bare = adapter == builtin.NO_ADAPTER
        parts = builtin.complete(base, encoder, None if bare else adapter)
        base = builtin.resolve(parts.base)
        base = str(checkpoint_file(base, {})) if "://" in base else base
        is_file = Path(base).is_file()
        index = {} if is_file else _read_json(base, "model_index.json", needed=False)
        config = _read_config(base, parts.encoder)
        configs = [config]
        if "text_encoder_2" in index or (is_file and "g" in text_encoders_in(base)):
            configs.append(_read_config(base, encoder_2, "text_encoder_2"))
        elif encoder_2 is not None:
            raise ValueError(
                f"encoder_2={encoder_2!r}: base {parts.base!r} has one text encoder; Stable Diffusion XL has two"
            )
        if bare:
            config.adapter = None
        elif parts.adapter is not None:
            config.adapter = _read_adapter_config(parts.adapter, len(configs))
            if config.adapter is not None:
                what = f"adapter {parts.adapter!r}"
                check_fits(config.adapter, config.hidden_size, config.max_position_embeddings, what)
        length = config.max_position_embeddings
        tokenizer = _read_tokenizer(base, length)
        saved = None
        if parts.encoder is parts.adapter is encoder_2 is None:  # what is given decides itself how it is read
            saved = renamed(index.get("conditioning"), index.get("long_prompt"))
        how = choose_conditioning(conditioning or saved, configs)
        context = context_of_config(config, tokenizer)
        for each in configs:
            how.check(context_of_config(each, tokenizer))
        syntax = check_syntax(index.get("weights") if weights is None else weights)
        return cls(tokenizer, context, how, syntax, config.adapter)

    def report(self, prompt: str) -> TokenReport:
        """What becomes of the prompt."""
        return token_report(self.tokenizer, prompt, self.conditioning, self.context, self.weights, self.adapter)


def _read_adapter_config(adapter: str, num_encoders: int) -> dict[str, Any] | None:
    """That of the first text encoder; None where only the second one of Stable Diffusion XL has an adapter."""
    if num_encoders == 1:
        return read_adapter_config(adapter)
    first = adapter_folders(adapter, CONFIG_NAME).get(XL_ENCODERS[0])
    return None if first is None else read_adapter_config(first)


def _read_tokenizer(base: str, context_length: int) -> FixClipTokenizer:
    """The first text encoder's tokenizer."""
    if Path(base).is_file():
        is_2 = text_encoders_in(base) == ["h"]  # Stable Diffusion 2 has a pad token of its own
        return FixClipTokenizer.from_stock(clip_tokenizer(pad_token="!") if is_2 else clip_tokenizer(), context_length)
    # Names the file that is missing, and asks once; the tokenizer alone would try a dozen before it gives up.
    _read_json(base, "tokenizer/tokenizer_config.json")
    return FixClipTokenizer.from_pretrained(base, subfolder="tokenizer", context_length=context_length)


def _read_config(base: str, encoder: str | None, component: str = "text_encoder") -> FixClipTextConfig:
    file = Path(base if encoder is None else encoder)
    if file.is_file():
        which = choose_text_encoder(file, pooled=component == "text_encoder_2")
        return long_config(CLIPTextConfig(**read_text_config(file, which)))
    if encoder is not None:
        name = builtin.resolve(encoder)
        subfolder = encoder_subfolder(name, component)
        config = load_clip_text_config(name, **({} if subfolder is None else {"subfolder": subfolder}))
    elif Path(base).is_dir() and not (Path(base) / component).is_dir():
        return long_config(FixClipTextConfig())
    else:
        config = load_clip_text_config(base, subfolder=component)
    return config if isinstance(config, FixClipTextConfig) else long_config(config)


def _read_json(base: str, name: str, needed: bool = True) -> dict[str, Any]:
    """A file of a base, in a folder or fetched from the hub; {} if it is not there and not needed.

    Raises:
        LoadError: `base` is neither a folder nor a hub name, the file is not there, or is damaged.
    """
    check_folder_or_hub_name("base", base)
    path = Path(base) / name
    if not Path(base).is_dir():
        try:
            path = Path(hf_hub_download(base, name))
        except Exception as error:
            raise LoadError(f"base {base!r}: {name} could not be read: {hub_reason(error)}") from error
    if not path.is_file():
        if needed:
            raise LoadError(f"base {base!r}: there is no {name} in this folder")
        return {}
    try:
        return dict(parse_json(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise LoadError(f"base {base!r}: {name} is damaged: {error}") from error
