"""The image tower: regional prompts with one-way attention, and the masked patches of the short branch.

FIX-CLIP adds M learnable prompts to every image layer. CLS reads itself, the prompts and the patches; a patch
reads CLS and patches only; prompt j reads itself and its own region, the floor(N / M) patches from
j * floor(N / M) on in raster order (the last region takes the remainder).

The sequence is laid out [patches, CLS, prompts] instead of [CLS, prompts, patches]: attention does not care
about the order, and every set of keys and queries above becomes a slice. Patches see the first N + 1 tokens
without a mask, so they run on fused kernels; only the 1 + M readers need one, of (1 + M) x (N + 1 + M).

Shapes: B batch, N patches, K patches that are kept, M prompts, T tokens of a sequence, R readers (CLS and
prompts), D width, H heads, L layers, E embedding, C H W image.
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fixclip_core.model.attention import attend, split_heads
from fixclip_core.model.config import PromptFlow


def region_of_patch(num_patches: int, num_prompts: int, device: torch.device | None = None) -> Tensor:
    """The region that each patch belongs to, (N,) int64 in 0..M-1.

    Raises:
        ValueError: there are more prompts than patches, or no prompts.
    """
    if not 1 <= num_prompts <= num_patches:
        raise ValueError(f"num_prompts={num_prompts}: it must lie between 1 and the {num_patches} patches")
    return (torch.arange(num_patches, device=device) // (num_patches // num_prompts)).clamp(max=num_prompts - 1)


def reader_mask(region_N: Tensor, num_prompts: int) -> Tensor:
    """What CLS and the prompts may read of [patches, CLS, prompts].

    Args:
        region_N: the region of each patch of the sequence, (N,) or (B, N).
        num_prompts: M.

    Returns:
        True where reading is allowed, (1 + M, N + 1 + M), with a leading (B, 1) for a batch of regions.
    """
    prompts = torch.arange(num_prompts, device=region_N.device)
    own_MN = region_N.unsqueeze(-2) == prompts[:, None]
    batch = own_MN.shape[:-2]
    cls_M1 = own_MN.new_zeros(*batch, num_prompts, 1)
    self_MM = torch.eye(num_prompts, dtype=torch.bool, device=region_N.device).expand(*batch, -1, -1)
    prompts_MT = torch.cat([own_MN, cls_M1, self_MM], dim=-1)
    cls_1T = prompts_MT.new_ones(*batch, 1, prompts_MT.shape[-1])
    mask_RT = torch.cat([cls_1T, prompts_MT], dim=-2)
    return mask_RT.unsqueeze(1) if batch else mask_RT


def masked_patches(seeds_B: Tensor, num_patches: int, mask_ratio: float) -> tuple[Tensor, Tensor]:
    """Draw the patches that the short branch loses, from one seed a sample.

    Each patch gets a pseudo-random number from (seed, patch) by SplitMix64, so a sample's mask depends on its
    own seed alone: not on the batch, the device, or any generator's history.

    Args:
        seeds_B: int64 seeds, (B,).
        num_patches: N.
        mask_ratio: share of patches to mask; at least one stays and at least one goes.

    Returns:
        Indices of kept patches, (B, K), ascending, and the mask, (B, N), True where a patch is masked.
    """
    num_masked = min(max(round(num_patches * mask_ratio), 1), num_patches - 1)
    patches_N = torch.arange(num_patches, device=seeds_B.device)
    scores_BN = _splitmix64(_splitmix64(seeds_B)[:, None] + patches_N)
    order_BN = scores_BN.argsort(dim=-1, stable=True)
    kept_BK = order_BN[:, num_masked:].sort(dim=-1).values
    mask_BN = torch.ones_like(order_BN, dtype=torch.bool).scatter(1, kept_BK, False)
    return kept_BK, mask_BN


def _splitmix64(x: Tensor) -> Tensor:
    """Steele, Lea and Flood's mixing function on int64, whose products wrap around."""
    x = x - 7046029254386353131
    x = (x ^ _shift_right(x, 30)) * -4658895280553007687
    x = (x ^ _shift_right(x, 27)) * -7723592293110705685
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # torch shifts int64 arithmetically; the mixing function wants zeros from the left.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def run_mlp(mlp: Any, x_BTD: Tensor) -> Tensor:
    """An open_clip block's MLP, (B, T, D) to (B, T, D); with QuickGELU in a third of the passes over its hidden layer.

    QuickGELU(h) = h sigmoid(1.702 h) = silu(1.702 h) / 1.702, and torch has silu as one kernel, forward and backward,
    which keeps one tensor of the hidden layer's size where open_clip's three operations keep two. Both factors go to
    the D-wide input and output, a quarter of the hidden layer.
    """
    if len(mlp) != 3 or not isinstance(mlp[1], QuickGELU):
        return mlp(x_BTD)
    hidden_BTF = F.silu(F.linear(1.702 * x_BTD, mlp.c_fc.weight, 1.702 * mlp.c_fc.bias))
    return F.linear(hidden_BTF, mlp.c_proj.weight, 1.702 * mlp.c_proj.bias) / 1.702


