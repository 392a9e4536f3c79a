"""How long does it take to encode a prompt, and what does it hold in memory?

    python benchmarks/encode.py                    # ViT-L/14 (Stable Diffusion 1.x) on this machine
    python benchmarks/encode.py --layers 4 --rounds 5
    python benchmarks/encode.py --base sdxl        # both text encoders of Stable Diffusion XL; --layers 4 of each

From text to states, tokenizing included, for prompts of 20 to 500 tokens, without guidance:

- stock: diffusers' StableDiffusionPipeline.encode_prompt; reads 77 tokens and drops the rest;
- compel: chunks of 77 tokens through the same stock encoder;
- chunks: FixClipStableDiffusionPipeline.encode_prompt with conditioning="chunks", the same passes as compel's;
- ours: the same as it is for a base's own encoder: overlapping windows, about twice as many tokens in passes;
- one_pass: the same with conditioning="one_pass", as trained encoders read: one pass up to 248 tokens.

The weights are random and the same for all. Times are medians over rounds in which the systems take turns, after a
round that does not count, and a ratio of two is the median of their ratios in each round; peak memory is a process's
(Linux), so each system and length has one of its own.
"""

import ctypes
import functools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import logging as diffusers_logging
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from fixclip_core.model.windows import WINDOW_LENGTH
from fixclip_core.weights.write import clip_tokenizer
from fixclip_diffusion import (
    FixClipStableDiffusionPipeline,
    FixClipStableDiffusionXLPipeline,
    FixClipTextEncoder,
    FixClipTokenizer,
)
from fixclip_diffusion.adapter_training import random_models
from fixclip_diffusion.tiny import clip_text_config, unet, vae

LENGTHS = (20, 60, 77, 150, 240, 500)
SYSTEMS = ("stock", "compel", "chunks", "ours", "one_pass")
CONDITIONING = {"chunks": "chunks", "ours": None, "one_pass": "one_pass"}
WORDS = ("horse", "house", "boat", "tree", "lamp", "chair", "bird", "cloud", "kite", "table", "drum")


def prompt_of(num_tokens: int) -> str:
    """Sentences of ten tokens, cut to `num_tokens`, start and end included."""
    words: list[str] = []
    while len(words) < num_tokens - 2:
        thing = WORDS[len(words) // 10 % len(WORDS)]
        words += ["a", "large", thing, "is", "standing", "on", "the", "old", "wall", "."]
    return " ".join(words[: num_tokens - 2]).replace(" .", ".")


@functools.cache
def text_models_xl(layers: int, dtype: torch.dtype) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """ViT-L/14 and ViT-bigG/14 with random weights, which every system of a process shares."""
    torch.manual_seed(0)
    sizes = [random_models.VIT_L, random_models.VIT_BIG_G]
    if layers:
        sizes = [{**size, "num_hidden_layers": layers} for size in sizes]
    first = CLIPTextModel(CLIPTextConfig(**sizes[0])).to(dtype).eval()
    return first, CLIPTextModelWithProjection(CLIPTextConfig(**sizes[1])).to(dtype).eval()


@functools.cache
def pipeline_xl(ours: bool, layers: int, dtype: torch.dtype) -> Any:
    first, second = text_models_xl(layers, dtype)
    parts = {"tokenizer": clip_tokenizer(), "tokenizer_2": clip_tokenizer(pad_token="!")}
    parts |= {"text_encoder": first, "text_encoder_2": second, "vae": None, "unet": None, "scheduler": None}
    stock = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    return FixClipStableDiffusionXLPipeline.from_pipe(stock) if ours else stock


def build_xl(system: str, layers: int, dtype: torch.dtype) -> Callable[[str], Any]:
    """The function from a prompt to what Stable Diffusion XL's UNet reads of it, of ViT-L/14 and ViT-bigG/14."""
    if system == "compel":
        from compel import Compel, ReturnedEmbeddingsType

        return Compel(
            tokenizer=[clip_tokenizer(), clip_tokenizer(pad_token="!")],
            text_encoder=list(text_models_xl(layers, dtype)),
            returned_embeddings_type=ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED,
            requires_pooled=[False, True],
            truncate_long_prompts=False,
        )
    pipe = pipeline_xl(system != "stock", layers, dtype)

    def encode(prompt: str) -> Any:
        if system != "stock":
            pipe.conditioning = CONDITIONING[system]
        return pipe.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)[0]

    return encode


@functools.cache
def text_model(width: int, layers: int, dtype: torch.dtype) -> CLIPTextModel:
    """A text encoder with random weights, which every system of a process shares."""
    torch.manual_seed(0)
    config = clip_text_config(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers or 12, num_attention_heads=width // 64
    )
    return CLIPTextModel(config).to(dtype).eval()


@functools.cache
def pipeline(ours: bool, width: int, layers: int, dtype: torch.dtype) -> Any:
    model, tokenizer = text_model(width, layers, dtype), clip_tokenizer()
    parts = {"vae": vae(), "unet": unet(cross_attention_dim=width), "scheduler": None}
    parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    if not ours:
        return StableDiffusionPipeline(text_encoder=model, tokenizer=tokenizer, **parts)
    own = FixClipTokenizer(vocab=tokenizer.get_vocab(), merges=tokenizer._merges)
    return FixClipStableDiffusionPipeline(text_encoder=FixClipTextEncoder.from_clip(model), tokenizer=own, **parts)


