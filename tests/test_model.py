"""FixClip against the open_clip model it is made of, and its fast paths against plain ones."""

import copy
import itertools
import json
import re
from types import SimpleNamespace

import open_clip
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from fixclip_core.files import write_atomically
from fixclip_core.model.config import FINE_TUNE, LONG_CLIP
from fixclip_core.model.fixclip import FixClip, FixClipOutput, group_token_aggregation
from fixclip_core.model.image_tower import masked_patches
from fixclip_core.model.positional import stretch_positions
from fixclip_core.model.text_tower import piece_bounds
from fixclip_core.weights.load import load_fixclip

CLIP_CFG = {
    "embed_dim": 12,
    "vision_cfg": {"layers": 4, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 32},
    "text_cfg": {"context_length": 24, "vocab_size": 64, "width": 24, "heads": 2, "layers": 2},
}
PREPROCESS = {"size": 32, "mode": "RGB", "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
PREPROCESS |= {"interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0}
SMALL = {"keep": 4, "ratio": 2, "num_prompts": 3, "num_groups": 2, "first_group": 1}
EOS = 63


def base_clip(custom_text: bool = False, **fields) -> nn.Module:
    """A tiny open_clip model whose weights are all different and not small."""
    cfg = copy.deepcopy(CLIP_CFG) | fields
    clip = (open_clip.CustomTextCLIP if custom_text else open_clip.CLIP)(**cfg)
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return clip.double().eval()


def fix_clip(clip: nn.Module, **fields) -> FixClip:
    model = FixClip.from_clip(copy.deepcopy(clip), CLIP_CFG, PREPROCESS, **SMALL | fields).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in model.new_parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def texts(lengths: list[int], context_length: int = 44) -> Tensor:
    """Random ids whose end-of-text token makes them `lengths` long, padded with 0."""
    ids = torch.randint(1, EOS - 1, (len(lengths), context_length))
    for row, length in zip(ids, lengths, strict=True):
        row[length - 1] = EOS
        row[length:] = 0
    return ids


def captioned_images(size: int = 3) -> SimpleNamespace:
    return SimpleNamespace(
        image=torch.randn(size, 3, 32, 32, dtype=torch.float64),
        long_ids=texts([9 + 7 * index for index in range(size)]),
        short_ids=texts([2 + index for index in range(size)]),
        seeds=torch.arange(size),
    )


def plain_text(clip: nn.Module, positions: Tensor, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """open_clip's own text blocks on padded texts with a dense causal mask, and every layer's EOS."""
    x = clip.token_embedding(ids) + positions[: ids.shape[1]]
    mask = torch.full((ids.shape[1], ids.shape[1]), float("-inf"), dtype=x.dtype).triu(1)
    rows, eos = torch.arange(len(ids)), ids.argmax(dim=1)
    collected = []
    for block in clip.transformer.resblocks:
        x = block(x, attn_mask=mask)
        collected.append(x[rows, eos])
    return clip.ln_final(x)[rows, eos] @ clip.text_projection, collected


def features(output: FixClipOutput) -> dict[str, Tensor | None]:
    """Of an output all but the hidden states, which are a tuple, empty here."""
    return {name: value for name, value in vars(output).items() if name != "text_states"}


def weighted_sum(*outputs: Tensor) -> Tensor:
    """A scalar that every number enters with a weight of its own."""
    flat = torch.cat([output.flatten() for output in outputs])
    return (flat * torch.linspace(-1, 1, len(flat), dtype=flat.dtype)).sum()


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters()}


# -- the base ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_prompts_off_equals_the_base(custom_text, quick_gelu):
    clip = base_clip(custom_text, quick_gelu=quick_gelu)
    model = fix_clip(clip, ratio=1)
    assert model.config.clip["quick_gelu"] == quick_gelu, "seen from the modules, not the given dict"
    image, ids = torch.randn(2, 3, 32, 32, dtype=torch.float64), texts([5, 24], 24)
    for normalize in (True, False):
        expected = clip.encode_image(image, normalize=normalize)
        torch.testing.assert_close(model.encode_image(image, normalize, prompts=False), expected)
        torch.testing.assert_close(fix_clip(clip, num_prompts=0).encode_image(image, normalize), expected)
        torch.testing.assert_close(model.encode_text(ids, normalize), clip.encode_text(ids, normalize=normalize))


def test_texts_within_the_kept_positions_equal_the_base():
    clip = base_clip()
    ids = texts([3, 4], 24)
    torch.testing.assert_close(fix_clip(clip).encode_text(ids), clip.encode_text(ids, normalize=True))


def test_prompt_similarity_is_the_cosine_with_the_base():
    clip = base_clip()
    image = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    model = fix_clip(clip)
    expected = F.cosine_similarity(model.encode_image(image), clip.encode_image(image))
    torch.testing.assert_close(model.prompt_similarity(image), expected)
    assert fix_clip(clip, num_prompts=0).prompt_similarity(image).sub(1).abs().max() < 1e-12


@pytest.mark.parametrize("prompt_flow", ["carry", "replace"])
def test_prompts_start_close_to_the_base(prompt_flow):
    """At initialisation; a random tiny model is no CLIP, so the bound is loose."""
    preprocess = dict(PREPROCESS)
    model = FixClip.from_clip(base_clip(), CLIP_CFG, preprocess, **SMALL | {"prompt_flow": prompt_flow}).double()
    assert model.prompt_similarity(torch.randn(8, 3, 32, 32, dtype=torch.float64)).min() > 0.9


# -- text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [1, 2, 4, 9])
@pytest.mark.parametrize("lengths", [[44, 2, 17, 9, 17], [3], [5, 5, 5, 5]])
def test_trimmed_pieces_equal_padded_texts(pieces, lengths):
    clip = base_clip()
    model = fix_clip(clip)
    model.text.pieces = pieces
    ids = texts(lengths)
    positions = stretch_positions(clip.positional_embedding.detach(), 4, 2).requires_grad_()
    plain = plain_text(clip, positions, ids)
    fast = model.text.encode(ids, first_layer=0)
    torch.testing.assert_close(fast, plain)
    weighted_sum(plain[0], *plain[1]).backward()
    weighted_sum(fast[0], *fast[1]).backward()
    torch.testing.assert_close(model.text.stretched_positions.grad, positions.grad[4:])
    for name, parameter in model.text.named_parameters():
        if name != "stretched_positions":
            torch.testing.assert_close(parameter.grad, clip.get_parameter(name).grad, msg=name)


def test_padding_is_not_read():
    model = fix_clip(base_clip())
    ids = texts([5, 12])
    other = ids.clone()
    other[0, 5:] = torch.randint(1, EOS - 1, (39,))
    torch.testing.assert_close(model.encode_text(other), model.encode_text(ids))
    torch.testing.assert_close(model.encode_text(ids[:, :12]), model.encode_text(ids))


def test_eos_pooling():
    text_cfg = CLIP_CFG["text_cfg"] | {"pool_type": "eos", "eos_id": 7}
    clip = base_clip(text_cfg=text_cfg)
    ids = torch.tensor([[1, 9, 7, 7, 63], [1, 7, 2, 2, 2]])
    padded = F.pad(ids, (0, 19))
    model = fix_clip(clip, ratio=1)
    torch.testing.assert_close(model.encode_text(ids), clip.encode_text(padded, normalize=True))


@given(lengths=st.lists(st.integers(1, 248), min_size=1, max_size=9), pieces=st.integers(1, 5))
def test_pieces_pad_least(lengths, pieces):
    lengths = sorted(lengths)

    def padded(bounds: list[tuple[int, int]]) -> int:
        return sum((stop - start) * lengths[stop - 1] for start, stop in bounds)

    bounds = piece_bounds(lengths, pieces)
    assert [index for start, stop in bounds for index in range(start, stop)] == list(range(len(lengths)))
    assert len(bounds) == min(pieces, len(lengths))
    best = min(
        padded(list(itertools.pairwise([0, *cuts, len(lengths)])))
        for cuts in itertools.combinations(range(1, len(lengths)), min(pieces, len(lengths)) - 1)
    )
    assert padded(bounds) == best


def test_many_texts_are_cut_at_candidates_only():
    bounds = piece_bounds(list(range(1, 1001)), 4, candidates=10)
    assert bounds[0][0] == 0
    assert bounds[-1][1] == 1000
    assert all(start % 100 == 0 for start, _ in bounds)


def test_kept_positions_do_not_move():
    """Neither a gradient nor weight decay reaches them, and the stretched rows do learn."""
    model = fix_clip(base_clip())
    kept, stretched = model.text.kept_positions.clone(), model.text.stretched_positions.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    weighted_sum(model.encode_text(texts([9, 30]))).backward()
    optimizer.step()
    assert torch.equal(model.text.positions()[:4], kept)
    assert not torch.equal(model.text.stretched_positions, stretched)
    assert "text.kept_positions" in model.state_dict()
    assert "text.kept_positions" not in dict(model.named_parameters())


@pytest.mark.parametrize("shape", [(2, 45), (4,), (0, 44)])
def test_wrong_texts_are_named(shape):
    with pytest.raises(ValueError, match=f"{re.escape(str(shape))}.*at most 44 tokens"):
        fix_clip(base_clip()).encode_text(torch.ones(shape, dtype=torch.long))


# -- both branches -------------------------------------------------------------------------------------------


def plain_features(model: FixClip, batch: SimpleNamespace) -> dict[str, Tensor]:
    """Every feature from a pass of its own."""
    visual, config = model.visual, model.config

    def image_pass(masked: bool, collect: int | None) -> tuple[Tensor, list[Tensor]]:
        patches, kept = visual.patch_tokens(batch.image), None
        if masked:
            kept, mask = masked_patches(batch.seeds, 16, config.mask_ratio)
            if config.masking == "replace":
                patches, kept = torch.where(mask[..., None], visual.mask_embedding, patches), None
        return visual.encode(visual.sequence(patches, kept), kept, first_layer=collect)

    def mid(tokens: list[Tensor], heads: nn.ModuleList) -> Tensor:
        size = len(tokens) // len(heads)
        weights = [2.718281828459045 ** (-((j - size) ** 2) / 2) for j in range(1, size + 1)]
        blends = [
            sum(w * token for w, token in zip(weights, tokens[g * size : (g + 1) * size], strict=True)) / sum(weights)
            for g in range(len(heads))
        ]
        return torch.stack([F.normalize(head(blend), dim=-1) for head, blend in zip(heads, blends, strict=True)])

    branch_is_short = config.hierarchy_branch == "short"
    ids = batch.short_ids if branch_is_short else batch.long_ids
    image_tokens = image_pass(branch_is_short, model.image_first_layer)[1]
    text_tokens = model.text.encode(ids, first_layer=model.text_first_layer)[1]
    return {
        "image_long_BE": F.normalize(image_pass(False, None)[0], dim=-1),
        "image_short_BE": F.normalize(image_pass(True, None)[0], dim=-1),
        "text_long_BE": model.encode_text(batch.long_ids),
        "text_short_BE": model.encode_text(batch.short_ids),
        "image_mid_GBE": mid(image_tokens, model.image_groups),
        "text_mid_GBE": mid(text_tokens, model.text_groups),
        "logit_scale": model.logit_scale.exp(),
    }


@pytest.mark.parametrize(
    ("masking", "prompt_flow", "first_group", "hierarchy_branch"),
    [
        ("replace", "carry", 1, "long"),
        ("replace", "replace", 2, "short"),
        ("drop", "carry", 1, "short"),
        ("drop", "replace", 2, "long"),
    ],
)
def test_shared_passes_equal_separate_ones(masking, prompt_flow, first_group, hierarchy_branch):
    fields = {"masking": masking, "prompt_flow": prompt_flow, "first_group": first_group}
    model = fix_clip(base_clip(), hierarchy_branch=hierarchy_branch, **fields)
    batch = captioned_images()
    fast = vars(model(batch))
    assert fast.pop("text_states") == ()
    plain = plain_features(model, batch)
    torch.testing.assert_close(fast, plain)
    names = sorted(plain)
    weighted_sum(*(plain[name] for name in names)).backward()
    expected = gradients(model)
    model.zero_grad()
    weighted_sum(*(fast[name] for name in names)).backward()
    torch.testing.assert_close(gradients(model), expected)


def test_recomputing_changes_nothing():
    model, batch = fix_clip(base_clip()), captioned_images()
    results = []
    for recompute in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(recompute)
        output = features(model(batch))
        weighted_sum(*output.values()).backward()
        results.append(({name: value.detach() for name, value in output.items()}, gradients(model)))
    torch.testing.assert_close(results[0], results[1])


def test_compiled_blocks_change_nothing():
    model, batch = fix_clip(base_clip()), captioned_images()
    expected = vars(model(batch))
    model.compile_blocks(backend="aot_eager")
    torch.testing.assert_close(vars(model(batch)), expected)


def test_masks_come_from_the_seeds_alone():
    model, batch = fix_clip(base_clip()), captioned_images()
    first = model(batch).image_short_BE
    torch.manual_seed(5)
    torch.testing.assert_close(model(batch).image_short_BE, first, rtol=0, atol=0)
    batch.seeds = batch.seeds + 1
    assert not torch.allclose(model(batch).image_short_BE, first)


def test_long_branch_sees_the_whole_image():
    model, batch = fix_clip(base_clip()), captioned_images()
    torch.testing.assert_close(model(batch).image_long_BE, model.encode_image(batch.image))


MODULES_OFF = [
    ({"short_branch": "off"}, {"image_short_BE", "text_short_BE"}),
    ({"num_groups": 0}, {"image_mid_GBE", "text_mid_GBE"}),
    ({"num_prompts": 0}, set()),
    ({"masking": "none"}, set()),
    (LONG_CLIP, {"image_short_BE", "image_mid_GBE", "text_mid_GBE"}),
    (FINE_TUNE, {"image_short_BE", "text_short_BE", "image_mid_GBE", "text_mid_GBE"}),
]


@pytest.mark.parametrize(("fields", "off"), MODULES_OFF)
def test_modules_can_be_switched_off(fields, off, tmp_path):
    model, batch = fix_clip(base_clip(), **fields), captioned_images()
    output = features(model(batch))
    assert {name for name, value in output.items() if value is None} == off
    if model.config.masking == "none":
        assert torch.equal(output["image_short_BE"], output["image_long_BE"])
    weighted_sum(*(value for value in output.values() if value is not None)).backward()
    unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert unused == [], "a parameter without gradient would stall distributed training"
    model.save_pretrained(tmp_path)
    assert FixClip.from_pretrained(tmp_path).config == model.config


def test_logit_scale_is_clamped_at_100():
    model, batch = fix_clip(base_clip()), captioned_images()
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    scale = model(batch).logit_scale
    assert scale.item() == pytest.approx(100)
    scale.backward()
    assert model.logit_scale.grad is not None
    assert model.logit_scale.grad.item() == pytest.approx(100), "it can come down again"


@given(size=st.integers(1, 4), groups=st.integers(1, 3))
def test_group_token_aggregation_blends_with_a_gaussian(size, groups):
    tokens = torch.randn(size * groups, 2, 3, dtype=torch.float64)
    blended = group_token_aggregation(tokens, groups)
    for group in range(groups):
        weights = torch.tensor([2.718281828459045 ** (-((j - size) ** 2) / 2) for j in range(1, size + 1)])
        members = tokens[group * size : (group + 1) * size]
        expected = (weights[:, None, None] / weights.sum() * members).sum(dim=0)
        torch.testing.assert_close(blended[group], expected, rtol=1e-6, atol=1e-6)
    constant = torch.ones(size * groups, 2, 3)
    torch.testing.assert_close(group_token_aggregation(constant, groups), torch.ones(groups, 2, 3))


def test_groups_must_split_the_layers():
    with pytest.raises(ValueError, match="num_groups=2: 3 layers"):
        group_token_aggregation(torch.zeros(3, 1, 1), 2)
    with pytest.raises(ValueError, match="num_groups=4: the text tower's 2 layers"):
        fix_clip(base_clip(), num_groups=4)


def test_mid_features_start_from_the_towers_own_projection():
    model = FixClip.from_clip(base_clip(), CLIP_CFG, PREPROCESS, **SMALL).double()
    token = torch.randn(1, 32, dtype=torch.float64)
    expected = (token * model.visual.ln_post.weight) @ model.visual.proj
    torch.testing.assert_close(model.image_groups[0][0](token), expected)


# -- folders, names, errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bit_equal(dtype, tmp_path):
    model = fix_clip(base_clip()).to(dtype)
    model.save_pretrained(tmp_path)
    loaded = FixClip.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert list(loaded.state_dict()) == list(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
        assert loaded.state_dict()[name].dtype == dtype
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())


def test_folder_errors_name_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match=r"no FixClip folder: it has no config\.json"):
        FixClip.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds config\.json .* or open_clip_config\.json .*; this one holds neither"):
        load_fixclip(tmp_path)
    fix_clip(base_clip()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_prompts": 5}))
    with pytest.raises(ValueError, match=r"(?s)model\.safetensors does not fit.*visual\.prompts"):
        FixClip.from_pretrained(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")

    def fail(path):
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(target, fail)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_saved_files_have_the_permissions_of_any_other(tmp_path):
    fix_clip(base_clip()).save_pretrained(tmp_path / "model")
    (tmp_path / "other").write_text("")
    usual = (tmp_path / "other").stat().st_mode
    assert [path.stat().st_mode for path in (tmp_path / "model").iterdir()] == [usual, usual]


def test_local_folder_of_open_clip(tmp_path):
    clip = base_clip().float()
    config = {"model_cfg": CLIP_CFG, "preprocess_cfg": PREPROCESS}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(clip.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    model = load_fixclip(f"local-dir:{tmp_path}", **SMALL)
    assert model.config.preprocess["mean"] == [0.4, 0.5, 0.6]
    image = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(
        model.encode_image(image, prompts=False), clip.encode_image(image, normalize=True), rtol=1e-4, atol=1e-5
    )


def test_names_of_open_clip(tmp_path):
    """A registered name, in either spelling; weights are random without a tag."""
    (tmp_path / "tiny-16.json").write_text(json.dumps(CLIP_CFG))
    open_clip.add_model_config(tmp_path / "tiny-16.json")
    for name in ("tiny-16", "tiny/16"):
        model = load_fixclip(name, **SMALL)
        assert model.config.clip["embed_dim"] == 12
        assert model.encode_text(texts([30])).shape == (1, 12)


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match=r"ViT-Z-99: no such file or folder, and no model of open_clip \(.*ViT-"):
        load_fixclip("ViT-Z-99")
    with pytest.raises(ValueError, match=r"cannot load.*'no-such-tag'"):
        load_fixclip("ViT-B-32", pretrained="no-such-tag")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text_cfg": CLIP_CFG["text_cfg"] | {"no_causal_mask": True}}, "unsupported text tower: it is not causal"),
        ({"text_cfg": CLIP_CFG["text_cfg"] | {"pool_type": "last"}}, "text tower: it pools by 'last'"),
        ({"init_logit_bias": -10.0}, "unsupported base: it has a logit bias"),
        ({"vision_cfg": CLIP_CFG["vision_cfg"] | {"pool_type": "avg"}}, "unsupported image tower"),
    ],
)
def test_unsupported_bases_get_one_clear_error(fields, message):
    with pytest.raises(ValueError, match=message):
        fix_clip(base_clip(custom_text="no_causal_mask" in fields.get("text_cfg", {}), **fields))


def test_new_parameters_are_what_fix_clip_adds():
    model = fix_clip(base_clip())
    base = dict(base_clip().named_parameters())
    names = {name.removeprefix("text.") for name, _ in model.named_parameters()} - model.new_parameters()
    assert names - set(base) == {"stretched_positions"}
    assert set(base) - names == {"positional_embedding"}


def test_preprocess_is_the_bases():
    model = fix_clip(base_clip())
    picture = Image.new("RGB", (50, 40), (255, 0, 127))
    evaluated = model.preprocess(False)(picture)
    expected = (torch.tensor([1.0, 0.0, 127 / 255]) - torch.tensor([0.4, 0.5, 0.6])) / torch.tensor([0.2, 0.3, 0.4])
    torch.testing.assert_close(evaluated, expected[:, None, None].expand(3, 32, 32))
    assert model.preprocess(True, scale=(0.5, 1.0))(picture).shape == (3, 32, 32)


def test_tokenizer_reads_the_stretched_context():
    model = fix_clip(base_clip(text_cfg={**CLIP_CFG["text_cfg"], "vocab_size": 49408}))
    ids = model.tokenizer()(["a cat", "word " * 300])
    assert ids.shape == (2, 44)
    assert ids[1, -1] == ids.max(), "cut texts still end with the end-of-text token"
