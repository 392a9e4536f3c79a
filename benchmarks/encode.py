"""How long does it take to encode a prompt, and what does it hold in memory?

    python benchmarks/encode.py                    # ViT-L/14 (Stable Diffusion 1.x) on this machine
    python benchmarks/encode.py --layers 4 --rounds 5

From text to states, tokenizing included, for prompts of 20 to 500 tokens, without guidance:

- stock: diffusers' StableDiffusionPipeline.encode_prompt; reads 77 tokens and drops the rest;
- compel: chunks of 77 tokens through the same stock encoder;
- ours: FixClipStableDiffusionPipeline.encode_prompt; one pass up to 248 tokens, then windows.

The weights are random and the same for all. Times are medians over rounds in which the three take turns, after a
round that does not count; peak memory is a process's (Linux), so each system and length has one of its own.
"""

import ctypes
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from tqdm import tqdm
from transformers import CLIPTextModel

from fixclip_core.weights.write import clip_tokenizer
from fixclip_diffusion import FixClipStableDiffusionPipeline, FixClipTextEncoder, FixClipTokenizer
from fixclip_diffusion.tiny import clip_text_config, unet, vae

LENGTHS = (20, 60, 77, 150, 240, 500)
SYSTEMS = ("stock", "compel", "ours")
WORDS = ("horse", "house", "boat", "tree", "lamp", "chair", "bird", "cloud", "kite", "table", "drum")


def prompt_of(num_tokens: int) -> str:
    """Sentences of ten tokens, cut to `num_tokens`, start and end included."""
    words: list[str] = []
    while len(words) < num_tokens - 2:
        thing = WORDS[len(words) // 10 % len(WORDS)]
        words += ["a", "large", thing, "is", "standing", "on", "the", "old", "wall", "."]
    return " ".join(words[: num_tokens - 2]).replace(" .", ".")


def build(system: str, width: int, layers: int, dtype: torch.dtype) -> Callable[[str], Any]:
    """The function from a prompt to its states."""
    torch.manual_seed(0)
    config = clip_text_config(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=width // 64
    )
    text_encoder = CLIPTextModel(config).to(dtype).eval()
    tokenizer = clip_tokenizer()
    rest = {"vae": vae(), "unet": unet(cross_attention_dim=width), "scheduler": None}
    rest |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    if system == "compel":
        from compel import Compel

        return Compel(tokenizer=tokenizer, text_encoder=text_encoder, truncate_long_prompts=False)
    if system == "stock":
        pipe = StableDiffusionPipeline(text_encoder=text_encoder, tokenizer=tokenizer, **rest)
    else:
        ours = FixClipTokenizer(vocab=tokenizer.get_vocab(), merges=tokenizer._merges)
        pipe = FixClipStableDiffusionPipeline(
            text_encoder=FixClipTextEncoder.from_clip(text_encoder), tokenizer=ours, **rest
        )
    return lambda prompt: pipe.encode_prompt(prompt, "cpu", 1, False)[0]


def measure_times(width: int, layers: int, dtype: torch.dtype, rounds: int) -> dict[str, dict[int, float]]:
    """Median seconds of every system and length; the systems take turns."""
    encoders = {system: build(system, width, layers, dtype) for system in SYSTEMS}
    times: dict[str, dict[int, list[float]]] = {system: {n: [] for n in LENGTHS} for system in SYSTEMS}
    for index in tqdm(range(rounds + 1), desc="rounds"):
        for length in LENGTHS:
            prompt = prompt_of(length)
            for system in SYSTEMS if index % 2 else SYSTEMS[::-1]:
                start = time.perf_counter()
                with torch.no_grad():
                    encoders[system](prompt)
                if index:
                    times[system][length].append(time.perf_counter() - start)
    return {system: {n: statistics.median(values) for n, values in by.items()} for system, by in times.items()}


def reset_peak(peak_first: bool = False) -> float:
    """Forget the peak of this process's memory; returns the present use in MiB, or the peak until now."""
    if not peak_first:
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for later would hide what is used
    name = "VmHWM:" if peak_first else "VmRSS:"
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith(name))


def peak_memory(system: str, length: int, width: int, layers: int, dtype: str) -> float:
    """MiB that encoding adds to the peak of a process that holds the weights."""
    arguments = ["--one", f"{system},{length}", "--width", str(width), "--layers", str(layers), "--dtype", dtype]
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(
    width: Annotated[int, typer.Option(help="Width of the text encoder.")] = 768,
    layers: Annotated[int, typer.Option(help="Layers of the text encoder.")] = 12,
    rounds: Annotated[int, typer.Option(help="Timed rounds.")] = 15,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    one: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    diffusers_logging.set_verbosity_error()
    torch_dtype = getattr(torch, dtype)
    if one:
        system, tokens = one.split(",")
        encode = build(system, width, layers, torch_dtype)
        # The first prompt brings in libraries and buffers that stay.
        with torch.no_grad():
            encode("a")
            before = reset_peak()
            encode(prompt_of(int(tokens)))
        print(json.dumps(reset_peak(peak_first=True) - before))
        return
    times = measure_times(width, layers, torch_dtype, rounds)
    memory = {
        system: {length: peak_memory(system, length, width, layers, dtype) for length in LENGTHS} for system in SYSTEMS
    }
    print(
        f"\ntext encoder of width {width}, {layers} layers, {dtype}; torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, {platform.processor() or platform.machine()}\n"
    )
    print("| tokens | stock ms | compel ms | ours ms | ours / stock | ours / compel | peak MiB stock, compel, ours |")
    print("|---|---|---|---|---|---|---|")
    for length in LENGTHS:
        stock, compel, ours = (times[system][length] for system in SYSTEMS)
        note = "" if length <= 77 else " (77 read)"
        peaks = ", ".join(f"{memory[system][length]:.0f}" for system in SYSTEMS)
        print(
            f"| {length} | {1e3 * stock:.1f}{note} | {1e3 * compel:.1f} | {1e3 * ours:.1f} | {ours / stock:.2f} | "
            f"{ours / compel:.2f} | {peaks} |"
        )


if __name__ == "__main__":
    typer.run(main)
