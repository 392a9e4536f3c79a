"""How much memory a device has and a pass needs."""

from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch import Tensor, nn


def device_memory(device: torch.device) -> int:
    """Bytes that the device has: all of a GPU's, what is free of the machine's otherwise."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().available


def activation_bytes(forward: Callable[[], Any], model: nn.Module) -> int:
    """Bytes that autograd keeps for the backward pass of `forward`, the model's own tensors excepted."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}
    alive = []  # a freed storage's address could be given to another one

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(kept.values())
