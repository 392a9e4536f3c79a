"""Low-rank changes of the text tower against the formula W + B A written out."""

import copy

import open_clip
import pytest
import torch

from fixclip_core.model.fixclip import FixClip
from fixclip_core.model.lora import low_rank_factors
from fixclip_core.weights.load import build_clip
from fixclip_core.weights.write import plain_clip

CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 64, "width": 16, "heads": 2, "layers": 2},
}
PREPROCESS = {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}


def base_clip():
    torch.manual_seed(0)
    clip = open_clip.CLIP(**CLIP)
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return clip.double()


def with_low_rank(clip, rank=3, **fields):
    fields = {"num_prompts": 0, "num_groups": 0} | fields
    torch.manual_seed(1)
    return FixClip.from_clip(copy.deepcopy(clip), CLIP, PREPROCESS, lora_rank=rank, **fields)


def trained(model):
    """Every weight that the optimizer would move, moved."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def texts():
    ids = torch.randint(1, 63, (4, 248), generator=torch.Generator().manual_seed(2))
    for row, length in zip(ids, (248, 5, 100, 77), strict=True):
        row[length - 1], row[length:] = 63, 0
    return ids


def merged_by_hand(model, clip):
    """open_clip's own model of the base with W + B A in each matrix and the trained positions and projection."""
    long = open_clip.CLIP(**{**CLIP, "text_cfg": {**CLIP["text_cfg"], "context_length": 248}}).double()
    weights = copy.deepcopy(clip.state_dict())
    places = {"q_proj": slice(0, 16), "k_proj": slice(16, 32), "v_proj": slice(32, 48)}
    names = {"out_proj": "attn.out_proj.weight", "fc1": "mlp.c_fc.weight", "fc2": "mlp.c_proj.weight"}
    for (layer, part), (A, B) in low_rank_factors(model.text.blocks).items():
        assert A.shape[0] == B.shape[1] == 3
        name = f"transformer.resblocks.{layer}.{names.get(part, 'attn.in_proj_weight')}"
        weights[name][places.get(part, slice(None))] += B @ A
    weights["positional_embedding"] = model.text.positions().detach()
    weights["text_projection"] = model.text.text_projection.detach()
    long.load_state_dict(weights)
    return long


def test_it_starts_as_the_base():
    clip = base_clip()
    plain = FixClip.from_clip(copy.deepcopy(clip), CLIP, PREPROCESS, num_prompts=0, num_groups=0)
    assert torch.equal(with_low_rank(clip).encode_text(texts()), plain.encode_text(texts()))


def test_features_and_gradients_are_those_of_the_merged_matrices():
    clip = base_clip()
    model = trained(with_low_rank(clip))
    long = merged_by_hand(model, clip)
    ids = texts()
    found, expected = model.encode_text(ids, normalize=False), long.encode_text(ids)
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(expected)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    change = model.text.blocks[1].mlp.c_fc.parametrizations.weight[0]
    grad_W = long.transformer.resblocks[1].mlp.c_fc.weight.grad
    torch.testing.assert_close(change.lora_B.grad[0], grad_W @ change.lora_A[0].T)
    torch.testing.assert_close(change.lora_A.grad[0], change.lora_B[0].T @ grad_W)
    change = model.text.blocks[0].attn.parametrizations.in_proj_weight[0]
    for part, grad_W in enumerate(long.transformer.resblocks[0].attn.in_proj_weight.grad.chunk(3)):
        torch.testing.assert_close(change.lora_B.grad[part], grad_W @ change.lora_A[part].T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_matrix_is_kept_once_for_the_backward_pass_whatever_the_pieces(dtype):
    model = trained(with_low_rank(base_clip().float()))
    shapes = {(48, 16), (16, 48), (16, 16), (64, 16), (16, 64)}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor):
        if tensor.dtype == dtype and tuple(tensor.shape) in shapes:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    plain = model.encode_text(texts())
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    with autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = model.encode_text(texts())
    found.sum().backward()
    assert 0 < len(kept) <= 2 * 4 + 1  # four matrices of each layer, and the projection
    torch.testing.assert_close(found.float(), plain, atol=0.02 if dtype == torch.bfloat16 else 0, rtol=0)


@pytest.mark.parametrize("recompute", [False, True])
def test_pieces_and_checkpointing_change_no_gradient(recompute):
    model = trained(with_low_rank(base_clip()))
    found = {}
    for pieces in (1, 8):
        model.text.pieces = pieces
        model.set_grad_checkpointing(recompute and pieces == 8)
        model.zero_grad()
        model.encode_text(texts()).square().cumsum(-1).sum().backward()
        found[pieces] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found[1], found[8])


def test_only_the_change_positions_and_projection_of_the_text_tower_are_trained():
    model = with_low_rank(base_clip())
    learnt = {name for name, p in model.text.named_parameters() if p.requires_grad}
    assert {name for name in learnt if not name.endswith((".lora_A", ".lora_B"))} == {
        "stretched_positions",
        "text_projection",
    }
    assert {name for name in learnt if "lora" in name} == {
        name.removeprefix("text.") for name in model.new_parameters() if name.startswith("text.")
    }
    assert all(p.requires_grad for p in model.visual.parameters())


def test_a_trained_model_keeps_its_base_through_a_folder(tmp_path):
    clip = base_clip().float()
    model = trained(with_low_rank(clip, positions="kept"))
    model.save_pretrained(tmp_path)
    again = FixClip.from_pretrained(tmp_path)
    ids = texts()
    assert torch.equal(again.encode_text(ids), model.encode_text(ids))
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    base = again.base_text_tower()
    short = ids[1:2, :77]
    assert torch.equal(base.positions(), clip.positional_embedding)
    found = torch.cat([base.encode(short)[0], base.encode(ids[3:, :77])[0]])
    expected = clip.encode_text(ids[[1, 3], :77]) @ clip.text_projection.inverse() @ again.text.text_projection
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_other_formats_get_the_merged_matrices():
    model = trained(with_low_rank(base_clip()))
    exported = build_clip(plain_clip(model)).double()
    torch.testing.assert_close(
        exported.encode_text(texts()), model.encode_text(texts(), normalize=False), atol=1e-5, rtol=1e-4
    )
    assert model.text.blocks[0].attn.parametrizations  # the model itself is left as it was


def test_a_rank_beyond_the_width_is_refused():
    with pytest.raises(ValueError, match="lora_rank=17: it must be at most 16"):
        with_low_rank(base_clip(), rank=17)
