"""LoRAs of a pipeline: saved beside clean weights, and kept when another one is loaded.

A loaded LoRA changes the modules of a model: a Linear becomes a layer of peft that holds the Linear as its base layer,
and `to_q.weight` becomes `to_q.base_layer.weight`, which nothing that loads the plain model knows. Here a pipeline is
saved as if no LoRA had been loaded, with each LoRA as a file of diffusers' format in its folder lora/.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers.utils import convert_state_dict_to_diffusers
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict

from fixclip_core.check import loading, split_scale

LORA_NAME = "fixclip"  # of a whole model's LoRA, for `set_adapters` and `delete_adapters`
FOLDER = "lora"
LORAS_KEY = "_loras"  # of model_index.json; diffusers ignores keys that begin with an underscore


def load_loras(pipe: Any, loras: Sequence[str]) -> None:
    """Load LoRAs beside those that a pipeline has, each with its weight; all of them act.

    Args:
        pipe: any pipeline of diffusers that takes LoRAs.
        loras: `SOURCE` or `SOURCE:0.7`; a source is what `load_lora_weights` reads, or a built-in name.

    Raises:
        ValueError: the pipeline takes none, one cannot be loaded, or none of its weights is for this model.
    """
    if not loras:
        return
    if not hasattr(pipe, "load_lora_weights"):
        raise ValueError(f"LoRA {loras[0]!r}: {type(pipe).__name__} takes no LoRA")
    before = {name: 1.0 for names in pipe.get_list_adapters().values() for name in names}
    scales = {f"lora_{number}": split_scale(text) for number, text in enumerate(loras)}
    for name, (source, _) in scales.items():
        try:
            pipe.load_lora_weights(source, adapter_name=name)
        except Exception as error:
            raise ValueError(f"LoRA {source!r} cannot be loaded: {error}") from error
        if not any(name in names for names in pipe.get_list_adapters().values()):
            raise ValueError(f"LoRA {source!r}: none of its weights is for this model")
    names = {**before, **{name: scale for name, (_, scale) in scales.items()}}
    pipe.set_adapters(list(names), list(names.values()))


@contextmanager
def without_lora_layers(models: Sequence[Any]) -> Iterator[None]:
    """Each model with its own layers in the place of peft's, as long as the block lasts; no weight is copied."""
    swapped = [
        (parent, name, layer)
        for model in models
        for parent in model.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, BaseTunerLayer)
    ]
    with_peft = [model for model in models if getattr(model, "_hf_peft_config_loaded", False)]
    for parent, name, layer in swapped:
        setattr(parent, name, layer.get_base_layer())
    for model in with_peft:
        model._hf_peft_config_loaded = False  # with it, transformers saves the LoRA and not the model
    try:
        yield
    finally:
        for parent, name, layer in swapped:
            setattr(parent, name, layer)
        for model in with_peft:
            model._hf_peft_config_loaded = True


def copy_lora_layers(source: Any, target: Any) -> None:
    """Put copies of a model's LoRA layers, with their scales, into another model of the same layers.

    Args:
        source: a text encoder of transformers, with LoRA layers or without.
        target: one of ours with the same weights, whose modules may be named `text_model.NAME`.
    """
    layers = {name: layer for name, layer in source.named_modules() if isinstance(layer, BaseTunerLayer)}
    if not layers:
        return
    inner = set(dict(target.named_modules()))
    for name, layer in layers.items():
        place = name if name in inner else f"text_model.{name}"
        own = target.get_submodule(place)
        # The plain layer that it holds is taken as it is, not copied, and then replaced by the target's own.
        plain = layer.get_base_layer()
        copied: Any = copy.deepcopy(layer, {id(plain): plain})
        copied.base_layer = own
        target.set_submodule(place, copied)
    target.peft_config = copy.deepcopy(source.peft_config)
    target._hf_peft_config_loaded = True


def lora_models(pipe: Any) -> dict[str, Any]:
    """The components that hold LoRA layers now, by name."""
    names = [name for name, adapters in pipe.get_list_adapters().items() if adapters]
    return {name: getattr(pipe, name) for name in names}


