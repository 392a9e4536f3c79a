"""Components of a base, loaded and checked for pipelines of every family.

What does not fit is found out from configurations, before any weights are fetched.
"""

import copy
import difflib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from fixclip_core.check import check_folder_or_hub_name, check_tokenizer, hub_reason, refuse_stand_in
from fixclip_core.weights.names import Which
from fixclip_core.weights.text_encoder import choose_text_encoder, read_text_config, text_encoders_in
from fixclip_diffusion import builtin
from fixclip_diffusion.adapter import TextAdapter, check_fits, read_adapter_config
from fixclip_diffusion.conditioning import get_conditioning, renamed
from fixclip_diffusion.families import Family, Tower
from fixclip_diffusion.fingerprint import MADE_FOR, warn_of_another_encoder
from fixclip_diffusion.lora import copy_lora_layers, without_lora_layers
from fixclip_diffusion.prompt_weights import check_syntax
from fixclip_diffusion.text_config import FixClipTextConfig, encoder_subfolder, load_clip_text_config
from fixclip_diffusion.text_encoder import FixClipTextEncoder, FixClipTextEncoderWithProjection, LongTextEncoder
from fixclip_diffusion.tokenizer import FixClipTokenizer

HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "proxies")
# Stable Diffusion 2 reads ViT-H's penultimate layer. Its checkpoints hold the 24th layer too, its folders do not.
VIT_H_LAYERS = 23
ELSEWHERE = tuple(key for key in HUB_KWARGS if key != "revision")  # for other repositories than the base's
READING_ARGUMENTS = ("conditioning", "weights")  # of a call, too
OWN_ARGUMENTS = ("encoder", "encoder_2", "adapter", *READING_ARGUMENTS)
TAKES_BOTH = "fixclip_diffusion.auto.load_pipeline takes Stable Diffusion 1, 2 and XL"


def encoder_class(tower: Tower) -> type[LongTextEncoder]:
    return FixClipTextEncoderWithProjection if tower.pooled else FixClipTextEncoder


