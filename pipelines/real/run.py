"""Real weights: does all of it hold on OpenAI's CLIP, Long-CLIP, Stable Diffusion 1.5 and XL?

    python pipelines/real/run.py                       # everything; about 25 GB of downloads, one GPU of 16 GB
    python pipelines/real/run.py --list                # the steps and what is done
    python pipelines/real/run.py --only parity --only retrieval

Steps, each written to OUTPUT/STEP.json when it is done and not repeated then; a picture is written when it is drawn,
and the report anew in each run. A folder goes on with the options it was begun with (OUTPUT/settings.json):

    download   the five repositories, through huggingface_hub (HF_ENDPOINT and HF_HOME are heeded)
    parity     hidden states layer by layer, in our classes and in the libraries that published the weights
    retrieval  Urban-1k with CLIP and Long-CLIP, against published figures, within 0.5 points
    draw       20 long captions of Urban-1k through every conditioning of both models, from the same noise
    score      Long-CLIP's cosines of pictures and sentences, by where in the prompt the sentence lies
    report     OUTPUT/report.md, with a verdict for each step

Nothing of this has been run on the real weights by us; tests/test_real_pipeline.py runs every step on tiny stand-ins
from a local hub, on a CPU and so in fp32: that pictures are drawn in fp16 on CUDA is untested, too.
"""

import gc
import json
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from huggingface_hub import hf_hub_download, snapshot_download
from parity import LIMIT, Row, clip_parity, component_parity, long_clip_parity
from PIL import Image
from tqdm import tqdm
from transformers import AutoTokenizer

from fixclip_core.device import choose_device
from fixclip_core.evaluation.benchmarks import Benchmark as Retrieval
from fixclip_core.evaluation.benchmarks import load_benchmark
from fixclip_core.evaluation.encoders import load_encoder
from fixclip_core.evaluation.items import BenchmarkItems
from fixclip_core.evaluation.retrieval import retrieval_report
from fixclip_core.files import prepare_folder, write_atomically
from fixclip_diffusion import FixClipStableDiffusionXLPipeline, FixClipTokenizer
from fixclip_diffusion.evaluation import generate, report, run
from fixclip_diffusion.evaluation.benchmarks import open_benchmark

CLIP = "openai/clip-vit-large-patch14"
LONG_CLIP = ("BeichenZhang/LongCLIP-L", "longclip-L.pt")
SD = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
URBAN = ("BeichenZhang/Urban1k", "Urban1k.zip")
CLIP_FILES = ["*.json", "*.txt", "model.safetensors"]
PIPELINE_FILES = [
    "model_index.json", "scheduler/*.json", "tokenizer*/*", "feature_extractor/*.json", "*/config.json",
    "text_encoder*/model.safetensors", "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
]  # fmt: skip

# R@1 in %, image to text and text to image, of Urban-1k with ViT-L/14 in Long-CLIP's paper (ECCV 2024, arXiv
# 2403.15378). Typed in, not fetched: look them up before a difference is blamed on this code.
PUBLISHED = {"CLIP": (68.7, 52.8), "Long-CLIP": (82.7, 86.1)}
WITHIN = 0.5
DECIDING = ("prompts", "steps", "guidance", "partial")  # settings that a step's result depends on
CONDITIONINGS = ("stock", "chunks", "overlap", "one_pass")
WINDOWED = ("chunks", "overlap")  # all of the prompt in states that the UNet was trained with: these must beat stock
BEHIND = "sentence_after"  # mean cosine of picture and sentences behind token 77, which stock never reads


@dataclass(frozen=True)
class Settings:
    """What the steps share.

    Attributes:
        output: folder for results.
        prompts: how many captions are drawn.
        steps, guidance: of the drawing.
        partial: Urban-1k may be incomplete, as a stand-in is.
        device: where everything runs.
    """

    output: Path
    prompts: int
    steps: int
    guidance: float
    partial: bool
    device: str

    @property
    def dtype(self) -> torch.dtype:
        return torch.float16 if self.device.startswith("cuda") else torch.float32

    def result(self, step: str) -> Any:
        """What a step before this one found.

        Raises:
            ValueError: it has not run.
        """
        path = self.output / f"{step}.json"
        if not path.is_file():
            raise ValueError(f"{path} is missing: run the step {step} first")
        return json.loads(path.read_text())["result"]


