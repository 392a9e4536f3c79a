"""Symmetric InfoNCE over the batch of all processes (CLIP; FIX-CLIP's L_long and L_short, section 3.4).

With normalised features I and T of N pairs and the scale s, the logits are Z = s I T^T (N, N), and

    L = (1 / 2N) sum_i ( -log softmax(Z[i, :])[i] - log softmax(Z[:, i])[i] )

Gradients are those of one process with the whole batch when each process takes the mean over its own rows and
gradients are averaged over processes, as DistributedDataParallel does.

Shapes: B samples of this process, N samples of all processes, E embedding, C rows of a chunk.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class _Gather(torch.autograd.Function):
    """Concatenate every process's rows; the backward pass sums what all processes want of this one's."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows)
        return torch.cat(parts, dim=-2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size(), dim=-2)[dist.get_rank()]


def gather(features: Tensor) -> Tensor:
    """Rows (..., B, E) of every process, (..., N, E), with gradient. Every process must hold equally many."""
    if not is_distributed():
        return features
    return _Gather.apply(features.contiguous())


def is_distributed() -> bool:
    """Whether there are other processes to exchange rows with."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def contrastive_loss(
    image_BE: Tensor,
    text_BE: Tensor,
    logit_scale: Tensor,
    *,
    label_smoothing: float = 0.0,
    chunk_size: int | None = None,
) -> Tensor:
    """Symmetric InfoNCE over the batch of all processes.

    The mean over rows of the cross-entropy of logit_scale * image @ text.T against the matching pair, images to
    texts and texts to images, averaged. Computed in float32 whatever the autocast.

    Args:
        image_BE: this process's normalised image features, (B, E).
        text_BE: its normalised text features, (B, E).
        logit_scale: the scale itself, not its logarithm.
        label_smoothing: share of the target spread over all pairs.
        chunk_size: rows whose logits are held at once, B by default. Smaller is exact too: logits are computed
            again in the backward pass, so memory grows with chunk_size * N instead of B * N.

    Returns:
        This process's loss, a scalar.

    Raises:
        ValueError: the features' shapes differ, or chunk_size is not positive.
    """
    if image_BE.shape != text_BE.shape or image_BE.ndim != 2:
        raise ValueError(f"features of shapes {tuple(image_BE.shape)} and {tuple(text_BE.shape)} make no pairs")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: it must be at least 1")
    with torch.autocast(image_BE.device.type, enabled=False):
        dtype = torch.promote_types(image_BE.dtype, torch.float32)
        image_BE, text_BE, scale = image_BE.to(dtype), text_BE.to(dtype), logit_scale.to(dtype)
        first = dist.get_rank() * len(image_BE) if is_distributed() else 0
        options = (scale, first, label_smoothing, chunk_size)
        to_text = _cross_entropy(image_BE, gather(text_BE), *options)
        to_image = _cross_entropy(text_BE, gather(image_BE), *options)
        return (to_text + to_image) / 2


def _cross_entropy(
    rows_BE: Tensor,
    columns_NE: Tensor,
    scale: Tensor,
    first: int,
    label_smoothing: float,
    chunk_size: int | None,
) -> Tensor:
    """Mean cross-entropy of each row against the columns; row i matches column first + i."""
    targets_B = torch.arange(first, first + len(rows_BE), device=rows_BE.device)
    if chunk_size is None or chunk_size >= len(rows_BE):
        return _summed_cross_entropy(rows_BE, columns_NE, scale, targets_B, label_smoothing) / len(rows_BE)
    total = rows_BE.new_zeros(())
    for rows_CE, targets_C in zip(rows_BE.split(chunk_size), targets_B.split(chunk_size), strict=True):
        total = total + checkpoint(
            _summed_cross_entropy,
            rows_CE,
            columns_NE,
            scale,
            targets_C,
            label_smoothing,
            use_reentrant=False,
            preserve_rng_state=False,
        )
    return total / len(rows_BE)


def _summed_cross_entropy(
    rows_CE: Tensor, columns_NE: Tensor, scale: Tensor, targets_C: Tensor, label_smoothing: float
) -> Tensor:
    logits_CN = scale * rows_CE @ columns_NE.T
    return F.cross_entropy(logits_CN, targets_C, label_smoothing=label_smoothing, reduction="sum")
