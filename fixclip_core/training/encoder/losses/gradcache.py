"""Large batches in small passes: exact gradients of a loss over features of many micro-batches (GradCache).

Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, 2021.
"""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

Batch = TypeVar("Batch")


def cached_backward(
    batches: Sequence[Batch],
    encode: Callable[[Batch], Any],
    loss_fn: Callable[[Any], dict[str, Tensor]],
    *,
    own_losses: Callable[[Batch, Any], dict[str, Tensor]] | None = None,
    backward: Callable[[Tensor], Any] = Tensor.backward,
    no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, Tensor]:
    """Gradients of a loss over many micro-batches at once, in the memory of one (GradCache).

    Features of all micro-batches are computed without a graph; the loss over all of them gives a gradient for
    each feature; then each micro-batch is encoded once more and those gradients are sent through it. Exact for
    any loss over any of the output's features, the logit scale included, as long as `encode` is deterministic.

    Args:
        batches: micro-batches; together they are this process's batch.
        encode: micro-batch to a dataclass of features with the samples in their last but one dimension and scalars:
            `FixClip` or a wrapper of it. Fields that hold no tensor are for `own_losses`.
        loss_fn: the same dataclass for the whole batch to named losses, of which "loss" is minimised.
        own_losses: micro-batch and its output to named losses that read no other micro-batch and add up over them:
            sums over samples, divided by what the whole batch holds. Its "loss" is minimised with `loss_fn`'s.
        backward: backward pass through the model, `accelerator.backward` for example; it may scale.
        no_sync: context for all micro-batches but the last, so that gradients are averaged over processes once.

    Returns:
        The losses of both, detached.

    Raises:
        ValueError: there are no micro-batches.
    """
    if not batches:
        raise ValueError("no micro-batches: at least one is needed")
    with torch.no_grad():
        outputs = [_features(encode(batch)) for batch in batches]
    sizes = [_num_samples(output) for output in outputs]
    whole = _concatenate(outputs)
    losses = loss_fn(whole)
    losses["loss"].backward()
    gradients = _split_gradients(whole, sizes)
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        with nullcontext() if last else no_sync():
            output = encode(batch)
            own = {} if own_losses is None else own_losses(batch, output)
            surrogate = _surrogate(output, gradients[index])
            backward(surrogate + own["loss"] if own else surrogate)
        losses = add_losses(losses, {name: loss.detach() for name, loss in own.items()})
    return {name: loss.detach() for name, loss in losses.items()}


def add_losses(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
    """Named losses added by name: {"loss": 1, "loss_long": 1} and {"loss": 2} make {"loss": 3, "loss_long": 1}."""
    sums = {name: one[name] + loss if name in one else loss for name, loss in other.items()}
    return one | sums


def _num_samples(output: Any) -> int:
    sizes = {value.shape[-2] for value in _fields(output).values() if value.ndim >= 2}
    assert len(sizes) == 1, f"features disagree on the number of samples: {sizes}"
    return sizes.pop()


def _fields(output: Any) -> dict[str, Tensor]:
    values = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _features(output: Any) -> Any:
    """The output without the fields that hold no tensor: nothing reads those of the pass without a graph."""
    tensors = _fields(output)
    others = [field.name for field in dataclasses.fields(output) if field.name not in tensors]
    return dataclasses.replace(output, **dict.fromkeys(others))


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
