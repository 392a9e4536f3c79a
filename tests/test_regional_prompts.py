"""The image tower against open_clip's own, and against a plain one with a dense additive mask."""

import copy

import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fixclip_core.model.image_tower import (
    ImageTower,
    check_image_tower,
    masked_patches,
    reader_mask,
    region_of_patch,
    run_mlp,
)

WIDTH, LAYERS, PATCHES = 32, 3, 16


def vision_transformer(**fields) -> nn.Module:
    """A tiny open_clip tower whose weights are all different and not small."""
    cfg = {
        "layers": LAYERS,
        "width": WIDTH,
        "head_width": 8,
        "patch_size": 8,
        "image_size": 32,
    }
    quick_gelu = fields.pop("quick_gelu", False)
    text_cfg = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
    clip = open_clip.CLIP(12, cfg | fields, text_cfg, quick_gelu=quick_gelu)
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return clip.visual.double().eval()


def tower_of(visual: nn.Module, num_prompts: int, flow: str = "carry") -> ImageTower:
    tower = ImageTower(copy.deepcopy(visual), num_prompts, flow, mask_embedding=False).double()
    if num_prompts:
        with torch.no_grad():
            tower.prompts.add_(torch.randn_like(tower.prompts))
    return tower


def dense_mask(region: Tensor, num_prompts: int) -> Tensor:
    """The additive mask as the paper prints it, on [CLS, prompts, patches], one entry at a time."""
    size = 1 + num_prompts + len(region)
    mask = torch.full((size, size), float("-inf"), dtype=torch.float64)
    mask[0, :] = 0
    for prompt in range(num_prompts):
        mask[1 + prompt, 1 + prompt] = 0
        for patch, owner in enumerate(region.tolist()):
            if owner == prompt:
                mask[1 + prompt, 1 + num_prompts + patch] = 0
    mask[1 + num_prompts :, 0] = 0
    mask[1 + num_prompts :, 1 + num_prompts :] = 0
    return mask


