"""How fast is a FIX-CLIP training step, and what does it hold in memory?

    python benchmarks/train_step.py                      # ViT-B/16, fp32 and bf16
    python benchmarks/train_step.py --model ViT-B-32 --batch-size 4 --variants fix_clip_drop,long_clip
    python benchmarks/train_step.py --claims             # FIX-CLIP and its rivals alone

Samples per second (of the fastest step: other work on the machine only slows), CPU seconds a sample (median) and
peak memory of

- the full FIX-CLIP step, all modules on, with both kinds of masking;
- its rivals on open_clip's own towers: plain fine-tuning at 248 padded tokens, and Long-CLIP's step (the image
  once, both captions padded to 248, PCA short branch);
- both rivals with open_clip's newest length options, `--length-bucketing --text-pad-multiple` of its main branch since
  commit 4630c00 (11 June 2026): batches of captions of similar length, of a pool of 2,048 (its default), padded to the
  longest of each, rounded up to a multiple of 8. The installed version, 3.3, lacks them: `bucketed_batches` and
  `encode_trimmed` are our own. Lengths differ from batch to batch, so a measured step is one of each of four batches,
  evenly spaced in the pool;
- FIX-CLIP with state alignment, which adds the frozen base's pass over the overlapping windows of every caption;
- each fast path and the plain computation that it replaces.

A step is forward, losses and backward; the optimiser is left out, being the same for all and independent of the
batch. Weights and images are random, and so are the captions' tokens; their lengths are drawn like those of long
captions (mean about 120 tokens) and short ones (about 20). Every variant runs in a process of its own, in turns,
because peak memory is a process's and because other work on the machine would favour whoever runs alone.
"""

import copy
import dataclasses
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated, Any

import open_clip
import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from tqdm import tqdm

from fixclip_core.data.loader import Batch
from fixclip_core.model.config import FINE_TUNE, LONG_CLIP, HiddenState
from fixclip_core.model.fixclip import FixClip
from fixclip_core.model.image_tower import reader_mask, region_of_patch
from fixclip_core.training.encoder.losses.contrastive import contrastive_loss
from fixclip_core.training.encoder.losses.gradcache import cached_backward
from fixclip_core.training.encoder.losses.pca import pca_reconstruction
from fixclip_core.training.encoder.losses.state_alignment import StateAlignment
from fixclip_core.training.encoder.recipe import TrainSection
from fixclip_core.training.encoder.task import ContrastiveTask, split_batch
from fixclip_core.weights.load import load_fixclip

CONTEXT_LENGTH = 248
EOS = 49407
PCA_RANK = 32
LOSS_ROWS = 8192
POOL = 2048  # captions that are sorted together, open_clip's default of --bucket-pool
BUCKETS = 4  # batches of different lengths that a step of a bucketed variant goes through
PAD_MULTIPLE = 8

# What is trained, and one step of it.
Step = tuple[Iterable[Tensor], Callable[[], Any]]


@dataclass(frozen=True)
class Setting:
    """One run of one variant."""

    model: str
    batch_size: int
    steps: int
    warmup: int
    dtype: str
    device: str
    threads: int
    num_prompts: int
    seed: int = 0


# -- data --------------------------------------------------------------------------------------------------------


def caption_lengths(batch_size: int, mean: float, deviation: float, low: int, high: int) -> list[int]:
    """Token counts of captions, evenly spaced through a normal distribution, so that small batches have its mean."""
    normal = statistics.NormalDist(mean, deviation)
    drawn = [normal.inv_cdf((index + 0.5) / batch_size) for index in range(batch_size)]
    return [min(max(round(length), low), high) for length in drawn]


def random_texts(lengths: list[int]) -> Tensor:
    """Token ids (B, 248) padded with 0, in random order."""
    ids_BT = torch.randint(1, EOS - 1, (len(lengths), CONTEXT_LENGTH))
    for row, index in enumerate(torch.randperm(len(lengths)).tolist()):
        ids_BT[row, lengths[index] - 1] = EOS
        ids_BT[row, lengths[index] :] = 0
    return ids_BT


def random_batch(setting: Setting, image_size: int) -> Batch:
    size = setting.batch_size
    batch = Batch(
        image=torch.randn(size, 3, image_size, image_size),
        long_ids=random_texts(caption_lengths(size, 120, 40, 40, CONTEXT_LENGTH)),
        short_ids=random_texts(caption_lengths(size, 20, 5, 8, 40)),
        seeds=torch.arange(size),
        keys=[str(number) for number in range(size)],
    )
    return batch.to(setting.device)


