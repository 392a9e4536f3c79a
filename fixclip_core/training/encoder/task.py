"""Batch -> named losses, and the one place that weighs them.

Loss = weight_long * long + weight_short * short + weight_himo * himo + sum over the aligned groups g of
weight_mid[g] * mid_g, each a symmetric InfoNCE over the batch of all processes, + weight_states * states
+ weight_plain * plain (`losses.state_alignment`).

Shapes: B samples of this process, E embedding, G aligned groups.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fixclip_core.model.config import FixClipConfig
from fixclip_core.model.fixclip import FixClip, FixClipOutput
from fixclip_core.training.encoder.losses.contrastive import contrastive_loss
from fixclip_core.training.encoder.losses.gradcache import add_losses, cached_backward
from fixclip_core.training.encoder.losses.hierarchical import hierarchical_losses
from fixclip_core.training.encoder.losses.pca import pca_reconstruction, variance_reconstruction
from fixclip_core.training.encoder.losses.state_alignment import StateAlignment
from fixclip_core.training.encoder.recipe import TrainSection


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
        weight_himo: weight of the image against what the batch's principal components keep of the long caption's
            feature (HiMo-CLIP); 0: left out.
        himo_variance: share of the variance that these components hold.
        alignment: the hidden states that are aligned with the base's; None without.
    """

    weight_long: float = 1.0
    weight_short: float = 1.0
    weight_mid: tuple[float, ...] = (1.0,)
    label_smoothing: float = 0.0
    chunk_size: int | None = None
    first_group: int = 1
    pca_rank: int | None = None
    weight_himo: float = 0.0
    himo_variance: float = 0.9
    alignment: StateAlignment | None = None

    @classmethod
    def from_recipe(
        cls, train: TrainSection, config: FixClipConfig, alignment: StateAlignment | None = None
    ) -> "ContrastiveTask":
        return cls(
            weight_long=train.weight_long,
            weight_short=train.weight_short,
            weight_mid=tuple(train.weight_mid),
            label_smoothing=train.label_smoothing,
            chunk_size=train.loss_chunk_size,
            first_group=config.first_group,
            pca_rank=config.pca_rank if config.short_branch == "pca" else None,
            weight_himo=train.weight_himo,
            himo_variance=train.himo_variance,
            alignment=alignment,
        )

    def losses(self, output: FixClipOutput) -> dict[str, Tensor]:
        """Named contrastive losses of this process's rows; "loss" is their weighted sum, the one to minimise.

        Returns:
            "loss", "loss_long", and as far as they are on "loss_short", "loss_himo" and "loss_mid_K".."loss_mid_G".

        Raises:
            ValueError: there are neither one weight_mid nor as many as aligned groups.
        """
        options: dict[str, Any] = {"label_smoothing": self.label_smoothing, "chunk_size": self.chunk_size}
        scale = output.logit_scale
        assert output.image_long_BE is not None
        assert output.text_long_BE is not None
        losses = {"long": contrastive_loss(output.image_long_BE, output.text_long_BE, scale, **options)}
        weights = {"long": self.weight_long}
        if output.text_short_BE is not None:
            losses["short"] = short_loss(self._short_image(output), output.text_short_BE, scale, **options)
            weights["short"] = self.weight_short
        if self.weight_himo:
            # HiMo-CLIP (arXiv 2511.06653): L = InfoNCE(image, text) + weight * InfoNCE(image, components of the text).
            # losses/pca.py lists where this leaves its published code.
            text_BE = variance_reconstruction(output.text_long_BE, self.himo_variance)
            losses["himo"] = contrastive_loss(output.image_long_BE, text_BE, scale, **options)
            weights["himo"] = self.weight_himo
        if output.image_mid_GBE is not None and output.text_mid_GBE is not None:
            mid_G = hierarchical_losses(output.image_mid_GBE, output.text_mid_GBE, scale, **options)
            for group, (loss, weight) in enumerate(zip(mid_G, self._group_weights(len(mid_G)), strict=True)):
                losses[f"mid_{self.first_group + group}"] = loss
                weights[f"mid_{self.first_group + group}"] = weight
        total = torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()
        return {"loss": total} | {f"loss_{name}": loss for name, loss in losses.items()}

    def _short_image(self, output: FixClipOutput) -> Tensor:
        """The image features that short captions meet, (B, E)."""
        if self.pca_rank is None:
            assert output.image_short_BE is not None
            return output.image_short_BE
        assert output.image_long_BE is not None
        return pca_reconstruction(output.image_long_BE, self.pca_rank)

    def _group_weights(self, groups: int) -> tuple[float, ...]:
        weights = self.weight_mid * groups if len(self.weight_mid) == 1 else self.weight_mid
        if len(weights) != groups:
            raise ValueError(f"weight_mid={list(self.weight_mid)}: give 1 weight, or {groups}, one a group")
        return weights

    def encode(self, model: nn.Module, batch: Any) -> FixClipOutput:
        """The model's output, with the hidden states that the losses read."""
        return model(batch) if self.alignment is None else model(batch, state=self.alignment.state)

    def own_losses(
        self, batch: Any, autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> Callable[[Any, FixClipOutput], dict[str, Tensor]] | None:
        """The losses of which each sample has its own, as a function of a part of the batch and its output.

        None if there are none. `autocast` is what the frozen base is run under. Every process must ask.
        """
        if self.alignment is None:
            return None
        counts, alignment = self.alignment.counts(batch), self.alignment

        def losses(part: Any, output: FixClipOutput) -> dict[str, Tensor]:
            with autocast():
                return alignment.losses(part, output, counts)

        return losses

    def batch_losses(
        self, model: nn.Module, batch: Any, autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> dict[str, Tensor]:
        """All losses of a batch in one pass, with their graph; "loss" is the one to minimise."""
        output = self.encode(model, batch)
        own_losses = self.own_losses(batch, autocast)
        losses = self.losses(output)
        return losses if own_losses is None else add_losses(losses, own_losses(batch, output))


def short_loss(image_BE: Tensor, text_BE: Tensor, scale: Tensor, **options: Any) -> Tensor:
    """The loss of short captions, the mean over captions where images have several: 1/K sum_k InfoNCE(image, text_k).

    The multi-positive loss of DreamLIP (Zheng et al., ECCV 2024), whose sub-captions are sampled from the sentences of
    a long one: an image's own captions are no negatives of each other.

    Args:
        image_BE: features, (B, E).
        text_BE: (B, E), or (K, B, E).
        scale: the logit scale.
        options: of `contrastive_loss`.
    """
    if text_BE.ndim == 2:
        return contrastive_loss(image_BE, text_BE, scale, **options)
    return torch.stack([contrastive_loss(image_BE, own_BE, scale, **options) for own_BE in text_BE]).mean()


def make_alignment(train: TrainSection, clip: FixClip, device: torch.device | str) -> StateAlignment | None:
    """The recipe's state alignment with the model's base, which `clip` must still equal; None where it is off.

    Raises:
        ValueError: the base has not 77 positions.
    """
    if not train.weight_states:
        return None
    try:
        base = clip.base_text_tower().to(device)
    except ValueError as error:
        raise ValueError(f"train.weight_states={train.weight_states}: {error}") from None
    return StateAlignment(base, train.align_state, train.weight_states, train.weight_plain)


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
        losses = task.batch_losses(model, batch, accelerator.autocast)
        accelerator.backward(losses["loss"])
        return {name: loss.detach() for name, loss in losses.items()}
    return cached_backward(
        split_batch(batch, micro_batch_size),
        partial(task.encode, model),
        task.losses,
        own_losses=task.own_losses(batch, accelerator.autocast),
        backward=accelerator.backward,
        no_sync=partial(accelerator.no_sync, model),
    )


def split_batch(batch: Any, size: int) -> list[Any]:
    """Consecutive parts of at most `size` samples: a batch's tensors cut, all else of it left as it is."""
    tensors = {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}

    def part(name: str, tensor: Tensor, start: int) -> Tensor:
        # (K, B, T); packed layouts of an adapter's captions have three dimensions too, in the long ones as well.
        several = name == "short_ids" and tensor.ndim > batch.long_ids.ndim
        return tensor[:, start : start + size] if several else tensor[start : start + size]

    starts = range(0, len(batch.image), size)
    return [replace(batch, **{name: part(name, t, start) for name, t in tensors.items()}) for start in starts]
