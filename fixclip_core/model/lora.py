"""Low-rank changes of the text tower's weights (LoRA), the base's weights kept beside them.

A matrix W (O, I) of the base stays frozen and becomes W + B A with A (r, I) and B (O, r); B starts at 0, so the tower
starts as the base. PEFT calls this LoRA of rank r with lora_alpha = r, that is a scale of 1. The projections of
queries, keys and values, which open_clip keeps as one matrix (3 I, I), have an A and a B each, because other libraries
keep them apart. Hu et al., LoRA, 2021.

Shapes: O outputs of a projection, I inputs, r rank.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

# The matrices of a block of open_clip's text transformer: module, weight, and the projections that the weight holds.
MATRICES = (
    ("attn", "in_proj_weight", ("q_proj", "k_proj", "v_proj")),
    ("attn.out_proj", "weight", ("out_proj",)),
    ("mlp.c_fc", "weight", ("fc1",)),
    ("mlp.c_proj", "weight", ("fc2",)),
)


class LowRank(nn.Module):
    """W -> W + B A of one matrix, as a parametrization of `torch.nn.utils.parametrize`."""

    def __init__(self, weight_OI: Tensor, rank: int, parts: int):
        super().__init__()
        outputs, inputs = weight_OI.shape[0] // parts, weight_OI.shape[1]
        if rank > min(outputs, inputs):
            raise ValueError(
                f"lora_rank={rank}: it must be at most {min(outputs, inputs)}, the width of the text tower"
            )
        options: dict[str, Any] = {"dtype": weight_OI.dtype, "device": weight_OI.device}
        self.lora_A = nn.Parameter(torch.empty(parts, rank, inputs, **options))
        self.lora_B = nn.Parameter(torch.zeros(parts, outputs, rank, **options))
        nn.init.kaiming_uniform_(self.lora_A.view(-1, inputs), a=math.sqrt(5))  # as PEFT

    def forward(self, weight_OI: Tensor) -> Tensor:
        changed_OI = weight_OI + (self.lora_B @ self.lora_A).flatten(0, 1).to(weight_OI.dtype)
        device = weight_OI.device.type
        # Autocast would make a copy at each use, and keep it for the backward pass.
        return changed_OI.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else changed_OI


def add_low_rank(blocks: nn.ModuleList, rank: int) -> None:
    """Give every matrix of the blocks a low-rank change and freeze all else of them.

    Raises:
        ValueError: the rank is larger than the tower is wide.
    """
    blocks.requires_grad_(False)
    for module, name, parts in matrices(blocks):
        # `unsafe` skips a trial run, which would have to allocate what may be on the meta device.
        change = LowRank(getattr(module, name), rank, len(parts))
        parametrize.register_parametrization(module, name, change, unsafe=True)


def matrices(blocks: nn.ModuleList) -> Iterator[tuple[Any, str, tuple[str, ...]]]:
    """Module, name of the weight, and projections of each matrix, layer after layer."""
    for block in blocks:
        for path, name, parts in MATRICES:
            yield block.get_submodule(path), name, parts


def changed_once(blocks: nn.ModuleList) -> AbstractContextManager[None]:
    """W + B A of each matrix is made once in this context, and not at each use, which would all be kept for backward.

    Compiled blocks are left alone.
    """
    is_plain = not any(parametrize.is_parametrized(module, name) for module, name, _ in matrices(blocks))
    is_compiled = any(block._compiled_call_impl is not None for block in blocks)
    return nullcontext() if is_plain or is_compiled else parametrize.cached()


@contextmanager
def without_low_rank(blocks: nn.ModuleList) -> Iterator[None]:
    """Plain modules with the base's matrices, for as long as the context lasts; nothing happens to plain blocks."""
    changed = [(module, name) for module, name, _ in matrices(blocks) if parametrize.is_parametrized(module, name)]
    changes = [module.parametrizations[name][0] for module, name in changed]
    for module, name in changed:
        parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    try:
        yield
    finally:
        for (module, name), change in zip(changed, changes, strict=True):
            parametrize.register_parametrization(module, name, change, unsafe=True)


def low_rank_factors(blocks: nn.ModuleList) -> dict[tuple[int, str], tuple[Tensor, Tensor]]:
    """A (r, I) and B (O, r) of each projection by layer and name: (0, "q_proj"), (0, "k_proj") ... (11, "fc2")."""
    factors = {}
    for index, (module, name, parts) in enumerate(matrices(blocks)):
        change = module.parametrizations[name][0]
        for part, A, B in zip(parts, change.lora_A, change.lora_B, strict=True):
            factors[index // len(MATRICES), part] = (A.detach(), B.detach())
    return factors
