"""Stretching a table of absolute positions: keep the first rows, interpolate the rest (method section 2)."""

import torch
from torch import Tensor


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


def copied_rows(length: int, keep: int = 20, ratio: int = 4) -> list[int]:
    """Where `stretch_positions` leaves the rows of the table that it stretches: 0..19, 20, 24, 28 ... 244 for CLIP."""
    stretched_length(length, keep, ratio)
    return [*range(keep), *(keep + ratio * row for row in range(length - keep))]
