"""Attention as the towers and the adapter compute it.

Shapes: B batch, T tokens, D width, H heads, Q queries, K keys, d = D / H.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def split_heads(x_BTD: Tensor, num_heads: int) -> Tensor:
    """(B, T, D) to (B, H, T, D / H), as a view."""
    return x_BTD.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def rotate_by_position(x_BHTd: Tensor) -> Tensor:
    """Turn queries or keys by their positions, so that their products depend on how far apart they stand.

    Numbers i and i + d/2 of the vector at position t are the two parts of a complex number, which is turned by
    t / 10000^(2 i / d) (RoFormer, section 3.2.2; pairs as in GPT-NeoX). d is even.
    """
    half = x_BHTd.shape[-1] // 2
    speed_d = 10000.0 ** (-torch.arange(half, device=x_BHTd.device) / half)
    angle_Td = torch.outer(torch.arange(x_BHTd.shape[-2], device=x_BHTd.device), speed_d)
    cos_Td, sin_Td = angle_Td.cos().to(x_BHTd.dtype), angle_Td.sin().to(x_BHTd.dtype)
    first, second = x_BHTd.chunk(2, dim=-1)
    return torch.cat([first * cos_Td - second * sin_Td, second * cos_Td + first * sin_Td], dim=-1)


def attend(
    query_BHQd: Tensor,
    key_BHKd: Tensor,
    value_BHKd: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention`, except in bfloat16 on a CPU where gradients are wanted.

    There the fused kernel's backward pass of torch 2.14 and 2.15 makes both passes take two to eight times as long as
    the two products and the softmax written out. Forward alone it takes 0.4 to 0.6 of the time on causal texts of 130
    to 200 tokens, and as long on images of 41 (one core with AVX512-BF16).

    Args:
        query_BHQd: queries, (B, H, Q, d).
        key_BHKd: keys, (B, H, K, d).
        value_BHKd: values, (B, H, K, d).
        attn_mask: True where a query may read a key, broadcastable to (B, H, Q, K).
        is_causal: query i reads keys 0..i.
    """
    slow_backward = query_BHQd.device.type == "cpu" and query_BHQd.dtype == torch.bfloat16
    if not (slow_backward and torch.is_grad_enabled()):
        return F.scaled_dot_product_attention(
            query_BHQd, key_BHKd, value_BHKd, attn_mask=attn_mask, is_causal=is_causal
        )
    logits_BHQK = (query_BHQd * query_BHQd.shape[-1] ** -0.5) @ key_BHKd.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(logits_BHQK.shape[-2:], dtype=torch.bool, device=query_BHQd.device).tril()
    if attn_mask is not None:
        barred = torch.zeros(attn_mask.shape, dtype=logits_BHQK.dtype, device=attn_mask.device)
        # Adding keeps nothing for the backward pass, unlike filling the logits.
        logits_BHQK = logits_BHQK + barred.masked_fill_(~attn_mask, float("-inf"))
    return logits_BHQK.softmax(dim=-1) @ value_BHKd
