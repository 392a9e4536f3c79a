"""A table of absolute positions for longer texts: stretched (method section 2), or kept and continued."""

from typing import Literal, get_args

import torch
from torch import Tensor

# What the longer table starts from: "stretched" is `stretch_positions`, "kept" is `continue_positions`.
PositionStart = Literal["stretched", "kept"]
PERIOD = 35  # rows that "kept" repeats; overlapping windows begin every 35 tokens, too


def stretched_length(length: int, keep: int = 20, ratio: int = 4) -> int:
    """Number of rows that `stretch_positions` makes of `length`: keep + (length - keep) * ratio.

    Raises:
        ValueError: `keep` is outside 0..length, `ratio` below 1, or there are too few rows to extrapolate.
    """
    if not 0 <= keep <= length:
        raise ValueError(f"keep={keep}: it must lie between 0 and the number of positions, {length}")
    if ratio < 1:
        raise ValueError(f"ratio={ratio}: it must be a whole number of at least 1")
    if length < 2 and keep < length and ratio > 1:
        raise ValueError(f"{length} position(s): at least 2 are needed to extrapolate past the last one")
    return keep + (length - keep) * ratio


def stretch_positions(positions_PD: Tensor, keep: int = 20, ratio: int = 4) -> Tensor:
    """Stretch P positions to keep + (P - keep) * ratio; CLIP's 77 become 248 with the defaults.

    The first `keep` rows are copied: short texts live there and they are well trained. Every later row
    becomes `ratio` rows on the straight line to its successor, and the last one goes on along the last
    difference (Long-CLIP's rule). `F.interpolate` computes something else: it moves the anchors and
    clamps at the end.

    Args:
        positions_PD: the table of positions, (P, D), any floating dtype.
        keep: rows that stay as they are.
        ratio: rows made of each remaining row.

    Returns:
        A new tensor, (keep + (P - keep) * ratio, D), of the same dtype and device. Low-precision tables
        are interpolated in float32 and rounded once.

    Raises:
        ValueError: the table is not a floating (P, D) matrix, or see `stretched_length`.
    """
    if positions_PD.ndim != 2 or not positions_PD.is_floating_point():
        raise ValueError(
            f"positions must be a floating-point matrix (positions, width), got shape "
            f"{tuple(positions_PD.shape)} of {positions_PD.dtype}"
        )
    stretched_length(positions_PD.shape[0], keep, ratio)
    kept_KD, anchors_AD = positions_PD[:keep], positions_PD[keep:]
    if ratio == 1 or len(anchors_AD) == 0:
        return positions_PD.clone()
    anchors_AD = anchors_AD.to(torch.promote_types(positions_PD.dtype, torch.float32))
    last_two_2D = positions_PD[-2:].to(anchors_AD)
    successors_AD = torch.cat([anchors_AD[1:], 2 * last_two_2D[1:] - last_two_2D[:1]])
    weight_R1 = torch.arange(ratio, dtype=anchors_AD.dtype, device=anchors_AD.device)[:, None] / ratio
    rows_ARD = anchors_AD[:, None] + weight_R1 * (successors_AD - anchors_AD)[:, None]
    return torch.cat([kept_KD, rows_ARD.flatten(0, 1).to(positions_PD.dtype)])


def continue_positions(positions_PD: Tensor, length: int) -> Tensor:
    """Keep all P rows and continue them to `length` with periodic copies of the last 35.

    Of CLIP's 77 rows, row 77 becomes a copy of row 42, row 111 of row 76, row 112 of row 42 again. Causal attention
    then makes the first 77 hidden states exactly the base's; what follows must be learnt. A token at place 35 w + o of
    a text has the position that it has at place o of the overlapping window w, save for one place in 35.

    Args:
        positions_PD: the table of positions, (P, D).
        length: rows of the result, at least P.

    Returns:
        A new tensor, (length, D).
    """
    return positions_PD[continued_rows(len(positions_PD), length)]


def continued_rows(length: int, new_length: int) -> list[int]:
    """The row of the base's table that each row of `continue_positions` is a copy of."""
    period = min(PERIOD, length)
    return [row if row < length else length - period + (row - length) % period for row in range(new_length)]


def start_positions(positions_PD: Tensor, start: PositionStart, keep: int = 20, ratio: int = 4) -> Tensor:
    """The table of a model that begins to learn long texts, (keep + (P - keep) * ratio, D); CLIP's 77 rows become 248.

    Args:
        positions_PD: the base's table of positions, (P, D).
        start: how the rows are made; there are equally many either way.
        keep, ratio: see `stretch_positions`.

    Raises:
        ValueError: there is no such start, or see `stretch_positions`.
    """
    if start not in get_args(PositionStart):
        raise ValueError(f"positions={start}: it must be one of {', '.join(get_args(PositionStart))}")
    if start == "stretched":
        return stretch_positions(positions_PD, keep, ratio)
    return continue_positions(positions_PD, stretched_length(len(positions_PD), keep, ratio))


def copied_rows(length: int, start: PositionStart, keep: int = 20, ratio: int = 4) -> list[int]:
    """Where the base's rows stand in `start_positions`; in CLIP's, stretched, at 0, 1 ... 19, 20, 24, 28 ... 244."""
    if start == "kept":
        return list(range(length))
    return [*range(keep), *(keep + ratio * row for row in range(length - keep))]