# -- whole steps -------------------------------------------------------------------------------------------------


def fix_clip(setting: Setting, **fields: Any) -> tuple[FixClip, Batch]:
    fields = {"num_prompts": setting.num_prompts} | fields
    model = load_fixclip(setting.model, **fields).to(setting.device)
    return model, random_batch(setting, model.config.clip["vision_cfg"]["image_size"])


def task_of(model: FixClip, alignment: StateAlignment | None = None) -> ContrastiveTask:
    """The losses of a training of this model, with the recipe's default weights."""
    return ContrastiveTask.from_recipe(TrainSection(), model.config, alignment)


def fix_clip_step(setting: Setting, **fields: Any) -> Step:
    model, batch = fix_clip(setting, **fields)
    task = task_of(model)
    return model.parameters(), lambda: task.batch_losses(model, batch)["loss"].backward()


def cached_step(setting: Setting) -> Step:
    model, batch = fix_clip(setting, masking="drop")
    parts = split_batch(batch, setting.batch_size // 4)
    return model.parameters(), lambda: cached_backward(parts, model, task_of(model).losses)


def recomputed_step(setting: Setting) -> Step:
    model, batch = fix_clip(setting, masking="drop")
    model.set_grad_checkpointing()
    task = task_of(model)
    return model.parameters(), lambda: task.batch_losses(model, batch)["loss"].backward()


def aligned_step(setting: Setting, state: HiddenState) -> Step:
    model, batch = fix_clip(setting, masking="drop")
    task = task_of(model, StateAlignment(model.base_text_tower(), state))
    return model.parameters(), lambda: task.batch_losses(model, batch)["loss"].backward()


def open_clip_at_248(setting: Setting) -> tuple[Any, Batch]:
    model = open_clip.create_model(setting.model, force_context_length=CONTEXT_LENGTH).to(setting.device)
    return model, random_batch(setting, open_clip.get_model_config(setting.model)["vision_cfg"]["image_size"])


def rival_fine_tune_step(setting: Setting) -> Step:
    model, batch = open_clip_at_248(setting)
    loss_fn = open_clip.ClipLoss()

    def step() -> None:
        image_BE = model.encode_image(batch.image, normalize=True)
        text_BE = model.encode_text(batch.long_ids, normalize=True)
        loss_fn(image_BE, text_BE, model.logit_scale.exp()).backward()

    return model.parameters(), step


def rival_long_clip_step(setting: Setting) -> Step:
    model, batch = open_clip_at_248(setting)
    loss_fn = open_clip.ClipLoss()

    def step() -> None:
        image_BE = model.encode_image(batch.image, normalize=True)
        long_BE = model.encode_text(batch.long_ids, normalize=True)
        short_BE = model.encode_text(batch.short_ids, normalize=True)
        coarse_BE = pca_reconstruction(image_BE, PCA_RANK).to(image_BE.dtype)
        scale = model.logit_scale.exp()
        (loss_fn(image_BE, long_BE, scale) + loss_fn(coarse_BE, short_BE, scale)).backward()

    return model.parameters(), step


def bucketed_batches(setting: Setting, image_size: int) -> list[Batch]:
    """Four of the batches that open_clip's LengthBucketer makes of a pool, evenly spaced from short to long.

    The pool is sorted by the long captions, so that a batch has short ones of all lengths.
    """
    size = setting.batch_size
    pool = max(POOL, BUCKETS * size)
    lengths = sorted(caption_lengths(pool, 120, 40, 40, CONTEXT_LENGTH))
    middles = [(2 * number + 1) * pool // (2 * BUCKETS) for number in range(BUCKETS)]
    texts = [random_texts(lengths[middle - size // 2 :][:size]).to(setting.device) for middle in middles]
    return [dataclasses.replace(random_batch(setting, image_size), long_ids=long_ids) for long_ids in texts]


def encode_trimmed(model: Any, ids_BT: Tensor) -> Tensor:
    """Text features of an open_clip CLIP, (B, E), from no more than the batch's longest text.

    What open_clip's main branch does with texts of variable length, re-implemented on the layers of the installed
    version, 3.3, whose `CLIP.encode_text` needs all 248.
    """
    longest = int(ids_BT.argmax(dim=-1).max()) + 1
    length = min(-(-longest // PAD_MULTIPLE) * PAD_MULTIPLE, ids_BT.shape[1])
    x_BTD = model.token_embedding(ids_BT[:, :length]) + model.positional_embedding[:length]
    x_BTD = model.ln_final(model.transformer(x_BTD, attn_mask=model.attn_mask[:length, :length]))
    rows_B = torch.arange(len(ids_BT), device=ids_BT.device)
    return F.normalize(x_BTD[rows_B, ids_BT.argmax(dim=-1)] @ model.text_projection, dim=-1)


def bucketed_step(setting: Setting, with_short: bool) -> Step:
    """Fine-tuning, or Long-CLIP's step, over batches of similar lengths."""
    model, _ = open_clip_at_248(setting)
    batches = bucketed_batches(setting, open_clip.get_model_config(setting.model)["vision_cfg"]["image_size"])
    loss_fn = open_clip.ClipLoss()

    def step() -> None:
        for batch in batches:
            scale = model.logit_scale.exp()
            image_BE = model.encode_image(batch.image, normalize=True)
            loss = loss_fn(image_BE, encode_trimmed(model, batch.long_ids), scale)
            if with_short:
                coarse_BE = pca_reconstruction(image_BE, PCA_RANK).to(image_BE.dtype)
                loss = loss + loss_fn(coarse_BE, encode_trimmed(model, batch.short_ids), scale)
            loss.backward()

    return model.parameters(), step


# -- fast paths and what they replace ----------------------------------------------------------------------------


def texts_in_pieces(setting: Setting) -> Step:
    model, batch = fix_clip(setting)
    ids_BT = torch.cat([batch.long_ids, batch.short_ids])
    return model.parameters(), lambda: model.encode_text(ids_BT).sum().backward()


def texts_padded(setting: Setting) -> Step:
    model, batch = open_clip_at_248(setting)

    def step() -> None:
        for ids_BT in (batch.long_ids, batch.short_ids):
            model.encode_text(ids_BT, normalize=True).sum().backward()

    return model.parameters(), step


def prompts_in_slices(setting: Setting) -> Step:
    model, batch = fix_clip(setting)
    return model.parameters(), lambda: model.encode_image(batch.image).sum().backward()


def prompts_behind_a_mask(setting: Setting) -> Step:
    """open_clip's own layers on [patches, CLS, prompts] with one dense additive mask."""
    visual = open_clip.create_model(setting.model).visual.to(setting.device)
    model, batch = fix_clip(setting)
    num_patches, num_prompts = model.visual.num_patches, setting.num_prompts
    size = num_patches + 1 + num_prompts
    allowed_TT = torch.zeros(size, size, dtype=torch.bool)
    allowed_TT[:, : num_patches + 1] = True
    allowed_TT[num_patches:] = reader_mask(region_of_patch(num_patches, num_prompts), num_prompts)
    mask_TT = torch.zeros(size, size).masked_fill(~allowed_TT, float("-inf")).to(setting.device)
    prompts_LMD = copy.deepcopy(model.visual.prompts)

    def step() -> None:
        x_BTD = visual._embeds(batch.image).roll(-1, dims=1)
        x_BTD = torch.cat([x_BTD, x_BTD.new_zeros(len(x_BTD), num_prompts, x_BTD.shape[-1])], dim=1)
        for block, prompts_MD in zip(visual.transformer.resblocks, prompts_LMD, strict=True):
            x_BTD = x_BTD + F.pad(prompts_MD.to(x_BTD.dtype), (0, 0, num_patches + 1, 0))
            x_BTD = block(x_BTD, attn_mask=mask_TT)
        (visual.ln_post(x_BTD[:, num_patches]) @ visual.proj).sum().backward()

    return [*visual.parameters(), prompts_LMD], step


def loss_over(setting: Setting, chunk_size: int | None) -> Step:
    features = [torch.randn(LOSS_ROWS, 512, device=setting.device) for _ in range(2)]
    image_NE, text_NE = (F.normalize(feature, dim=-1).requires_grad_() for feature in features)
    scale = torch.tensor(100.0, device=setting.device, requires_grad=True)
    return (image_NE, text_NE, scale), lambda: contrastive_loss(
        image_NE, text_NE, scale, chunk_size=chunk_size
    ).backward()


VARIANTS: dict[str, tuple[str, Callable[[Setting], Step]]] = {
    "fix_clip_drop": ("FIX-CLIP, all modules, masking drop", lambda s: fix_clip_step(s, masking="drop")),
    "fix_clip_replace": ("FIX-CLIP, all modules, masking replace", lambda s: fix_clip_step(s, masking="replace")),
    "long_clip": ("Long-CLIP step, padded to 248", rival_long_clip_step),
    "fine_tune": ("fine-tuning, padded to 248", rival_fine_tune_step),
    "long_clip_bucketed": ("Long-CLIP step, length buckets", lambda s: bucketed_step(s, with_short=True)),
    "fine_tune_bucketed": ("fine-tuning, length buckets", lambda s: bucketed_step(s, with_short=False)),
    "our_long_clip": ("Long-CLIP recipe in this code", lambda s: fix_clip_step(s, **LONG_CLIP)),
    "our_fine_tune": ("fine-tuning in this code", lambda s: fix_clip_step(s, **FINE_TUNE)),
    "fix_clip_cached": ("FIX-CLIP drop, GradCache, a quarter a pass", cached_step),
    "fix_clip_recomputed": ("FIX-CLIP drop, gradient checkpointing", recomputed_step),
    "fix_clip_states": ("FIX-CLIP drop, state alignment of the last states", lambda s: aligned_step(s, "last")),
    "fix_clip_penultimate": ("FIX-CLIP drop, of the penultimate ones", lambda s: aligned_step(s, "penultimate")),
    "texts_pieces": ("texts, trimmed and in sorted pieces", texts_in_pieces),
    "texts_padded": ("texts, padded, open_clip's own tower", texts_padded),
    "prompts_slices": ("image tower with prompts, slices", prompts_in_slices),
    "prompts_mask": ("image tower with prompts, dense mask", prompts_behind_a_mask),
    "loss_chunked": (f"loss over {LOSS_ROWS} pairs, 512 rows a chunk", lambda s: loss_over(s, 512)),
    "loss_plain": (f"loss over {LOSS_ROWS} pairs, whole matrix", lambda s: loss_over(s, None)),
}
# What each variant is to be compared with.
AGAINST = {
    "fix_clip_drop": ["long_clip", "long_clip_bucketed", "fine_tune"],
    "fix_clip_replace": ["long_clip", "long_clip_bucketed", "fine_tune"],
    "our_long_clip": ["long_clip", "long_clip_bucketed"],
    "our_fine_tune": ["fine_tune", "fine_tune_bucketed"],
    "fix_clip_cached": ["fix_clip_drop"],
    "fix_clip_recomputed": ["fix_clip_drop"],
    "fix_clip_states": ["fix_clip_drop"],
    "fix_clip_penultimate": ["fix_clip_drop"],
    "texts_pieces": ["texts_padded"],
    "prompts_slices": ["prompts_mask"],
    "loss_chunked": ["loss_plain"],
}
CLAIMS = [*list(AGAINST)[:4], "long_clip", "long_clip_bucketed", "fine_tune", "fine_tune_bucketed"]


def rows_of(variant: str, batch_size: int) -> int:
    """Samples, or rows of a loss, that one step of the variant goes through."""
    return LOSS_ROWS if variant.startswith("loss") else batch_size * (BUCKETS if "bucketed" in variant else 1)


# -- measuring ---------------------------------------------------------------------------------------------------


def measure(variant: str, setting: Setting) -> dict[str, Any]:
    """Seconds and CPU seconds of each step, and peak memory in MiB, of one variant in this process."""
    torch.set_num_threads(setting.threads)
    torch.manual_seed(setting.seed)
    trained, step = VARIANTS[variant][1](setting)
    parameters = list(trained)
    cuda = setting.device.startswith("cuda")
    low_precision = setting.dtype == "bf16"
    seconds, cpu_seconds = [], []
    for _ in range(setting.warmup + setting.steps):
        for parameter in parameters:
            parameter.grad = None
        start, cpu_start = time.perf_counter(), time.process_time()
        with torch.autocast(setting.device.split(":")[0], torch.bfloat16) if low_precision else nullcontext():
            step()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "seconds": seconds[setting.warmup :],
        "cpu_seconds": cpu_seconds[setting.warmup :],
        "peak_mib": peak / 2**20,
    }


def measure_apart(variant: str, setting: Setting) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--worker", json.dumps([variant, dataclasses.asdict(setting)])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(results: dict[str, dict[str, Any]], batch_size: int) -> str:
    """Markdown: speed, CPU time, memory, and the ratios of samples per second that the claims are about."""

    def per_row(name: str, what: str) -> float:
        return results[name][what] / rows_of(name, batch_size)

    lines = ["| variant | samples/s | CPU s/sample | peak MiB | against: times its samples/s (by CPU time) |"]
    lines.append("|---|---|---|---|---|")
    for name, result in results.items():
        ratios = [
            f"{other}: {per_row(other, 'seconds') / per_row(name, 'seconds'):.2f}x"
            f" ({per_row(other, 'cpu_seconds') / per_row(name, 'cpu_seconds'):.2f}x)"
            for other in AGAINST.get(name, [])
            if other in results
        ]
        lines.append(
            f"| {name}: {VARIANTS[name][0]} | {1 / per_row(name, 'seconds'):.3g} | "
            f"{per_row(name, 'cpu_seconds'):.3g} | {result['peak_mib']:.0f} | {', '.join(ratios)} |"
        )
    return "\n".join(lines)


def run(setting: Setting, variants: list[str], rounds: int) -> dict[str, dict[str, Any]]:
    """Fastest step, median CPU time and largest peak over rounds in which every variant runs once."""
    collected: dict[str, list[dict[str, Any]]] = {variant: [] for variant in variants}
    turns = [(index, variant) for index in range(rounds) for variant in variants]
    for index, variant in tqdm(turns, desc=setting.dtype, unit="run"):
        found = measure_apart(variant, dataclasses.replace(setting, seed=index))
        collected[variant].append(found)
        rows = rows_of(variant, setting.batch_size)
        tqdm.write(  # a run that is stopped has shown what it measured
            f"{variant}: {rows / min(found['seconds']):.3g} samples/s, "
            f"{statistics.median(found['cpu_seconds']) / rows:.3g} CPU s/sample, {found['peak_mib']:.0f} MiB",
            file=sys.stderr,
        )
    return {
        variant: {
            "seconds": min(second for run in runs for second in run["seconds"]),
            "cpu_seconds": statistics.median(second for run in runs for second in run["cpu_seconds"]),
            "peak_mib": max(run["peak_mib"] for run in runs),
        }
        for variant, runs in collected.items()
    }


def main(
    model: Annotated[str, typer.Option(help="open_clip's model name.")] = "ViT-B-16",
    batch_size: Annotated[int, typer.Option(min=4, help="Samples a step.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Measured steps a run.")] = 2,
    warmup: Annotated[int, typer.Option(min=0, help="Steps before them.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each variant, in turns.")] = 2,
    dtypes: Annotated[str, typer.Option(help="fp32, bf16 (autocast), or both.")] = "fp32,bf16",
    variants: Annotated[str, typer.Option(help=f"Some of {', '.join(VARIANTS)}.")] = ",".join(VARIANTS),
    claims: Annotated[bool, typer.Option("--claims", help="FIX-CLIP and its rivals alone.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of a run.")] = torch.get_num_threads(),
    num_prompts: Annotated[int, typer.Option(min=1, help="Regional prompts.")] = 4,
    worker: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure training steps and print Markdown tables."""
    if worker:
        variant, values = json.loads(worker)
        print(json.dumps(measure(variant, Setting(**values))))
        return
    names, dtype_names = CLAIMS if claims else variants.split(","), dtypes.split(",")
    if unknown := [name for name in names if name not in VARIANTS]:
        raise typer.BadParameter(f"variants {unknown}: valid are {', '.join(VARIANTS)}")
    if unknown := [name for name in dtype_names if name not in ("fp32", "bf16")]:
        raise typer.BadParameter(f"dtypes {unknown}: valid are fp32 and bf16")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("device cuda: this torch sees no GPU")
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {threads} thread(s)"
    print(f"{model}, batch {batch_size}, {rounds} x {steps} steps, torch {torch.__version__}, {machine}")
    for dtype in dtype_names:
        setting = Setting(model, batch_size, steps, warmup, dtype, device, threads, num_prompts)
        print(f"\n{dtype}\n\n{table(run(setting, names, rounds), batch_size)}", flush=True)


if __name__ == "__main__":
    typer.run(main)
