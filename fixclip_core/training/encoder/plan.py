"""What a training of the encoder on many GPUs needs: samples from storage, cores, memory, hours and cost.

Every figure says where it comes from: counted or measured here, given by the user, or assumed. The model is the
recipe's, with random weights, on this machine; nothing is trained and nothing is downloaded.
"""

import io
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fixclip_core.data.loader import Batches
from fixclip_core.data.samples import Sample, decode_image
from fixclip_core.training.encoder.recipe import EncoderRecipe
from fixclip_core.training.encoder.trainer import EncoderTrainer, mean_length, scenes_for
from fixclip_core.training.trainer import GIB, changed
from fixclip_core.weights.load import is_open_clip_name

# Dense bf16 TFLOP/s and GiB of memory, from the vendors' data sheets.
GPUS = {"h100": (989, 80), "h200": (989, 141), "a100": (312, 80), "l40s": (362, 48), "rtx4090": (165, 24)}
PROBE = 4  # samples whose floating-point operations are counted
LOOKED_AT = 24  # samples that are read and decoded to be measured
ASSUMED_KB = 100.0
ASSUMED_SIDES = (640, 480)  # of a picture that is decoded in place of data that is not at hand

Row = tuple[str, str, str]  # what, figure, where it comes from


@dataclass(frozen=True)
class Cluster:
    """What the plan is for; None: to be counted, measured or assumed.

    Attributes:
        gpus: training processes.
        gpu: one of `GPUS`.
        samples: of the data, where it is not at hand.
        samples_per_second: of one GPU, as the user's benchmark gave it.
        utilisation: share of the GPU's peak that a step reaches, if `samples_per_second` is not given.
        sample_kb: size of a stored sample.
        price: of one GPU for an hour.
    """

    gpus: int
    gpu: str = "h100"
    samples: int | None = None
    samples_per_second: float | None = None
    utilisation: float = 0.35
    sample_kb: float | None = None
    price: float | None = None

    def __post_init__(self) -> None:
        if self.gpu not in GPUS:
            raise ValueError(f"gpu {self.gpu!r}: valid are {', '.join(GPUS)}")


