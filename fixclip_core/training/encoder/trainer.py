"""Training the encoder, a `FixClip`, by contrast of images with long and short captions.

Shapes: B samples of this process, I images, T texts, E embedding.
"""

import logging
import math
import sys
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import DistributedType
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm import tqdm

from fixclip_core.data.config import READ_SCENES, DataConfig, SourceSection
from fixclip_core.data.loader import Batch, Loader, build_loader, check_wordings, open_samples, some_captions
from fixclip_core.data.order import sample_range
from fixclip_core.data.samples import BadSampleError, picture_digest
from fixclip_core.data.sources import Source, open_source
from fixclip_core.evaluation.retrieval import retrieval_metrics
from fixclip_core.model.config import FINE_TUNE, LONG_CLIP
from fixclip_core.model.fixclip import MAX_LOG_SCALE, FixClip
from fixclip_core.training.encoder.recipe import EncoderRecipe
from fixclip_core.training.encoder.task import ContrastiveTask, forward_backward, make_alignment, split_batch
from fixclip_core.training.memory import activation_bytes
from fixclip_core.training.metrics import METRICS, MetricsLog, rows_until
from fixclip_core.training.optim import check_finite
from fixclip_core.training.trainer import Trainer, batches, changed, this_process
from fixclip_core.weights.load import find_fixclip, is_open_clip_name, load_fixclip

logger = logging.getLogger(__name__)

MODEL = "model"
BEST = "best"
EVALUATED_ALIKE = ("eval.every", "eval.batch_size")  # whatever these are
SCORED = ("long_image_to_text_recall_at_1", "long_text_to_image_recall_at_1")


