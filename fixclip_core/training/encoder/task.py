"""Batch -> named losses, and the one place that weighs them.

Loss = weight_long * long + weight_short * short + sum over the aligned groups g of weight_mid[g] * mid_g, each a
symmetric InfoNCE over the batch of all processes.

Shapes: B samples of this process, E embedding, G aligned groups.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fixclip_core.model.config import FixClipConfig
from fixclip_core.model.fixclip import FixClipOutput
from fixclip_core.training.encoder.losses import cached_backward, contrastive_loss, pca_reconstruction
from fixclip_core.training.recipe import TrainSection


@dataclass(frozen=True)
class ContrastiveTask:
    """What of the model's output counts, and how much.

    Args:
        weight_long: weight of the whole image against the long caption.
        weight_short: weight of the short branch, where the model has one.
        weight_mid: one weight for every aligned group, or one each.
        label_smoothing: share of each target spread over all pairs.
        chunk_size: rows of the similarity matrix held at once; None: all of this process's.
        first_group: number of the first aligned group, for the names of the losses.
        pca_rank: components of Long-CLIP's short branch; None without it.
    """

    weight_long: float = 1.0
    weight_short: float = 1.0
    weight_mid: tuple[float, ...] = (1.0,)
    label_smoothing: float = 0.0
    chunk_size: int | None = None
    first_group: int = 1
    pca_rank: int | None = None

    @classmethod
    def from_recipe(cls, train: TrainSection, config: FixClipConfig) -> "ContrastiveTask":
        return cls(
            weight_long=train.weight_long,
            weight_short=train.weight_short,
            weight_mid=tuple(train.weight_mid),
            label_smoothing=train.label_smoothing,
            chunk_size=train.loss_chunk_size,
            first_group=config.first_group,
            pca_rank=config.pca_rank if config.short_branch == "pca" else None,
        )

    def losses(self, output: FixClipOutput) -> dict[str, Tensor]:
        """Named losses of this process's rows; "loss" is their weighted sum, the only one to minimise.

        Returns:
            "loss", "loss_long", and as far as the model has them "loss_short" and "loss_mid_K".."loss_mid_G".

        Raises:
            ValueError: there are neither one weight_mid nor as many as aligned groups.
        """
        loss_fn = partial(contrastive_loss, label_smoothing=self.label_smoothing, chunk_size=self.chunk_size)
        parts = [
            (f"loss_{name}", weight, loss_fn(image_BE, text_BE, output.logit_scale))
            for name, weight, image_BE, text_BE in self._pairs(output)
        ]
        total = torch.stack([weight * loss for _, weight, loss in parts]).sum()
        return {"loss": total} | {name: loss for name, _, loss in parts}

    def _pairs(self, output: FixClipOutput) -> Iterator[tuple[str, float, Tensor, Tensor]]:
        """(name, weight, image features, text features) of each loss."""
        assert output.image_long_BE is not None
        assert output.text_long_BE is not None
        yield "long", self.weight_long, output.image_long_BE, output.text_long_BE
        if output.text_short_BE is not None:
            image_BE = output.image_short_BE
            if self.pca_rank is not None:
                image_BE = pca_reconstruction(output.image_long_BE, self.pca_rank)
            assert image_BE is not None
            yield "short", self.weight_short, image_BE, output.text_short_BE
        if output.image_mid_GBE is not None and output.text_mid_GBE is not None:
            groups = len(output.image_mid_GBE)
            weights = self.weight_mid * groups if len(self.weight_mid) == 1 else self.weight_mid
            if len(weights) != groups:
                raise ValueError(f"weight_mid={list(self.weight_mid)}: give 1 weight, or {groups}, one a group")
            for group in range(groups):
                name = f"mid_{self.first_group + group}"
                yield name, weights[group], output.image_mid_GBE[group], output.text_mid_GBE[group]


def forward_backward(
    accelerator: Accelerator,
    model: nn.Module,
    batch: Any,
    task: ContrastiveTask,
    micro_batch_size: int | None = None,
) -> dict[str, Tensor]:
    """One batch's losses, detached, with their gradients left in the model's parameters.

    With a `micro_batch_size` below this process's batch only so many samples are in memory at a time; the
    gradient is still that of the whole batch (GradCache), where plain accumulation would lose its negatives.

    Args:
        accelerator: it scales and synchronises.
        model: a prepared `FixClip`.
        batch: a `data.Batch` on the model's device.
        task: the losses.
        micro_batch_size: samples a pass.
    """
    if micro_batch_size is None or micro_batch_size >= len(batch.image):
        losses = task.losses(model(batch))
        accelerator.backward(losses["loss"])
        return {name: loss.detach() for name, loss in losses.items()}
    return cached_backward(
        split_batch(batch, micro_batch_size),
        model,
        task.losses,
        backward=accelerator.backward,
        no_sync=partial(accelerator.no_sync, model),
    )


def split_batch(batch: Any, size: int) -> list[Any]:
    """Consecutive parts of at most `size` samples: a batch's tensors cut, all else of it left as it is."""
    names = ("image", "long_ids", "short_ids", "seeds")
    starts = range(0, len(batch.image), size)
    return [replace(batch, **{name: getattr(batch, name)[start : start + size] for name in names}) for start in starts]