def load_own_encoder(base: str, tower: Tower, dtype: torch.dtype = torch.float32) -> LongTextEncoder:
    """A base's own text encoder, without an adapter: of a folder, a hub or built-in name, or a file.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    load: Any = encoder_class(tower)
    if Path(base).is_file():
        encoder = _load_encoder(_plan_of_checkpoint(base, tower, text_encoders_in(base), dtype))
    else:
        encoder = load.from_pretrained(base, subfolder=tower.encoder, dtype=dtype, hidden_state=tower.output)
    encoder.set_adapter_module(None)
    return cast(LongTextEncoder, encoder)


def load_encoders_of_checkpoint(
    family: Family,
    file: str,
    held: list[Which | None],
    encoders: dict[str, Any],
    adapters: dict[str, Any],
    kwargs: dict[str, Any],
) -> dict[str, LongTextEncoder]:
    """Text encoders of a checkpoint in one file, or what is given in their place: {tower's component name: encoder}.

    Widths are compared before any weights are read.

    Args:
        family: of the checkpoint.
        file: the checkpoint.
        held: text encoders in it, see `text_encoders_in`.
        encoders: {tower's component name: file, folder, hub name or module} to take instead.
        adapters: {tower's component name: folder, hub name or `TextAdapter`}, of which the widths are compared.
        kwargs: of `from_single_file`; a text encoder in it is taken as it is, and is not in the result.

    Raises:
        ValueError: an encoder is damaged, unknown or of another width than the checkpoint's own; an adapter is.
    """
    own: dict[str, int] = {}
    chosen: dict[str, Any] = {}
    elsewhere = {key: kwargs[key] for key in ELSEWHERE if key in kwargs}
    for tower in family.towers:
        given = encoders.get(tower.encoder)
        if given is not None and tower.encoder in kwargs:
            raise ValueError(f"pass either {tower.encoder.removeprefix('text_')}= or {tower.encoder}=, not both")
        # The refiner of Stable Diffusion XL has the second one only.
        is_held = bool(held) if len(family.towers) == 1 else ("g" if tower.pooled else "l") in held
        if tower.encoder in kwargs or not is_held:
            continue
        dtype = dtype_of(kwargs, tower) or torch.float32
        plan = _plan_of_checkpoint(file, tower, held, dtype)
        own[tower.encoder] = plan["width"]
        if isinstance(given, torch.nn.Module):
            plan = as_long(given, tower)
        elif given is not None:
            plan = plan_other_encoder(given, tower, plan["num_hidden_layers"], dtype, elsewhere)
        chosen[tower.encoder] = plan
    widths = {
        name: plan["width"] if isinstance(plan, dict) else plan.config.hidden_size for name, plan in chosen.items()
    }
    if len(widths) == len(family.towers):
        check_width(widths, sum(own.values()), family)
    _check_adapters(_adapter_configs(adapters, elsewhere), adapters, widths)
    return {name: _load_encoder(plan) if isinstance(plan, dict) else plan for name, plan in chosen.items()}


def _plan_of_checkpoint(file: str, tower: Tower, held: list[Which | None], dtype: torch.dtype) -> dict[str, Any]:
    """As `plan_encoder`, of a checkpoint in one file that holds these text encoders, from its header."""
    which: Which | None = None
    if len(held) > 1:
        which = "g" if tower.pooled else "l"
    config = read_text_config(file, which)
    layers = config["num_hidden_layers"]
    if held == ["h"]:
        layers = min(layers, VIT_H_LAYERS)
    plan = {"load": encoder_class(tower).from_file, "name": file, "which": which, "dtype": dtype}
    return plan | {"hidden_state": tower.output, "num_hidden_layers": layers, "width": config["hidden_size"]}


def load_components(
    family: Family,
    base: str,
    encoders: dict[str, Any],
    adapters: dict[str, Any],
    kwargs: dict[str, Any],
) -> dict[str, Any]:
    """Arguments for diffusers' `from_pretrained`: `kwargs` with text encoders, tokenizers and adapters of the family.

    Args:
        family: of the pipeline.
        base: folder or hub name.
        encoders: {tower's component name: folder, hub name or module}; what is missing is the base's own.
        adapters: {tower's component name: folder, hub name or `TextAdapter`}.
        kwargs: of the caller; a text encoder or tokenizer in it is taken as it is. Without a conditioning, that of an
            encoder or adapter that is given acts, and else the one that the base was saved with.

    Raises:
        ValueError: the base is of another family or damaged, a component is unknown or does not fit the others,
            device_map is no device, or text encoders are to be quantized.
    """
    kwargs = dict(kwargs)
    for name, module in encoders.items():
        if name in kwargs:
            raise ValueError(f"pass either {name.removeprefix('text_')}= or {name}=, not both")
        if isinstance(module, torch.nn.Module):
            kwargs[name] = module
    check_encoder_2(family, kwargs.pop("encoder_2", None), f"base {base!r}")
    conditioning = renamed(kwargs.get("conditioning"), kwargs.pop("long_prompt", None))
    if conditioning is not None:
        kwargs["conditioning"] = get_conditioning(conditioning).name
    check_syntax(kwargs.get("weights"))
    check_spelling(kwargs)
    if kwargs.get("device_map") == "balanced":
        raise ValueError(
            "device_map='balanced': text encoders are loaded before the other parts, so that no balance can be found; "
            "valid is one device, such as 'cuda', or load without it and call pipe.enable_model_cpu_offload()"
        )
    hub_kwargs = {key: kwargs[key] for key in HUB_KWARGS if key in kwargs}
    elsewhere = {key: kwargs[key] for key in ELSEWHERE if key in kwargs}
    adapter_configs = _adapter_configs(adapters, elsewhere)
    index = load_index(family, base, hub_kwargs)
    given = (*encoders.values(), *adapters.values(), *(kwargs.get(tower.encoder) for tower in family.towers))
    is_own = all(part is None for part in given)
    if not is_own:
        kwargs.setdefault("conditioning", None)  # the base was saved with one for its own text encoder
    if (conditioning is not None or not is_own) and index.get("long_prompt") is not None:
        kwargs["long_prompt"] = None  # as version 0.1 saved it
    towers = [tower for tower in family.towers if index.get(tower.encoder, [None])[0] is not None]
    _check_quantization(towers, kwargs)
    widths: dict[str, int] = {}
    plans: dict[str, dict[str, Any]] = {}
    for tower in towers:
        if kwargs.get(tower.encoder) is not None:
            kwargs[tower.encoder] = as_long(kwargs[tower.encoder], tower, adapters.get(tower.encoder) is not None)
            widths[tower.encoder] = kwargs[tower.encoder].config.hidden_size
        elif tower.encoder not in kwargs:
            plans[tower.encoder] = plan_encoder(base, tower, encoders.get(tower.encoder), kwargs, hub_kwargs)
            widths[tower.encoder] = plans[tower.encoder]["width"]
    if len(widths) == len(towers):
        check_width(widths, _unet_width(base, kwargs, hub_kwargs), family)
    _check_adapters(adapter_configs, adapters, widths)
    for tower in towers:
        if tower.encoder in plans:
            kwargs[tower.encoder] = _load_encoder(plans[tower.encoder])
        encoder = kwargs[tower.encoder]
        if tower.tokenizer not in kwargs and encoder is not None:
            kwargs[tower.tokenizer] = FixClipTokenizer.from_pretrained(
                base, subfolder=tower.tokenizer, context_length=encoder.context_length, **hub_kwargs
            )
        check_pair(tower, encoder, kwargs.get(tower.tokenizer))
        adapter = adapters.get(tower.encoder)
        if adapter is not None:
            if encoder is None:
                raise ValueError(f"adapter= needs a text encoder, but {tower.encoder}=None was passed")
            adapter = _own_adapter(adapter, elsewhere)
            if adapter.folder is not None:
                _warn_of_another_encoder(adapter.folder, encoder, kwargs[tower.tokenizer], plans.get(tower.encoder))
            encoder.set_adapter_module(adapter)
        if tower.encoder in plans and kwargs.get("device_map") is not None:
            encoder.to(kwargs["device_map"])
    return kwargs


def _adapter_configs(adapters: dict[str, Any], elsewhere: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A wrong name, or an adapter of another base, is told before gigabytes are read."""
    return {
        name: adapter.config if isinstance(adapter, TextAdapter) else read_adapter_config(adapter, **elsewhere)
        for name, adapter in adapters.items()
        if adapter is not None
    }


def _check_adapters(configs: dict[str, dict[str, Any]], adapters: dict[str, Any], widths: dict[str, int]) -> None:
    for name in configs.keys() & widths.keys():
        source = "" if isinstance(adapters[name], TextAdapter) else f" {str(adapters[name])!r}"
        check_fits(configs[name], widths[name], what=f"{name}: adapter{source}")


def _warn_of_another_encoder(adapter: str, encoder: Any, tokenizer: Any, plan: dict[str, Any] | None) -> None:
    """Log it if the adapter was made for another text encoder than this one, which was loaded by `plan`, or given."""
    folder = Path(adapter)
    if not (folder / MADE_FOR).is_file():
        return
    if encoder.dtype != torch.float32 and plan is not None:  # digests are those of float32
        encoder = _load_encoder({**plan, "dtype": torch.float32})
    if encoder.dtype == torch.float32:
        warn_of_another_encoder(folder, encoder, tokenizer, "the given one" if plan is None else str(plan["name"]))


def _load_encoder(plan: dict[str, Any]) -> Any:
    """The encoder of a plan (`plan_encoder`); its plain file where it has none of the variant, as in diffusers."""
    arguments = {key: value for key, value in plan.items() if key not in ("load", "name", "width")}
    try:
        return plan["load"](plan["name"], **arguments)
    except (OSError, ValueError):
        if arguments.pop("variant", None) is None:
            raise
        return plan["load"](plan["name"], **arguments)


def check_spelling(kwargs: Collection[str], own: Sequence[str] = OWN_ARGUMENTS) -> None:
    """diffusers ignores an unknown argument, at best with a line in the log; ours must not get lost that way.

    Args:
        kwargs: names that a caller gave beside ours.
        own: names of ours.

    Raises:
        ValueError: an argument is nearly one of ours.
    """
    for name in kwargs:
        near = difflib.get_close_matches(name, own, 1, cutoff=0.8)
        if near and near[0] != name and name not in ("text_encoder", "text_encoder_2"):
            raise ValueError(f"unknown argument {name}=: did you mean {near[0]}=?")


def check_family(family: Family, pipeline: str, components: Collection[str]) -> None:
    """Refuse a pipeline in memory that is of another family.

    Args:
        family: which it should be of.
        pipeline: name of its class.
        components: names of its parts.

    Raises:
        ValueError: it lacks a text encoder, or has one more.
    """
    missing, is_other = _compare(family, components, ("unet",))
    if missing or is_other:
        raise ValueError(
            f"{pipeline} is no pipeline of {family.name}"
            + (f": it has no {', '.join(missing)}" if missing else "")
            + "; FixClipStableDiffusionPipeline.from_pipe takes Stable Diffusion 1 and 2, and "
            "FixClipStableDiffusionXLPipeline.from_pipe Stable Diffusion XL"
        )


def _compare(family: Family, there: Collection[str], further: Sequence[str]) -> tuple[list[str], bool]:
    """What is missing of a family's text encoders, their tokenizers and `further` components, and whether there is a
    second text encoder where it has one, or the other way round."""
    parts = [part for tower in family.towers for part in (tower.encoder, tower.tokenizer)]
    missing = [part for part in (*further, *parts) if part not in there]
    return missing, ("text_encoder_2" in there) != ("text_encoder_2" in parts)


def check_encoder_2(family: Family, encoder_2: Any, source: str) -> None:
    """Refuse a second text encoder for a family that has one.

    Args:
        family: of the pipeline.
        encoder_2: what was given.
        source: begins the reason, such as "base 'X'".

    Raises:
        ValueError: there is one, which would not act.
    """
    if encoder_2 is not None and len(family.towers) == 1:
        name = type(encoder_2).__name__ if isinstance(encoder_2, torch.nn.Module) else repr(str(encoder_2))
        raise ValueError(
            f"encoder_2={name}: {source} has one text encoder, which encoder= takes; Stable Diffusion XL has two"
        )


def _check_quantization(towers: Sequence[Tower], kwargs: dict[str, Any]) -> None:
    """diffusers quantizes what it loads itself, and text encoders are loaded before.

    Raises:
        ValueError: a text encoder is to be quantized that is not given in memory.
    """
    config = kwargs.get("quantization_config")
    if config is None:
        return
    # A configuration that names no components is for all of them.
    chosen = getattr(config, "quant_mapping", None) or getattr(config, "components_to_quantize", None)
    named = [t.encoder for t in towers if t.encoder not in kwargs and (chosen is None or t.encoder in chosen)]
    if named:
        raise ValueError(
            f"quantization_config is for {', '.join(named)}, too: text encoders are loaded before the other parts and "
            "are not quantized; name the others, such as components_to_quantize=['unet'], and give the text encoders a "
            "dtype: dtype={'text_encoder': torch.bfloat16, 'default': torch.float32}"
        )


def check_pair(tower: Tower, text_encoder: Any, tokenizer: Any) -> None:
    """Refuse a long text encoder without its tokenizer, and the other way round.

    Raises:
        ValueError: one of both is not FixClip's, they differ in length, or the tokenizer has another vocabulary.
    """
    if text_encoder is None or tokenizer is None:
        return
    wanted = encoder_class(tower)
    if not isinstance(text_encoder, wanted) or not isinstance(tokenizer, FixClipTokenizer):
        raise ValueError(
            f"{tower.encoder} is a {type(text_encoder).__name__} and {tower.tokenizer} a {type(tokenizer).__name__}: "
            f"this pipeline needs {wanted.__name__} and FixClipTokenizer together, else prompts stay cut at 77 tokens; "
            "from_pretrained(base) makes both"
        )
    if text_encoder.context_length != tokenizer.context_length:
        raise ValueError(
            f"the text encoder reads {text_encoder.context_length} tokens and the tokenizer gives "
            f"{tokenizer.context_length}; pass context_length={text_encoder.context_length} to the tokenizer"
        )
    check_tokenizer(tokenizer, text_encoder.config, f"{tower.encoder} and {tower.tokenizer}")


def check_width(widths: dict[str, int], unet_width: Any, family: Family) -> None:
    """Refuse text encoders whose hidden states the UNet cannot read.

    Raises:
        ValueError: their widths do not add up to the UNet's.
    """
    if not isinstance(unet_width, int) or sum(widths.values()) == unet_width:
        return
    if len(widths) > 1:
        parts = " + ".join(f"{width} ({name})" for name, width in widths.items())
        raise ValueError(
            f"the text encoders are {parts} = {sum(widths.values())} wide, but the UNet's cross-attention takes "
            f"{unet_width}: Stable Diffusion XL needs a ViT-L/14 (768) and a ViT-bigG/14 (1280)"
        )
    if len(family.towers) > 1:
        missing = [tower.encoder for tower in family.towers if tower.encoder not in widths]
        raise ValueError(
            f"{', '.join(widths)} is {sum(widths.values())} wide, but the UNet's cross-attention takes {unet_width}: "
            f"there is no {' and no '.join(missing)}, and Stable Diffusion XL needs both text encoders"
        )
    raise ValueError(
        f"the text encoder is {sum(widths.values())} wide, but the UNet's cross-attention takes {unet_width}: "
        "Stable Diffusion 1.x needs a ViT-L/14 (768), 2.x a ViT-H/14 (1024)"
    )


def as_long(text_encoder: Any, tower: Tower, copied: bool = False) -> LongTextEncoder:
    """A text encoder in memory as one of ours; a stock one is stretched, and its LoRAs go on acting.

    Args:
        text_encoder: of any pipeline.
        tower: which of a base's text encoders it is.
        copied: for an encoder that is to have an adapter: whoever holds the one given goes on without it.

    Raises:
        ValueError: it is no CLIP text model.
    """
    if isinstance(text_encoder, encoder_class(tower)):
        return copy.deepcopy(text_encoder) if copied else text_encoder
    if isinstance(text_encoder, (CLIPTextModel, CLIPTextModelWithProjection)):
        with without_lora_layers([text_encoder]):
            long_encoder = encoder_class(tower).from_clip(text_encoder, hidden_state=tower.output)
        copy_lora_layers(text_encoder, long_encoder)
        return cast(LongTextEncoder, long_encoder)
    raise ValueError(f"{tower.encoder} is a {type(text_encoder).__name__}; a CLIP text model is needed")


def load_index(family: Family, base: str, hub_kwargs: dict[str, Any]) -> dict[str, Any]:
    """model_index.json of a base, checked: a model of the family whose local weights are readable.

    Raises:
        ValueError: there is none, it is of another family, or files are missing or damaged.
    """
    folder = Path(builtin.resolve(builtin.base_of(base)))
    if folder.is_file():
        raise ValueError(f"base {base!r} is a file, and a folder or a hub name is needed; from_single_file loads files")
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise ValueError(f"base {base!r} is a folder without model_index.json: not a diffusers model")
    if not folder.is_dir():
        check_folder_or_hub_name("base", base)
    try:
        index = dict(DiffusionPipeline.load_config(folder if folder.is_dir() else base, **hub_kwargs))
    except Exception as error:
        raise ValueError(f"base {base!r}: its model_index.json could not be read: {hub_reason(error)}") from error
    missing, is_other = _compare(family, index, ("vae", "unet", "scheduler"))
    if missing or is_other:
        raise ValueError(
            f"base {base!r} is a {index.get('_class_name')}, not a {family.name} model"
            + (f": it has no {', '.join(missing)}" if missing else "")
            + (f"; {TAKES_BOTH}" if {"unet", "text_encoder"} <= index.keys() else "")
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
                refuse_stand_in(file)
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
        raise ValueError(f"base {base!r}: unet/config.json could not be read: {hub_reason(error)}") from error


def plan_encoder(
    base: str, tower: Tower, encoder: str | Path | None, kwargs: dict[str, Any], hub_kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Arguments of the encoder's `from_pretrained`, its `name`, and its `width`, from configurations alone."""
    dtype = dtype_of(kwargs, tower) or torch.float32
    own = {"subfolder": tower.encoder, **hub_kwargs}
    config = load_clip_text_config(base, **own)
    if encoder is not None:
        elsewhere = {key: kwargs[key] for key in ELSEWHERE if key in kwargs}
        return plan_other_encoder(encoder, tower, config.num_hidden_layers, dtype, elsewhere)
    plan: dict[str, Any] = {"load": encoder_class(tower).from_pretrained, "name": base, "width": config.hidden_size}
    plan |= {"hidden_state": tower.output, "dtype": dtype, **own}
    if kwargs.get("variant") is not None:
        plan["variant"] = kwargs["variant"]
    return plan


def plan_other_encoder(
    encoder: str | Path, tower: Tower, num_layers: int, dtype: torch.dtype, hub_kwargs: dict[str, Any] | None = None
) -> dict[str, Any]:
    """As `plan_encoder`, of an encoder that takes the place of a base's own one of `num_layers` layers.

    Raises:
        ValueError: there is none.
    """
    plan: dict[str, Any] = {"hidden_state": tower.output, "dtype": dtype}
    if Path(encoder).is_file():
        which = choose_text_encoder(encoder, tower.pooled)
        values = read_text_config(encoder, which)
        width, layers, is_ours = values["hidden_size"], values["num_hidden_layers"], False
        plan |= {"load": encoder_class(tower).from_file, "name": encoder, "which": which}
    else:
        name = builtin.resolve(encoder)
        subfolder = encoder_subfolder(name, tower.encoder)
        where = {**(hub_kwargs or {}), **({} if subfolder is None else {"subfolder": subfolder})}
        config = load_clip_text_config(name, **where)
        width, layers = config.hidden_size, config.num_hidden_layers
        is_ours = isinstance(config, FixClipTextConfig)
        plan |= {"load": encoder_class(tower).from_pretrained, "name": name, **where}
    if tower.output == "last" and not is_ours and layers > num_layers:
        # Stable Diffusion 2 reads ViT-H's penultimate layer: its own encoder lacks the last one.
        plan["num_hidden_layers"] = num_layers
    return {**plan, "width": int(width)}


def dtype_of(kwargs: dict[str, Any], tower: Tower) -> torch.dtype | None:
    """The dtype that `from_pretrained` or `from_single_file` is to load a text encoder in; None: none was given."""
    dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
    return dtype.get(tower.encoder, dtype.get("default")) if isinstance(dtype, dict) else dtype


def convert_stock(
    family: Family,
    components: dict[str, Any],
    encoders: dict[str, Any],
    adapters: dict[str, Any],
    elsewhere: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Components of a stock pipeline in memory, with long text encoders and their tokenizers in place of its own.

    Args:
        family: of the pipeline.
        components: of the stock pipeline; text encoders and tokenizers that are ours already stay.
        encoders: {tower's component name: file, folder, hub name or module} to take instead.
        adapters: {tower's component name: folder, hub name or `TextAdapter`}.
        elsewhere: arguments of the hub for the encoders and adapters that are hub names, see `ELSEWHERE`.

    Raises:
        ValueError: an encoder is unknown or does not fit.
    """
    components, elsewhere = dict(components), elsewhere or {}
    plans = _plan_others(family, components, encoders, adapters, elsewhere)
    for tower in family.towers:
        encoder = components.get(tower.encoder)
        if encoder is None:
            continue
        given = encoders.get(tower.encoder)
        if isinstance(given, torch.nn.Module):
            encoder = given
        elif given is not None:
            is_offloaded = hasattr(encoder, "_hf_hook") and encoder.device.type == "meta"
            encoder = _load_encoder(plans[tower.encoder]).to("cpu" if is_offloaded else encoder.device)
        adapter = adapters.get(tower.encoder)
        is_shared = adapter is not None and tower.encoder not in plans
        encoder = components[tower.encoder] = as_long(encoder, tower, is_shared)
        tokenizer = components[tower.tokenizer]
        if not isinstance(tokenizer, FixClipTokenizer) or tokenizer.context_length != encoder.context_length:
            components[tower.tokenizer] = FixClipTokenizer.from_stock(tokenizer, encoder.context_length)
        if adapter is not None:
            encoder.set_adapter_module(_own_adapter(adapter, elsewhere))
    return components


def _own_adapter(adapter: Any, elsewhere: dict[str, Any]) -> TextAdapter:
    """The adapter of a folder or hub name; of one in memory a copy, as an encoder moves and casts its own."""
    if isinstance(adapter, TextAdapter):
        return copy.deepcopy(adapter)
    return TextAdapter.from_pretrained(adapter, **elsewhere)


def _plan_others(
    family: Family,
    components: dict[str, Any],
    encoders: dict[str, Any],
    adapters: dict[str, Any],
    elsewhere: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """Plans of the encoders that are given by name, in place of those of a stock pipeline in memory.

    Raises:
        ValueError: one of them is unknown, or too wide or narrow for the UNet; or an adapter is, for its encoder.
    """
    plans: dict[str, dict[str, Any]] = {}
    widths: dict[str, int] = {}
    for tower in family.towers:
        encoder, given = components.get(tower.encoder), encoders.get(tower.encoder)
        if encoder is None:
            continue
        if given is None or isinstance(given, torch.nn.Module):
            module: Any = encoder if given is None else given
            widths[tower.encoder] = module.config.hidden_size
            continue
        layers = encoder.config.num_hidden_layers
        plans[tower.encoder] = plan_other_encoder(given, tower, layers, encoder.dtype, elsewhere)
        widths[tower.encoder] = plans[tower.encoder]["width"]
    if plans and components.get("unet") is not None:
        check_width(widths, components["unet"].config.cross_attention_dim, family)
    _check_adapters(_adapter_configs(adapters, elsewhere), adapters, widths)
    return plans
