"""Pipelines as command line and page load them: base, encoder, adapter, LoRAs, textual inversions, scheduler."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ModelOptions:
    """What draws; each source is a folder, a file, a hub name or a built-in name.

    Attributes:
        base: Stable Diffusion.
        encoder: FIX-CLIP or Long-CLIP text encoder; None: the base's own.
        adapter: `TextAdapter` on its hidden states; `none`: neither the adapter nor the LoRA that the base holds.
        loras: `SOURCE` or `SOURCE:scale`, see `check.split_scale`.
        embeddings: textual inversions. A file's name is its token, as in A1111; a folder or hub name brings its own.
        scheduler: class name of diffusers, with or without "Scheduler" at its end; None: the base's own.
        weights: syntax of prompt weights, "a1111" or "compel", or "literal"; None: the base's own, else literal.
        conditioning: how prompts are read that do not fit into 77 tokens; None: as the encoder was trained for.
        encoder_2: the second text encoder of Stable Diffusion XL, as `encoder`.
    """

    base: str
    encoder: str | None = None
    adapter: str | None = None
    loras: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()
    scheduler: str | None = None
    weights: str | None = None
    conditioning: str | None = None
    encoder_2: str | None = None


@contextmanager
def offer_builtin() -> Iterator[None]:
    """What the hub did not give ends in an error that names a model which needs no hub."""
    from fixclip_core import builtin
    from fixclip_core.check import LoadError, is_hub_out_of_reach

    try:
        yield
    except (LoadError, ValueError) as error:
        if not is_hub_out_of_reach(error) or not builtin.is_available():
            raise
        raise LoadError(f"{error}; --base {builtin.SCENES} needs no hub") from error


def load_pipeline(options: ModelOptions, device: str | None = None, dtype: str | None = None) -> Any:
    """The pipeline with all that the options name, on the fastest device there is unless one is named.

    Raises:
        ValueError: one of them cannot be loaded, does not fit, or the device cannot be used.
    """
    check_names(options)
    import torch

    from fixclip_core.builtin import NO_ADAPTER
    from fixclip_core.device import choose_device
    from fixclip_diffusion.auto import load_pipeline as load
    from fixclip_diffusion.lora import load_loras

    device = choose_device(device)
    if options.scheduler is not None:
        check_scheduler(options.scheduler)
    torch_dtype = getattr(torch, dtype or ("float16" if device.startswith("cuda") else "float32"))
    reading = {"conditioning": options.conditioning, "weights": options.weights}
    with offer_builtin():
        pipe = load(
            options.base,
            encoder=options.encoder,
            encoder_2=options.encoder_2,
            adapter=None if options.adapter == NO_ADAPTER else options.adapter,
            dtype=torch_dtype,
            **{name: value for name, value in reading.items() if value is not None},  # else as the base's folder says
        )
    if options.adapter == NO_ADAPTER:
        _take_off_own_parts(pipe)
    load_loras(pipe, options.loras)
    _load_embeddings(pipe, options.embeddings)
    if options.scheduler is not None:
        pipe.scheduler = make_scheduler(pipe, options.scheduler)
    return pipe.to(device)


def has_own_parts(pipe: Any) -> bool:
    """Whether a pipeline has an adapter, or a LoRA that belongs to its text encoder."""
    return has_adapter(pipe) or has_lora(pipe)


def has_adapter(pipe: Any) -> bool:
    """Whether one of a pipeline's text encoders has an adapter."""
    return any(encoding.encoder.adapter is not None for encoding in pipe.prompt_encoder.encodings)


def has_lora(pipe: Any) -> bool:
    """Whether a pipeline has a LoRA that belongs to its text encoder."""
    from fixclip_diffusion.lora import LORA_NAME

    return any(LORA_NAME in names for names in pipe.get_list_adapters().values())


def _take_off_own_parts(pipe: Any) -> None:
    from fixclip_diffusion.lora import LORA_NAME

    for encoding in pipe.prompt_encoder.encodings:
        encoding.encoder.set_adapter_module(None)
    if has_lora(pipe):
        pipe.delete_adapters(LORA_NAME)


