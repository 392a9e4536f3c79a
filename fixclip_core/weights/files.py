"""Weight files: safetensors, pickles and TorchScript archives to state dicts, without ever running what is in them."""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


def load_weights(path: Path) -> tuple[dict[str, Tensor], bool]:
    """Load the tensors of a safetensors file, a pickle or a TorchScript archive as float32.

    Returns:
        The state dict (without wrappers such as "state_dict" and "module."), and whether it came from
        TorchScript.

    Raises:
        ValueError: the file is missing or damaged, holds no state dict, or is a pickle that wants to run code.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with path.open("rb") as file:
        start = file.read(16)
    is_torchscript = False
    state_dict: Any
    if start[8:9] == b"{":
        state_dict = _load_safetensors(path)
    elif start[:2] == b"PK" and _is_torchscript(path):
        state_dict, is_torchscript = _load_torchscript(path), True
    else:
        state_dict = _load_pickle(path)
    for wrapper in ("state_dict", "model", "module"):
        if isinstance(state_dict, Mapping) and isinstance(state_dict.get(wrapper), Mapping):
            state_dict = state_dict[wrapper]
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"{path} holds a {type(state_dict).__name__}, not a state dict")
    tensors = {_plain_name(name): tensor for name, tensor in state_dict.items() if isinstance(tensor, Tensor)}
    if not tensors:
        raise ValueError(f"{path} holds no tensors")
    return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}, is_torchscript


def _plain_name(name: str) -> str:
    """Drop what wrappers put in front: 'module.' (data parallel), 'text.' (open_clip's CustomTextCLIP)."""
    name = name.removeprefix("_orig_mod.").removeprefix("module.").removeprefix("_orig_mod.")
    return name.removeprefix("text.")


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is a damaged safetensors file: {error}") from None


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") or "/code/" in name for name in archive.namelist())
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is a damaged archive: {error}") from None


def _load_torchscript(path: Path) -> dict[str, Tensor]:
    try:
        return torch.jit.load(path, map_location="cpu").state_dict()
    except RuntimeError as error:
        raise ValueError(f"{path} is a damaged TorchScript archive: {str(error).splitlines()[0]}") from None


def _load_pickle(path: Path) -> Any:
    from pickle import UnpicklingError

    try:
        with path.open("rb") as file:  # given a path, torch.load would go by the file's name
            return torch.load(file, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, IndexError) as error:
        # torch's own messages advise switching the protection off.
        wanted = re.search(r"(?i)(?:unsupported global:?|unrecognized function|unsupported class)\s+\S.*", str(error))
        if wanted:
            detail = re.split(r" whose | was not |\. ", wanted[0])[0]
            raise ValueError(
                f"{path} is a pickle that wants to run code ({detail}), so it was not loaded. Only tensors are "
                "read: ask its author for a state dict or a safetensors file"
            ) from None
        if _calls_something(path):
            raise ValueError(f"{path} is a pickle that wants to run code, so it was not loaded") from None
        raise ValueError(f"{path} is neither a pickle of tensors, TorchScript nor safetensors") from None


def _calls_something(path: Path) -> bool:
    """Whether a bare pickle, whose protocol torch does not read, holds a call."""
    import pickletools

    try:
        with path.open("rb") as file:
            return any(opcode.name in ("REDUCE", "INST", "OBJ", "NEWOBJ") for opcode, _, _ in pickletools.genops(file))
    except ValueError:
        return False
