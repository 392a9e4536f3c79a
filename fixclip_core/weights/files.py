"""Weight files: safetensors, pickles and TorchScript archives, without ever running what is in them.

`open_weights` reads names and shapes (of a safetensors file the header alone, of a pickle in an archive, as torch.save
writes them, what points to the tensors), tensors follow when they are asked for;
`load_weights` reads a whole file.
"""

import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, hf_hub_download, parse_hf_uri
from safetensors import safe_open
from torch import Tensor

from fixclip_core.check import LoadError, hub_reason, loading, refuse_stand_in
from fixclip_core.weights.torchscript import read_torchscript

# Keys under which checkpoints keep the state dict proper.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net")
_DOWNLOAD_KWARGS = ("cache_dir", "force_download", "local_files_only", "token", "revision")


@dataclass(frozen=True)
class WeightFile:
    """The tensors of a file, not read yet where the format allows.

    Attributes:
        path: the file.
        shapes: the shape of each tensor, in the file's order and under its names.
        metadata: of a safetensors header; empty for other formats.
        is_torchscript: whether it is a TorchScript archive, as OpenAI's are.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]
    read: Callable[[Iterable[str]], dict[str, Tensor]] = field(repr=False)
    is_torchscript: bool = False

    def load(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors of these names in the file's own dtype, on the CPU.

        Raises:
            LoadError: the file is damaged.
        """
        with loading(str(self.path)):
            return self.read(names)


def open_weights(path: str | Path) -> WeightFile:
    """Open a safetensors file, a pickle or a TorchScript archive; the content decides, not the name.

    Raises:
        LoadError: the file is missing or damaged, holds no state dict, is a pointer of Git LFS, or is a pickle that
            wants to run code.
    """
    path = Path(path)
    if not path.is_file():
        raise LoadError(f"{path}: no such file")
    with loading(str(path)):
        refuse_stand_in(path)
        with path.open("rb") as file:
            start = file.read(16)
        if start[8:9] == b"{":
            return _open_safetensors(path)
        is_archive = start[:2] == b"PK"
        if is_archive and _is_torchscript(path):
            return _in_memory(path, _load_torchscript(path), is_torchscript=True)
        return _in_memory(path, _load_pickle(path, is_archive))


def load_weights(path: Path) -> tuple[dict[str, Tensor], bool]:
    """Load the tensors of a file as float32.

    Returns:
        The state dict (without wrappers such as "state_dict" and "module."), and whether it came from
        TorchScript.

    Raises:
        LoadError: see `open_weights`.
    """
    file = open_weights(path)
    tensors = {_plain_name(name): tensor for name, tensor in file.load(file.shapes).items()}
    return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}, file.is_torchscript


def _plain_name(name: str) -> str:
    """Drop what wrappers put in front: 'module.' (data parallel), 'text.' (open_clip's CustomTextCLIP)."""
    name = name.removeprefix("_orig_mod.").removeprefix("module.").removeprefix("_orig_mod.")
    return name.removeprefix("text.")


def _open_safetensors(path: Path) -> WeightFile:
    def read(names: Iterable[str]) -> dict[str, Tensor]:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in names}

    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 -- no dict
            metadata = dict(file.metadata() or {})
    except Exception as error:
        raise LoadError(f"{path} is a damaged safetensors file: {error}") from error
    if not shapes:
        raise LoadError(f"{path} holds no tensors")
    return WeightFile(path, shapes, metadata, read)


def _in_memory(path: Path, content: Any, is_torchscript: bool = False) -> WeightFile:
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise LoadError(f"{path} holds a {type(content).__name__}, not a state dict")
    tensors = {str(name): tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
    if not tensors:
        raise LoadError(f"{path} holds no tensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return WeightFile(path, shapes, {}, lambda names: {name: tensors[name] for name in names}, is_torchscript)


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") or "/code/" in name for name in archive.namelist())
    except zipfile.BadZipFile as error:
        raise LoadError(f"{path} is a damaged archive: {error}") from None


def _load_torchscript(path: Path) -> dict[str, Tensor]:
    try:
        return read_torchscript(path)
    except (LoadError, MemoryError):
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise LoadError(f"{path} is a damaged TorchScript archive: {type(error).__name__}: {reason}") from None


def _load_pickle(path: Path, is_archive: bool) -> Any:
    """Of an archive, as torch.save writes them, the tensors are read from the disk when they are used."""
    try:
        if is_archive and path.suffix != ".safetensors":  # given a path, torch.load goes by the file's name
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        with path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:
        # torch's own messages advise switching the protection off.
        wanted = re.search(r"(?i)(?:unsupported global:?|unrecognized function|unsupported class)\s+\S.*", str(error))
        if wanted:
            detail = re.split(r" whose | was not |\. ", wanted[0])[0]
            raise LoadError(
                f"{path} is a pickle that wants to run code ({detail}), so it was not loaded. Only tensors are "
                "read: ask its author for a state dict or a safetensors file"
            ) from None
        if _calls_something(path):
            raise LoadError(f"{path} is a pickle that wants to run code, so it was not loaded") from None
        raise LoadError(f"{path} is neither a pickle of tensors, TorchScript nor safetensors") from None


def _calls_something(path: Path) -> bool:
    """Whether a bare pickle, whose protocol torch does not read, holds a call."""
    import pickletools

    try:
        with path.open("rb") as file:
            return any(opcode.name in ("REDUCE", "INST", "OBJ", "NEWOBJ") for opcode, _, _ in pickletools.genops(file))
    except ValueError:
        return False


def checkpoint_file(name: str, hub_kwargs: dict[str, Any]) -> Path:
    """A checkpoint in one file: the file itself, or the hub's cache of the one that a URL names.

    Args:
        name: a file, or a URL such as https://huggingface.co/OWNER/NAME/blob/main/FILE, with `resolve` for `blob` too.
        hub_kwargs: of `hf_hub_download`; `revision` counts instead of the URL's.

    Raises:
        ValueError: neither, a folder, or what the hub has not.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        raise ValueError(f"checkpoint {name!r} is a folder; from_pretrained loads folders")
    if "://" not in name:
        raise ValueError(f"checkpoint {name!r} is neither a file here nor a URL")
    try:
        place = parse_hf_uri(name, constants.ENDPOINT)
    except ValueError as error:
        raise ValueError(f"checkpoint {name!r}: URLs of huggingface.co alone are fetched ({error})") from error
    if place.type != "model" or not place.path_in_repo:
        raise ValueError(f"checkpoint {name!r} is no URL of a model's file: .../OWNER/NAME/blob/main/FILE")
    given = {key: hub_kwargs[key] for key in _DOWNLOAD_KWARGS if hub_kwargs.get(key) is not None}
    arguments = {"revision": place.revision, **given}
    try:
        return Path(hf_hub_download(place.id, place.path_in_repo, **arguments))
    except Exception as error:
        raise ValueError(f"checkpoint {name!r} could not be fetched: {hub_reason(error)}") from error
