"""Checkpoints of a training run that survive kill -9, a damaged file and a full disk.

A checkpoint is the folder that `Accelerator.save_state` writes, plus a manifest with the size and SHA-256 of every
file. It is written under a temporary name, flushed to disk and renamed, so a folder named `step-...` is
always whole unless the disk damaged it later, and the manifest finds that out.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType

import torch
from accelerate import Accelerator
from accelerate.utils import SAFE_WEIGHTS_NAME, broadcast_object_list
from safetensors import SafetensorError, safe_open

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"  # in the folder of a run
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")


def save_checkpoint(
    accelerator: Accelerator,
    folder: Path,
    step: int,
    *,
    keep_last: int,
    files: Mapping[str, bytes] = MappingProxyType({}),
) -> Path:
    """Write `folder/step-XXXXXXXX` atomically from all processes, then delete all but the newest `keep_last`.

    Every process calls this, on a file system that all of them see.

    Args:
        files: what else is to lie in it, by name.

    Raises:
        ValueError: `keep_last` is below 1.
        OSError: the disk is full or gone; what was there before is untouched.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last={keep_last}: it must be at least 1")
    path = folder / f"step-{step:08d}"
    temporary = _temporary_name(path)
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(temporary))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            for name, content in files.items():
                (temporary / name).write_bytes(content)
            _seal(temporary)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"{path} could not be written ({error})") from error
    if accelerator.is_main_process:
        _rename(temporary, path)
        for _, old in list_checkpoints(folder)[:-keep_last]:
            _remove(old)
    accelerator.wait_for_everyone()
    return path


def load_checkpoint(accelerator: Accelerator, path: Path) -> None:
    """Load what `save_checkpoint` wrote into the prepared and registered objects, in every process.

    Load only checkpoints you trust: like every Accelerate checkpoint they hold pickles.

    Raises:
        ValueError: the checkpoint does not fit the model, e.g. because the recipe's model section changed.
    """
    try:
        accelerator.load_state(str(path))
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"{path}: the checkpoint does not fit this model: {error}") from error
    except ValueError as error:  # the optimizer's parameter groups are others
        raise ValueError(
            f"{path}: written with another optim.optimizer, or with other parameters in training ({error}); set what "
            "it was begun with, or start anew in another output.folder"
        ) from error


def misfit(path: Path, module: torch.nn.Module) -> str | None:
    """How the weights in a checkpoint differ from a module's in names or shapes, or None, before anything is loaded.

    The files of FSDP and DeepSpeed are not looked into: `load_checkpoint` finds out.
    """
    file = path / SAFE_WEIGHTS_NAME
    if not file.is_file():
        return None
    with safe_open(file, framework="pt") as opened:
        there = {
            name.removeprefix("module."): tuple(opened.get_slice(name).get_shape())
            for name in opened.keys()  # noqa: SIM118
        }
    state = module.state_dict()
    here = {name: tuple(tensor.shape) for name, tensor in state.items()}
    # A file holds one of several names of the same memory.
    memory = Counter(tensor.data_ptr() for tensor in state.values())
    new = {name for name in here.keys() - there.keys() if memory[state[name].data_ptr()] == 1}
    found = [
        f"{name} is {there[name]} there and {shape} here"
        for name, shape in here.items()
        if there.get(name, shape) != shape
    ]
    found += [f"there is a {name}, and none here" for name in there if name not in here]
    found += [f"there is no {name}" for name in here if name in new]
    return found[0] + (f", and {len(found) - 1} more" if len(found) > 1 else "") if found else None


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every checkpoint in the folder, oldest first, without looking inside."""
    found = [(int(match[1]), path) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return sorted(found)


def step_of(path: Path) -> int:
    """The step of a checkpoint's folder, which its name says.

    Raises:
        ValueError: it has no such name.
    """
    if not (match := _NAME.fullmatch(path.name)):
        raise ValueError(f"{path}: the folder of a checkpoint is named step-XXXXXXXX; give it its name back")
    return int(match[1])


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint (a missing, short or altered file), or None if it is whole."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    for name, (size, _) in expected.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    with ThreadPoolExecutor(4) as pool:
        try:
            digests = list(pool.map(_sha256, [path / name for name in expected]))
        except OSError as error:
            return f"it cannot be read ({error})"
    changed = [name for (name, (_, known)), digest in zip(expected.items(), digests, strict=True) if digest != known]
    return f"{changed[0]} has changed since it was written" if changed else None


def latest_valid(folder: Path) -> Path | None:
    """The newest whole checkpoint, with a warning for each damaged one passed over; None if there is none.

    Raises:
        ValueError: there are checkpoints and all of them are damaged; starting over silently would lose them.
    """
    checkpoints = list_checkpoints(folder)
    reasons = []
    for _, path in reversed(checkpoints):
        reason = damage(path)
        if reason is None:
            return path
        reasons.append(f"{path.name}: {reason}")
        logger.warning("Checkpoint %s is damaged: %s. Falling back to the one before it.", path, reason)
    if checkpoints:
        raise ValueError(f"{folder}: every checkpoint is damaged ({'; '.join(reasons)}); delete them to start over")
    return None


def find_resume(accelerator: Accelerator, resume: str, folder: Path) -> Path | None:
    """The checkpoint that `--resume auto|none|PATH` means, found by the main process for all of them.

    Raises:
        ValueError: in every process: the path is no checkpoint, or it or all candidates are damaged.
    """
    answer: list[object] = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = _find_resume(resume, folder)
        except ValueError as error:
            answer[1] = str(error)
    path, problem = broadcast_object_list(answer)
    if problem is not None:
        raise ValueError(problem)
    return path


def _find_resume(resume: str, folder: Path) -> Path | None:
    if resume == "none":
        return None
    if resume == "auto":
        return latest_valid(folder)
    path = Path(resume).absolute()  # what its run wrote beside it lies above it
    if not (path / MANIFEST).is_file():
        for place in (path, path / CHECKPOINTS):
            if list_checkpoints(place):
                return latest_valid(place)
        others = ", ".join(other.name for _, other in list_checkpoints(path.parent))
        raise ValueError(
            f"--resume {resume}: no checkpoint there{f', but {others}' if others else ''}; pass auto, none, the folder "
            "of a run, or of one of its checkpoints"
        )
    if (reason := damage(path)) is not None:
        raise ValueError(f"--resume {resume}: the checkpoint is damaged: {reason}")
    step_of(path)
    return path


def remove_unfinished(folder: Path) -> None:
    """Delete what a killed process left half written."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def training_state_bytes(model: torch.nn.Module, *, ema: bool = False) -> int:
    """Size of one checkpoint: weights, AdamW's two moments of what is trained, and EMA weights."""
    weights = sum(p.numel() * p.element_size() for p in [*model.parameters(), *model.buffers()])
    moments = sum(2 * p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return weights * (2 if ema else 1) + moments


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _seal(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        _fsync(path)
    manifest = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    _fsync(folder / MANIFEST)
    for path in {folder, *(file.parent for file in files)}:
        _fsync(path)


def _rename(temporary: Path, path: Path) -> None:
    if path.exists():  # a damaged checkpoint of the same step, passed over when the run resumed
        _remove(path)
    os.rename(temporary, path)
    _fsync(path.parent)


def _remove(path: Path) -> None:
    """Rename first: a process killed while deleting must not leave a half-deleted `step-...`."""
    doomed = path.with_name(f".{path.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