def check_names(options: ModelOptions) -> None:
    """Refuse names that can be nothing at all, before the libraries that load a pipeline are imported.

    Raises:
        ValueError: a name is neither a folder nor one of the hub, or a built-in part that there is not.
    """
    from fixclip_core import builtin
    from fixclip_core.check import check_folder_or_hub_name, split_scale

    for what in ("base", "encoder", "encoder_2", "adapter"):
        name = getattr(options, what)
        if name is None or Path(name).is_file() or (what == "adapter" and name == builtin.NO_ADAPTER):
            continue  # what a file is, is told by its loader
        if what == "base" and ("://" in name or builtin.whole_model(name) is not None):
            continue
        check_folder_or_hub_name(what, builtin.resolve(name))
    for what, names in (
        ("--lora", [split_scale(text)[0] for text in options.loras]),
        ("--embedding", options.embeddings),
    ):
        for name in names:
            check_folder_or_hub_name(what, builtin.resolve(name), or_file=True)


def base_options(options: ModelOptions) -> ModelOptions:
    """The same with the base's own encoder and nothing that belongs to another one, for comparison."""
    from fixclip_diffusion import builtin

    base = builtin.base_of(options.base)
    return replace(options, base=base, encoder=None, encoder_2=None, adapter=builtin.NO_ADAPTER, conditioning=None)


def _load_embeddings(pipe: Any, embeddings: tuple[str, ...]) -> None:
    for source in embeddings:
        path = Path(source)
        known = set(pipe.tokenizer.get_vocab())
        try:
            pipe.load_textual_inversion(source, **({"token": path.stem} if path.is_file() else {}))
        except ValueError as error:
            is_name = path.is_file() and "token=" in str(error)
            way_out = "; here its token is the file's name, so rename the file" if is_name else ""
            raise ValueError(f"--embedding: {error}{way_out}") from error
        if set(pipe.tokenizer.get_vocab()) == known:
            raise ValueError(f"--embedding {source}: it brought no new token")


def embedding_tokens(pipe: Any) -> list[str]:
    """Names of the textual inversions that are loaded; one of several vectors is NAME, NAME_1, NAME_2, ..."""
    added = [token.content for token in pipe.tokenizer.added_tokens_decoder.values() if not token.special]
    return [name for name in added if name.rpartition("_")[0] not in added]


def check_scheduler(name: str) -> None:
    """Find out before a model is loaded that there is no such scheduler for Stable Diffusion.

    One that diffusers has for other models passes: a base may have come with it, and its pictures name it.

    Raises:
        ValueError: names those that there are.
    """
    import diffusers
    from diffusers.schedulers import KarrasDiffusionSchedulers

    every = {key.lower() for key in dir(diffusers) if key.endswith("Scheduler")}
    if f"{name.lower().removesuffix('scheduler')}scheduler" not in every:
        _find_scheduler(name, [item.name for item in KarrasDiffusionSchedulers])


def _find_scheduler(name: str, classes: Iterable[str]) -> str:
    """The class of that name, in any case, with or without "Scheduler".

    Raises:
        ValueError: there is none.
    """
    keys = {key.lower().removesuffix("scheduler"): key for key in classes}
    key = keys.get(name.lower().removesuffix("scheduler"))
    if key is None:
        valid = ", ".join(sorted(item.removesuffix("Scheduler") for item in keys.values()))
        raise ValueError(f"--scheduler {name}: valid are {valid}")
    return key


def make_scheduler(pipe: Any, name: str) -> Any:
    """A scheduler of diffusers by its class's name, in any case, with or without "Scheduler", for this model.

    Raises:
        ValueError: there is none of that name that fits, or it needs a library that is not installed.
    """
    classes = {item.__name__: item for item in [*pipe.scheduler.compatibles, type(pipe.scheduler)]}
    key = _find_scheduler(name, classes)
    try:
        return classes[key].from_config(pipe.scheduler.config)
    except ImportError as error:
        raise ValueError(f"--scheduler {name}: {error}") from error