class EncoderTrainer(Trainer):
    """Trains a `FixClip`; `module` is it, and `eval_loader` the held-out pairs, if there are any.

    Raises:
        ValueError: see `Trainer`, or the way of sharding weights does not fit model or recipe.
    """

    recipe: EncoderRecipe
    module: FixClip
    loader: Loader
    eval_loader: Loader | None = None
    task: ContrastiveTask

    def __init__(self, recipe: EncoderRecipe):
        super().__init__(recipe)
        if self.accelerator.distributed_type == DistributedType.FSDP and not self.accelerator.is_fsdp2:
            raise ValueError(
                "FSDP of version 1, Accelerate's default, cannot train this model; set fsdp_version: 2 in Accelerate's "
                "config (accelerate config), or leave FSDP out"
            )
        if recipe.train.micro_batch_size and self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise ValueError(
                f"train.micro_batch_size={recipe.train.micro_batch_size}: DeepSpeed steps at every backward pass; "
                "set it to null, or use FSDP"
            )

    # -- building --------------------------------------------------------------------------------------------

    def prepare(self, resume: str = "auto") -> Self:
        super().prepare(resume)
        if self.accelerator.is_fsdp2:
            from torch.distributed.fsdp import register_fsdp_forward_method

            for name in ("encode_image", "encode_text"):
                register_fsdp_forward_method(self.module, name)
        return self

    def build_model(self) -> FixClip:
        train, name, clip = self.recipe.train, self.recipe.model.name, build_clip(self.recipe)
        if train.weight_states and not clip.config.lora_rank and find_fixclip(name) is not None:
            raise ValueError(
                f"train.weight_states={train.weight_states}: {name} is a FixClip, whose text tower is trained "
                "already; start from the CLIP whose hidden states the image generator reads"
            )
        alignment = make_alignment(train, clip, self.accelerator.device)
        self.task = ContrastiveTask.from_recipe(train, clip.config, alignment)
        if self.accelerator.distributed_type == DistributedType.FSDP:  # it cannot shard a scalar; `save` undoes this
            clip.logit_scale = nn.Parameter(clip.logit_scale.detach().reshape(1))
        return clip

    def open_data(self) -> None:
        self.recipe = hold_out(self.recipe)
        configs = [data_config(self.recipe, self.batch_size)]
        if self.recipe.eval.source is not None:
            configs.append(eval_data_config(self.recipe))
        self.data = [(config, open_samples(config)) for config in configs]

    def build_data(self) -> Loader:
        loader, *others = [
            self._loader(config, source, augment=number == 0) for number, (config, source) in enumerate(self.data)
        ]
        self.eval_loader = others[0] if others else None
        if self.recipe.train.weight_plain and self.accelerator.is_main_process:
            check_wordings(some_captions(loader.batches), "train.weight_plain", self.recipe.data.source)
        return loader

    def _loader(self, config: DataConfig, source: Source, *, augment: bool) -> Loader:
        clip, accelerator = self.module, self.accelerator
        size = clip.config.preprocess.get("size")
        return build_loader(
            config,
            transform=clip.preprocess(train=augment),
            tokenizer=clip.tokenizer(),
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            image_size=max(size) if isinstance(size, list | tuple) else size,
            pin_memory=accelerator.device.type == "cuda",
            source=source,
            digests=not augment,
        )

    def is_new(self, name: str) -> bool:
        return name in self.module.new_parameters()

    def no_decay(self, name: str, parameter: nn.Parameter) -> bool:
        """Tokens and positions are no matrices either; the logit scale has fewer than 2 dimensions."""
        return super().no_decay(name, parameter) or "position" in name or name == "visual.prompts"

    def is_fixed(self, key: str, now: Any, then: Any) -> bool:
        """What acts on a run's first weights alone, or on how they are read where their shapes do not tell."""
        own = ("model.keep", "model.ratio", "model.positions", "model.prompt_flow")
        return super().is_fixed(key, now, then) or key in own

    # -- the step --------------------------------------------------------------------------------------------

    def forward_backward(self, item: Batch) -> dict[str, Tensor]:
        batch = item.to(self.accelerator.device, non_blocking=True)
        return forward_backward(self.accelerator, self.model, batch, self.task, self.recipe.train.micro_batch_size)

    def figures(self) -> dict[str, float]:
        return {
            "logit_scale": math.exp(_whole(self.module.logit_scale).item()),
            "unusable_samples": len(self.loader.skipped),
        }

    # -- evaluation and saving -------------------------------------------------------------------------------

    def start(self) -> None:
        """As any training; the best score is looked up, as a checkpoint is written before its step is evaluated."""
        super().start()
        if self.checkpoint is not None:
            self.state.best = self._on_main(self._best_to_beat)

    def _best_to_beat(self) -> float:
        """The best score so far, if `best/` has its model and it is one of the same pairs; else none."""
        pairs = [key for key, *_ in self.changes() if key.startswith("eval.") and key not in EVALUATED_ALIKE]
        if pairs:
            logger.warning(
                "%s changed, so %s is chosen anew, by the pairs of now", ", ".join(pairs), self.folder / BEST
            )
        if pairs or not (self.folder / BEST).exists():
            return -math.inf
        return max(self.state.best, self._best_so_far())

    def _best_so_far(self) -> float:
        """The best score in the figures of the run that the checkpoint belongs to, up to its step."""
        assert self.checkpoint is not None
        path = self.checkpoint.parent.parent / METRICS
        rows = rows_until(path, self.state.step) if path.exists() else []
        return max((score_of(row) for row in rows if set(SCORED) <= row.keys()), default=-math.inf)

    @property
    def evaluate_every(self) -> int | None:
        return None if self.eval_loader is None else self.recipe.eval.every

    def evaluate(self, log: MetricsLog) -> None:
        """Retrieval of the held-out pairs; the model is saved if the mean of both long R@1 is the best so far.

        Raises:
            ValueError: they cannot be evaluated.
        """
        assert self.eval_loader is not None
        try:
            values = self.retrieval(self.eval_loader)
        except ValueError as error:
            raise ValueError(
                f"step {self.state.step} cannot be evaluated: {error}; mend the held-out pairs, or set others, or none "
                f"(section eval). {self._whole_checkpoint()}"
            ) from error
        score = score_of(values)
        if score > self.state.best:
            self.state.best = score
            self.save_model(self.folder / BEST)
        log.write(self.state.step, values)
        if self.accelerator.is_main_process:
            shown = ", ".join(f"{name} {value:.3f}" for name, value in values.items() if name.endswith("_at_1"))
            tqdm.write(f"step {self.state.step}: {shown}", file=sys.stderr)

    @torch.no_grad()
    def retrieval(self, loader: Loader) -> dict[str, float]:
        """Recalls among the loader's pairs, with long and with short captions, by the EMA weights if there are any.

        Pairs with the very same picture are one image with several captions, as `fixclip evaluate` has it.
        """
        accelerator, model = self.accelerator, self.ema_module
        model.eval()
        parts: dict[str, list[Tensor]] = {"position": [], "image": [], "long": [], "short": []}
        pictures: list[str] = []
        quiet = None if accelerator.is_main_process else True  # None: where it is no terminal
        for number, batch in enumerate(tqdm(loader.epoch(0), "evaluating", len(loader), leave=False, disable=quiet)):
            batch = batch.to(accelerator.device)
            with accelerator.autocast():
                parts["image"].append(model.encode_image(batch.image).float())
                parts["long"].append(model.encode_text(batch.long_ids).float())
                parts["short"].append(model.encode_text(batch.short_ids).float())
            pictures += batch.pictures
            parts["position"].append(torch.tensor(_usable_positions(loader, number), device=accelerator.device))
        self.model.train()
        whole = {name: accelerator.gather(torch.cat(tensors)) for name, tensors in parts.items()}
        pictures = gather_object(pictures)
        rows_T = _first_of_each(whole["position"].tolist())
        row_of: dict[str, int] = {}
        for row in rows_T:
            row_of.setdefault(pictures[row], row)
        number_of = {picture: number for number, picture in enumerate(row_of)}
        image_of_T = [number_of[pictures[row]] for row in rows_T]
        image_IE = whole["image"][list(row_of.values())]
        return {
            f"{name}_{metric}": value
            for name in ("long", "short")
            for metric, value in retrieval_metrics(image_IE, whole[name][rows_T], image_of_T).items()
        }

    def save(self) -> Path:
        """Write `model/`, which `FixClip.from_pretrained` reads."""
        self.save_model(self.folder / MODEL)
        return self.folder / MODEL

    def save_model(self, folder: Path) -> None:
        """Write the model, of EMA weights if there are any, as a FixClip folder.

        Raises:
            FloatingPointError: a weight is not finite.
        """
        accelerator = self.accelerator
        check_finite(self.model)
        clip = self.ema_module
        if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            weights = accelerator.get_state_dict(self.model)
            if accelerator.is_main_process:
                with torch.device("meta"):
                    clip = FixClip.from_config(self.module.config)
                weights["logit_scale"] = weights["logit_scale"].reshape(()).clamp(max=MAX_LOG_SCALE)
                clip.load_state_dict(weights, assign=True)
        if accelerator.is_main_process:
            clip.save_pretrained(folder)
        accelerator.wait_for_everyone()

    # -- plan and smoke --------------------------------------------------------------------------------------

    def describe(self) -> dict[str, str]:
        recipe, clip, loader = self.recipe, self.module, self.loader
        config, new = clip.config, clip.new_parameters()
        total = sum(p.numel() for p in clip.parameters())
        added = sum(p.numel() for name, p in clip.named_parameters() if name in new)
        tokens = mean_length(self._first_batch().long_ids)
        alignment = self.task.alignment
        states = f"{alignment.state} states of the base's windows, weight {alignment.weight:g}" if alignment else "off"
        if alignment and alignment.weight_plain:
            states += f"; of tokens that they misread, weight {alignment.weight_plain:g}"
        return {
            "method": f"{recipe.method}: {config.num_prompts} prompts ({config.prompt_flow}), short branch "
            f"{config.short_branch}, masking {config.masking}, {config.num_groups} groups",
            "model": f"{recipe.model.name} ({_which_weights(recipe)}), {config.context_length} tokens",
            "parameters": f"{total / 1e6:.1f}M, of which new {added / 1e6:.2f}M",
            "state alignment": states,
            "data": f"{len(loader.batches.order)} samples, {len(loader)} batches an epoch, "
            f"{tokens:.0f} of at most {config.context_length} tokens a long caption in the first batch",
        }

    def _first_batch(self) -> Batch:
        return next(batches(self.loader, 0, 1)).to(self.accelerator.device)

    def memory(self) -> dict[str, int]:
        """See `memory_of`, of as many samples as a process has at a time."""
        return self.memory_of(min(self.recipe.train.micro_batch_size or self.batch_size, self.batch_size))

    def memory_of(self, samples: int, probe: int = 4) -> dict[str, int]:
        """Bytes that a process needs with so many samples at a time, by what for.

        Activations are measured on half a probe and a whole one, and extrapolated along a line: what does not
        grow with the samples, such as low-precision copies of the weights, counts once. Gradient checkpointing adds
        the layer that is being recomputed.
        """
        clip, batch = self.module, self._first_batch()
        weights = sum(p.numel() * p.element_size() for p in clip.parameters())
        base = [] if self.task.alignment is None else self.task.alignment.base.parameters()
        frozen = sum(p.numel() * p.element_size() for p in base)
        trained = sum(p.numel() * p.element_size() for p in clip.parameters() if p.requires_grad)
        probe = min(probe, samples, len(batch.image))

        def extrapolated() -> float:
            half = max(1, probe // 2)
            whole, less = (self._activations(split_batch(batch, count)[0]) for count in (probe, half))
            return whole + (samples - probe) * (whole - less) / max(1, probe - half)

        activations = extrapolated()
        if self.recipe.train.gradient_checkpointing:
            clip.set_grad_checkpointing(False)
            activations += extrapolated() / sum(1 for _ in clip.visual.transformer["resblocks"].children())
            clip.set_grad_checkpointing(True)
        return {
            "weights, gradients and AdamW": weights * (2 if self.ema is not None else 1) + 3 * trained + frozen,
            "activations (of a few samples, scaled up)": math.ceil(activations),
        }

    def _activations(self, batch: Batch) -> int:
        """DistributedDataParallel is left out, as it would wait for the backward pass; FSDP must gather weights."""
        model = self.model if self.accelerator.distributed_type == DistributedType.FSDP else self.module
        return activation_bytes(lambda: self.task.batch_losses(model, batch, self.accelerator.autocast), self.module)

    @classmethod
    def smoke_trainer(cls, recipe: EncoderRecipe, folder: str) -> Self:
        return cls(smoke_recipe(recipe, folder, 4 * this_process().num_processes))


# -- the recipe's parts --------------------------------------------------------------------------------------


def build_clip(recipe: EncoderRecipe) -> FixClip:
    """The recipe's base, stretched, with its method's modules; weights are fp32, whatever the precision.

    Raises:
        ValueError: the base is unknown, cannot be loaded, or does not fit the modules.
    """
    section = recipe.model
    pretrained = section.pretrained if is_open_clip_name(section.name) else None  # weights on disk are their own
    try:
        clip = load_fixclip(
            section.name, pretrained=pretrained, cache_dir=section.cache_dir, **model_fields(recipe)
        ).float()
    except ValueError as error:
        if str(error).partition("=")[0] in model_fields(recipe):  # by its own name, where a recipe has a section, too
            raise ValueError(f"model.{error}") from None
        raise
    clip.set_grad_checkpointing(recipe.train.gradient_checkpointing)
    clip.text.pieces = recipe.train.text_pieces
    if recipe.train.compile:
        clip.compile_blocks()
    return clip


def _which_weights(recipe: EncoderRecipe) -> str:
    """Where `build_clip` takes the base's weights from, in words."""
    name, pretrained = recipe.model.name, recipe.model.pretrained
    if not is_open_clip_name(name):
        return "its own weights" if pretrained is None else f"its own weights, not {pretrained}"
    return pretrained or ("its own weights" if ":" in name else "random weights")


def model_fields(recipe: EncoderRecipe) -> dict[str, Any]:
    """The fields of FixClipConfig that the recipe decides; a baseline's method overrides its modules."""
    fields = recipe.model.model_dump(exclude={"name", "pretrained", "cache_dir"})
    return fields | {"fixclip": {}, "longclip": LONG_CLIP, "finetune": FINE_TUNE}[recipe.method]


def hold_out(recipe: EncoderRecipe, most: int = 1000) -> EncoderRecipe:
    """The recipe with `eval.held_out` written out: the first samples of the data are evaluated on, the rest trained on.

    Successive samples with the very same picture are held out together, but for remote shards, which are not read here.

    Raises:
        ValueError: the data cannot be opened.
    """
    share, data = recipe.eval.held_out, recipe.data
    if share is None:
        return recipe
    config = data_config(recipe, 1)
    opened = open_source(config)
    samples = sample_range(opened.sizes, config)
    middle = samples.start + max(1, min(most, round(share * len(samples))))
    if middle >= samples.stop:
        raise ValueError(
            f"eval.held_out={share}: it leaves none of {len(samples)} samples to train on; give a smaller share, or an "
            "eval.source"
        )
    if not opened.remote:
        borders = (at for at in range(middle, samples.stop) if not _is_same_picture(opened, at - 1, at))
        middle = next(borders, middle)
    source = data.model_dump(include=set(SourceSection.model_fields))
    evaluated = {**source, "stop": middle, "held_out": None}
    return changed(recipe, {"data": {"start": middle}, "eval": evaluated})


def _is_same_picture(source: Source, one: int, other: int) -> bool:
    try:
        return picture_digest(source.read(one)) == picture_digest(source.read(other))
    except BadSampleError:
        return False


def data_config(recipe: EncoderRecipe, batch_size: int) -> DataConfig:
    fields = recipe.data.model_dump() | recipe.captions.model_dump()
    return DataConfig(**fields, batch_size=batch_size, seed=recipe.seed)


def eval_data_config(recipe: EncoderRecipe) -> DataConfig:
    """Held-out pairs in their order, whole long captions, nothing filtered. Bad ones are left out, however many.

    Recalls of two trainings can be compared where both retrieve by the same short captions: `eval.short_caption`.
    """
    fields: dict[str, Any] = recipe.eval.model_dump(exclude={"every", "held_out"})
    fields |= recipe.data.model_dump(include={"workers", "cache_dir", "cache_gb", "draft"})
    usual = "given" if recipe.captions.short_caption == "given" else "first_sentence"
    fields["short_caption"] = recipe.eval.short_caption or usual
    return DataConfig(**fields, shuffle=False, last_batch="wrap", max_bad_share=1.0)


def mean_length(ids_BT: Tensor) -> float:
    """Tokens of a text in the mean, start and end included; the end has the largest id, whatever stands behind it."""
    return (ids_BT.argmax(1) + 1).float().mean().item()


def score_of(values: dict[str, float]) -> float:
    """What the best model is chosen by: the mean of both long R@1."""
    return sum(values[name] for name in SCORED) / 2


def _whole(tensor: Tensor) -> Tensor:
    """A parameter that FSDP may have sharded; every process must ask."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def _usable_positions(loader: Loader, number: int) -> list[int]:
    """Where the samples of a batch stand in the epoch; -1 for one that was replaced, as it occurs elsewhere too."""
    positions, _ = loader.batches.positions(number)
    order = loader.batches.order
    return [-1 if order.index(0, position) in loader.skipped else position for position in positions]


def _first_of_each(positions: list[int]) -> list[int]:
    """Indices of the first occurrence of each position that is not -1: the last batch wraps around."""
    first = {position: index for index, position in reversed(list(enumerate(positions)))}
    return [first[position] for position in sorted(first) if position >= 0]


def scenes_for(recipe: EncoderRecipe) -> dict[str, Any]:
    """Fields of `data` that read generated captions, with plain wordings where a loss is about those."""
    return READ_SCENES | ({"source": "scenes-references"} if recipe.train.weight_plain else {})


def smoke_recipe(recipe: EncoderRecipe, folder: str | Path, batch_size: int = 4) -> EncoderRecipe:
    """The recipe with random weights, generated samples and two steps: does it start, step, save and evaluate?

    Model size, modules, losses, optimizer and precision stay the recipe's; two steps are too few for a warm-up.
    """
    micro = recipe.train.micro_batch_size and max(1, batch_size // 2)
    changes: dict[str, dict[str, Any]] = {
        "model": {"pretrained": None},
        "data": {**scenes_for(recipe), "stop": 2 * batch_size, "workers": 0},
        "captions": {"filter_captions": False},
        "optim": {"warmup_steps": 0},
        "train": {"steps": 2, "epochs": 1, "batch_size": batch_size, "micro_batch_size": micro},
        "eval": {**READ_SCENES, "stop": batch_size, "held_out": None, "batch_size": batch_size},
        "output": {"folder": str(folder), "log_every": 1, "keep_last": 1, "trackers": []},
    }
    return changed(recipe, changes)
