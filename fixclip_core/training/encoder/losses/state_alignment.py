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
sentence's full stop, say, must be the same whichever way the sentence is put. Such tokens are few among those that
L_states averages over, so a second loss is about them alone. With v_t what windows make of the caption as it stands,
p_t what they make of its plain wording, and d_t = |v_t - p_t|^2 / D, how far windows misread token t,

    L_plain = 1 / C  sum over captions  ( sum_t d_t |h_t - p_t|^2 / D ) / sum_t d_t

over the shared tokens of the C captions whose plain wording is another one.

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


def plain_wording_loss(states: Sequence[Tensor], targets: Sequence[Tensor], misread: Sequence[Tensor]) -> Tensor:
    """Sum over captions of the mean squared difference of their tokens, weighted by how far windows misread each.

    Args:
        states: hidden states of the tokens that a caption shares with its plain wording, in one pass, (T, D) each.
        targets: what the base's windows make of the same tokens in the plain wording; constants.
        misread: what they make of them in the caption as it stands; constants. A caption of which they misread
            nothing adds 0.
    """
    total = states[0].new_zeros((), dtype=torch.promote_types(states[0].dtype, torch.float32))
    with torch.autocast(total.device.type, enabled=False):
        for state_TD, target_TD, misread_TD in zip(states, targets, misread, strict=True):
            target_TD = target_TD.detach().to(total.dtype)
            gap_T = (misread_TD.detach().to(total.dtype) - target_TD).square().mean(-1)
            error_T = (state_TD.to(total.dtype) - target_TD).square().mean(-1)
            total = total + (gap_T * error_T).sum() / gap_T.sum().clamp(min=torch.finfo(total.dtype).tiny)
    return total


def with_plain_wording(base: TextTower, batch: CaptionedImages) -> list[int]:
    """Rows of the batch's long captions whose plain wording is another one."""
    if batch.plain_ids is None:
        return []
    pairs = zip(_before_end(base, batch.long_ids), _before_end(base, batch.plain_ids), strict=True)
    return [row for row, (own, plain) in enumerate(pairs) if own != plain]


@dataclass(frozen=True)
class StateAlignment:
    """The losses as a training uses them: their weights, and the base that gives the targets.

    Args:
        base: the frozen base, whole on this process's device. It stands outside of the model, so that neither
            checkpoints nor the optimizer nor averaged weights hold it.
        state: which hidden states are aligned, those that the image generator reads.
        weight: factor of L_states in the total.
        weight_plain: factor of L_plain; 0 leaves it out.
    """

    base: TextTower
    state: HiddenState = "last"
    weight: float = 1.0
    weight_plain: float = 0.0

    def counts(self, batch: CaptionedImages) -> tuple[Tensor, Tensor]:
        """Aligned tokens, and captions with another plain wording, a process: what the losses' sums are divided by.

        They are means over processes. Gradients are averaged over processes, so the average divides by all tokens of
        all processes, however unevenly the captions' lengths fell.
        """
        num_tokens = sum(len(own) for own, _ in shared_positions(self.base, batch))
        own = [num_tokens, len(with_plain_wording(self.base, batch))]
        total = torch.tensor(own, dtype=torch.float32, device=batch.long_ids.device)
        if is_distributed():
            dist.all_reduce(total)
            total = total / dist.get_world_size()
        return total[0], total[1]

    def losses(self, batch: CaptionedImages, output: FixClipOutput, counts: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """ "loss_states" and, with a weight, "loss_plain" of a batch or a part of one; "loss": both with their weights.

        Args:
            batch: the captions.
            output: what `FixClip.forward(batch, state)` made of them.
            counts: `counts` of the whole batch.
        """
        num_tokens, num_plain = counts
        pairs = shared_positions(self.base, batch)
        long_ids = batch.long_ids if batch.plain_ids is None else batch.plain_ids
        found = window_states(self.base, torch.cat([long_ids, batch.short_ids]), self.state)
        states = [state[own] for state, (own, _) in zip(output.text_states, pairs, strict=True)]
        targets = [target[other] for target, (_, other) in zip(found, pairs, strict=True)]
        loss = state_alignment_loss(states, targets, num_tokens)
        losses = {"loss": self.weight * loss, "loss_states": loss}
        if not self.weight_plain:
            return losses
        plain = loss.new_zeros(())
        if rows := with_plain_wording(self.base, batch):
            misread = window_states(self.base, batch.long_ids[rows], self.state)
            own = [state[pairs[row][0]] for row, state in zip(rows, misread, strict=True)]
            plain = plain_wording_loss([states[row] for row in rows], [targets[row] for row in rows], own) / num_plain
        return {**losses, "loss": losses["loss"] + self.weight_plain * plain, "loss_plain": plain}
