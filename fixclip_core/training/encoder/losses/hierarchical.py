"""FIX-CLIP's hierarchical alignment: one InfoNCE for each aligned group of layers (section 3.3).

The middle features of group g are made by `FixClip` (group token aggregation, projection, LayerNorm), shallow groups
first, for example G = 2 for the groups 3 and 4 of 4. With the weights w_g of the recipe the total loss adds

    sum_g w_g * InfoNCE(image_GBE[g], text_GBE[g])

Shapes: B samples of this process, E embedding, G aligned groups.
"""

import torch
from torch import Tensor

from fixclip_core.training.encoder.losses.contrastive import contrastive_loss


def hierarchical_losses(
    image_GBE: Tensor,
    text_GBE: Tensor,
    logit_scale: Tensor,
    *,
    label_smoothing: float = 0.0,
    chunk_size: int | None = None,
) -> Tensor:
    """`contrastive_loss` of each aligned group's middle features, (G,); the caller weighs them.

    Args:
        image_GBE: middle image features, (G, B, E), shallow groups first.
        text_GBE: middle text features, (G, B, E).
        logit_scale: the scale itself.
        label_smoothing: see `contrastive_loss`.
        chunk_size: see `contrastive_loss`.

    Raises:
        ValueError: the two towers have different numbers of groups, or the features' shapes differ.
    """
    if len(image_GBE) != len(text_GBE):
        raise ValueError(f"{len(image_GBE)} image groups and {len(text_GBE)} text groups: there must be equally many")
    losses = [
        contrastive_loss(image_BE, text_BE, logit_scale, label_smoothing=label_smoothing, chunk_size=chunk_size)
        for image_BE, text_BE in zip(image_GBE, text_GBE, strict=True)
    ]
    return torch.stack(losses)