class Block(nn.Module):
    """A residual attention block on the weights of open_clip's, under the same names."""

    def __init__(self, block: Any):
        super().__init__()
        self.ln_1, self.attn, self.ls_1 = block.ln_1, block.attn, block.ls_1
        self.ln_2, self.mlp, self.ls_2 = block.ln_2, block.mlp, block.ls_2

    def heads(self, x_BTD: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of every token, (B, H, T, D / H) each."""
        qkv = F.linear(x_BTD, self.attn.in_proj_weight, self.attn.in_proj_bias)
        return tuple(split_heads(part, self.attn.num_heads) for part in qkv.chunk(3, dim=-1))

    def heads_of_one(self, one_B1D: Tensor, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of one token, keys and values of every token: all that a last layer has to compute."""
        weight, bias = self.attn.in_proj_weight, self.attn.in_proj_bias
        width = x_BTD.shape[-1]
        query = F.linear(one_B1D, weight[:width], bias[:width])
        key, value = F.linear(x_BTD, weight[width:], bias[width:]).chunk(2, dim=-1)
        num_heads = self.attn.num_heads
        return split_heads(query, num_heads), split_heads(key, num_heads), split_heads(value, num_heads)

    def finish(self, x_BTD: Tensor, attended_BHTd: Tensor) -> Tensor:
        """Output projection, MLP and both residuals."""
        x_BTD = x_BTD + self.ls_1(self.attn.out_proj(attended_BHTd.transpose(1, 2).flatten(2)))
        return x_BTD + self.ls_2(run_mlp(self.mlp, self.ln_2(x_BTD)))


class ImageBlock(Block):
    """One image layer over [patches, CLS, prompts]."""

    def forward(self, x_BTD: Tensor, num_patches: int, mask_RT: Tensor | None, cls_only: bool = False) -> Tensor:
        """One layer.

        Args:
            x_BTD: N patches, CLS, and M prompts or none, (B, N + 1 + M, D).
            num_patches: N.
            mask_RT: `reader_mask`; without it the prompts are read by CLS but read nothing themselves, and
                leave the sequence.
            cls_only: compute CLS alone, which is all that anybody reads of the last layer.

        Returns:
            The tokens after the layer: all, those before the prompts without a mask, or CLS, (B, 1, D).
        """
        normed_BTD = self.ln_1(x_BTD)
        cls, tokens = slice(num_patches, num_patches + 1), slice(num_patches + 1)
        if cls_only:
            q, k, v = self.heads_of_one(normed_BTD[:, cls], normed_BTD)
            return self.finish(x_BTD[:, cls], attend(q, k, v))
        q, k, v = self.heads(normed_BTD)
        if x_BTD.shape[1] == num_patches + 1:
            return self.finish(x_BTD, attend(q, k, v))
        if mask_RT is None:
            x_BTD, q = x_BTD[:, tokens], q[:, :, tokens]
        q_patches, q_readers = q.tensor_split((num_patches,), dim=2)
        patches = attend(q_patches, k[:, :, tokens], v[:, :, tokens])
        read = attend(q_readers, k, v, attn_mask=mask_RT)
        return self.finish(x_BTD, torch.cat([patches, read], dim=2))


class ImageTower(nn.Module):
    """open_clip's vision transformer with regional prompts and the short branch's masked patches.

    Parameters of the base keep open_clip's names; `prompts` (L, M, D) and `mask_embedding` (D,) are new.

    Raises:
        ValueError: the tower is not a plain vision transformer with a CLS token, or has fewer than M patches.
    """

    def __init__(self, visual: Any, num_prompts: int, prompt_flow: PromptFlow, mask_embedding: bool):
        super().__init__()
        self.conv1, self.ln_pre, self.ln_post = visual.conv1, visual.ln_pre, visual.ln_post
        self.class_embedding, self.positional_embedding = visual.class_embedding, visual.positional_embedding
        self.proj = visual.proj
        self.transformer = as_transformer(ImageBlock(block) for block in visual.transformer.resblocks)
        self.prompt_flow = prompt_flow
        self.num_prompts = num_prompts
        self.grad_checkpointing = False
        if num_prompts:
            self.prompts = nn.Parameter(self._initial_prompts())
        if mask_embedding:
            self.mask_embedding = nn.Parameter(torch.zeros_like(self.class_embedding))

    @property
    def blocks(self) -> nn.ModuleList:
        return cast(nn.ModuleList, self.transformer["resblocks"])

    @property
    def num_patches(self) -> int:
        return self.positional_embedding.shape[0] - 1

    def _initial_prompts(self) -> Tensor:
        """Prompts that a pre-trained CLS reads like one more plain patch, (L, M, D).

        The first layer's prompt j is the token of a grey patch at the mean position of region j; with `carry`
        the later layers' are 0, so that it goes on as a patch that sees its own region alone.
        """
        positions_ND = self.positional_embedding[1:]
        region_N = region_of_patch(self.num_patches, self.num_prompts, positions_ND.device)
        own_NM = F.one_hot(region_N, self.num_prompts).to(positions_ND.dtype)
        with torch.no_grad():
            grey_MD = self.ln_pre((own_NM / own_NM.sum(dim=0)).T @ positions_ND)
            later_MD = torch.zeros_like(grey_MD) if self.prompt_flow == "carry" else grey_MD
            later = [later_MD] * (len(self.blocks) - 1)
            return torch.stack([grey_MD, *later])

    def patch_tokens(self, image_BCHW: Tensor) -> Tensor:
        """Patch embeddings before positions, (B, N, D).

        Raises:
            ValueError: the image is not of the tower's size.
        """
        patches_BND = self.conv1(image_BCHW).flatten(2).transpose(1, 2)
        if patches_BND.shape[1] != self.num_patches:
            raise ValueError(
                f"images of {tuple(image_BCHW.shape)} make {patches_BND.shape[1]} patches; the tower has "
                f"positions for {self.num_patches}: use the model's own preprocessing"
            )
        return patches_BND

    def sequence(self, patches_BND: Tensor, kept_BK: Tensor | None = None) -> Tensor:
        """[patches, CLS] with positions and the first LayerNorm, (B, N + 1, D) or (B, K + 1, D)."""
        positions = self.positional_embedding.to(patches_BND.dtype)
        patches_BND = patches_BND + positions[1:]
        if kept_BK is not None:
            patches_BND = patches_BND.gather(1, kept_BK[..., None].expand(-1, -1, patches_BND.shape[-1]))
        cls_D = self.class_embedding.to(patches_BND.dtype) + positions[0]
        return self.ln_pre(torch.cat([patches_BND, cls_D.expand(len(patches_BND), 1, -1)], dim=1))

    def encode(
        self, x_BTD: Tensor, kept_BK: Tensor | None = None, first_layer: int | None = None, prompts: bool = True
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the layers.

        Args:
            x_BTD: `sequence`'s tokens.
            kept_BK: indices of the patches in the sequence where some were dropped.
            first_layer: collect CLS after each layer from this one on, counted from 0; None collects none.
            prompts: False leaves the regional prompts out, which is the base model's own forward.

        Returns:
            The projected feature, (B, E), not normalised, and the collected CLS tokens, (B, D) each.
        """
        num_patches = x_BTD.shape[1] - 1
        use_prompts = prompts and self.num_prompts > 0
        carry = self.prompt_flow == "carry"
        mask_RT = self._mask(kept_BK, x_BTD.device) if use_prompts and carry else None
        collected = []
        for layer, block in enumerate(self.blocks):
            if use_prompts:
                x_BTD = self._add_prompts(x_BTD, self.prompts[layer].to(x_BTD.dtype), num_patches)
            last = layer == len(self.blocks) - 1
            x_BTD = run_block(block, self.grad_checkpointing, x_BTD, num_patches, mask_RT, last)
            if first_layer is not None and layer >= first_layer:
                collected.append(x_BTD[:, 0 if last else num_patches])
        return self.ln_post(x_BTD[:, 0]) @ self.proj, collected

    def _mask(self, kept_BK: Tensor | None, device: torch.device) -> Tensor:
        region_N = region_of_patch(self.num_patches, self.num_prompts, device)
        return reader_mask(region_N if kept_BK is None else region_N[kept_BK], self.num_prompts)

    def _add_prompts(self, x_BTD: Tensor, prompts_MD: Tensor, num_patches: int) -> Tensor:
        if x_BTD.shape[1] > num_patches + 1:
            return x_BTD + F.pad(prompts_MD, (0, 0, num_patches + 1, 0))
        return torch.cat([x_BTD, prompts_MD.expand(len(x_BTD), -1, -1)], dim=1)


def as_transformer(blocks: Iterable[nn.Module]) -> nn.ModuleDict:
    """Layers under the names that open_clip gives them."""
    return nn.ModuleDict({"resblocks": nn.ModuleList(blocks)})


def run_block(block: nn.Module, recompute: bool, *args: object) -> Tensor:
    """Run a block, keeping only its input for the backward pass where `recompute` is set."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)


def check_image_tower(visual: Any) -> None:
    """Raise one clear ValueError where the tower is not a plain vision transformer with a CLS token."""
    kind = type(visual).__name__
    blocks = getattr(getattr(visual, "transformer", None), "resblocks", None)
    reason = None
    if kind != "VisionTransformer" or not blocks:
        reason = f"it is a {kind}"
    elif visual.attn_pool is not None:
        reason = "it pools by attention"
    elif visual.pool_type != "tok":
        reason = f"it pools by {visual.pool_type!r} instead of reading a CLS token"
    elif visual.proj is None:
        reason = "it has no output projection"
    else:
        reason = unsupported_block(blocks[0])
    if reason:
        raise ValueError(
            f"unsupported image tower: {reason}. FixClip needs an open_clip vision transformer with a CLS token "
            "(ViT-B-32, ViT-B-16, ViT-L-14, ViT-H-14, ...), not timm, ResNet, CoCa or SigLIP"
        )


def unsupported_block(block: Any) -> str | None:
    """Why a residual block cannot be run, or None."""
    attention = getattr(block, "attn", None)
    if not isinstance(attention, nn.MultiheadAttention) or attention.in_proj_weight is None:
        return f"its layers are {type(block).__name__} with custom attention"
    return None