def save_loras(pipe: Any, folder: Path) -> dict[str, dict[str, Any]]:
    """Write every LoRA of a pipeline to `folder`/lora/NAME.safetensors, but for components that it is fused into.

    Returns:
        For each LoRA {"weight_name", "scale", "active"}: its file, its weight of `set_adapters`, and whether it acts.

    Raises:
        ValueError: a LoRA has other weights in other blocks, which cannot be recorded.
    """
    models = lora_models(pipe)
    names = dict.fromkeys(name for adapters in pipe.get_list_adapters().values() for name in adapters)
    found = {}
    for name in names:
        arguments: dict[str, Any] = {}
        kept: list[LoraLayer] = []
        for component, model in models.items():
            layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer) and name in layer.scaling]
            if not layers or any(name in layer.merged_adapters for layer in layers):
                continue
            kept += layers
            weights = get_peft_model_state_dict(model, adapter_name=name)
            arguments[f"{component}_lora_layers"] = convert_state_dict_to_diffusers(weights)
            arguments[f"{component}_lora_adapter_metadata"] = model.peft_config[name].to_dict()
        if not kept:
            continue
        scales = {round(_scale(layer, name), 6) for layer in kept}
        if len(scales) != 1:
            raise ValueError(f"LoRA {name!r} has other weights in other blocks, {sorted(scales)}: fuse it, then save")
        file = f"{name}.safetensors"
        pipe.save_lora_weights(folder / FOLDER, weight_name=file, **arguments)
        active = all(name in layer.active_adapters and not layer.disable_adapters for layer in kept)
        found[name] = {"weight_name": file, "scale": scales.pop(), "active": active}
    return found


def _scale(layer: LoraLayer, name: str) -> float:
    """The factor that `set_adapters` gave a LoRA; 1.0 as loaded."""
    rank = layer.r[name]
    trained = layer.lora_alpha[name] / (math.sqrt(rank) if layer.use_rslora.get(name) else rank)
    return layer.scaling[name] / trained


def scale_of(pipe: Any, name: str) -> float:
    """The weight that a loaded LoRA has by `set_adapters`, of the first layer that holds it."""
    layers = (layer for model in lora_models(pipe).values() for layer in model.modules())
    return next(_scale(layer, name) for layer in layers if isinstance(layer, LoraLayer) and name in layer.scaling)


def load_saved_loras(pipe: Any, base: str, saved: dict[str, dict[str, Any]], **hub_kwargs: Any) -> None:
    """Load what `save_loras` wrote, with the same weights, and only those acting that acted.

    A component that has a LoRA of the same name keeps it, as a UNet that another pipeline has loaded; those of other
    names go on acting.

    Raises:
        LoadError: one is missing or damaged.
    """
    others = sorted(_acting(pipe) - saved.keys())
    scales = {name: scale_of(pipe, name) for name in others} | {name: item["scale"] for name, item in saved.items()}
    for name, item in saved.items():
        with loading(f"LoRA {name!r} of {base!r}"):
            where = {"subfolder": FOLDER, "weight_name": item["weight_name"], **hub_kwargs}
            _load_where_missing(pipe, name, base, where)
    active = [*others, *(name for name, item in saved.items() if item["active"])]
    names = active or list(saved)
    pipe.set_adapters(names, [scales[name] for name in names])
    if not active:
        pipe.disable_lora()


def _acting(pipe: Any) -> set[str]:
    layers = [
        layer for model in lora_models(pipe).values() for layer in model.modules() if isinstance(layer, LoraLayer)
    ]
    return {name for layer in layers if not layer.disable_adapters for name in layer.active_adapters}


def _load_where_missing(pipe: Any, name: str, base: str, where: dict[str, Any]) -> None:
    """Load a LoRA into each component that it has layers of, and that has no LoRA of this name."""
    present = pipe.get_list_adapters()
    state, alphas, metadata = pipe.lora_state_dict(base, return_lora_metadata=True, **where)
    for component in pipe._lora_loadable_modules:
        model = getattr(pipe, component)
        own = {key: tensor for key, tensor in state.items() if key.startswith(f"{component}.")}
        if model is None or not own or name in present.get(component, ()):
            continue
        options = {"adapter_name": name, "network_alphas": alphas, "metadata": metadata, "_pipeline": pipe}
        if component == "unet":
            pipe.load_lora_into_unet(own, unet=model, **options)
        else:
            pipe.load_lora_into_text_encoder(own, text_encoder=model, prefix=component, **options)
