"""Contrastive losses over the batch of all processes, and large batches on one device.

Gradients are those of one process with the whole batch when each process takes the mean over its own rows and
gradients are averaged over processes, as DistributedDataParallel does.

Shapes: B samples of this process, N samples of all processes, E embedding, G aligned groups.
"""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Batch = TypeVar("Batch")


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
    if not _is_distributed():
        return features
    return _Gather.apply(features.contiguous())


def _is_distributed() -> bool:
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
        first = dist.get_rank() * len(image_BE) if _is_distributed() else 0
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


def hierarchical_loss(
    image_GBE: Tensor,
    text_GBE: Tensor,
    logit_scale: Tensor,
    *,
    weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    chunk_size: int | None = None,
) -> Tensor:
    """Sum over the aligned groups of weight * `contrastive_loss` of the group's middle features.

    Args:
        image_GBE: middle image features, (G, B, E), shallow groups first.
        text_GBE: middle text features, (G, B, E).
        logit_scale: the scale itself.
        weights: one weight a group, 1 by default.
        label_smoothing: see `contrastive_loss`.
        chunk_size: see `contrastive_loss`.

    Raises:
        ValueError: there are not as many weights as groups, or the features' shapes differ.
    """
    weights = [1.0] * len(image_GBE) if weights is None else list(weights)
    if len(image_GBE) != len(text_GBE) or len(weights) != len(image_GBE):
        raise ValueError(
            f"{len(image_GBE)} image groups, {len(text_GBE)} text groups and {len(weights)} weights: "
            "there must be equally many"
        )
    total = logit_scale.new_zeros(())
    for weight, image_BE, text_BE in zip(weights, image_GBE, text_GBE, strict=True):
        total = total + weight * contrastive_loss(
            image_BE, text_BE, logit_scale, label_smoothing=label_smoothing, chunk_size=chunk_size
        )
    return total


def pca_reconstruction(features_BE: Tensor, rank: int) -> Tensor:
    """What the principal components of the batch of all processes keep of each feature (Long-CLIP).

    Features are centred, projected on the `rank` components of largest variance, projected back, and the mean is
    added again. The components count as constants: their own gradient is undefined where variances coincide,
    which they always do when a batch is smaller than the embedding.

    Args:
        features_BE: this process's image features, (B, E).
        rank: components to keep; with rank >= N - 1 nothing is lost.

    Returns:
        The reconstructions, (B, E), normalised.

    Raises:
        ValueError: rank is not positive.
    """
    if rank < 1:
        raise ValueError(f"rank={rank}: it must be at least 1")
    with torch.autocast(features_BE.device.type, enabled=False):
        features_BE = features_BE.to(torch.promote_types(features_BE.dtype, torch.float32))
        all_NE = gather(features_BE)
        mean_E = all_NE.mean(dim=0)
        with torch.no_grad():
            components_RE = torch.linalg.svd(all_NE - mean_E, full_matrices=False).Vh[:rank]
        kept_BE = (features_BE - mean_E) @ components_RE.T @ components_RE + mean_E
        return F.normalize(kept_BE, dim=-1)


def cached_backward(
    batches: Sequence[Batch],
    encode: Callable[[Batch], Any],
    loss_fn: Callable[[Any], dict[str, Tensor]],
    *,
    backward: Callable[[Tensor], Any] = Tensor.backward,
    no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, Tensor]:
    """Gradients of a loss over many micro-batches at once, in the memory of one (GradCache).

    Features of all micro-batches are computed without a graph; the loss over all of them gives a gradient for
    each feature; then each micro-batch is encoded once more and those gradients are sent through it. Exact for
    any loss over any of the output's features, the logit scale included, as long as `encode` is deterministic.

    Args:
        batches: micro-batches; together they are this process's batch.
        encode: micro-batch to a dataclass of features with the samples in their last but one dimension, scalars,
            and None: `FixClip` or a wrapper of it.
        loss_fn: the same dataclass for the whole batch to named losses, of which "loss" is minimised.
        backward: backward pass through the model, `accelerator.backward` for example; it may scale.
        no_sync: context for all micro-batches but the last, so that gradients are averaged over processes once.

    Returns:
        `loss_fn`'s losses, detached.

    Raises:
        ValueError: there are no micro-batches.
    """
    if not batches:
        raise ValueError("no micro-batches: at least one is needed")
    with torch.no_grad():
        outputs = [encode(batch) for batch in batches]
    sizes = [_num_samples(output) for output in outputs]
    whole = _concatenate(outputs)
    losses = loss_fn(whole)
    losses["loss"].backward()
    gradients = _split_gradients(whole, sizes)
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        with nullcontext() if last else no_sync():
            output = encode(batch)
            backward(_surrogate(output, gradients[index]))
    return {name: loss.detach() for name, loss in losses.items()}


def _num_samples(output: Any) -> int:
    sizes = {value.shape[-2] for value in _fields(output).values() if value.ndim >= 2}
    assert len(sizes) == 1, f"features disagree on the number of samples: {sizes}"
    return sizes.pop()


def _fields(output: Any) -> dict[str, Tensor]:
    values = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    return {name: value for name, value in values.items() if value is not None}


def _concatenate(outputs: list[Any]) -> Any:
    """One output for all micro-batches, whose tensors are leaves that collect gradients."""
    merged = {}
    for name, value in _fields(outputs[0]).items():
        if value.ndim >= 2:
            value = torch.cat([getattr(output, name) for output in outputs], dim=-2)
        merged[name] = value.detach().requires_grad_()
    return dataclasses.replace(outputs[0], **merged)


def _split_gradients(whole: Any, sizes: list[int]) -> list[dict[str, Tensor]]:
    """Each micro-batch's share of the gradients; scalars' go to the last one, which is the synchronised one."""
    shares: list[dict[str, Tensor]] = [{} for _ in sizes]
    for name, value in _fields(whole).items():
        if value.grad is None:
            continue
        if value.ndim < 2:
            shares[-1][name] = value.grad
            continue
        for share, part in zip(shares, value.grad.split(sizes, dim=-2), strict=True):
            share[name] = part
    return shares


def _surrogate(output: Any, gradients: dict[str, Tensor]) -> Tensor:
    """A scalar whose gradient by the model's parameters is the loss's."""
    values = _fields(output)
    exact = [torch.promote_types(grad.dtype, torch.float32) for grad in gradients.values()]
    products = [
        (values[name].to(dtype) * grad).sum() for (name, grad), dtype in zip(gradients.items(), exact, strict=True)
    ]
    return torch.stack(products).sum()
