"""The state dict of a TorchScript archive, read as data: nothing of the archive's code is compiled or run.

`torch.jit.load` compiles the code in an archive and runs what it finds as `__setstate__`. Here the archive's pickle
becomes a tree of inert objects, and of its code two lines a class are read, as text: the names of parameters and of
buffers.
"""

import io
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fixclip_core.check import LoadError

DTYPES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}


class Inert:
    """An object of the pickle: what it was called with and its state, whatever its class is called."""

    kind = ""
    args: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *args: Any) -> "Inert":
        new = super().__new__(cls)
        new.args = args
        return new

    def __setstate__(self, state: Any) -> None:
        self.state = state


class InertUnpickler(pickle.Unpickler):
    """Makes an `Inert` of every object, so that no name of the pickle is looked up; storages stay their keys."""

    def find_class(self, module: str, name: str) -> Any:
        return type("Inert", (Inert,), {"kind": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        return pid


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Parameters and buffers under the names and in the order of `torch.jit.load(path).state_dict()`, on the CPU.

    Raises:
        LoadError: a class reads its state by code of its own, which is not run.
        Exception: of any kind, the archive is damaged.
    """
    archive = Archive(path)
    root = InertUnpickler(io.BytesIO(archive.reader.get_record("data.pkl"))).load()
    return dict(archive.tensors(root))


class Archive:
    """The records of an archive, and what was read of them already."""

    def __init__(self, path: Path):
        self.path = path
        self.reader = torch._C.PyTorchFileReader(str(path))
        self.storages: dict[str, Tensor] = {}
        self.codes: dict[str, str] = {}

    def tensors(self, module: Inert, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """Names and values of a module's tensors, then those of the modules in it."""
        for name in self._tensor_names(module.kind):
            if module.state[name] is not None:  # a bias that a layer does without
                yield prefix + name, self._tensor(module.state[name])
        for name, value in module.state.items():
            if isinstance(value, Inert) and value.kind.startswith("__torch__.") and self._is_module(value.kind):
                yield from self.tensors(value, f"{prefix}{name}.")

    def _tensor(self, value: Inert) -> Tensor:
        if value.kind != "torch._utils._rebuild_tensor_v2":
            raise ValueError(f"a tensor is made by {value.kind}")
        (_, storage_type, key, _, _), offset, size, stride = value.args[:4]
        if key not in self.storages:
            record, dtype = bytearray(self.reader.get_record(f"data/{key}")), DTYPES[storage_type.kind]
            self.storages[key] = torch.frombuffer(record, dtype=dtype) if record else torch.empty(0, dtype=dtype)
        return self.storages[key].as_strided(size, stride, offset)

    def _class(self, kind: str) -> str:
        """The text of a class: that of `__torch__.a.b.C` stands in code/__torch__/a/b.py."""
        place, _, name = kind.rpartition(".")
        if place not in self.codes:
            self.codes[place] = self.reader.get_record(f"code/{place.replace('.', '/')}.py").decode()
        text = rf"^class {re.escape(name)}\(.*?(?=^class |\Z)"
        match = re.search(text, self.codes[place], re.MULTILINE | re.DOTALL)
        if match is None:
            raise ValueError(f"its code has no class {kind}")
        return match[0]

    def _is_module(self, kind: str) -> bool:
        return re.match(r"class \w+\(Module\):", self._class(kind)) is not None

    def _tensor_names(self, kind: str) -> list[str]:
        """The names of a module's parameters and buffers."""
        text = self._class(kind)
        if re.search(r"^  def __setstate__\(", text, re.MULTILINE):
            raise LoadError(
                f"{self.path} is a TorchScript archive that wants to run code ({kind}.__setstate__), so it was not "
                "loaded. Only tensors are read: ask its author for a state dict or a safetensors file"
            )
        lists = (re.search(rf"^  {key} = \[(.*)\]$", text, re.MULTILINE) for key in ("__parameters__", "__buffers__"))
        return [name for found in lists if found for name in re.findall(r'"([^"]*)"', found[1])]
