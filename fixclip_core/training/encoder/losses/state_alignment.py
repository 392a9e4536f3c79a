"""State alignment, an extension of the paper: one pass of 248 tokens learns the states of the base's windows.

The contrastive losses read the end-of-text token alone, so nothing holds the hidden states of the other tokens near
those that an image generator was trained with. Here the frozen base CLIP reads every caption in overlapping windows
of 77 tokens (`model.windows`), the text tower in training reads it in one pass, and with their states h_t and b_t
(D,) of token t

    L_states = 1 / S  sum over captions, sum over their tokens t  |h_t - b_t|^2 / D

The tokens are those of all long and all short captions of all processes, S in number: start token included,
end-of-text token (which belongs to the contrastive losses) and padding left out. A caption that fits into 77 tokens
is one window, so its target is what the base itself makes of it. For example a caption of 100 tokens (start, 98, end)
counts 99: the states of tokens 0..75 come from the first window, those of 76..98 from the second, which begins 35
tokens later.

What a sentence says by pointing to one that lies further back ("the ring has the same colour as the heart"), no window
can read. Where the data give a long caption's plain wording too ("the ring is blue"; `Sample.plain`), the base reads
that one instead, and the tokens are those that the two wordings share (`captions.shared_tokens`): the state of the
sentence's full stop, say, must be the same whichever way the sentence is put.

Shapes: B captions, W windows of a caption, V windows of all captions, T tokens, S tokens of all captions, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fixclip_core.data.captions import shared_tokens
from fixclip_core.model.config import HiddenState
from fixclip_core.model.fixclip import CaptionedImages, FixClipOutput
from fixclip_core.model.text_tower import TextTower
from fixclip_core.model.windows import NO_WINDOW, overlapping_windows, window_and_offset
from fixclip_core.training.encoder.losses.contrastive import is_distributed


def state_alignment_loss(
    states: Sequence[Tensor], targets: Sequence[Tensor], num_tokens: Tensor | int | None = None
) -> Tensor:
    """Mean over tokens and width of the squared difference, in float32 whatever the autocast.

    Args:
        states: hidden states of each caption's tokens in one pass, (T, D) each.
        targets: what the base's windows make of the same tokens, of the same shapes; constants.
        num_tokens: tokens to divide by instead of those given, where these are a part of the batch.

    Raises:
        ValueError: states and targets are not those of the same tokens.
    """
    if [state.shape for state in states] != [target.shape for target in targets]:
        raise ValueError("hidden states and targets differ in shape: they must be those of the same captions")
    states_SD, targets_SD = torch.cat(list(states)), torch.cat(list(targets))
    with torch.autocast(states_SD.device.type, enabled=False):
        dtype = torch.promote_types(states_SD.dtype, torch.float32)
        error_SD = states_SD.to(dtype) - targets_SD.detach().to(dtype)
        return error_SD.square().mean(dim=-1).sum() / (len(error_SD) if num_tokens is None else num_tokens)


@torch.no_grad()
def window_states(base: TextTower, ids_BT: Tensor, state: HiddenState) -> tuple[Tensor, ...]:
    """Hidden states of each caption's tokens in the overlapping windows of a base of 77 tokens.

    Args:
        base: the frozen text tower, see `FixClip.base_text_tower`.
        ids_BT: token ids, (B, T), T at least 77.
        state: which hidden states.

    Returns:
        A matrix (tokens, D) for each caption: start token included, end-of-text token and padding left out.
    """
    last_B = base.last_token(ids_BT)
    ids_BWT = overlapping_windows(ids_BT, last_B + 1)
    is_window_BW = ids_BWT[..., 0] != NO_WINDOW
    _, _, windows = base.encode_states(ids_BWT[is_window_BW], state)
    # Row of each window's first state in the states of all windows; those of a caption follow each other.
    lengths_V = torch.tensor([len(window) for window in windows], device=ids_BT.device)
    first_BW = torch.zeros_like(ids_BWT[..., 0]).masked_scatter(is_window_BW, lengths_V.cumsum(0) - lengths_V)
    window_BT, offset_BT = window_and_offset(last_B + 1, ids_BT.shape[1])
    row_BT = first_BW.gather(1, window_BT) + offset_BT
    before_end_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device) < last_B[:, None]
    return torch.cat(windows)[row_BT[before_end_BT]].split(last_B.tolist())


def shared_positions(base: TextTower, batch: CaptionedImages) -> list[tuple[Tensor, Tensor]]:
    """Positions of the aligned tokens of each caption, long ones before short ones, and of their targets' tokens.

    The end-of-text token is left out. All tokens of a caption that has no other wording are aligned with themselves.
    """
    plain_ids = batch.long_ids if batch.plain_ids is None else batch.plain_ids
    pairs = []
    for ids_BT, other_BT in ((batch.long_ids, plain_ids), (batch.short_ids, batch.short_ids)):
        rows, others = (_before_end(base, ids) for ids in (ids_BT, other_BT))
        shared = [shared_tokens(row, other) for row, other in zip(rows, others, strict=True)]
        device = ids_BT.device
        pairs += [(torch.tensor(own, device=device), torch.tensor(targets, device=device)) for own, targets in shared]
    return pairs


def _before_end(base: TextTower, ids_BT: Tensor) -> list[tuple[int, ...]]:
    ends = base.last_token(ids_BT).tolist()
    return [tuple(row[:end]) for row, end in zip(ids_BT.tolist(), ends, strict=True)]


@dataclass(frozen=True)
class StateAlignment:
    """The loss as a training uses it: its weight, and the base that gives the targets.

    Args:
        base: the frozen base, whole on this process's device. It stands outside of the model, so that neither
            checkpoints nor the optimizer nor averaged weights hold it.
        state: which hidden states are aligned, those that the image generator reads.
        weight: factor of the loss in the total.
    """

    base: TextTower
    state: HiddenState = "last"
    weight: float = 1.0

    def num_tokens(self, batch: CaptionedImages) -> Tensor:
        """Aligned tokens a process, the mean over processes: what the loss of each must divide its sum by.

        Gradients are averaged over processes, so the average divides by all tokens of all processes, however
        unevenly the captions' lengths fell.
        """
        pairs = shared_positions(self.base, batch)
        total = torch.tensor(sum(len(own) for own, _ in pairs), dtype=torch.float64, device=batch.long_ids.device)
        if is_distributed():
            dist.all_reduce(total)
            total = total / dist.get_world_size()
        return total

    def losses(self, batch: CaptionedImages, output: FixClipOutput, num_tokens: Tensor) -> dict[str, Tensor]:
        """ "loss_states", and "loss" with its weight, of a batch or a part of one.

        Args:
            batch: the captions.
            output: what `FixClip.forward(batch, state)` made of them.
            num_tokens: `num_tokens` of the whole batch.
        """
        pairs = shared_positions(self.base, batch)
        long_ids = batch.long_ids if batch.plain_ids is None else batch.plain_ids
        targets = window_states(self.base, torch.cat([long_ids, batch.short_ids]), self.state)
        states = [state[own] for state, (own, _) in zip(output.text_states, pairs, strict=True)]
        wanted = [target[other] for target, (_, other) in zip(targets, pairs, strict=True)]
        loss = state_alignment_loss(states, wanted, num_tokens)
        return {"loss": self.weight * loss, "loss_states": loss}
