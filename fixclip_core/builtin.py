"""Models that come with the package, and whole models in general: `builtin:scenes`, or a folder of the same layout.

A whole model is a folder with base/ (Stable Diffusion) and, as far as there are any, clip/ (the CLIP of two towers
whose text tower the base has), encoder/ (what `fixclip export --format diffusers` writes), adapter/ and lora/ for it,
and overlap_adapter/ for windows of the base's own encoder. Where there is an overlap_adapter/, the base reads with it
unless another part is named: `complete` is the one place that says so. `builtin:scenes` is the folder
fixclip_diffusion/builtin/scenes, and `builtin:scenes/base` one of its parts. No hub name has a colon, so these names
clash with none, and nothing here asks the hub or imports anything large.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

PREFIX = "builtin:"
PARTS = ("base", "clip", "encoder", "adapter", "lora", "overlap_adapter")
SCENES = f"{PREFIX}scenes"
NO_ADAPTER = "none"  # as the name of an adapter: without the adapter and the LoRA that the base holds
FOLDER = Path(__file__).parents[1] / "fixclip_diffusion" / "builtin"


@dataclass(frozen=True)
class ModelParts:
    """What a model is made of: folders, hub names or built-in names; None for what it lacks."""

    base: str
    clip: str | None = None  # to train and to evaluate with; nothing here draws with it
    encoder: str | None = None
    adapter: Any = None  # the pipeline takes one in memory, too
    lora: str | None = None
    overlap_adapter: str | None = None  # of the base's own encoder; acts unless another part is named


def whole_model(name: str | Path) -> ModelParts | None:
    """The parts of a whole model, None for any other folder or name.

    Args:
        name: `builtin:NAME`, a folder, or anything else.

    Raises:
        ValueError: there is no such built-in model.
    """
    name = str(name)
    if name.startswith(PREFIX):
        if "/" in name:
            return None
        if name not in _names():
            raise _unknown(name)
        folder = FOLDER / name.removeprefix(PREFIX)
    else:
        folder = Path(name)
        if (folder / "model_index.json").is_file() or not (folder / "base" / "model_index.json").is_file():
            return None
    return ModelParts(**{part: f"{name}/{part}" for part in PARTS if (folder / part).is_dir()})


def complete(
    base: str | Path, encoder: str | Path | None = None, adapter: Any = None, lora: str | None = None
) -> ModelParts:
    """The parts as named, with those of a whole model where nothing is named.

    What is named wins. Adapter and LoRA of a whole model belong to its encoder: beside another one they are left out,
    and to name this adapter is to name that encoder. Where neither is named, the base reads overlapping windows with
    the whole model's overlap_adapter; without one the whole model's encoder reads, with its adapter and LoRA.
    """
    named = None if encoder is None else str(encoder)
    whole = whole_model(base)
    if whole is None:
        return ModelParts(str(base), encoder=named, adapter=adapter, lora=lora)
    if named is None and (whole.overlap_adapter is None or _is_part(adapter, whole.adapter)):
        named = whole.encoder
    if named is None:
        return ModelParts(whole.base, adapter=whole.overlap_adapter if adapter is None else adapter, lora=lora)
    if not _is_part(named, whole.encoder):
        return ModelParts(whole.base, encoder=named, adapter=adapter, lora=lora)
    adapter = whole.adapter if adapter is None else adapter
    return ModelParts(whole.base, encoder=named, adapter=adapter, lora=lora or whole.lora)


def _is_part(named: Any, part: str | None) -> bool:
    return part is not None and isinstance(named, str | Path) and resolve(named) == resolve(part)


def base_of(name: str | Path) -> str:
    """The Stable Diffusion of a whole model; any other name as it is."""
    whole = whole_model(name)
    return str(name) if whole is None else whole.base


def resolve(name: str | Path) -> str:
    """The folder of a built-in part; a folder or hub name as it is.

    Raises:
        ValueError: there is no such part, or it is a whole model where a part is needed.
    """
    name = str(name)
    whole = whole_model(name)
    if whole is not None:
        parts = ", ".join(f"{name}/{part}" for part in PARTS if getattr(whole, part) is not None)
        raise ValueError(f"{name!r} is a whole model, and one of its parts is needed here: {parts}")
    if not name.startswith(PREFIX):
        return name
    if name not in _names():
        raise _unknown(name)
    return str(FOLDER / name.removeprefix(PREFIX))


def resolve_component(name: str | Path, component: str, kwargs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """`resolve`, and for built-in parts the subfolder that holds `component`, unless `kwargs` names one."""
    folder = resolve(name)
    inside = str(name).startswith(PREFIX) and (Path(folder) / component).is_dir()
    return folder, {"subfolder": component, **kwargs} if inside else kwargs


def is_available(name: str = SCENES) -> bool:
    """Whether this copy of the package has the weights of a built-in model."""
    return name in _names()


def _names() -> list[str]:
    """All built-in names there are, each whole model before its parts."""
    names = []
    for index in sorted(FOLDER.glob("*/base/model_index.json")):
        folder = index.parents[1]
        names += [f"{PREFIX}{folder.name}"]
        names += [f"{PREFIX}{folder.name}/{part}" for part in PARTS if (folder / part).is_dir()]
    return names


def _unknown(name: str) -> ValueError:
    names = _names()
    if not names:
        return ValueError(f"{name!r}: this copy of fixclip has no embedded model, its weights are missing in {FOLDER}")
    return ValueError(f"{name!r}: there is no such built-in model; there are {', '.join(names)}")
