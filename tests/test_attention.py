"""Attention written out where torch's fused kernel is slow, against that kernel and float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fixclip_core.model.attention import attend
from fixclip_diffusion.adapter import TextAdapter


@pytest.mark.parametrize(
    ("queries", "keys", "masked", "is_causal"),
    [(17, 17, False, False), (5, 21, True, False), (33, 33, False, True), (1, 9, True, False)],
)
def test_bfloat16_attention_is_as_good_as_the_fused_kernel(queries, keys, masked, is_causal):
    """Against float64; rounding is all that is left, within twice the fused kernel's."""
    q, k, v = (torch.randn(2, 3, n, 16).bfloat16().requires_grad_() for n in (queries, keys, keys))
    mask = (torch.rand(queries, keys) < 0.5).index_fill_(1, torch.tensor(0), True) if masked else None
    weights = torch.randn(2, 3, queries, 16)

    def outcome(attention, dtype: torch.dtype) -> list[Tensor]:
        out = attention(q.to(dtype), k.to(dtype), v.to(dtype), attn_mask=mask, is_causal=is_causal)
        return [out, *torch.autograd.grad(out, (q, k, v), weights.to(dtype))]

    exact = outcome(F.scaled_dot_product_attention, torch.float64)
    fused = outcome(F.scaled_dot_product_attention, torch.bfloat16)
    for ours, theirs, truth in zip(outcome(attend, torch.bfloat16), fused, exact, strict=True):
        bound = 2.5 * (theirs.double() - truth.double()).norm() + 1e-3 * truth.double().norm()
        assert (ours.double() - truth.double()).norm() <= bound

    with torch.no_grad():
        read = attend(q, k, v, attn_mask=mask, is_causal=is_causal).double()
    truth = exact[0].double()
    assert (read - truth).norm() <= 2.5 * (fused[0].double() - truth).norm() + 1e-3 * truth.norm()


@pytest.mark.parametrize("more", [{}, {"rotary": True, "causal_heads": 2}], ids=["plain", "rotary"])
def test_an_adapter_in_bfloat16_learns_as_in_float64(more):
    """Its output and all its gradients on masked texts, against float64; autocast to bfloat16 is all the difference."""
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "num_heads": 4, "max_tokens": 24}
    adapter = TextAdapter(32, kind="attention", mask_padding=True, **sizes, **more)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    states_BTD, weights_BTD = torch.randn(2, 3, 24, 32).double()
    text_BT = torch.arange(24) < torch.tensor([24, 17, 1])[:, None]

    def outcome(dtype: torch.dtype) -> list[Tensor]:
        adapter.double() if dtype == torch.float64 else adapter.float()
        states = states_BTD.to(adapter.position_embedding.dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = adapter(states, text_BT)
        loss = (out * weights_BTD.to(out.dtype) * text_BT[..., None]).sum()
        return [out.double(), *(part.double() for part in torch.autograd.grad(loss, list(adapter.parameters())))]

    for close, exact in zip(outcome(torch.bfloat16), outcome(torch.float64), strict=True):
        assert (close - exact).norm() <= 0.03 * exact.norm()
