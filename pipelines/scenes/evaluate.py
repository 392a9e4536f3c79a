"""What the parts of the scenes miniature can do, as JSON: `images SYSTEM`, `wordings SYSTEM`, `paddings`, `retrieval`
and `twins RUN`.

Scenes and captions here are never trained on: FIX-CLIP and the adapter take scenes from number 1000 of seed 0 on, the
base draws its own, and these are the first 1000 of seed 0 (retrieval) and those of seed 1 (images).
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import StableDiffusionPipeline
from torch.nn import functional
from tqdm import tqdm

from fixclip_core import scenes
from fixclip_core.data.captions import shared_tokens
from fixclip_core.device import choose_precision
from fixclip_core.evaluation.encoders import load_encoder
from fixclip_core.evaluation.report import write_json
from fixclip_core.evaluation.retrieval import retrieval_metrics
from fixclip_core.evaluation.twins import NUM_SCENES, twins_reports
from fixclip_core.files import write_atomically
from fixclip_core.model.config import FINE_TUNE
from fixclip_core.model.fixclip import FixClip
from fixclip_core.weights.load import load_fixclip
from fixclip_diffusion import FixClipStableDiffusionPipeline
from fixclip_diffusion.evaluation.generate import Drawing, Painter, System
from fixclip_diffusion.evaluation.judges import as_tensor, scene_verdicts
from fixclip_diffusion.evaluation.prompts import Prompt
from fixclip_diffusion.prompt_tokens import tokenize_prompt
from fixclip_diffusion.tokenizer import FixClipTokenizer

OUT = Path("outputs/scenes")
BASE, ENCODER = str(OUT / "base"), str(OUT / "encoder_diffusers")
SYSTEMS = {
    "stock": System("stock", conditioning="stock"),
    "windows": System("windows", conditioning="chunks"),
    "overlap": System("overlap", conditioning="overlap"),
    "stretched": System("stretched", conditioning="one_pass"),
    "trained": System("trained", ENCODER),
    "adapter": System("adapter", ENCODER, str(OUT / "adapter/adapter")),
    "lora": System("lora", ENCODER, str(OUT / "adapter/adapter"), str(OUT / "lora/lora")),
    "overlap_adapter": System("overlap_adapter", adapter=str(OUT / "adapter_overlap/adapter"), conditioning="overlap"),
    "overlap_text_adapter": System(
        "overlap_text_adapter", adapter=str(OUT / "adapter_overlap_text/adapter"), conditioning="overlap"
    ),
    "stretched_adapter": System(
        "stretched_adapter", adapter=str(OUT / "adapter_stretched/adapter"), conditioning="one_pass"
    ),
}
for seed in (1, 2):  # the systems that decide, trained again with other seeds
    part = f"seed{seed}/adapter"
    SYSTEMS |= {
        f"{name}_seed{seed}": System(f"{name}_seed{seed}", encoder, str(OUT / f"{folder}_{part}"), conditioning=how)
        for name, encoder, folder, how in (
            ("adapter", str(OUT / f"encoder_seed{seed}_diffusers"), "adapter", None),
            ("overlap_text_adapter", None, "adapter_overlap_text", "overlap"),
            ("stretched_adapter", None, "adapter_stretched", "one_pass"),
        )
    }
for rank in (16, 64):  # FIX-CLIP as a low-rank change of the base's text tower
    SYSTEMS[f"trained_rank{rank}"] = System(f"trained_rank{rank}", str(OUT / f"encoder_rank{rank}_diffusers"))
DRAWING = Drawing(steps=20, guidance_scale=2.0, batch_size=16)

app = typer.Typer(add_completion=False)


def nine(number: int, **words: Any) -> list[Prompt]:
    drawn = [scenes.scene_at(1, index, num_objects=9) for index in range(number)]
    return [Prompt(scenes.long_caption(s, f"results/{i}", **words).text, s) for i, s in enumerate(drawn)]


def by_count(number: int) -> list[Prompt]:
    """Long captions of scenes with 1 to 8 objects, `number` each."""
    drawn = [scenes.scene_at(2, 8 * i + n - 1, num_objects=n) for i in range(number) for n in range(1, 9)]
    return [Prompt(scenes.long_caption(s, f"results/{i}").text, s) for i, s in enumerate(drawn)]


def short(number: int) -> list[Prompt]:
    """Short captions of scenes with 1 to 3 objects; they name all of them."""
    drawn = [scenes.scene_at(3, index, num_objects=(1, 3)) for index in range(number)]
    return [Prompt(scenes.short_caption(s, f"results/{i}").text, s) for i, s in enumerate(drawn)]


def references(number: int, **words: Any) -> list[Prompt]:
    """Captions that refer, of scenes with 4 to 9 objects: each kind at each distance once in 16 prompts."""
    drawn = [scenes.reference_at(4, index, **words) for index in range(number)]
    return [Prompt(caption.text, scene) for scene, caption in drawn]


# name: prompts, noises of each
SETS: dict[str, tuple[Callable[[], list[Prompt]], int]] = {
    "nine": (lambda: nine(300), 3),
    "by_count": (lambda: by_count(20), 1),
    "heldout_templates": (lambda: nine(80, split="heldout", synonyms="train"), 1),
    "heldout_words": (lambda: nine(80, split="train", synonyms="heldout"), 1),
    "short": (lambda: short(100), 2),
    "references": (lambda: references(320), 1),
    "references_heldout": (lambda: references(160, split="heldout", synonyms="train"), 1),
}


@app.command()
def images(
    system: Annotated[str, typer.Argument(help=f"One of {', '.join(SYSTEMS)}.")],
    output: Annotated[Path, typer.Option(help="Folder; a set that is there already is not drawn again.")] = OUT
    / "evaluation",
    limit: Annotated[int | None, typer.Option(help="Prompts of each set, for a quick look.")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", help=f"Of {', '.join(SETS)}; default: all.")] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Draw in float32; default: bfloat16 autocast.")] = False,
) -> None:
    """Draw every set of prompts with one system and judge the pictures, object by object."""
    if system not in SYSTEMS:
        raise SystemExit(f"Error: system {system!r}: valid are {', '.join(SYSTEMS)}")
    if unknown := [name for name in sets or () if name not in SETS]:
        raise SystemExit(f"Error: --set {unknown[0]}: valid are {', '.join(SETS)}")
    painter = Painter(BASE)
    tokenizer = FixClipTokenizer.from_pretrained(BASE, subfolder="tokenizer")
    for name, (make, seeds) in SETS.items():
        if sets and name not in sets:
            continue
        file = output / f"{name}-{system}.json"
        if file.exists():
            continue
        prompts = make()[:limit]
        drawing = Drawing(**{**asdict(DRAWING), "num_seeds": seeds})
        # Half the time; results.md says what it changes.
        with contextlib.nullcontext() if exact else torch.autocast("cpu", torch.bfloat16):
            pictures = painter.draw(SYSTEMS[system], prompts, drawing)
        rows = [judged(prompt, own, tokenizer) for prompt, own in zip(prompts, pictures, strict=True)]
        if name.startswith("references"):
            followed = [judged_references(*pair, tokenizer) for pair in zip(prompts, pictures, strict=True)]
            rows = [row | {"references": own} for row, own in zip(rows, followed, strict=True)]
        output.mkdir(parents=True, exist_ok=True)
        content = {"system": system, "set": name, "drawing": asdict(drawing), "bfloat16": not exact, "prompts": rows}
        write_atomically(file, (json.dumps(content) + "\n").encode())
        right = [right for row in rows for own in row["right"] for right in own]
        typer.echo(f"{name} {system}: {right.count('1') / len(right):.3f} of the objects right")


def judged(prompt: Prompt, pictures: list[Any], tokenizer: FixClipTokenizer) -> dict[str, Any]:
    """Verdicts as strings, an object a letter and a picture a string: compact, and readable in a diff."""
    assert prompt.scene is not None
    found = scene_verdicts(pictures, prompt, tokenizer)
    size = len(prompt.scene.objects)
    objects = [found["objects"][start : start + size] for start in range(0, len(found["objects"]), size)]
    clean = tokenizer.clean(prompt.text)
    offsets = tokenizer(clean, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    caption = scenes.annotate_caption(str(clean))
    ends = {
        span.place: last for span, (_, last) in zip(caption.spans, scenes.token_ranges(caption, offsets), strict=True)
    }
    return {
        "tokens": len(offsets) + 2,
        "ends": [ends[item.place] for item in prompt.scene.objects],
        "zones": "".join(item["zone"][:2][-1] for item in objects[0]),  # e before, c across, f after, a past
        **{key: ["".join(str(int(o[key])) for o in own) for own in objects] for key in ("right", "shape", "colour")},
        "background": "".join(str(int(b)) for b in found["background"]),
    }


def judged_references(prompt: Prompt, pictures: list[Any], tokenizer: FixClipTokenizer) -> list[dict[str, Any]]:
    """For each reference: its kind and pointer, its distance in tokens, how good guessing is, a mark for each picture.

    A mark is 1 where all properties that the reference gives are right at the object's place.
    """
    assert prompt.scene is not None
    clean = str(tokenizer.clean(prompt.text))
    offsets = tokenizer(clean, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    caption = scenes.annotate_caption(clean)
    checks = scenes.check_batch(torch.stack([as_tensor(p) for p in pictures]), [prompt.scene] * len(pictures))
    verdicts = [{verdict.place: verdict for verdict in check.objects} for check in checks]
    found = []
    for reference, distance in zip(caption.references, scenes.reference_distances(caption, offsets), strict=True):
        marks = [
            all(getattr(own[reference.place], f"{kind}_right") for kind in reference.properties) for own in verdicts
        ]
        guess = scenes.blind_guess(prompt.scene, caption, reference)
        found.append(
            {
                "kind": reference.kind,
                "pointer": reference.pointer,
                "distance": distance,
                "chance": round(guess.uniform, 4),
                "named": round(guess.named, 4),
                "first": guess.first,
                "right": "".join(str(int(mark)) for mark in marks),
            }
        )
    return found


# -- what a reader takes a pointer for --------------------------------------------------------------------------


@app.command()
def wordings(
    system: Annotated[str, typer.Argument(help=f"One of {', '.join(SYSTEMS)}.")],
    number: Annotated[int, typer.Option(min=1, help="Captions that refer, half of which point.")] = 640,
    output: Annotated[Path, typer.Option(help="Folder of wordings-SYSTEM.json.")] = OUT / "evaluation",
) -> None:
    """Whom does a sentence point to, by its hidden states alone? Minutes, where pictures take ten times as long.

    For each object that could be meant, the base reads a plain wording of the caption in which this one is, in
    overlapping windows; the system is right where its hidden states of the caption are nearest to those of the object
    that is meant. Tokens are compared as far as the wordings' states differ: squared distances, weighted by the
    variance over the wordings. Where the system has read none of them, it is wrong.
    """
    if system not in SYSTEMS:
        raise SystemExit(f"Error: system {system!r}: valid are {', '.join(SYSTEMS)}")
    own = SYSTEMS[system]
    reader, base = (
        FixClipStableDiffusionPipeline.from_pretrained(BASE, **options)
        for options in (
            {"encoder": own.encoder, "adapter": own.adapter, "conditioning": own.conditioning},
            {"conditioning": "overlap"},
        )
    )
    rows: list[dict[str, Any]] = []
    for index in tqdm(range(number), system):
        scene, caption = scenes.reference_at(4, index)
        for reference, distance in zip(
            caption.references, scenes.reference_distances(caption, scenes.count_words), strict=True
        ):
            candidates = scenes.plain_wordings(scene, caption, reference) if reference.pointer else {}
            if len(candidates) > 1:
                item = next(item for item in scene.objects if item.place == reference.place)
                meant = tuple(getattr(item, kind) for kind in reference.properties)
                nearest = nearest_wording(reader, base, caption.text, candidates)
                row: dict[str, Any] = {"kind": reference.kind, "pointer": reference.pointer, "distance": distance}
                guess = scenes.blind_guess(scene, caption, reference)
                row |= {"named": round(guess.named, 4), "first": guess.first}
                rows.append({"caption": index, **row, "right": int(nearest == meant)})
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / f"wordings-{system}.json", (json.dumps({"rows": rows}) + "\n").encode())
    share, guess = (sum(row[key] for row in rows) / len(rows) for key in ("right", "named"))
    typer.echo(f"{system}: right {share:.3f} of {len(rows)}, by chance {guess:.3f}")


@torch.no_grad()
def nearest_wording(reader: Any, base: Any, text: str, candidates: dict[Any, str]) -> Any:
    """The key of the candidate whose hidden states by `base` are nearest to those of the text by `reader`.

    None where `reader` has read no token that tells the candidates apart.
    """
    ids, own_row_of, states_LD = states_of(reader, [text])[0]
    compared = list(own_row_of)
    read = []
    for other_ids, other_row_of, other_LD in states_of(base, list(candidates.values())):
        shared = zip(*shared_tokens(ids, other_ids), strict=True)
        row_of = {token: other_row_of[other] for token, other in shared if other in other_row_of}
        compared = [token for token in compared if token in row_of]
        read.append((row_of, other_LD))
    wanted_CTD = torch.stack([other_LD[[row_of[token] for token in compared]] for row_of, other_LD in read])
    weight_T = wanted_CTD.var(0).mean(-1)
    if not weight_T.any():
        return None
    error_CT = (states_LD[[own_row_of[token] for token in compared]] - wanted_CTD).square().mean(-1)
    return list(candidates)[int((error_CT * weight_T).sum(1).argmin())]


def states_of(pipe: Any, texts: list[str]) -> list[tuple[tuple[int, ...], dict[int, int], torch.Tensor]]:
    """Of each text its tokens, the first row that each token read has, and all rows (L, D) as the UNet reads them."""
    encoding, conditioning = pipe.prompt_encoder.encodings[0], pipe.prompt_encoder.conditioning
    embeds_NLD, _ = pipe.encode_prompt(texts, "cpu", 1, False)
    found = []
    for text, states_LD in zip(texts, embeds_NLD.float(), strict=True):
        tokens = tokenize_prompt(encoding.tokenizer, text)
        token_L = conditioning.lay_out(tokens, encoding.context).token_L.tolist()
        row_of = {token: row for row, token in reversed(list(enumerate(token_L))) if token >= 0}
        found.append((tokens.ids, row_of, states_LD))
    return found


# -- what stands behind a text ------------------------------------------------------------------------------

PADDINGS = {  # of each system; windows have no padding of their own between them
    "trained": ("mask", "zeros", "keep"),
    "overlap": ("mask", "zeros"),
}


@app.command()
def paddings(
    number: Annotated[int, typer.Option(min=1, help="Prompts of nine objects, one noise each.")] = 96,
    output: Annotated[Path, typer.Option(help="Folder of paddings.json.")] = OUT / "evaluation",
) -> None:
    """Draw without adapter, FIX-CLIP's pass and the base's windows, with each kind of padding behind a text.

    mask: the UNet does not attend to it. zeros: hidden states of 0 up to 248 rows, which the UNet attends to. keep: the
    same with the encoder's own hidden states of its padding.
    """
    prompts = nine(number)
    tokenizer = FixClipTokenizer.from_pretrained(BASE, subfolder="tokenizer")
    found: dict[str, dict[str, list[float]]] = {}
    for name, kinds in PADDINGS.items():
        system = SYSTEMS[name]
        ours = FixClipStableDiffusionPipeline.from_pretrained(BASE, system.encoder, conditioning=system.conditioning)
        unmasked = StableDiffusionPipeline.from_pretrained(BASE)  # its UNet attends to every row
        found[name] = {}
        for padding in kinds:
            ours.text_encoder.config.padding = "keep" if padding == "keep" else "mask"
            texts, empty = [prompt.text for prompt in prompts], [""] * number
            embeds = [e for e in ours.encode_prompt(texts, "cpu", 1, True, empty) if e is not None]
            if padding != "mask":
                embeds = [functional.pad(rows_BTD, (0, 0, 0, 248 - rows_BTD.shape[1])) for rows_BTD in embeds]
            pictures = _draw_embeds(ours if padding == "mask" else unmasked, embeds[0], embeds[1])
            rows = [judged(prompt, [picture], tokenizer) for prompt, picture in zip(prompts, pictures, strict=True)]
            found[name][padding] = [_share_right(rows, zones) for zones in ("e", "fa")]
            before, after = found[name][padding]
            typer.echo(f"{name} {padding}: {before:.1%} right before token 77, {after:.1%} after it")
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / "paddings.json", (json.dumps(found, indent=1) + "\n").encode())


def _draw_embeds(pipe: Any, embeds_BTD: torch.Tensor, negative_BTD: torch.Tensor) -> list[Any]:
    """Pictures of prompts that were read already; that of prompt i starts from the noise of seed 1000 + i."""
    pipe.set_progress_bar_config(disable=True)
    pictures: list[Any] = []
    for start in range(0, len(embeds_BTD), DRAWING.batch_size):
        rows = slice(start, start + DRAWING.batch_size)
        own = {"prompt_embeds": embeds_BTD[rows], "negative_prompt_embeds": negative_BTD[rows]}
        noises = [torch.Generator().manual_seed(1000 + start + i) for i in range(len(own["prompt_embeds"]))]
        steps = {"num_inference_steps": DRAWING.steps, "guidance_scale": DRAWING.guidance_scale}
        with torch.autocast("cpu", torch.bfloat16):
            pictures += pipe(**own, **steps, generator=noises).images
    return pictures


def _share_right(rows: list[dict[str, Any]], zones: str) -> float:
    """Share of the objects in these zones that are right, of one picture a prompt."""
    marks = [mark for row in rows for mark, zone in zip(row["right"][0], row["zones"], strict=True) if zone in zones]
    return marks.count("1") / len(marks)


# -- retrieval -----------------------------------------------------------------------------------------------


def retrieval_models() -> Iterator[tuple[str, Callable[[], FixClip]]]:
    base = OUT / "clip/model"
    # keep=76 and ratio 1 leave the 77 positions as they are.
    yield "base", lambda: load_fixclip(base, keep=76, ratio=1, **FINE_TUNE)
    yield "stretched", lambda: load_fixclip(base, **FINE_TUNE)
    yield "trained", lambda: load_fixclip(OUT / "encoder")


CAPTIONS: dict[str, Callable[[scenes.Scene, int], scenes.Caption]] = {
    "long": lambda s, i: scenes.long_caption(s, i),
    "short": lambda s, i: scenes.short_caption(s, i),
    "long_heldout_templates": lambda s, i: scenes.long_caption(s, i, split="heldout", synonyms="train"),
    "long_heldout_words": lambda s, i: scenes.long_caption(s, i, split="train", synonyms="heldout"),
}


@app.command()
def retrieval(
    output: Annotated[Path, typer.Option(help="Folder of retrieval.json.")] = OUT / "evaluation", number: int = 1000
) -> None:
    """Recall of the base at 77 tokens, the base stretched, and the trained FIX-CLIP, over 1,000 scenes."""
    drawn = [scenes.scene_at(0, index) for index in range(number)]
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, load in retrieval_models():
        model = load().float().eval()
        transform, tokenizer = model.preprocess(train=False), model.tokenizer()
        pictures = [transform(to_pil(scenes.render(scene))) for scene in drawn]
        with torch.no_grad():
            image_IE = torch.cat(
                [model.encode_image(torch.stack(pictures[i : i + 100])) for i in range(0, number, 100)]
            )
            found[name] = {}
            for kind, caption in tqdm(CAPTIONS.items(), name):
                texts = [caption(scene, i).text for i, scene in enumerate(drawn)]
                parts = [model.encode_text(tokenizer(texts[i : i + 100])) for i in range(0, number, 100)]
                found[name][kind] = retrieval_metrics(image_IE, torch.cat(parts), torch.arange(number))
                typer.echo(
                    f"{name} {kind}: " + ", ".join(f"{k} {v:.3f}" for k, v in found[name][kind].items() if "at_1" in k)
                )
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / "retrieval.json", (json.dumps(found, indent=1) + "\n").encode())


@app.command()
def twins(
    names: Annotated[list[str], typer.Argument(metavar="RUN...", help="Folders of rivals/, or base.")],
    folder: Annotated[Path, typer.Option(help="Of the runs; writes twins/RUN.json there.")] = OUT / "rivals",
    base: Annotated[Path, typer.Option(help="The CLIP that the runs began with.")] = OUT / "clip" / "model",
    number: int = NUM_SCENES,
    batch_size: int = 256,
) -> None:
    """Retrieval among 5,000 scenes, and choices between each and its near twins; the scenes are drawn once for all."""
    for name in names:
        if name != "base" and not (folder / name).is_dir():
            raise SystemExit(
                f"Error: run {name!r}: there is no {folder / name}; pipelines/scenes/run.py --list names them"
            )
    files = {name: folder / "twins" / f"{name}.json" for name in names}
    left = [name for name, file in files.items() if not file.exists()]
    encoders = [load_encoder(base if name == "base" else folder / name) for name in left]
    options: dict[str, Any] = {"batch_size": batch_size, "precision": choose_precision("auto", "cpu")}
    for name, report in zip(left, twins_reports(encoders, number, **options) if encoders else [], strict=True):
        write_json(report, files[name])
        typer.echo(str(files[name]))


def to_pil(image_CHW: torch.Tensor) -> Any:
    from torchvision.transforms.v2.functional import to_pil_image

    return to_pil_image(image_CHW)


if __name__ == "__main__":
    app()
