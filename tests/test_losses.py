"""Losses against plain implementations, in values and gradients, on one process and on two."""

import itertools
import math
import weakref
from types import SimpleNamespace

import open_clip
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fixclip_core.model.fixclip import FixClip, FixClipOutput
from fixclip_core.training.encoder.losses.contrastive import contrastive_loss, gather
from fixclip_core.training.encoder.losses.gradcache import cached_backward
from fixclip_core.training.encoder.losses.hierarchical import hierarchical_losses
from fixclip_core.training.encoder.losses.pca import pca_reconstruction, variance_reconstruction

CLIP_CFG = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32},
    "text_cfg": {"context_length": 24, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2},
}


def features(batch: int, width: int = 8, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(batch, width, generator=generator, dtype=torch.float64) for _ in range(2)]
    return [F.normalize(row, dim=-1).requires_grad_() for row in rows]


def plain_contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, smoothing: float = 0.0) -> Tensor:
    """InfoNCE by its definition, a row at a time."""
    logits = scale * image @ text.T
    size = len(logits)
    target = torch.full_like(logits, smoothing / size) + (1 - smoothing) * torch.eye(size, dtype=logits.dtype)
    rows = -(target * torch.log(logits.exp() / logits.exp().sum(dim=1, keepdim=True))).sum(dim=1)
    columns = -(target * torch.log(logits.exp() / logits.exp().sum(dim=0, keepdim=True))).sum(dim=0)
    return (rows.mean() + columns.mean()) / 2


def values_and_gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@settings(deadline=None, max_examples=25)
@given(batch=st.integers(1, 9), chunk=st.one_of(st.none(), st.integers(1, 12)), smoothing=st.floats(0, 0.5))
def test_contrastive_loss_equals_the_definition(batch, chunk, smoothing):
    image, text = features(batch)
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    plain = plain_contrastive_loss(image, text, scale, smoothing)
    fast = contrastive_loss(image, text, scale, label_smoothing=smoothing, chunk_size=chunk)
    torch.testing.assert_close(
        values_and_gradients(fast, image, text, scale), values_and_gradients(plain, image, text, scale)
    )


def test_chunks_do_not_hold_the_whole_matrix():
    """What the graph saves for the backward pass, in numbers of the largest tensor."""

    def largest_saved(chunk_size: int | None) -> int:
        image, text = features(64, width=4)
        saved: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            contrastive_loss(image, text, torch.tensor(1.0), chunk_size=chunk_size)
        return max(saved)

    assert largest_saved(None) >= 64 * 64
    assert largest_saved(8) <= 64 * 4


