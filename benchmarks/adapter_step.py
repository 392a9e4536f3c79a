"""How long does a training step of the adapter take, and what does it hold in memory?

    python benchmarks/adapter_step.py                          # a small model on this machine, about a minute
    python benchmarks/adapter_step.py --scale sd15 --rounds 3  # Stable Diffusion 1.5's sizes; meant for a GPU

From the loader to the optimizer, on scenes, random weights, the same models and batch for all, captions in one pass:

- plain loop: encodes picture and caption in every step, noise prediction alone, written out in twenty lines;
- no cache: ours with the same objective;
- latents cached: `features.folder`;
- latents and text cached: `features.text` too;
- with distillation: the last one, and a quarter of the draws held to the base's predictions of short captions.

Times are medians over rounds in which all take turns, after a round that does not count. Memory is what a step adds
to the peak of a process that holds the models, so each system has a process of its own (Linux; on a GPU it is what
torch allocated).
"""

import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from diffusers import AutoencoderKL, DDPMScheduler
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import CLIPTextModel

from fixclip_core.training.optim import optimizer_step
from fixclip_core.weights.write import clip_tokenizer
from fixclip_diffusion import FixClipTextEncoder, FixClipTokenizer
from fixclip_diffusion.adapter_training.features import FrozenModels, unpack_layouts
from fixclip_diffusion.adapter_training.random_models import random_models
from fixclip_diffusion.adapter_training.recipe import AdapterRecipe
from fixclip_diffusion.adapter_training.trainer import AdapterTrainer
from fixclip_diffusion.families import STABLE_DIFFUSION, TextEncoding
from fixclip_diffusion.tiny import clip_text_config, unet

LONG_ONLY = {"short_share": 0.0, "caption_dropout": 0.0}
SYSTEMS: dict[str, dict[str, Any]] = {
    "plain loop": {},
    "no cache": {"objectives": LONG_ONLY},
    "latents cached": {"objectives": LONG_ONLY, "features": {"text": False}},
    "latents and text cached": {"objectives": LONG_ONLY, "features": {"text": True}},
    "with distillation": {"objectives": {"short_share": 0.25, "caption_dropout": 0.0}, "features": {"text": True}},
}
Scale = Literal["small", "sd15"]


