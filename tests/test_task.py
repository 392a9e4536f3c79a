"""The weighing of the losses, and large batches in small passes, against plain sums."""

import pytest
import torch
from accelerate import Accelerator

from fixclip_core.data.loader import Batch
from fixclip_core.model.config import FINE_TUNE, LONG_CLIP, FixClipConfig
from fixclip_core.model.fixclip import FixClip
from fixclip_core.training.encoder.losses.contrastive import contrastive_loss
from fixclip_core.training.encoder.losses.pca import pca_reconstruction
from fixclip_core.training.encoder.recipe import TrainSection
from fixclip_core.training.encoder.task import ContrastiveTask, forward_backward, split_batch

CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 4, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32},
    "text_cfg": {"context_length": 24, "vocab_size": 64, "width": 32, "heads": 2, "layers": 4},
}


def tiny(**fields):
    torch.manual_seed(0)
    config = FixClipConfig(clip=CLIP, **{"num_prompts": 2, "num_groups": 2, "first_group": 1, **fields})
    return FixClip.from_config(config).double()


def tiny_batch(model, size=6):
    ids_BT = torch.randint(1, 60, (2 * size, model.config.context_length))
    ids_BT[torch.arange(2 * size), torch.randint(3, 36, (2 * size,))] = 63
    return Batch(
        image=torch.randn(size, 3, 32, 32, dtype=torch.float64),
        long_ids=ids_BT[:size],
        short_ids=ids_BT[size:],
        seeds=torch.arange(size),
        keys=[str(i) for i in range(size)],
    )


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def test_weighted_sum_of_all_parts():
    model = tiny()
    output = model(tiny_batch(model))
    task = ContrastiveTask(weight_long=0.5, weight_short=2.0, weight_mid=(3.0, 0.25), label_smoothing=0.1)
    losses = task.losses(output)

    def plain(image_BE, text_BE):
        return contrastive_loss(image_BE, text_BE, output.logit_scale, label_smoothing=0.1)

    expected = {
        "loss_long": plain(output.image_long_BE, output.text_long_BE),
        "loss_short": plain(output.image_short_BE, output.text_short_BE),
        "loss_mid_1": plain(output.image_mid_GBE[0], output.text_mid_GBE[0]),
        "loss_mid_2": plain(output.image_mid_GBE[1], output.text_mid_GBE[1]),
    }
    weights = {"loss_long": 0.5, "loss_short": 2.0, "loss_mid_1": 3.0, "loss_mid_2": 0.25}
    assert losses.keys() == {"loss", *expected}
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value)
    torch.testing.assert_close(losses["loss"], sum(weights[name] * value for name, value in expected.items()))


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        (FINE_TUNE, {"loss", "loss_long"}),
        (LONG_CLIP | {"pca_rank": 2}, {"loss", "loss_long", "loss_short"}),
        ({"first_group": 2}, {"loss", "loss_long", "loss_short", "loss_mid_2"}),
        ({"masking": "none", "num_groups": 0, "num_prompts": 0}, {"loss", "loss_long", "loss_short"}),
    ],
)
def test_each_method_has_its_losses(fields, names):
    model = tiny(**fields)
    output = model(tiny_batch(model))
    task = ContrastiveTask.from_recipe(TrainSection(), model.config)
    losses = task.losses(output)
    assert losses.keys() == names
    torch.testing.assert_close(losses["loss"], sum(losses[name] for name in names - {"loss"}))
    if "pca_rank" in fields:
        image_BE = pca_reconstruction(output.image_long_BE, 2)
        torch.testing.assert_close(
            losses["loss_short"], contrastive_loss(image_BE, output.text_short_BE, output.logit_scale)
        )


def test_wrong_number_of_group_weights():
    model = tiny()
    with pytest.raises(ValueError, match=r"weight_mid=\[1.0, 2.0, 3.0\]: give 1 weight, or 2"):
        ContrastiveTask(weight_mid=(1.0, 2.0, 3.0)).losses(model(tiny_batch(model)))


@pytest.mark.parametrize("fields", [{}, {"masking": "drop", "hierarchy_branch": "short"}, LONG_CLIP | {"pca_rank": 3}])
@pytest.mark.parametrize("micro_batch_size", [1, 4, 6])
def test_small_passes_give_the_whole_batchs_losses_and_gradients(accelerator, fields, micro_batch_size):
    model = tiny(**fields)
    batch = tiny_batch(model)
    task = ContrastiveTask.from_recipe(TrainSection(label_smoothing=0.1, weight_mid=[0.5]), model.config)
    plain = task.losses(model(batch))
    plain["loss"].backward()
    expected = gradients(model)
    model.zero_grad()
    losses = forward_backward(accelerator, model, batch, task, micro_batch_size)
    assert not any(loss.requires_grad for loss in losses.values())
    torch.testing.assert_close(losses, {name: loss.detach() for name, loss in plain.items()})
    torch.testing.assert_close(gradients(model), expected)
    assert "logit_scale" in expected


def test_split_covers_the_batch_in_order():
    batch = tiny_batch(tiny())
    parts = split_batch(batch, 4)
    assert [len(part.image) for part in parts] == [4, 2]
    for name in ("image", "long_ids", "short_ids", "seeds"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    assert len(split_batch(batch, 100)) == 1


def test_weights_of_zero_leave_a_part_out(accelerator):
    model = tiny(num_groups=0)
    batch = tiny_batch(model)
    forward_backward(accelerator, model, batch, ContrastiveTask(weight_short=0.0))
    alone = gradients(model)
    model.zero_grad()
    output = model(batch)
    contrastive_loss(output.image_long_BE, output.text_long_BE, output.logit_scale).backward()
    torch.testing.assert_close({n: g for n, g in alone.items() if n in gradients(model)}, gradients(model))
    assert alone["visual.mask_embedding"].abs().max() == 0
