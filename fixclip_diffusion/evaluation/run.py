"""Does the picture follow the prompt? Several systems draw the same prompts from the same noise, and are scored."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fixclip_core.evaluation.encoders import Encoder
from fixclip_core.files import prepare_folder, write_atomically
from fixclip_diffusion.evaluation.generate import Drawing, Painter, System, save_pictures
from fixclip_diffusion.evaluation.judges import scene_verdicts, text_scores
from fixclip_diffusion.evaluation.prompts import Prompt, sentences
from fixclip_diffusion.evaluation.report import write_sheet
from fixclip_diffusion.evaluation.scores import metrics


def evaluate_images(
    base: str,
    prompts: Sequence[Prompt],
    systems: Sequence[System],
    drawing: Drawing,
    *,
    scorer: Encoder | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Let every system draw every prompt from the same seeds, score the pictures and compare.

    Args:
        base: Stable Diffusion 1.x or 2.x, folder or hub name.
        prompts: see `read_prompts`; scenes are judged by the exact checker.
        systems: see `System`; their names must differ.
        drawing: steps, guidance, size and seeds.
        scorer: a long-context CLIP for image-text scores; None leaves them out.
        device, dtype: of the drawing.
        folder: where to write report.json, sheet.png and images/; None writes nothing.

    Returns:
        {"settings", "systems": {name: {metric: mean, standard error, count}}, "prompts": [per prompt]}. Metrics
        are "whole", "sentence_ZONE" (cosines) and "objects_right_ZONE", "objects_colour_ZONE", "background_right"
        (shares); each prompt counts once in a mean, whatever it holds.

    Raises:
        ValueError: nothing to draw or to draw with, names that recur, a part that cannot be loaded, or a folder that
            cannot be written to.
    """
    names = [system.name for system in systems]
    if not prompts or not systems or len(set(names)) < len(names):
        raise ValueError(f"{len(prompts)} prompts and systems {names}: at least one of each, every name once")
    painter = Painter(base, device, dtype)
    for system in systems:  # what cannot be loaded is found out before hours of drawing
        with painter.pipeline(system) as pipe:
            tokenizer = pipe.tokenizer
    if folder is not None:
        prepare_folder(folder)
    parts = [sentences(prompt.text, tokenizer) for prompt in prompts]
    rows: list[dict[str, Any]] = [
        {"prompt": prompt.text, "sentences": [asdict(s) for s in own], "systems": {}}
        for prompt, own in zip(prompts, parts, strict=True)
    ]
    drawn: dict[str, list[list[Image.Image]]] = {}
    for system in systems:
        pictures = drawn[system.name] = painter.draw(system, prompts, drawing)
        if folder is not None:
            save_pictures(folder / "images" / system.name, pictures, drawing)
        scores: list[list[float]] = [[] for _ in prompts]
        if scorer is not None:
            texts = [[p.text, *(s.text for s in own)] for p, own in zip(prompts, parts, strict=True)]
            scores = text_scores(pictures, texts, scorer)
        for row, prompt, own, score in zip(rows, prompts, pictures, scores, strict=True):
            result: dict[str, Any] = {}
            if score:
                result |= {"whole": score[0], "per_sentence": score[1:]}
            if prompt.scene is not None:
                result |= scene_verdicts(own, prompt, tokenizer)
            row["systems"][system.name] = result
    report = {
        "settings": {
            "base": base,
            "systems": [asdict(system) for system in systems],
            "drawing": asdict(drawing),
            "scorer": None if scorer is None else scorer.describe(),
        },
        "systems": {name: metrics([(row["sentences"], row["systems"][name]) for row in rows]) for name in names},
        "prompts": rows,
    }
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "report.json", (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())
        write_sheet(folder / "sheet.png", drawn, prompts)
    return report
