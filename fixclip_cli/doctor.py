"""`fixclip doctor`: what this machine has, what is missing, and whether a picture comes out; one line each."""

import importlib.metadata
import importlib.util
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import typer

from fixclip_cli.app import EXTRAS, app, format_columns

GIB = 2**30
PARTS = {**EXTRAS, "compel": "compel", "pyarrow": "parquet", "torchmetrics": "judge"}
LIBRARIES = ("torch", "transformers", "diffusers", "peft", "accelerate")  # whose versions have to fit together


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        mark: "ok"; "-" for what is not there and need not be; "BAD" for what has to be mended.
        name: what was looked at.
        text: what was found, and what to do about it.
    """

    mark: Literal["ok", "-", "BAD"]
    name: str
    text: str


@app.command(short_help="What this machine has, what is missing, and a test picture.")
def doctor() -> None:
    """Look at versions, devices, memory, disk and optional parts, and draw a picture with the embedded model.

    Ends with exit code 1 where something has to be mended.
    """
    findings = [*versions(), *devices(), *disk(), *optional_parts(), picture()]
    typer.echo(format_columns([(item.mark, item.name, item.text) for item in findings]))
    if any(item.mark == "BAD" for item in findings):
        raise typer.Exit(1)


def versions() -> Iterator[Finding]:
    """Python, this package, and the libraries that have to fit together, against the ranges of this package."""
    yield Finding("ok", "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield Finding("ok", "fixclip", importlib.metadata.version("fixclip"))
    ranges = required_versions()
    for name in LIBRARIES:
        wanted = ranges.get(name)
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("BAD", name, f"not installed: pip install '{wanted or name}'")
            continue
        if wanted is None or wanted.specifier.contains(found, prereleases=True):
            yield Finding("ok", name, found)
        else:
            text = f"{found}, and fixclip is tested with {wanted.specifier}: pip install '{wanted}'"
            yield Finding("BAD", name, text)


def required_versions() -> dict:
    """{name of a library: its `packaging` Requirement}, as this installation of the package states them."""
    from packaging.requirements import Requirement

    parsed = [Requirement(line) for line in importlib.metadata.requires("fixclip") or ()]
    return {item.name: item for item in parsed if item.marker is None}


def devices() -> Iterator[Finding]:
    """Where it would compute, and the memory that is free there."""
    import psutil
    import torch

    from fixclip_core.device import best_device, choose_precision, usable_cores

    memory = psutil.virtual_memory()
    free = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"
    yield Finding("ok", "cpu", f"{usable_cores()} cores, {free}; trains in {choose_precision('auto', 'cpu')}")
    for number in range(torch.cuda.device_count()):
        left, total = torch.cuda.mem_get_info(number)
        name = f"{torch.cuda.get_device_name(number)}, {left / GIB:.1f} of {total / GIB:.1f} GiB free"
        yield Finding("ok", f"cuda:{number}", f"{name}; trains in {choose_precision('auto', f'cuda:{number}')}")
    if best_device() == "mps":
        yield Finding("ok", "mps", f"Apple's GPU; trains in {choose_precision('auto', 'mps')}")
    elif best_device() == "cpu":
        advice = "a picture of 512x512 takes minutes on a CPU; with an NVIDIA GPU, install torch's build for its driver"
        yield Finding("-", "gpu", f"none that this torch ({torch.__version__}) can use: {advice}")


def disk() -> Iterator[Finding]:
    """Free space where models are kept and where this command was started."""
    from huggingface_hub.constants import HF_HUB_CACHE

    for name, folder in (("models", Path(HF_HUB_CACHE)), ("here", Path.cwd())):
        present = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(present).free / GIB
        few = free < 5
        advice = "; Stable Diffusion 1.5 takes 4 GiB" + (", HF_HOME chooses another folder" if name == "models" else "")
        yield Finding("-" if few else "ok", f"disk, {name}", f"{free:.1f} GiB free in {folder}{advice if few else ''}")


def optional_parts() -> Iterator[Finding]:
    """The extras of the package, each whole or with what is missing."""
    for extra in dict.fromkeys(PARTS.values()):
        libraries = [name for name, part in PARTS.items() if part == extra]
        missing = [name for name in libraries if importlib.util.find_spec(name) is None]
        if missing:
            yield Finding("-", extra, f"without {', '.join(missing)}; if you need it: pip install 'fixclip[{extra}]'")
        else:
            yield Finding("ok", extra, ", ".join(libraries))


def picture() -> Finding:
    """A scene of three objects, drawn by the embedded model, which draws most of them right, and checked."""
    from fixclip_core import builtin

    if not builtin.is_available():
        return Finding(
            "BAD", "picture", "this copy has no embedded weights: install the wheel, or a clone of all files"
        )
    try:
        return _draw()
    except Exception as error:  # whatever it is, is what this command is for
        text = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")
        return Finding("BAD", "picture", f"{text}; fixclip --traceback demo shows where")


def _draw() -> Finding:
    import time

    import torch
    from diffusers.utils import logging as diffusers_logging
    from torchvision.transforms.v2.functional import pil_to_tensor
    from transformers.utils import logging as transformers_logging

    from fixclip_core import scenes
    from fixclip_core.device import best_device
    from fixclip_diffusion import FixClipStableDiffusionPipeline

    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
    scene = scenes.sample_scene("doctor", num_objects=3)
    pipe = FixClipStableDiffusionPipeline.from_pretrained("builtin:scenes").to(best_device())
    pipe.set_progress_bar_config(disable=True)
    begin = time.perf_counter()
    image = pipe(
        scenes.long_caption(scene, 0).text,
        num_inference_steps=20,
        guidance_scale=2.0,
        generator=torch.Generator("cpu").manual_seed(0),
    ).images[0]
    seconds = time.perf_counter() - begin
    result = scenes.check(pil_to_tensor(image), scene)
    right = sum(item.right for item in result.objects)
    text = f"{right} of {len(result.objects)} objects drawn as asked, {seconds:.1f} s on {pipe.device}"
    if not right:
        return Finding(
            "BAD", "picture", f"{text}: look at versions that are marked BAD, then try --device cpu of generate"
        )
    return Finding("ok", "picture", text)
