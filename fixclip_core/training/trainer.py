"""One trainer for everything that is trained here: it owns the order, and a training fills in the parts.

    train = prepare -> start or go on -> steps -> save
    step  = seed -> forward and backward -> clip, optimise, average -> log -> checkpoint -> evaluate

A subclass overrides what differs: `build_model`, `build_data`, `forward_backward`, `evaluate`, `save`, and `describe`,
`memory` and `smoke_trainer` for `--dry-run` and `--smoke`. `encoder/trainer.py` is an example.

What is trained on at step s is a function of (recipe, s) alone, so a resumed run repeats an uninterrupted one.
"""

import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, LoggerType, broadcast_object_list
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from fixclip_core.data.loader import Loader
from fixclip_core.data.samples import describe_skipped
from fixclip_core.device import choose_precision
from fixclip_core.files import lock_folder, prepare_folder, write_atomically
from fixclip_core.training.checkpoint import (
    CHECKPOINTS,
    find_resume,
    list_checkpoints,
    load_checkpoint,
    misfit,
    remove_unfinished,
    save_checkpoint,
    step_of,
    training_state_bytes,
)
from fixclip_core.training.memory import device_memory
from fixclip_core.training.metrics import METRICS, MetricsLog, rows_until
from fixclip_core.training.optim import (
    check_finite,
    hyperparameters,
    make_ema,
    make_optimizer,
    make_schedule,
    moved_by_muon,
    optimizer_step,
    parameter_groups,
    set_hyperparameters,
)
from fixclip_core.training.recipe import (
    OutputSection,
    RunSection,
    flatten,
    load_recipe,
    recipe_diff,
    recipe_yaml,
)

if TYPE_CHECKING:
    from filelock import BaseFileLock

logger = logging.getLogger(__name__)

RECIPE = "recipe.yaml"
START_ANEW = "start anew in another output.folder"
MIB, GIB = 2**20, 2**30
SHARED_MEMORY = Path("/dev/shm")
# Processes wait while one downloads a base or fills a cache of features; NCCL's own 10 minutes would end the run.
PATIENCE = timedelta(hours=24)
T = TypeVar("T")


@dataclass
class TrainState:
    """Where a run stands; saved with each checkpoint and equal in all processes.

    Attributes:
        step: optimiser steps taken, skipped ones included.
        skipped: steps skipped because their gradient was not finite.
        skipped_in_a_row: how many of those came last.
        best: the best evaluation so far; in a checkpoint, of those before its step.
        history: (first step, processes from there on), see `data.order.apart_positions`.
        batch_size: samples a step of all processes; the history holds for it alone.
    """

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    best: float = -math.inf
    history: list[tuple[int, int]] = field(default_factory=list)
    batch_size: int = 0

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def share_among(self, processes: int, batch_size: int) -> None:
        """Note how many processes take the steps from here on."""
        if batch_size != self.batch_size:
            self.history, self.batch_size = [], batch_size
        before = [(step, ranks) for step, ranks in self.history if step < self.step]
        if not before or before[-1][1] != processes:
            before.append((self.step if before else 0, processes))
        self.history = before


