"""The report of an evaluation: a table for a terminal, and a sheet of pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from fixclip_core import scenes
from fixclip_core.files import write_atomically
from fixclip_diffusion.evaluation.judges import as_tensor
from fixclip_diffusion.evaluation.prompts import Prompt


def format_table(report: Mapping[str, Any]) -> str:
    """The report as a few lines for a terminal: a system in each row, mean ± standard error."""
    systems = report["systems"]
    metrics = list(dict.fromkeys(name for values in systems.values() for name in values))
    if not metrics:
        return "nothing was scored: choose a --scorer, or prompts of the scenes"
    width = max(len(name) for name in systems)
    lines = [f"{len(report['prompts'])} prompts, {report['settings']['drawing']['num_seeds']} picture(s) each"]
    for metric in metrics:
        lines.append(metric)
        for name, values in systems.items():
            value = values.get(metric)
            shown = f"{value['mean']:8.4f} ± {value['standard_error']:.4f}" if value else f"{'-':>8}"
            lines.append(f"  {name:<{width}} {shown}")
    return "\n".join(lines)


def write_sheet(
    path: Path, drawn: Mapping[str, list[list[Image.Image]]], prompts: Sequence[Prompt], most: int = 16
) -> None:
    """The first picture of the first prompts, a prompt in each row and a system in each column."""
    images, labels = [], []
    for row, prompt in enumerate(prompts[:most]):
        for name, pictures in drawn.items():
            images.append(as_tensor(pictures[row][0]))
            labels.append(f"{name}\n{prompt.text[:24]}")
    side = max(192, min(512, images[0].shape[-1]))
    sheet = scenes.sheet(images, labels, columns=len(drawn), side=side)
    write_atomically(path, lambda partial: sheet.save(partial, format="png"))
