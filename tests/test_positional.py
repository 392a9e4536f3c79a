"""Stretched positions against rows computed by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fixclip_core.model.positional import (
    continue_positions,
    copied_rows,
    start_positions,
    stretch_positions,
    stretched_length,
)


def plain_stretch(table: torch.Tensor, keep: int, ratio: int) -> torch.Tensor:
    """The rule of method section 2, a row at a time."""
    rows = [table[i] for i in range(keep)]
    last = table.shape[0] - 1
    for i in range((table.shape[0] - keep) * ratio):
        anchor, w = keep + i // ratio, (i % ratio) / ratio
        if anchor < last:
            rows.append((1 - w) * table[anchor] + w * table[anchor + 1])
        else:
            rows.append(table[last] + w * (table[last] - table[last - 1]))
    return torch.stack(rows)


def test_hand_computed_rows():
    table = torch.tensor([[0.0, 7.0], [1.0, 3.0], [3.0, 1.0]])
    by_hand = torch.tensor([[0.0, 7.0], [1.0, 3.0], [2.0, 2.0], [3.0, 1.0], [4.0, 0.0]])
    assert torch.equal(stretch_positions(table, keep=1, ratio=2), by_hand)


def test_clip_77_to_248():
    table = torch.randn(77, 8, dtype=torch.float64)
    long = stretch_positions(table)
    assert long.shape == (248, 8)
    assert torch.equal(long[:20], table[:20])
    assert torch.equal(long[20::4], table[20:]), "anchors stay what they were"
    torch.testing.assert_close(long[22], (table[20] + table[21]) / 2)
    torch.testing.assert_close(long[247], table[76] + 0.75 * (table[76] - table[75]))


@given(length=st.integers(2, 90), keep=st.integers(0, 90), ratio=st.integers(1, 6), width=st.integers(1, 5))
def test_equals_the_plain_rule(length, keep, ratio, width):
    keep = min(keep, length)
    table = torch.randn(length, width, dtype=torch.float64)
    long = stretch_positions(table, keep, ratio)
    assert long.shape[0] == stretched_length(length, keep, ratio)
    torch.testing.assert_close(long, plain_stretch(table, keep, ratio))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_round_once(dtype):
    table = torch.randn(77, 4).to(dtype)
    long = stretch_positions(table)
    assert long.dtype == dtype
    exact = plain_stretch(table.double(), 20, 4).to(dtype)
    torch.testing.assert_close(long, exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_result_is_a_copy_and_carries_gradients():
    table = torch.randn(6, 2, requires_grad=True)
    stretch_positions(table, 2, 3).sum().backward()
    assert table.grad is not None
    same = stretch_positions(table.detach(), 2, 1)
    same.zero_()
    assert not torch.equal(same, table.detach())


@pytest.mark.parametrize(
    ("shape", "keep", "ratio", "message"),
    [
        ((77, 4), 78, 4, "keep=78.*between 0 and the number of positions, 77"),
        ((77, 4), -1, 4, "keep=-1"),
        ((77, 4), 20, 0, "ratio=0"),
        ((1, 4), 0, 2, "at least 2"),
        ((77,), 20, 4, r"matrix.*\(77,\)"),
    ],
)
def test_bad_input_names_the_value(shape, keep, ratio, message):
    with pytest.raises(ValueError, match=message):
        stretch_positions(torch.zeros(shape), keep, ratio)


def test_integers_are_refused():
    with pytest.raises(ValueError, match=r"torch\.int64"):
        stretch_positions(torch.zeros(77, 4, dtype=torch.int64))


def test_kept_positions_go_on_periodically():
    table = torch.randn(77, 4)
    long = continue_positions(table, 248)
    assert long.shape == (248, 4)
    assert torch.equal(long[:77], table)
    for row in range(77, 248):
        assert torch.equal(long[row], table[42 + (row - 77) % 35])


@given(
    length=st.integers(2, 90),
    keep=st.integers(0, 90),
    ratio=st.integers(1, 6),
    start=st.sampled_from(["stretched", "kept"]),
)
def test_the_base_is_found_again_in_its_copy(length, keep, ratio, start):
    keep = min(keep, length)
    table = torch.randn(length, 3)
    long = start_positions(table, start, keep, ratio)
    assert len(long) == stretched_length(length, keep, ratio)
    assert torch.equal(long[:keep], table[:keep])
    assert torch.equal(long[copied_rows(length, start, keep, ratio)], table)


def test_an_unknown_start_is_refused():
    with pytest.raises(ValueError, match="positions=long: it must be one of stretched, kept"):
        start_positions(torch.zeros(77, 4), "long")