def keep_settings(settings: Settings) -> None:
    """Note what decides the results in the folder.

    Raises:
        BadParameter: it was begun with another value, which the steps that are done have.
    """
    path = settings.output / "settings.json"
    own = {name: getattr(settings, name) for name in DECIDING}
    if not path.is_file():
        write_atomically(path, (json.dumps(own) + "\n").encode())
        return
    begun = json.loads(path.read_text())
    for name, value in own.items():
        if begun[name] != value:
            raise typer.BadParameter(
                f"{name}={value}: {settings.output} was begun with {begun[name]}; give that, or another --output"
            )


def download(settings: Settings) -> dict[str, str]:
    """Folders and files of the weights and the data; what the cache holds is not fetched again."""
    archive = Path(hf_hub_download(*URBAN, repo_type="dataset"))
    data = settings.output / "urban1k"
    with zipfile.ZipFile(archive) as file:
        file.extractall(data)
    (captions,) = sorted(p for p in data.rglob("caption") if p.is_dir() and "__MACOSX" not in p.parts)
    return {
        "clip": snapshot_download(CLIP, allow_patterns=CLIP_FILES),
        "long_clip": hf_hub_download(*LONG_CLIP),
        "sd": snapshot_download(SD, allow_patterns=PIPELINE_FILES),
        "sdxl": snapshot_download(SDXL, allow_patterns=PIPELINE_FILES),
        "urban": str(captions.parent),
    }


def parity(settings: Settings) -> list[dict[str, Any]]:
    """A row for each layer of each comparison, see `parity.py`."""
    paths, data = settings.result("download"), urban(settings)
    texts = [captions[0] for captions in data.captions[:4]]
    short = ["a photo of a cat", "two horses under a tree", "a red bus in the rain", texts[0]]
    images = [Image.open(path).convert("RGB") for path in data.images[:4]]
    found = clip_parity(Path(paths["clip"]), short, images, settings.device)
    found += long_clip_parity(Path(paths["long_clip"]), texts, settings.device)
    for model, names in (("sd", ("text_encoder",)), ("sdxl", ("text_encoder", "text_encoder_2"))):
        for name in names:
            tokenizer = AutoTokenizer.from_pretrained(paths[model], subfolder=name.replace("text_encoder", "tokenizer"))
            found += component_parity(model.upper(), Path(paths[model]), name, tokenizer, short, settings.device)
    return [asdict(row) for row in found]


def urban(settings: Settings) -> Retrieval:
    return load_benchmark("urban-1k", settings.result("download")["urban"], settings.partial)


def retrieval(settings: Settings) -> dict[str, Any]:
    """R@1 of both models in %, beside what is published."""
    paths, data = settings.result("download"), urban(settings)
    found = {}
    for name, source in (("CLIP", paths["clip"]), ("Long-CLIP", paths["long_clip"])):
        encoder = load_encoder(source, device=settings.device)
        items = BenchmarkItems(data, encoder.preprocess)
        metrics = retrieval_report(encoder, items, data.name, data.protocol)["metrics"]
        own = [100 * metrics[f"{direction}_recall_at_1"] for direction in ("image_to_text", "text_to_image")]
        found[name] = {
            "measured": own,
            "published": PUBLISHED[name],
            "within": is_within(own, PUBLISHED[name]),
            "protocol": data.protocol,
        }
    return found


def is_within(measured: Sequence[float], published: Sequence[float]) -> bool:
    """Whether each recall, in %, is at most `WITHIN` points from the published one."""
    return all(abs(a - b) <= WITHIN for a, b in zip(measured, published, strict=True))


