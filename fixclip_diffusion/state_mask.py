"""A UNet that does not attend to rows of zeros: embeds of prompts of unequal length in one batch.

Where a batch holds prompts of 77 and of 160 rows, or a long prompt beside its short negative prompt, the shorter ones
are filled up with zeros. To attend to those is not the same as to have none: each takes a share of the attention. So a
hook on the UNet finds them and adds `encoder_attention_mask`, and every row of the batch is drawn as if it were alone.
"""

import inspect
import weakref
from typing import Any

import torch
from torch import Tensor, nn

_HOOK = "_fixclip_state_mask"


def mask_empty_states(model: nn.Module) -> None:
    """Let a UNet of diffusers or a `ControlNetModel` pass over states of zeros behind others; done once for each.

    A call whose rows are all in use, such as any of stock diffusers, is left as it is, to the bit. Rows of zeros alone
    (the empty negative prompt of Stable Diffusion XL) count as in use. A call with an `encoder_attention_mask` of its
    own keeps that one. A ControlNet and the UNet of AnimateDiff take no such mask, but each of their blocks with
    cross-attention does.

    Raises:
        ValueError: neither the model nor its blocks take such a mask.
    """
    parts = [model]
    if not _takes_mask(model):
        parts = [part for part in model.modules() if getattr(part, "has_cross_attention", False)]
    if not parts or not all(map(_takes_mask, parts)):
        name = type(getattr(model, "_orig_mod", model)).__name__
        raise ValueError(
            f"mask_empty_states: a {name} cannot pass over hidden states; it takes the UNets and ControlNets of "
            "diffusers that read text by cross-attention"
        )
    hook = _StateMask()
    for part in parts:
        if _HOOK not in part.__dict__:
            part.__dict__[_HOOK] = part.register_forward_pre_hook(hook, with_kwargs=True)


def _takes_mask(part: nn.Module) -> bool:
    own: Any = getattr(part, "_orig_mod", part)  # what torch.compile was given
    return "encoder_attention_mask" in inspect.signature(type(own).forward).parameters


class _StateMask:
    """The mask is computed once for each tensor of embeds, not in every step of the denoising."""

    def __init__(self) -> None:
        self._states: weakref.ref[Tensor] | None = None
        self._version = -1
        self._mask: Tensor | None = None

    @torch.compiler.disable
    def __call__(self, part: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        states = kwargs.get("encoder_hidden_states", args[2] if len(args) > 2 else None)
        if not isinstance(states, Tensor) or states.ndim != 3 or kwargs.get("encoder_attention_mask") is not None:
            return None
        version = -1 if states.is_inference() else states._version  # torch counts no changes in inference mode
        if self._states is None or self._states() is not states or self._version != version:
            self._states, self._version, self._mask = weakref.ref(states), version, state_mask(states)
        return None if self._mask is None else (args, {**kwargs, "encoder_attention_mask": self._mask})

    def __reduce__(self) -> tuple[type["_StateMask"], tuple[()]]:
        """A pickled model takes its hook along, but no embeds."""
        return _StateMask, ()


def state_mask(states_BLD: Tensor) -> Tensor | None:
    """(B, L), False for rows of zeros behind the last other one of a prompt; None where there are no such rows."""
    used_BL = (states_BLD.detach() != 0).any(-1)
    used_BL = used_BL.flip(1).int().cummax(1).values.flip(1).bool()
    used_BL = used_BL | ~used_BL.any(1, keepdim=True)
    return None if bool(used_BL.all()) else used_BL