def plain_encode(
    visual: nn.Module, prompts: Tensor, image: Tensor, flow: str, kept: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """open_clip's own blocks on [CLS, prompts, patches] with a dense mask, one image at a time."""
    num_prompts = prompts.shape[1]
    share = PATCHES // num_prompts
    region = torch.tensor([min(patch // share, num_prompts - 1) for patch in range(PATCHES)])
    features, collected = [], []
    for index in range(len(image)):
        tokens = visual._embeds(image[index : index + 1])
        cls, patches = tokens[:, :1], tokens[:, 1:]
        owners = region
        if kept is not None:
            patches, owners = patches[:, kept[index]], region[kept[index]]
        mask = dense_mask(owners, num_prompts)
        carried = torch.zeros(1, num_prompts, WIDTH, dtype=torch.float64)
        tokens_of_cls = []
        for layer, block in enumerate(visual.transformer.resblocks):
            fresh = prompts[layer][None]
            readers = carried + fresh if flow == "carry" else fresh
            x = block(torch.cat([cls, readers, patches], dim=1), attn_mask=mask)
            cls, carried, patches = x[:, :1], x[:, 1 : 1 + num_prompts], x[:, 1 + num_prompts :]
            tokens_of_cls.append(cls[0, 0])
        features.append(visual.ln_post(cls[0, 0]) @ visual.proj)
        collected.append(torch.stack(tokens_of_cls))
    return torch.stack(features), list(torch.stack(collected, dim=1))


def loss_of(feature: Tensor, collected: list[Tensor]) -> Tensor:
    """A scalar that every output enters with weights of its own."""
    outputs = torch.cat([feature, *collected], dim=1)
    return (outputs * torch.linspace(-1, 1, outputs.numel(), dtype=outputs.dtype).view_as(outputs)).sum()


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def assert_same(tower: ImageTower, visual: nn.Module, image: Tensor, flow: str, kept: Tensor | None = None) -> None:
    """Values and gradients of every parameter, tower against plain."""
    visual.zero_grad()
    prompts = tower.prompts.detach().clone().requires_grad_()
    plain = plain_encode(visual, prompts, image, flow, kept)
    fast = tower.encode(tower.sequence(tower.patch_tokens(image), kept), kept, first_layer=0)
    torch.testing.assert_close(fast, plain)
    loss_of(*plain).backward()
    loss_of(*fast).backward()
    found = gradients(tower)
    torch.testing.assert_close(found.pop("prompts"), prompts.grad)
    torch.testing.assert_close(found, gradients(visual))


@pytest.mark.parametrize("flow", ["carry", "replace"])
@pytest.mark.parametrize("num_prompts", [1, 3, 4, 5, 16])
def test_equals_the_dense_mask(num_prompts, flow):
    visual = vision_transformer()
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert_same(tower_of(visual, num_prompts, flow), visual, image, flow)


@pytest.mark.parametrize("flow", ["carry", "replace"])
@pytest.mark.parametrize("ratio", [0.75, 0.2, 0.99])
def test_dropped_patches_equal_the_dense_mask(ratio, flow):
    visual = vision_transformer()
    image = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    kept, _ = masked_patches(torch.arange(3), PATCHES, ratio)
    assert_same(tower_of(visual, 3, flow), visual, image, flow, kept)


@pytest.mark.parametrize(
    "fields",
    [{"quick_gelu": True}, {"ls_init_value": 0.3}, {"no_ln_pre": True}, {"final_ln_after_pool": True}, {"layers": 1}],
)
def test_variants_equal_the_dense_mask(fields):
    visual = vision_transformer(**fields)
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert_same(tower_of(visual, 3), visual, image, "carry")


def test_without_prompts_it_is_open_clips_own_forward():
    visual = vision_transformer()
    tower = tower_of(visual, 0)
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = visual(image)
    feature, collected = tower.encode(tower.sequence(tower.patch_tokens(image)))
    torch.testing.assert_close(feature, expected)
    assert collected == []
    expected.square().sum().backward()
    feature.square().sum().backward()
    torch.testing.assert_close(gradients(tower), gradients(visual))
    prompted = tower_of(visual, 4)
    sequence = prompted.sequence(prompted.patch_tokens(image))
    torch.testing.assert_close(prompted.encode(sequence, prompts=False)[0], expected)
    assert not torch.allclose(prompted.encode(sequence)[0], expected)


def test_patches_never_see_prompts():
    """Whatever the prompts are, patch tokens stay the base model's."""
    tower = tower_of(vision_transformer(), 4)
    x = tower.sequence(tower.patch_tokens(torch.randn(2, 3, 32, 32, dtype=torch.float64)))
    mask = reader_mask(region_of_patch(PATCHES, 4), 4)
    block = tower.blocks[0]
    with_prompts = block(torch.cat([x, torch.randn(2, 4, WIDTH, dtype=x.dtype)], dim=1), PATCHES, mask)
    torch.testing.assert_close(with_prompts[:, :PATCHES], block(x, PATCHES, None)[:, :PATCHES])


def test_a_prompt_reads_its_own_region_only():
    tower = tower_of(vision_transformer(), 3)
    x = torch.randn(1, PATCHES + 4, WIDTH, dtype=torch.float64, requires_grad=True)
    region = region_of_patch(PATCHES, 3)
    out = tower.blocks[0](x, PATCHES, reader_mask(region, 3))
    for prompt in range(3):
        (grad,) = torch.autograd.grad(out[0, PATCHES + 1 + prompt].sum(), x, retain_graph=True)
        read = grad[0].abs().sum(dim=-1) > 0
        assert torch.equal(read[:PATCHES], region == prompt)
        assert read[PATCHES:].tolist() == [False] + [other == prompt for other in range(3)]


def test_recomputing_changes_nothing():
    tower = tower_of(vision_transformer(), 3)
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    results = []
    for recompute in (False, True):
        tower.zero_grad()
        tower.grad_checkpointing = recompute
        output = tower.encode(tower.sequence(tower.patch_tokens(image)), first_layer=0)
        loss_of(*output).backward()
        results.append((output[0].detach(), {name: grad.clone() for name, grad in gradients(tower).items()}))
    torch.testing.assert_close(results[0], results[1])


def test_compiled_blocks_change_nothing():
    tower = tower_of(vision_transformer(), 3)
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected, _ = tower.encode(tower.sequence(tower.patch_tokens(image)))
    for block in tower.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    compiled, _ = tower.encode(tower.sequence(tower.patch_tokens(image)))
    torch.testing.assert_close(compiled, expected)


@pytest.mark.parametrize("quick_gelu", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_mlp_computes_what_open_clips_does(quick_gelu, dtype):
    """Values and gradients of input and weights, against open_clip's modules in float64."""
    mlp = vision_transformer(quick_gelu=quick_gelu).transformer.resblocks[0].mlp
    x, weights = torch.randn(2, 5, WIDTH).double(), torch.randn(2, 5, WIDTH).double()

    def outcome(run, mlp) -> list[Tensor]:
        dtype = mlp.c_fc.weight.dtype
        own = x.to(dtype).requires_grad_()
        out = run(mlp, own)
        return [out, *torch.autograd.grad(out, [own, *mlp.parameters()], weights.to(dtype))]

    exact = outcome(lambda mlp, x: mlp(x), mlp)
    ours = outcome(run_mlp, copy.deepcopy(mlp).to(dtype))
    theirs = outcome(lambda mlp, x: mlp(x), copy.deepcopy(mlp).to(dtype))
    for value, other, truth in zip(ours, theirs, exact, strict=True):
        bound = 2 * (other.double() - truth).norm() + 1e-12 * truth.norm()
        assert (value.double() - truth).norm() <= bound
    if not quick_gelu:
        assert all(torch.equal(value, other) for value, other in zip(ours, theirs, strict=True))


def test_initial_prompts_are_grey_patches():
    visual = vision_transformer()
    tower = ImageTower(copy.deepcopy(visual), 3, "carry", mask_embedding=False)
    last_region = visual.positional_embedding[1 + 10 :].mean(dim=0)
    torch.testing.assert_close(tower.prompts[0, 2], visual.ln_pre(last_region))
    assert tower.prompts[1:].abs().max() == 0
    literal = ImageTower(copy.deepcopy(visual), 3, "replace", mask_embedding=False)
    torch.testing.assert_close(literal.prompts, tower.prompts[:1].expand(LAYERS, -1, -1))


@given(num_patches=st.integers(1, 60), num_prompts=st.integers(1, 60))
def test_regions_are_consecutive_and_the_last_takes_the_remainder(num_patches, num_prompts):
    if num_prompts > num_patches:
        with pytest.raises(ValueError, match=f"num_prompts={num_prompts}.*{num_patches} patches"):
            region_of_patch(num_patches, num_prompts)
        return
    region = region_of_patch(num_patches, num_prompts)
    share = num_patches // num_prompts
    sizes = [share] * (num_prompts - 1) + [num_patches - share * (num_prompts - 1)]
    assert region.tolist() == [index for index, size in enumerate(sizes) for _ in range(size)]


@given(
    seeds=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5),
    num_patches=st.integers(2, 50),
    ratio=st.floats(0.01, 0.99),
)
def test_masks_depend_on_the_samples_own_seed(seeds, num_patches, ratio):
    state = torch.get_rng_state()
    kept, mask = masked_patches(torch.tensor(seeds), num_patches, ratio)
    masked = min(max(round(num_patches * ratio), 1), num_patches - 1)
    assert kept.shape == (len(seeds), num_patches - masked)
    assert torch.equal(mask.sum(dim=1), torch.full((len(seeds),), masked))
    for row, seed in enumerate(seeds):
        assert torch.equal(kept[row], (~mask[row]).nonzero()[:, 0]), "ascending, and the mask's complement"
        alone, _ = masked_patches(torch.tensor([seed]), num_patches, ratio)
        assert torch.equal(alone[0], kept[row])
    assert torch.equal(state, torch.get_rng_state())


def test_masks_are_spread_evenly():
    """4,000 consecutive seeds: each patch goes three times in four, and pairs go independently."""
    _, mask = masked_patches(torch.arange(4000), 16, 0.75)
    share = mask.double().mean(dim=0)
    assert (share - 0.75).abs().max() < 5 * (0.75 * 0.25 / 4000) ** 0.5
    pairs = mask.double().T @ mask.double() / 4000
    together = pairs[~torch.eye(16, dtype=torch.bool)]
    assert (together - 12 / 16 * 11 / 15).abs().max() < 0.04


@pytest.mark.parametrize(
    ("vision_cfg", "message"),
    [
        ({"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}, "ModifiedResNet"),
        ({"attentional_pool": True, "attn_pooler_heads": 2}, "pools by attention"),
        ({"pool_type": "avg"}, "pools by 'avg'"),
        ({"qk_norm": True}, "custom attention"),
    ],
)
def test_unsupported_towers_get_one_clear_error(vision_cfg, message):
    cfg = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32} | vision_cfg
    text_cfg = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
    with pytest.raises(ValueError, match=f"unsupported image tower.*{message}.*ViT-B-32"):
        check_image_tower(open_clip.CLIP(12, cfg, text_cfg).visual)


def test_wrong_image_size_is_named():
    tower = tower_of(vision_transformer(), 0)
    with pytest.raises(ValueError, match=r"\(1, 3, 64, 64\) make 64 patches.*16"):
        tower.patch_tokens(torch.zeros(1, 3, 64, 64, dtype=torch.float64))