def long_prompts(settings: Settings) -> Path:
    """A file of the first captions of more than 77 tokens."""
    path = settings.output / "prompts.jsonl"
    tokenizer = FixClipTokenizer.from_pretrained(settings.result("download")["sd"], subfolder="tokenizer")
    data = urban(settings)
    texts = [(image.stem, captions[0]) for image, captions in zip(data.images, data.captions, strict=True)]
    chosen = [(stem, text) for stem, text in texts if len(tokenizer(text).input_ids) > 77][: settings.prompts]
    if not chosen:
        raise ValueError("no caption of more than 77 tokens")
    lines = [json.dumps({"id": stem, "prompt": text}) + "\n" for stem, text in chosen]
    write_atomically(path, "".join(lines).encode())
    return path


def drawing_of(settings: Settings) -> generate.Drawing:
    return generate.Drawing(settings.steps, settings.guidance)


def sd_systems(settings: Settings) -> list[generate.System]:
    """Every conditioning of Stable Diffusion 1.5, and Long-CLIP in one pass in place of its text encoder."""
    systems = [generate.System(f"SD-{name}", conditioning=name) for name in CONDITIONINGS]
    return [*systems, generate.System("SD-long-clip", encoder=settings.result("download")["long_clip"])]


def draw(settings: Settings) -> dict[str, int]:
    """Pictures of each system; how many each has."""
    paths = settings.result("download")
    prompts = open_benchmark(str(long_prompts(settings)), check_scenes=False).prompts
    drawing, images = drawing_of(settings), settings.output / "images"
    painter = generate.Painter(paths["sd"], settings.device, settings.dtype)
    for system in sd_systems(settings):
        generate.draw_missing(painter, system, prompts, drawing, images / system.name)
    painter.release()
    gc.collect()
    pipe = FixClipStableDiffusionXLPipeline.from_pretrained(paths["sdxl"], dtype=settings.dtype)
    pipe.to(settings.device).set_progress_bar_config(disable=True)
    for name in CONDITIONINGS:
        for prompt in tqdm(prompts, desc=f"XL-{name}", unit="picture"):
            path = images / f"XL-{name}" / f"{generate.picture_stem(prompt)}.png"
            if path.is_file():
                continue
            picture = pipe(
                prompt.text, conditioning=name, num_inference_steps=settings.steps, guidance_scale=settings.guidance,
                generator=torch.Generator().manual_seed(0),
            ).images[0]  # fmt: skip
            path.parent.mkdir(parents=True, exist_ok=True)
            generate.save_picture(path, picture, {"prompt": prompt.text, "conditioning": name, "seed": 0})
    return {folder.name: len(list(folder.glob("*.png"))) for folder in sorted(images.iterdir())}


def score(settings: Settings) -> dict[str, Any]:
    """The tables of evaluate-images, in Markdown, and each system's cosine of sentences behind token 77.

    The page is OUTPUT/pictures/report.html.
    """
    images = settings.output / "images"
    settings.result("draw")
    benchmark = open_benchmark(str(settings.output / "prompts.jsonl"), check_scenes=False)
    systems = [generate.System(folder.name, pictures=str(folder)) for folder in sorted(images.iterdir())]
    scorer = load_encoder(settings.result("download")["long_clip"], device=settings.device)
    found = run.evaluate_images(
        "", benchmark, systems, drawing_of(settings), settings.output / "pictures", scorer=scorer
    )
    behind = {name: own[BEHIND]["mean"] for name, own in found["cosines"].items() if BEHIND in own}
    return {"tables": report.markdown(found), "behind": behind}


def below_stock(behind: dict[str, float]) -> list[str]:
    """Which systems that read in windows have no higher cosine behind token 77 than their model's stock."""
    names = [f"{model}-{way}" for model in ("SD", "XL") for way in WINDOWED]
    return [name for name in names if not behind.get(name, -1.0) > behind.get(f"{name[:2]}-stock", 1.0)]