def test_autocast_does_not_reach_the_logits():
    image, text = (feature.detach().float() for feature in features(6))
    exact = contrastive_loss(image, text, torch.tensor(100.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(contrastive_loss(image, text, torch.tensor(100.0)), exact)


@pytest.mark.parametrize(
    ("shapes", "chunk", "message"),
    [(((4, 8), (3, 8)), None, r"\(4, 8\) and \(3, 8\)"), (((4, 8), (4, 8)), 0, "chunk_size=0")],
)
def test_contrastive_loss_refuses(shapes, chunk, message):
    with pytest.raises(ValueError, match=message):
        contrastive_loss(torch.zeros(shapes[0]), torch.zeros(shapes[1]), torch.tensor(1.0), chunk_size=chunk)


def test_hierarchical_losses_are_one_a_group():
    first, second = features(5), features(5, seed=1)
    scale = torch.tensor(3.0, dtype=torch.float64)
    groups = [torch.stack(pair) for pair in zip(first, second, strict=True)]
    by_hand = torch.stack([plain_contrastive_loss(*first, scale), plain_contrastive_loss(*second, scale)])
    torch.testing.assert_close(hierarchical_losses(*groups, scale), by_hand)
    with pytest.raises(ValueError, match=r"2 image groups and 1 text groups"):
        hierarchical_losses(groups[0], groups[1][:1], scale)


def test_pca_keeps_the_largest_components():
    rows = features(12, width=6)[0]
    kept = pca_reconstruction(rows, rank=2)
    centred = (rows - rows.mean(dim=0)).detach()
    variance, directions = torch.linalg.eigh(centred.T @ centred)
    best = directions[:, variance.argsort(descending=True)[:2]]
    expected = F.normalize(centred @ best @ best.T + rows.mean(dim=0).detach(), dim=-1)
    torch.testing.assert_close(kept.detach(), expected)
    kept[:, 0].sum().backward()
    assert rows.grad is not None
    assert rows.grad.isfinite().all()


def test_pca_of_a_small_batch_loses_nothing():
    rows = features(5, width=8)[0]
    torch.testing.assert_close(pca_reconstruction(rows, rank=32), rows)
    with pytest.raises(ValueError, match="rank=0"):
        pca_reconstruction(rows, rank=0)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_components_of_what_is_not_finite_are_nan_and_have_a_gradient(poison):
    """Every row: a step is then skipped, as with any other loss."""
    for keep in (lambda rows: pca_reconstruction(rows, 2), lambda rows: variance_reconstruction(rows, 0.8)):
        rows, text = features(6)
        poisoned = torch.where(torch.arange(8) == 3, poison * rows, rows)
        loss = contrastive_loss(keep(poisoned), text, torch.tensor(10.0))
        assert loss.isnan()
        loss.backward()
        assert not rows.grad.isfinite().all()


def tiny_model(**fields) -> FixClip:
    torch.manual_seed(0)
    preprocess = {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
    fields = {"keep": 4, "ratio": 2, "num_groups": 2, "first_group": 1, "num_prompts": 2} | fields
    model = FixClip.from_clip(open_clip.CLIP(**CLIP_CFG), CLIP_CFG, preprocess, **fields).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in model.new_parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def captioned_images(size: int) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 62, (2, size, 44), generator=generator)
    for index, row in enumerate(ids.flatten(0, 1)):
        row[3 + index % 40] = 63
        row[4 + index % 40 :] = 0
    return SimpleNamespace(
        image=torch.randn(size, 3, 32, 32, generator=generator, dtype=torch.float64),
        long_ids=ids[0],
        short_ids=ids[1],
        seeds=torch.arange(size),
    )


def part(batch: SimpleNamespace, start: int, stop: int) -> SimpleNamespace:
    return SimpleNamespace(**{name: value[start:stop] for name, value in vars(batch).items()})


def all_losses(output: FixClipOutput, chunk_size: int | None = None) -> dict[str, Tensor]:
    """Every loss there is, so that every feature and the logit scale get a gradient."""
    scale, options = output.logit_scale, {"label_smoothing": 0.1, "chunk_size": chunk_size}
    losses = {
        "long": contrastive_loss(output.image_long_BE, output.text_long_BE, scale, **options),
        "short": contrastive_loss(output.image_short_BE, output.text_short_BE, scale, **options),
        "mid": hierarchical_losses(output.image_mid_GBE, output.text_mid_GBE, scale, **options).sum(),
        "pca": contrastive_loss(pca_reconstruction(output.image_long_BE, 2), output.text_short_BE, scale),
        "himo": contrastive_loss(
            output.image_long_BE, variance_reconstruction(output.text_long_BE, 0.8), scale, **options
        ),
    }
    return losses | {"loss": sum(losses.values())}


def gradients(model: FixClip) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def plain_gradients(model: FixClip, batch: SimpleNamespace) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model.zero_grad()
    losses = all_losses(model(batch))
    losses["loss"].backward()
    return {name: loss.detach() for name, loss in losses.items()}, gradients(model)


@pytest.mark.parametrize("fields", [{}, {"masking": "drop"}])
@pytest.mark.parametrize("sizes", [[3, 3], [1, 4, 1], [6]])
def test_cached_backward_equals_the_whole_batch(fields, sizes):
    model, batch = tiny_model(**fields), captioned_images(6)
    losses, expected = plain_gradients(model, batch)
    model.zero_grad()
    bounds = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    parts = [part(batch, start, stop) for start, stop in itertools.pairwise(bounds)]
    cached = cached_backward(parts, model, lambda output: all_losses(output, chunk_size=2))
    torch.testing.assert_close(cached, losses)
    torch.testing.assert_close(gradients(model), expected)


def test_cached_backward_skips_what_is_off():
    model = tiny_model(short_branch="off", num_groups=0)
    batch = captioned_images(4)

    def losses(output: FixClipOutput) -> dict[str, Tensor]:
        assert output.image_short_BE is None
        return {"loss": contrastive_loss(output.image_long_BE, output.text_long_BE, output.logit_scale)}

    losses(model(batch))["loss"].backward()
    expected = gradients(model)
    model.zero_grad()
    cached_backward([part(batch, 0, 2), part(batch, 2, 4)], model, losses)
    torch.testing.assert_close(gradients(model), expected)


def test_cached_backward_keeps_no_hidden_states_of_the_first_pass():
    model, batch = tiny_model(), captioned_images(4)
    kept: list[weakref.ref[Tensor]] = []

    def encode(part: SimpleNamespace) -> FixClipOutput:
        output = model(part, state="last")
        kept.extend(weakref.ref(state) for state in output.text_states)
        return output

    def losses(output: FixClipOutput) -> dict[str, Tensor]:
        assert not output.text_states
        assert [state() for state in kept] == [None] * 8
        return all_losses(output)

    cached_backward([part(batch, 0, 2), part(batch, 2, 4)], encode, losses)


def test_cached_backward_needs_a_micro_batch():
    with pytest.raises(ValueError, match="no micro-batches"):
        cached_backward([], tiny_model(), all_losses)


def _two_processes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mine = part(captioned_images(8), 4 * rank, 4 * rank + 4)
    model = tiny_model()
    wrapped = DistributedDataParallel(model)
    results = {}
    losses = all_losses(wrapped(mine), chunk_size=3)
    losses["loss"].backward()
    results["plain"] = gradients(model)
    results["losses"] = {name: loss.detach() for name, loss in losses.items()}
    model.zero_grad()
    parts = [part(mine, 0, 1), part(mine, 1, 4)]
    cached_backward(parts, wrapped, all_losses, no_sync=wrapped.no_sync)
    results["cached"] = gradients(model)
    poisoned = torch.randn(4, 8, requires_grad=True)
    poison = torch.tensor([math.nan if rank == 1 else 1.0])  # of one number of one process
    poisoned = torch.cat([poisoned.flatten()[1:], poison]).reshape(4, 8)
    results["poisoned"] = [pca_reconstruction(poisoned, 2), variance_reconstruction(poisoned, 0.8)]
    results["gathered"] = gather(torch.full((2, 1, 3), float(rank)))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one_with_the_whole_batch(tmp_path):
    mp.spawn(_two_processes, args=(str(tmp_path),), nprocs=2)
    losses, expected = plain_gradients(tiny_model(), captioned_images(8))
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    mean = {name: (results[0]["losses"][name] + results[1]["losses"][name]) / 2 for name in losses}
    torch.testing.assert_close(mean, losses)
    for result in results:
        torch.testing.assert_close(result["plain"], expected)
        torch.testing.assert_close(result["cached"], expected)
        assert all(kept.requires_grad and kept.isnan().all() for kept in result["poisoned"])
        assert result["gathered"][0, :, 0].tolist() == [0.0, 1.0]


def test_gather_is_the_identity_on_one_process():
    rows = torch.randn(3, 2)
    assert gather(rows) is rows


def test_output_fields_are_features_scalars_or_no_tensors():
    """`cached_backward` relies on it."""
    output = tiny_model()(captioned_images(2))
    assert {value.ndim for value in vars(output).values() if isinstance(value, Tensor)} == {0, 2, 3}
    assert output.text_states == ()