def build(base: str, system: str, width: int, layers: int, dtype: torch.dtype) -> Callable[[str], Any]:
    """The function from a prompt to its states."""
    if base == "sdxl":
        return build_xl(system, layers, dtype)
    if system == "compel":
        from compel import Compel

        model = text_model(width, layers, dtype)
        return Compel(tokenizer=clip_tokenizer(), text_encoder=model, truncate_long_prompts=False)
    pipe = pipeline(system != "stock", width, layers, dtype)

    def encode(prompt: str) -> Any:
        if system != "stock":
            pipe.conditioning = CONDITIONING[system]
        return pipe.encode_prompt(prompt, "cpu", 1, False)[0]

    return encode


def measure_times(
    base: str, width: int, layers: int, dtype: torch.dtype, rounds: int, lengths: Sequence[int]
) -> dict[str, dict[int, list[float]]]:
    """Seconds of every system, length and round; the systems take turns."""
    encoders = {system: build(base, system, width, layers, dtype) for system in SYSTEMS}
    times: dict[str, dict[int, list[float]]] = {system: {n: [] for n in lengths} for system in SYSTEMS}
    for index in tqdm(range(rounds + 1), desc="rounds"):
        for length in lengths:
            prompt = prompt_of(length)
            for system in SYSTEMS if index % 2 else SYSTEMS[::-1]:
                start = time.perf_counter()
                with torch.no_grad():
                    encoders[system](prompt)
                if index:
                    times[system][length].append(time.perf_counter() - start)
    return times


def ratio(seconds: Sequence[float], others: Sequence[float]) -> float:
    """Median of the ratios within each round, which a machine that slows down from round to round leaves alone."""
    return statistics.median(one / other for one, other in zip(seconds, others, strict=True))


def reset_peak(peak_first: bool = False) -> float:
    """Forget the peak of this process's memory; returns the present use in MiB, or the peak until now."""
    if not peak_first:
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for later would hide what is used
    name = "VmHWM:" if peak_first else "VmRSS:"
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith(name))


def peak_memory(base: str, system: str, length: int, width: int, layers: int, dtype: str) -> float:
    """MiB that encoding adds to the peak of a process that holds the weights."""
    sizes = ["--width", str(width), "--layers", str(layers), "--dtype", dtype, "--base", base]
    arguments = ["--one", f"{system},{length}", *sizes]
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(
    base: Annotated[str, typer.Option(help="sd: one text encoder; sdxl: ViT-L/14 and ViT-bigG/14.")] = "sd",
    width: Annotated[int, typer.Option(help="Width of the text encoder; not for sdxl.")] = 768,
    layers: Annotated[int, typer.Option(help="Layers of each text encoder; 0: 12, and 32 of ViT-bigG/14.")] = 0,
    rounds: Annotated[int, typer.Option(help="Timed rounds.")] = 15,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    memory: Annotated[bool, typer.Option(help="Measure memory too, in a process for each system and length.")] = True,
    tokens: Annotated[
        list[int] | None, typer.Option(min=20, help=f"A prompt's length; repeat. Default: {LENGTHS}.")
    ] = None,
    one: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    diffusers_logging.set_verbosity_error()
    torch_dtype = getattr(torch, dtype)
    if one:
        system, count = one.split(",")
        encode = build(base, system, width, layers, torch_dtype)
        # The first prompt brings in libraries and buffers that stay.
        with torch.no_grad():
            encode("a")
            before = reset_peak()
            encode(prompt_of(int(count)))
        print(json.dumps(reset_peak(peak_first=True) - before))
        return
    lengths = tokens or LENGTHS
    times = measure_times(base, width, layers, torch_dtype, rounds, lengths)
    peaks: dict[int, str] = dict.fromkeys(lengths, "not measured")
    for length in lengths if memory else ():
        found = [peak_memory(base, system, length, width, layers, dtype) for system in SYSTEMS]
        peaks[length] = ", ".join(f"{value:.0f}" for value in found)
    what = "both text encoders of Stable Diffusion XL" if base == "sdxl" else f"text encoder of width {width}"
    print(
        f"\n{what}, {layers or 'all'} layers, {dtype}; torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, {platform.processor() or platform.machine()}\n"
    )
    ratios = (("ours", "stock"), ("chunks", "compel"), ("ours", "compel"))
    columns = [
        "tokens",
        *(f"{name} ms" for name in SYSTEMS),
        *(f"{one} / {other}" for one, other in ratios),
        "peak MiB",
    ]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for length in lengths:
        each = {name: times[name][length] for name in SYSTEMS}
        cells = [f"{1e3 * statistics.median(seconds):.1f}" for seconds in each.values()]
        if length > WINDOW_LENGTH:
            cells[0] += f" ({WINDOW_LENGTH} read)"
        cells += [f"{ratio(each[one], each[other]):.3f}" for one, other in ratios]
        print(f"| {length} | {' | '.join(cells)} | {peaks[length]} |")
    if {150, 240} <= set(lengths):
        share = ratio(times["one_pass"][150], times["one_pass"][240])
        print(f"\none pass of 150 tokens: {share:.3f} of one of 240 tokens")


if __name__ == "__main__":
    typer.run(main)
