"""Adapters of several text encoders as one module, and where each is saved."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fixclip_diffusion.adapter import TextAdapter
from fixclip_diffusion.families import Tower


class JoinedAdapter(nn.Module):
    """Adapters on the hidden states of several text encoders, which lie side by side along the feature axis.

    For Stable Diffusion XL (N, P, 768 + 1280) is split, each part goes through its own adapter, and both are joined.

    Args:
        parts: {name of the text encoder's component: its adapter}, in the order of the states; alike but for the width.
    """

    def __init__(self, parts: Mapping[str, TextAdapter]):
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self.widths = [adapter.config["width"] for adapter in parts.values()]
        self.config: dict[str, Any] = next(iter(parts.values())).config

    @property
    def adapters(self) -> list[TextAdapter]:
        return [cast(TextAdapter, adapter) for adapter in self.parts.children()]

    def forward(self, states_NPD: Tensor, text_NP: Tensor | None = None) -> Tensor:
        """As `TextAdapter.forward`, D being the sum of the widths."""
        parts = zip(self.adapters, states_NPD.split(self.widths, dim=-1), strict=True)
        return torch.cat([adapter(part_NPD, text_NP) for adapter, part_NPD in parts], dim=-1)


def adapter_folders(folder: Path, towers: list[Tower]) -> list[Path]:
    """Where the adapter of each text encoder is: in `folder` if there is one, else in text_encoder/, text_encoder_2/
    in it."""
    return [folder] if len(towers) == 1 else [folder / tower.encoder for tower in towers]