def cluster_plan(recipe: EncoderRecipe, cluster: Cluster) -> list[Row]:
    """The plan, a row a figure.

    Raises:
        ValueError: the recipe cannot be used, its data is not at hand and `samples` is not given, or its batch does not
            divide among the GPUs.
    """
    batch_size, rest = divmod(recipe.train.batch_size, cluster.gpus)
    if rest or not batch_size:
        raise ValueError(
            f"train.batch_size={recipe.train.batch_size}: it must be a multiple of the number of GPUs, {cluster.gpus}"
        )
    with tempfile.TemporaryDirectory() as folder:
        trainer = EncoderTrainer(_probe_recipe(recipe, cluster, folder)).prepare()
        samples, source = _samples(trainer, cluster)
        steps = recipe.train.steps or recipe.train.epochs * (samples // recipe.train.batch_size)
        if not steps:
            raise ValueError(f"{samples} samples do not fill one step of train.batch_size={recipe.train.batch_size}")
        rate, rate_rows = _rate(trainer, cluster)
        hours = steps * recipe.train.batch_size / (rate * cluster.gpus) / 3600
        return [
            ("samples", f"{samples:,}", source),
            ("steps", f"{steps:,} of {recipe.train.batch_size:,} = {cluster.gpus} x {batch_size}", "the recipe"),
            *rate_rows,
            ("all GPUs", f"{rate * cluster.gpus:,.0f} samples/s", f"{cluster.gpus} times that; waiting for one another "
             "and evaluations not counted"),
            *_storage(trainer, cluster, rate),
            *_gradients(trainer, batch_size / rate),
            *_memory(trainer, cluster, batch_size, recipe.train.micro_batch_size),
            ("time", f"{hours:,.1f} hours, {hours * cluster.gpus:,.0f} GPU hours", "steps and samples/s above"),
            _cost(cluster, hours),
        ]  # fmt: skip


def _probe_recipe(recipe: EncoderRecipe, cluster: Cluster, folder: str) -> EncoderRecipe:
    """The recipe in a few samples: random weights, bfloat16, and scenes where the number of samples is given."""
    changes: dict[str, dict[str, Any]] = {
        "train": {"batch_size": PROBE, "micro_batch_size": None, "compile": False, "steps": 1, "epochs": 1},
        "eval": {"source": None, "held_out": None},
        "output": {"folder": folder, "trackers": []},
    }
    if recipe.train.precision == "auto":
        changes["train"]["precision"] = "bf16"
    if is_open_clip_name(recipe.model.name):
        changes["model"] = {"pretrained": None}
    if cluster.samples is not None:
        changes["data"] = {**scenes_for(recipe), "stop": 64, "workers": 0}
        changes["captions"] = {"filter_captions": False}
    else:
        changes["data"] = {"workers": 0}
    return changed(recipe, changes)


def _samples(trainer: EncoderTrainer, cluster: Cluster) -> tuple[int, str]:
    if cluster.samples is not None:
        return cluster.samples, "given; captions are those of generated scenes"
    return len(trainer.loader.batches.order), f"counted in {trainer.recipe.data.source}"


def _rate(trainer: EncoderTrainer, cluster: Cluster) -> tuple[float, list[Row]]:
    """Samples a second of one GPU."""
    if cluster.samples_per_second is not None:
        return cluster.samples_per_second, [("one GPU", f"{cluster.samples_per_second:,.0f} samples/s", "given")]
    flops, tokens = count_flops(trainer)
    peak = GPUS[cluster.gpu][0]
    rate = peak * 1e12 * cluster.utilisation / flops
    counted = f"counted: forward and backward of {PROBE} samples, captions of {tokens:.0f} tokens"
    estimated = (
        f"{cluster.utilisation:.0%} (assumed) of {peak} TFLOP/s of an {cluster.gpu} (data sheet); NOT MEASURED: "
        "give --samples-per-second, as `benchmarks/train_step.py --device cuda` prints it"
    )
    return rate, [("a sample", f"{flops / 1e9:,.0f} GFLOP", counted), ("one GPU", f"{rate:,.0f} samples/s", estimated)]


def count_flops(trainer: EncoderTrainer) -> tuple[float, float]:
    """Floating-point operations of a sample's step, matrix products and attention, and tokens of a long caption."""
    batch = trainer._first_batch()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the one that is counted on a CPU
        losses = trainer.task.batch_losses(trainer.module, batch, trainer.accelerator.autocast)
        losses["loss"].backward()
    trainer.optimizer.zero_grad()
    return counter.get_total_flops() / len(batch), mean_length(batch.long_ids)


def _storage(trainer: EncoderTrainer, cluster: Cluster, rate: float) -> list[Row]:
    """What storage and the nodes' cores must deliver."""
    batches = trainer.loader.batches
    kilobytes, milliseconds, measured = (
        _measured_sample(batches) if cluster.samples is None else _generated_sample(trainer)
    )
    if cluster.sample_kb is not None:
        kilobytes, of_size = cluster.sample_kb, f"{cluster.sample_kb:g} KB a sample, given"
    elif kilobytes is None:
        kilobytes, of_size = ASSUMED_KB, f"{ASSUMED_KB:g} KB a sample, assumed: give --sample-kb"
    else:
        of_size = f"{kilobytes:.0f} KB a sample, measured on {LOOKED_AT} of the data at most"
    total = rate * cluster.gpus
    sharing = (
        "nodes that share shards fetch a little more, see `fixclip data sampler "
        f"--samples {_samples(trainer, cluster)[0]} --ranks {cluster.gpus}`"
    )
    return [
        ("storage", f"{total:,.0f} samples/s, {total * kilobytes / 1e3:,.0f} MB/s", f"{of_size}; {sharing}"),
        ("cores", f"{rate * milliseconds / 1e3:,.1f} for each GPU", f"{milliseconds:.1f} ms CPU a sample, {measured}"),
    ]


def _measured_sample(batches: Batches) -> tuple[float | None, float, str]:
    """KB and CPU milliseconds of a sample of the data, and how they were found."""
    indices = np.linspace(0, len(batches.order) - 1, min(LOOKED_AT, len(batches.order))).astype(int)
    numbers = [batches.order.index(0, int(position)) for position in indices]
    sizes = [len(s.image) for s in map(batches.source.read, numbers) if not isinstance(s.image, Tensor)]
    batches.load(0, numbers[0])  # imports and opens what is needed
    start = time.process_time()
    for number in numbers:
        batches.load(0, number)
    milliseconds = 1e3 * (time.process_time() - start) / len(numbers)
    kilobytes = sum(sizes) / len(sizes) / 1e3 if sizes else None
    return kilobytes, milliseconds, f"measured here on {len(numbers)} of the data"


def _generated_sample(trainer: EncoderTrainer) -> tuple[float | None, float, str]:
    """As `_measured_sample`, of a JPEG of noise, as the data is not at hand."""
    buffer = io.BytesIO()
    Image.effect_noise(ASSUMED_SIDES, 48).convert("RGB").resize(ASSUMED_SIDES).save(buffer, "jpeg", quality=85)
    sample = Sample("generated", "0", buffer.getvalue(), "", "")
    batches = trainer.loader.batches
    start = time.process_time()
    for _ in range(LOOKED_AT):
        batches.transform(decode_image(sample, batches.draft_size))
    milliseconds = 1e3 * (time.process_time() - start) / LOOKED_AT
    width, height = ASSUMED_SIDES
    return None, milliseconds, f"measured here on a JPEG of {width} x {height}"


def _gradients(trainer: EncoderTrainer, seconds: float) -> list[Row]:
    trained = sum(p.numel() * p.element_size() for p in trainer.module.parameters() if p.requires_grad)
    return [
        ("network", f"{2 * trained / seconds / 1e9:,.2f} GB/s in and out of each GPU",
         f"fp32 gradients of {trained / 4e6:.0f}M parameters, twice in a ring, in the {seconds:.2f} s of a step"),
    ]  # fmt: skip


def _memory(trainer: EncoderTrainer, cluster: Cluster, batch_size: int, micro: int | None) -> list[Row]:
    samples = min(micro or batch_size, batch_size)
    parts = trainer.memory_of(samples)
    need, have = sum(parts.values()) / GIB, GPUS[cluster.gpu][1]
    shown = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
    fits = "" if need < have else "; DOES NOT FIT: set train.micro_batch_size or train.gradient_checkpointing"
    at_a_time = f"{samples} samples at a time; measured here on {PROBE} and scaled up: {shown}"
    return [("memory", f"{need:,.1f} of {have} GiB of a GPU{fits}", at_a_time)]


def _cost(cluster: Cluster, hours: float) -> Row:
    if cluster.price is None:
        return "cost", "unknown", "give --price, of a GPU for an hour"
    return "cost", f"{hours * cluster.gpus * cluster.price:,.0f}", f"{cluster.price:g} a GPU hour, given"