def build_models(scale: Scale) -> FrozenModels:
    """Random weights: of Stable Diffusion 1.5's sizes, or a hundredth of them."""
    if scale == "sd15":
        return random_models(STABLE_DIFFUSION, torch.bfloat16)
    torch.manual_seed(0)
    width, plain = 192, clip_tokenizer()
    text = CLIPTextModel(
        clip_text_config(hidden_size=width, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4)
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    tokenizer = FixClipTokenizer(vocab=plain.get_vocab(), merges=plain._merges)
    encodings = (TextEncoding(FixClipTextEncoder.from_clip(text), tokenizer),)
    model = unet(block_out_channels=(64, 128), cross_attention_dim=width, attention_head_dim=4)
    scheduler = DDPMScheduler(beta_schedule="scaled_linear")
    return FrozenModels(vae, encodings, encodings, model, scheduler, scheduler)


def build_recipe(system: str, scale: Scale, batch_size: int, folder: Path) -> AdapterRecipe:
    changes = {name: dict(values) for name, values in SYSTEMS[system].items()}
    if "features" in changes:
        changes["features"]["folder"] = str(folder / f"cache-{changes['features']['text']}")
    sections: dict[str, Any] = {
        "model": {"base": "random", "conditioning": "one_pass"},
        "data": {
            "source": "scenes",
            "stop": 16 * batch_size,
            "workers": 0,
            "resolution": 512 if scale == "sd15" else 64,
        },
        "captions": {"short_caption": "first_sentence"},
        "train": {
            "batch_size": batch_size,
            "precision": "bf16" if scale == "sd15" else "fp32",
            "gradient_checkpointing": scale == "sd15",
        },
        "output": {"folder": str(folder / system.replace(" ", "-"))},
    }
    return AdapterRecipe.model_validate(sections | changes)


def endless(run: AdapterTrainer) -> Iterator[Any]:
    epoch = 0
    while True:
        yield from run.loader.epoch(epoch)
        epoch += 1


def build(
    system: str, scale: Scale, batch_size: int, models: FrozenModels, folder: Path
) -> tuple[AdapterTrainer, Callable[[], None]]:
    """The run, and the function that takes one step of it."""
    run = AdapterTrainer(build_recipe(system, scale, batch_size, folder), models).prepare()
    run.fill_cache()
    loader, device = endless(run), run.accelerator.device
    if system == "plain loop":
        return run, lambda: plain_step(run, next(loader).to(device))

    def step() -> None:
        run.forward_backward(next(loader))
        optimizer_step(run.accelerator, run.model, run.optimizer, 1.0)

    return run, step


def plain_step(run: AdapterTrainer, batch: Any) -> None:
    frozen = run.frozen
    dtype, (encoding, *_) = frozen.unet.dtype, frozen.encodings
    rows = [layout.ids_NP.flatten() for layout in unpack_layouts(batch.long_ids)]
    ids_BT = pad_sequence(rows, batch_first=True, padding_value=encoding.context.end_id).to(run.accelerator.device)
    with torch.no_grad():
        latents = frozen.vae.encode(batch.image.to(dtype)).latent_dist.sample() * frozen.vae.config.scaling_factor
        states = encoding.encoder(ids_BT).last_hidden_state
    noise = torch.randn_like(latents)
    timesteps = torch.randint(1000, (len(latents),), device=latents.device)
    noisy = frozen.scheduler.add_noise(latents, noise, timesteps)
    with run.accelerator.autocast():
        predicted = frozen.unet(noisy, timesteps, run.module.adapter(states)).sample
        loss = torch.nn.functional.mse_loss(predicted.float(), noise.float())
    run.accelerator.backward(loss)
    torch.nn.utils.clip_grad_norm_(run.module.parameters(), 1.0)
    run.optimizer.step()
    run.optimizer.zero_grad()


def measure_times(scale: Scale, batch_size: int, rounds: int, folder: Path) -> dict[str, float]:
    """Median seconds of a step of every system; they take turns."""
    models = build_models(scale)
    steps = {system: build(system, scale, batch_size, models, folder)[1] for system in SYSTEMS}
    times: dict[str, list[float]] = {system: [] for system in SYSTEMS}
    for index in tqdm(range(rounds + 1), desc="rounds"):
        for system in list(SYSTEMS)[:: 1 if index % 2 else -1]:
            start = time.perf_counter()
            steps[system]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if index:
                times[system].append(time.perf_counter() - start)
    return {system: statistics.median(values) for system, values in times.items()}


def added_memory(system: str, scale: Scale, batch_size: int, folder: Path) -> float:
    """MiB that three steps add to what the process, its models and its cache took; measured in this process."""
    _, step = build(system, scale, batch_size, build_models(scale), folder)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = _resident_bytes()
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    for _ in range(3):
        step()
    if torch.cuda.is_available():
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    return (_peak_bytes() - before) / 2**20


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def main(
    scale: Annotated[Scale, typer.Option(help="small, or sd15 for Stable Diffusion 1.5's sizes.")] = "small",
    batch_size: Annotated[int, typer.Option(help="Samples a step.")] = 4,
    rounds: Annotated[int, typer.Option(help="Timed rounds.")] = 15,
    one: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if one:
            print(json.dumps(added_memory(one, scale, batch_size, folder)))
            return
        times = measure_times(scale, batch_size, rounds, folder)
    memory = {}
    for system in SYSTEMS:
        command = [sys.executable, __file__, "--one", system, "--scale", scale, "--batch-size", str(batch_size)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        memory[system] = json.loads(done.stdout.splitlines()[-1])
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} thread(s)"
    print(f"{platform.machine()}, {where}, torch {torch.__version__}, {scale}, {batch_size} samples a step")
    print(f"{'':<26}{'steps/s':>9}{'speed':>8}{'MiB':>8}{'memory':>8}")
    first = "plain loop"
    for system in SYSTEMS:
        print(
            f"{system:<26}{1 / times[system]:9.3f}{times[first] / times[system]:7.2f}x"
            f"{memory[system]:8.0f}{memory[system] / memory[first]:7.2f}x"
        )


if __name__ == "__main__":
    typer.run(main)