class Trainer:
    """The order of a training; see the top of the file.

    Args:
        recipe: what to do; it has the fields `seed`, `optim`, `train` and `output`.

    Attributes:
        accelerator: Accelerate's, for this process.
        model: what is trained, prepared by the accelerator (wrapped for several processes).
        module: the same without the wrapper.
        optimizer, schedule, ema: of the model; `ema` is None where the recipe does not average.
        loader: what `build_data` made.
        state: where the run stands.
        batch_size: samples a step of this process.
        total_steps: of the whole run.
        checkpoint: the folder of the checkpoint that the run goes on from; None: it begins anew.
        written_with: the recipe that it was written with; None: there is no checkpoint, or it does not say.

    Raises:
        ValueError: a tracker is not installed, or the batch does not divide among the processes.
    """

    recipe: Any
    module: Any
    loader: Any
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    ema: AveragedModel | None
    total_steps: int
    checkpoint: Path | None = None
    written_with: Any = None
    cpu = False  # True: whatever else the machine has
    has_begun = False  # True from the first step on

    def __init__(self, recipe: Any):
        self.recipe = recipe = with_precision(recipe, self.cpu)
        self.folder = Path(recipe.output.folder)
        self.accelerator = make_accelerator(recipe.train, recipe.output, cpu=self.cpu)
        self.state = TrainState()
        self.batch_size, rest = divmod(recipe.train.batch_size, self.accelerator.num_processes)
        if rest:
            raise ValueError(
                f"train.batch_size={recipe.train.batch_size}: it must be a multiple of the number of processes, "
                f"{self.accelerator.num_processes}"
            )

    # -- the order -------------------------------------------------------------------------------------------

    def train(self, resume: str = "auto") -> Path:
        """Train as the recipe says and return the folder of what was trained.

        Args:
            resume: "auto" goes on from the newest whole checkpoint in the output folder, if any; "none" starts
                over; a path goes on from there.

        Raises:
            ValueError: the recipe, data, weights, folder or checkpoint cannot be used.
            FloatingPointError: too many steps in a row without a finite gradient.
            OSError: the disk is full or gone.
        """
        with self.locked(self.folder):
            self.prepare(resume)
            self.start()
            self.fit()
            with self._saying_what_is_whole():
                result = self.save()
            self.accelerator.end_training()
        return result

    def prepare(self, resume: str = "auto") -> Self:
        """Build model, data, optimizer and schedule, and check checkpoint, folder and disk before the first step.

        Args:
            resume: see `train`.

        Raises:
            ValueError: see `train`.
        """
        recipe, accelerator = self.recipe, self.accelerator
        self._on_main(lambda: prepare_folder(self.folder))
        self._find_checkpoint(resume)
        torch.manual_seed(recipe.seed)
        self.open_data()
        with accelerator.local_main_process_first():  # the others find its download
            self.module = self.build_model()
        if self.checkpoint is not None:
            self.check_goes_on(self.checkpoint)
        self.loader = self.build_data()
        way_out = "keep fewer checkpoints (output.keep_last) or choose another output.folder"
        self._on_main(lambda: prepare_folder(self.folder, self.needed_disk(), way_out=way_out))
        self._on_main(self._check_shared_memory)
        if accelerator.state.deepspeed_plugin is not None:
            accelerator.state.deepspeed_plugin.deepspeed_config.update(
                train_micro_batch_size_per_gpu=self.batch_size,  # it cannot ask a loader that it does not prepare
                gradient_clipping=recipe.optim.max_grad_norm or 0.0,  # it clips by itself; 0: not at all
            )
        groups = parameter_groups(self.module, self.is_new, self.no_decay, recipe.optim)
        self.model, self.optimizer = accelerator.prepare(self.module, make_optimizer(accelerator, groups, recipe.optim))
        self.module = accelerator.unwrap_model(self.model)
        self.total_steps = self.count_steps()
        self.schedule = make_schedule(self.optimizer, recipe.optim, self.total_steps)
        accelerator.register_for_checkpointing(self.state, self.schedule)
        self.ema = make_ema(accelerator, self.model, recipe.train.ema_decay)
        return self

    def _find_checkpoint(self, resume: str) -> None:
        """Raises:
        ValueError: the checkpoint is damaged, or the output folder holds another run's newer ones.
        """
        checkpoints = self.folder / CHECKPOINTS
        self.checkpoint = path = find_resume(self.accelerator, resume, checkpoints)
        newer = [other.name for step, other in list_checkpoints(checkpoints) if path is None or step > step_of(path)]
        if newer and resume != "auto":
            held = "checkpoints" if path is None else f"checkpoints newer than {path.name}"
            raise ValueError(
                f"--resume {resume}: {checkpoints} holds {held} ({', '.join(newer)}); delete them or choose another "
                "output.folder"
            )
        places = [] if path is None else [path / RECIPE, path.parent.parent / RECIPE]  # the second: of version 0.1
        if found := [place for place in places if place.exists()]:
            try:
                self.written_with = load_recipe(type(self.recipe), found[0])
            except ValueError as error:
                first, *others = str(error).splitlines()
                more = f" (and {len(others)} more)" if others else ""
                logger.warning("The recipe that %s was written with cannot be compared: %s%s", path, first, more)

    def changes(self) -> list[tuple[str, Any, Any]]:
        """(key, value now, value then) for what differs from the recipe that the checkpoint was written with.

        Where a run writes may change as one likes.
        """
        if self.written_with is None:
            return []
        found = recipe_diff(self.recipe, self.written_with)
        return [(key, now, then) for key, now, then in found if not key.startswith("output.")]

    def check_goes_on(self, checkpoint: Path) -> None:
        """Refuse a checkpoint that does not fit the recipe, before data are read.

        Raises:
            ValueError: a key that `is_fixed` has another value than when the checkpoint was written, or its weights
                have other names or shapes.
        """
        way_out = f"set it back, or {START_ANEW}"
        for key, now, then in self.changes():
            if self.is_fixed(key, now, then):
                raise ValueError(
                    f"{key} was {then!r} when {checkpoint.name} was written and is {now!r} now, which it does not fit; "
                    f"{way_out}"
                )
        if problem := misfit(checkpoint, self.module):
            since = f"{self._describe_changes()}; {way_out}" if self.changes() else START_ANEW
            raise ValueError(f"{checkpoint}: the checkpoint does not fit this model: {problem}; {since}")

    def start(self) -> None:
        """Load the checkpoint that `prepare` found, if any, and write the recipe beside the results.

        The learning rates, betas and weight decay are the recipe's, whatever they were when the checkpoint was written.

        Raises:
            ValueError: the checkpoint does not fit or is another optimizer's.
        """
        path = self.checkpoint
        if path is not None:
            wanted, muon = hyperparameters(self.optimizer), moved_by_muon(self.optimizer)
            load_checkpoint(self.accelerator, path)
            if (before := moved_by_muon(self.optimizer)) != muon:
                raise ValueError(
                    f"{path}: written with optim.optimizer={'muon' if any(before) else 'adamw'}, not with "
                    f"{self.recipe.optim.optimizer}; set that, or start anew in another output.folder"
                )
            set_hyperparameters(self.optimizer, self.schedule, wanted)
            if self.accelerator.is_main_process:
                logger.info("Resumed step %d from %s", self.state.step, path)
        self.state.share_among(self.accelerator.num_processes, self.recipe.train.batch_size)
        if isinstance(self.loader, Loader):
            self.loader.batches.history = self.state.history
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            remove_unfinished(self.folder / CHECKPOINTS)
            if path is not None and self.changes():
                logger.warning("Since %s was written: %s", path.name, self._describe_changes())
            write_atomically(self.folder / RECIPE, recipe_yaml(self.recipe).encode())
        self._start_trackers()

    def fit(self) -> None:
        """Take the steps that are left, after the evaluation of the checkpoint's own step if a kill cut it off.

        Raises:
            FloatingPointError: too many steps in a row without a finite gradient, or weights that are not finite.
            OSError: the disk is full or gone.
            KeyboardInterrupt: Ctrl-C; the message says how to go on.
        """
        if self.state.step >= self.total_steps and self.accelerator.is_main_process:
            logger.warning("%s", self._all_taken(self.state.step))
        elif self._is_too_short() and self.accelerator.is_main_process:
            logger.warning("The learning rate is still warming up at the end of the run: %s", self._is_too_short())
        self.has_begun = True
        with self._saying_what_is_whole():
            log = MetricsLog(self.accelerator, self.folder, self.state.step)
            bar = tqdm(total=self.total_steps, initial=self.state.step, desc="steps", disable=not log.is_main_process)
            self.model.train()
            with bar:
                if self._on_main(self._owes_evaluation):
                    self.evaluate(log)
                    log.plot()
                    log.restart_clock()
                for item in self.inputs():
                    self._step(item, log, bar)
        if skipped := getattr(self.loader, "skipped", None):
            logger.warning("Samples that could not be used: %s", describe_skipped(skipped.values()))

    def _step(self, item: Any, log: MetricsLog, bar: tqdm) -> None:
        recipe, accelerator, state = self.recipe, self.accelerator, self.state
        seed_step(recipe.seed, state.step, accelerator.process_index)
        losses = self.forward_backward(item)
        lr = self.optimizer.param_groups[0]["lr"]
        grad_norm, applied = optimizer_step(accelerator, self.model, self.optimizer, recipe.optim.max_grad_norm)
        self.schedule.step()
        if self.ema is not None and applied:
            self.ema.update_parameters(self.model)
        count_step(state, applied, recipe.train.max_skipped_steps)

        log.add(losses, recipe.train.batch_size, applied)
        last = state.step == self.total_steps
        if last or state.step % recipe.output.log_every == 0:
            extra = {"grad_norm": grad_norm, "lr": lr, "skipped_steps": state.skipped, **self.figures()}
            values = log.flush(state.step, extra)
            shown = [name for name in values if "loss" in name or name in ("samples_per_second", "skipped_steps")]
            bar.set_postfix({name.removeprefix("loss_"): f"{values[name]:.3g}" for name in shown})
        saves = last or state.step % recipe.output.save_every == 0
        if saves:  # before an evaluation, which may fail: the run can then go on behind it
            check_finite(self.model)
            files = {RECIPE: recipe_yaml(recipe).encode()}
            folder, keep_last = self.folder / CHECKPOINTS, recipe.output.keep_last
            save_checkpoint(accelerator, folder, state.step, keep_last=keep_last, files=files)
            log.restart_clock()
        if self._is_evaluation_due():
            self.evaluate(log)
            log.restart_clock()
        if saves:
            log.plot()
            log.restart_clock()
        bar.update()

    def _is_evaluation_due(self) -> bool:
        """Whether the step that was taken last is one to evaluate."""
        step, every = self.state.step, self.evaluate_every
        return every is not None and (step == self.total_steps or step % every == 0)

    def _owes_evaluation(self) -> bool:
        """Whether the checkpoint's step is to be evaluated and its run did not come to it: it is written before."""
        if self.checkpoint is None or not self._is_evaluation_due():
            return False
        return not self.is_evaluated(self.checkpoint.parent.parent)

    # -- the parts: a training overrides these ---------------------------------------------------------------

    def build_model(self) -> nn.Module:
        """What is trained, on the CPU or the accelerator's device, in float32; the generators are seeded."""
        raise NotImplementedError

    def open_data(self) -> None:
        """Open the data, before `build_model`: what is wrong with them is said before models are loaded."""

    def build_data(self) -> Any:
        """A `data.Loader`, or None where `inputs` and `count_steps` need none."""
        raise NotImplementedError

    def forward_backward(self, item: Any) -> dict[str, Tensor]:
        """The losses of one of `inputs`, detached, with their gradients left in the parameters.

        "loss" is the sum that is minimised; other names are logged beside it.
        """
        raise NotImplementedError

    def save(self) -> Path:
        """Write what was trained; every process calls it. Returns its folder.

        Raises:
            FloatingPointError: a weight is not finite.
        """
        raise NotImplementedError

    def evaluate(self, log: MetricsLog) -> None:
        """Evaluate every `evaluate_every` steps and after the last, and write the figures into the log.

        What it gives is a function of recipe and step: a resumed run makes up for one that was cut off.
        """

    def is_evaluated(self, folder: Path) -> bool:
        """Whether a run's folder holds all of the evaluation of the step where this one stands."""
        step, path = self.state.step, folder / METRICS
        rows = rows_until(path, step) if path.exists() else []
        return any(row["step"] == step and "lr" not in row for row in rows)  # which a row of training has

    @property
    def evaluate_every(self) -> int | None:
        """Steps between two evaluations; None: never."""
        return None

    def inputs(self) -> Iterable[Any]:
        """One item for each step that is left: a batch, or what one is made from once the step is seeded."""
        return batches(self.loader, self.state.step, self.total_steps)

    def count_steps(self) -> int:
        return self.recipe.train.steps or self.recipe.train.epochs * len(self.loader)

    def figures(self) -> dict[str, float]:
        """What else belongs into a line of metrics; every process asks."""
        return {}

    def is_new(self, name: str) -> bool:
        """Whether a parameter has the learning rate of new ones, `optim.lr_new`."""
        return False

    def no_decay(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether a parameter has no weight decay: biases and norms have fewer than 2 dimensions."""
        return parameter.ndim < 2

    def is_fixed(self, key: str, now: Any, then: Any) -> bool:
        """Whether a run cannot go on once this dotted key of its recipe changes so, whatever its weights' shapes."""
        if key == "train.ema_decay":
            return None in (now, then)  # averages come into being with the run
        return key == "optim.optimizer" or (key, now) == ("train.precision", "fp16")  # whose scale a checkpoint holds

    def describe(self) -> dict[str, str]:
        """What is trained on what, for the plan: {heading: one line}."""
        return {}

    def memory(self) -> dict[str, int]:
        """Bytes that a process needs, by what for, for the plan; it may run a few samples."""
        return {}

    @classmethod
    def smoke_trainer(cls, recipe: Any, folder: str) -> Self:
        """A trainer of two steps that writes into `folder`, on generated data, with the recipe's modules and losses."""
        raise NotImplementedError

    # -- what all of them share ------------------------------------------------------------------------------

    @property
    def ema_module(self) -> Any:
        """The module with averaged weights (EMA) if the recipe averages, else the one in training."""
        return self.module if self.ema is None else self.ema.module

    def needed_disk(self) -> int:
        """Bytes the run will still write at most: checkpoints, one of them twice while it is replaced, and models."""
        keep_last = self.recipe.output.keep_last
        checkpoint = training_state_bytes(self.module, ema=self.recipe.train.ema_decay is not None)
        weights = sum(p.numel() * p.element_size() for p in self.module.parameters())
        present = min(len(list_checkpoints(self.folder / CHECKPOINTS)), keep_last)
        return (keep_last + 1 - present) * checkpoint + 3 * weights

    def plan(self) -> str:
        """What the run would do and need, in a few lines."""
        recipe, accelerator = self.recipe, self.accelerator
        micro = min(getattr(recipe.train, "micro_batch_size", None) or self.batch_size, self.batch_size)
        epochs = "" if self.loader is None else f" ({self.total_steps / len(self.loader):.2f} epochs)"
        lines = self.describe() | {
            "batch": f"{recipe.train.batch_size} = {accelerator.num_processes} process(es) x {self.batch_size}, "
            f"{micro} at a time",
            "steps": f"{self.total_steps}{epochs} of {recipe.optim.optimizer}, warm-up {recipe.optim.warmup_steps}, "
            f"lr {recipe.optim.lr:g}, new parameters {recipe.optim.lr_new:g}",
            "precision": f"{recipe.train.precision} on {accelerator.device.type}",
            "memory": self._describe_memory(),
            **self._describe_loading(),
            "disk": f"{self.needed_disk() / GIB:.2f} GiB for checkpoints and models in {self.folder}",
        }
        if self.checkpoint is not None:
            step = step_of(self.checkpoint)
            taken = f": {self._all_taken(step)}" if step >= self.total_steps else ""
            lines["resumes"] = f"from step {step}, {self.checkpoint}{taken}"
            if self.changes():
                lines["changed"] = self._describe_changes()
        if self._is_too_short():
            lines["warning"] = f"the learning rate is still warming up at the end: {self._is_too_short()}"
        return "\n".join(f"{name:>10}  {text}" for name, text in lines.items())

    def _waiting_bytes(self) -> int:
        """Shared memory that this machine's processes fill with batches, at most."""
        together = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return together * self.loader.waiting_bytes() if isinstance(self.loader, Loader) else 0

    def _describe_loading(self) -> dict[str, str]:
        if not (needed := self._waiting_bytes()):
            return {}
        shared = f"up to {needed / GIB:.1f} GiB of the machine's shared memory"
        return {"loading": f"{shared}, data.workers={self.recipe.data.workers}"}

    def _check_shared_memory(self) -> None:
        """Raises:
        ValueError: it has no room for the batches that are loaded ahead, of which a process would die.
        """
        needed = self._waiting_bytes()
        if needed and SHARED_MEMORY.is_dir() and (free := shutil.disk_usage(SHARED_MEMORY).free) < needed:
            raise ValueError(
                f"data.workers={self.recipe.data.workers}: batches that wait fill up to {needed / GIB:.2f} GiB of "
                f"shared memory, and {SHARED_MEMORY} has {free / GIB:.2f} GiB free; set fewer data.workers (0 needs "
                "none), or start a container with docker run --ipc=host"
            )

    def _describe_changes(self) -> str:
        return ", ".join(f"{key} was {then!r} and is {now!r} now" for key, now, then in self.changes())

    def _all_taken(self, step: int) -> str:
        return (
            f"step {step} of {self.total_steps} is taken, so none is left; raise train.steps or train.epochs for more"
        )

    def _describe_memory(self) -> str:
        parts, have = self.memory(), device_memory(self.accelerator.device)
        need = sum(parts.values())
        fits = "" if need < have else "; DOES NOT FIT, see docs/training.md"
        shown = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
        return f"about {need / GIB:.1f} GiB a process of {have / GIB:.1f}: {shown}{fits}"

    def _is_too_short(self) -> str:
        """The steps and the warm-up of a run that ends before its learning rate has reached its peak, else ""."""
        warmup = self.recipe.optim.warmup_steps
        return f"{self.total_steps} steps, optim.warmup_steps={warmup}" if self.total_steps <= warmup else ""

    def _on_main(self, action: Callable[[], T]) -> T:
        """What an action returns, in every process; the main process alone calls it.

        Raises:
            ValueError: in every process, where the action raises it in the main one.
        """
        answer: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                answer[0] = action()
            except ValueError as error:
                answer[1] = str(error)
        result, problem = broadcast_object_list(answer)
        if problem is not None:
            raise ValueError(problem)
        return result

    @contextmanager
    def locked(self, folder: Path, *, wait: bool = False) -> Iterator[None]:
        """Hold a folder, so that no other training can write into it; every process calls it. See `lock_folder`."""
        held: list[BaseFileLock] = []

        def lock() -> None:
            prepare_folder(folder)
            held.append(lock_folder(folder, wait=wait))

        self._on_main(lock)
        try:
            yield
        finally:
            for file_lock in held:
                file_lock.release()

    @contextmanager
    def _saying_what_is_whole(self) -> Iterator[None]:
        """Add to whatever ends the run which checkpoint is whole, and what to do."""
        try:
            yield
        except FloatingPointError as error:
            raise FloatingPointError(
                f"{error}. {self._whole_checkpoint()}. It would diverge again: lower optim.lr, use "
                "train.precision=bf16 or fp32 instead of fp16, or look at the data"
            ) from error
        except OSError as error:
            raise OSError(f"step {self.state.step}: {error}. {self._whole_checkpoint()}") from error
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted at step {self.state.step}. {self._whole_checkpoint()}") from None

    def _whole_checkpoint(self) -> str:
        checkpoints = list_checkpoints(self.folder / CHECKPOINTS)
        if not checkpoints:
            return f"There is no checkpoint in {self.folder} yet: the same command starts over"
        step, path = checkpoints[-1]
        return f"{path} is whole: the same command goes on from step {step}"

    def _start_trackers(self) -> None:
        output = self.recipe.output
        if output.trackers:
            fields = flatten(self.recipe).items()
            plain = {name: v if isinstance(v, int | float | str) else str(v) for name, v in fields}
            self.accelerator.init_trackers(output.project, config=plain)


def smoke(trainer: type[Trainer], recipe: Any) -> None:
    """Train two steps in a temporary folder."""
    process, recipe = this_process(trainer.cpu), with_precision(recipe, trainer.cpu)
    folder = broadcast_object_list([tempfile.mkdtemp() if process.is_main_process else None])[0]
    try:
        trainer.smoke_trainer(recipe, folder).train(resume="none")
    finally:
        if process.is_main_process:
            shutil.rmtree(folder)


def with_precision(recipe: Any, cpu: bool = False) -> Any:
    """The recipe with what `train.precision=auto` means on the main process's device, which is logged."""
    if recipe.train.precision != "auto":
        return recipe
    process = this_process(cpu)
    precision = broadcast_object_list([choose_precision("auto", process.device)])[0]
    if process.is_main_process:
        logger.info("train.precision=auto: %s on %s", precision, process.device.type)
    return changed(recipe, {"train": {"precision": precision}})


def this_process(cpu: bool = False) -> PartialState:
    """This process among those that train together; the first call connects them, for waits of up to `PATIENCE`."""
    return PartialState(cpu=cpu, timeout=PATIENCE)


def changed(recipe: Any, changes: dict[str, dict[str, Any]]) -> Any:
    """A recipe with other values: {section: {field: value}}, not validated again."""
    sections = {name: getattr(recipe, name).model_copy(update=update) for name, update in changes.items()}
    return recipe.model_copy(update=sections)


def make_accelerator(run: RunSection, output: OutputSection, *, cpu: bool = False) -> Accelerator:
    """An Accelerator with the recipe's precision and trackers; the rest comes from Accelerate's own config.

    Raises:
        ValueError: a tracker is not installed (Accelerate would leave it out without a word), or the device cannot
            compute in this precision.
    """
    missing = [name for name in output.trackers if LoggerType(name) not in get_available_trackers()]
    if missing:
        raise ValueError(
            f"output.trackers={list(output.trackers)}: {', '.join(missing)} cannot be imported; install it"
        )
    return Accelerator(
        cpu=cpu,
        mixed_precision="no" if run.precision == "fp32" else run.precision,
        log_with=list(output.trackers) or None,
        project_dir=output.folder,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=PATIENCE),
        ],
    )


def batches(loader: Any, step: int, total_steps: int) -> Iterator[Any]:
    """The batches of steps `step`..`total_steps`-1, epoch after epoch, of a `data.Loader` or one like it."""
    while step < total_steps:
        epoch, number = divmod(step, len(loader))
        for batch in loader.epoch(epoch, number):
            yield batch
            step += 1
            if step == total_steps:
                return


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed the global generators for one step, so what is drawn in it does not depend on the run's history."""
    torch.manual_seed((seed * 1_000_003 + step) * 65_537 + rank)


def count_step(state: TrainState, applied: bool, limit: int) -> None:
    """Count a step, and stop the run when too many in a row were skipped.

    Raises:
        FloatingPointError: `limit` steps in a row had no finite gradient; checkpoints hold finite weights only.
    """
    state.step += 1
    state.skipped += not applied
    state.skipped_in_a_row = 0 if applied else state.skipped_in_a_row + 1
    if state.skipped_in_a_row >= limit:
        raise FloatingPointError(f"step {state.step}: {limit} steps in a row without a finite gradient")