def write_report(settings: Settings) -> dict[str, bool]:
    """OUTPUT/report.md; whether each check held."""
    found = [Row(**row) for row in settings.result("parity")]
    recalls, drawn, scored = settings.result("retrieval"), settings.result("draw"), settings.result("score")
    below = below_stock(scored["behind"])
    verdicts = {
        "parity": all(row.is_right for row in found),
        "retrieval": all(own["within"] for own in recalls.values()),
        "draw": len(set(drawn.values())) == 1,
        "score": not below,
    }
    table = [
        [what, str(len(own)), f"{max(row.difference / row.largest for row in own):.1e}", _said(own)]
        for what in dict.fromkeys(row.what for row in found)
        if (own := [row for row in found if row.what == what])
    ]
    ranks = [
        [name, *(f"{a:.1f} ({b:.1f})" for a, b in zip(own["measured"], own["published"], strict=True)),
         "yes" if own["within"] else "NO", own["protocol"]]
        for name, own in recalls.items()
    ]  # fmt: skip
    parts = [
        "# Real weights",
        report.table(["check", "held"], [[name, "yes" if held else "NO"] for name, held in verdicts.items()]),
        f"## Layer by layer\n\nLargest difference over largest state of the layer, float32; at most {LIMIT:g}.",
        report.table(["compared", "layers", "worst", "held"], table),
        f"## Urban-1k\n\nR@1 in %, in brackets as published; within {WITHIN} points.",
        report.table(["model", "image to text", "text to image", "within", "protocol"], ranks),
        "## Long prompts\n\nPictures side by side: pictures/report.html. With sentences behind token 77, pictures "
        f"drawn from {' and '.join(WINDOWED)} must have a higher mean cosine than stock's: "
        f"{'NO, not ' + ', '.join(below) if below else 'yes'}.",
        scored["tables"],
    ]
    write_atomically(settings.output / "report.md", ("\n\n".join(parts) + "\n").encode())
    return verdicts


def _said(own: list[Row]) -> str:
    wrong = [row.layer for row in own if not row.is_right]
    return f"NO, first in layer {wrong[0]}" if wrong else "yes"


STEPS: dict[str, Callable[[Settings], Any]] = {
    "download": download, "parity": parity, "retrieval": retrieval, "draw": draw, "score": score,
    "report": write_report,
}  # fmt: skip
REPORTED = ("parity", "retrieval", "draw", "score")


def main(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for results; goes on there.")] = Path(
        "outputs/real"
    ),
    only: Annotated[list[str] | None, typer.Option(help=f"Repeat a step: {', '.join(STEPS)}.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="Show what is done, stop.")] = False,
    prompts: Annotated[int, typer.Option(min=1, help="Captions to draw.")] = 20,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 30,
    guidance: Annotated[float, typer.Option(min=0, help="Guidance scale.")] = 7.0,
    partial: Annotated[bool, typer.Option("--partial", help="Urban-1k may be incomplete.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: the fastest there is.")] = None,
) -> None:
    """Check everything on real weights, a step after the other, and write one report."""
    if unknown := [name for name in only or [] if name not in STEPS]:
        raise typer.BadParameter(f"step {unknown[0]!r}: valid are {', '.join(STEPS)}")
    settings = Settings(output, prompts, steps, guidance, partial, choose_device(device))
    prepare_folder(output)
    if not listed:
        keep_settings(settings)
    for name, step in STEPS.items():
        path = output / f"{name}.json"
        wanted = name in only if only else not path.is_file()
        can_report = name == "report" and all((output / f"{other}.json").is_file() for other in REPORTED)
        if listed or not (wanted or can_report):
            typer.echo(f"{name:10} {'done' if path.is_file() else 'to do'}")
            continue
        start = time.perf_counter()
        result = step(settings)
        seconds = time.perf_counter() - start
        write_atomically(path, (json.dumps({"seconds": seconds, "result": result}, indent=1) + "\n").encode())
        typer.echo(f"{name:10} {seconds:.0f} s")
        gc.collect()
    if (output / "report.md").is_file() and not listed:
        typer.echo((output / "report.md").read_text())


if __name__ == "__main__":
    typer.run(main)
