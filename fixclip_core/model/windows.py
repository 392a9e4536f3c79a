"""Overlapping windows: a text longer than 77 tokens as passes of a CLIP text encoder, one hidden state a token.

A window is [start, up to 75 tokens of the text, end], and windows begin every 35 tokens, so that each overlaps the
one before by 40. A text of 100 tokens (98 words between start and end) has two: words 0..74 and words 35..97. The
state of token t is read from the first window that holds it, in which at least 40 tokens stand before it, or all
there are.

Shapes: B texts, W windows of a text, V windows of all texts, T tokens, D width.
"""

import torch
from torch import Tensor

WINDOW_LENGTH = 77  # tokens of a pass, start and end included
WINDOW_STRIDE = 35  # tokens between the beginnings of two windows
NO_WINDOW = -1  # fills the ids behind a text's last window


def num_overlapping(num_tokens_B: Tensor) -> Tensor:
    """(B,) windows of texts of so many tokens, start and end included: 77 -> 1, 78 -> 2, 112 -> 2, 113 -> 3."""
    beyond_B = (num_tokens_B - WINDOW_LENGTH).clamp(min=0)
    return 1 + -(-beyond_B // WINDOW_STRIDE)


def overlapping_windows(ids_BT: Tensor, num_tokens_B: Tensor) -> Tensor:
    """Ids (B, W, 77) of the overlapping windows of each text; W is that of the longest text.

    A text that fits into 77 tokens is one window, with its padding. What pads the last window of a longer one is the
    end token, which no other state reads. Windows behind a text's last are NO_WINDOW.

    Args:
        ids_BT: padded ids, T at least 77.
        num_tokens_B: tokens of each text, start and end included, at most T.

    Raises:
        ValueError: T is below 77.
    """
    if ids_BT.shape[1] < WINDOW_LENGTH:
        raise ValueError(f"ids of shape {tuple(ids_BT.shape)}: pad them to at least {WINDOW_LENGTH} tokens")
    num_tokens_B = num_tokens_B.to(ids_BT.device)
    counts_B = num_overlapping(num_tokens_B)
    window_W = torch.arange(int(counts_B.max()), device=ids_BT.device)
    offset_T = torch.arange(WINDOW_LENGTH, device=ids_BT.device)
    place_WT = WINDOW_STRIDE * window_W[:, None] + offset_T
    place_WT[:, 0] = 0  # every window begins with the start token
    place_WT[:, -1] = ids_BT.shape[1]  # and has room for the end token
    place_BWT = torch.minimum(place_WT, num_tokens_B[:, None, None] - 1)
    ids_BWT = ids_BT.gather(1, place_BWT.flatten(1)).view(place_BWT.shape)
    ids_BWT[:, 0] = torch.where(counts_B[:, None] == 1, ids_BT[:, :WINDOW_LENGTH], ids_BWT[:, 0])
    return ids_BWT.masked_fill(window_W[:, None] >= counts_B[:, None, None], NO_WINDOW)


def window_and_offset(num_tokens_B: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Where the state of each token is read: its window and its place in that window, (B, length) each.

    The start token is read in the first window, the end token in the last one.

    Args:
        num_tokens_B: tokens of each text, start and end included.
        length: how many tokens to look up; what lies behind a text's end points into its last window.
    """
    place_T = torch.arange(length, device=num_tokens_B.device)
    window_T = -(-(place_T - WINDOW_LENGTH + 2).clamp(min=0) // WINDOW_STRIDE)
    window_BT = torch.minimum(window_T, num_overlapping(num_tokens_B)[:, None] - 1)
    return window_BT, (place_T - WINDOW_STRIDE * window_BT).clamp(max=WINDOW_LENGTH - 1)
