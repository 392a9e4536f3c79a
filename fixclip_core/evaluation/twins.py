"""Hard retrieval on the procedural world: does an encoder tell a scene from its near twins?

Each scene comes with twins in which one thing is changed (`scenes.near_twins`): the colour, shape, size or place of an
object, the colours of two objects swapped, or the object that a reference points to. A pair (scene, twin) asks four
questions: which of the two captions fits each of the two pictures, and which of the two pictures fits each caption.

How small a difference can this show? Decided before any model was looked at, see `smallest_difference`: of two methods
with 3 training seeds each, on the 5,000 pairs of one change, differences of 3.7 points are shown (two-sided 5 %, power
80 %) if seeds do not matter, 4.8 points if the seeds of one method spread by 1 point (standard deviation); on the
1,000 pairs or so of a change in one zone 8.3 and 8.8 points; over all pairs of all changes, about 29,000, 1.5 and
3.4 points. These bounds take the two methods' answers as unrelated. Answers to the same pairs are related, so a paired
bootstrap over pairs, which `choices` of the report allows, shows smaller ones.

Shape letters: I images, T texts, P pairs, E embedding width.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import to_pil_image
from tqdm import tqdm

from fixclip_core import scenes
from fixclip_core.evaluation.encoders import Encoder, Precision, encode_images, encode_texts
from fixclip_core.evaluation.report import skipped_report
from fixclip_core.evaluation.retrieval import TIE_RULE, TIE_TOLERANCE, retrieval_metrics

NAME = "scenes-twins"
NUM_SCENES = 5000
SEED = 5  # of the scenes; trainings take those of seed 0
NUM_OBJECTS = (4, 9)


def twin_scenes(data: str) -> int:
    """How many scenes `scenes-twins:N` names, 5,000 without a number.

    Raises:
        ValueError: N is no positive number.
    """
    name, colon, number = data.partition(":")
    if name != NAME or (colon and not (number.isdecimal() and int(number))):
        raise ValueError(f"data {data!r}: give the number of scenes, like {NAME}:{NUM_SCENES}")
    return int(number) if colon else NUM_SCENES


@dataclass(frozen=True)
class Pair:
    """A scene and a twin of it: what differs, where in the caption, and the rows of their features."""

    change: str
    zone: str
    images: tuple[int, int]
    texts: tuple[int, int]


class TwinScenes(Dataset[tuple[list[Any], list[scenes.Twin], str]]):
    """Scenes with their twins: PIL pictures, the scene's own first; the twins; the scene's caption."""

    def __init__(self, number: int):
        self.number = number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> tuple[list[Any], list[scenes.Twin], str]:
        scene = scenes.scene_at(SEED, index, num_objects=NUM_OBJECTS)
        twins = scenes.near_twins(scene, index)
        images = [to_pil_image(image) for image in scenes.render_batch([scene, *(twin.scene for twin in twins)])]
        return images, twins, scenes.long_caption(scene, index).text


def choices(image_IE: Tensor, text_TE: Tensor, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Share of right answers of each pair, (P,) from images to texts and (P,) from texts to images.

    1 if both pictures (or both captions) find their own, 0 if none does. Two scores within 1e-6 of each other count
    half: a model that reads nothing of the difference scores exactly 50 %.

    Args:
        image_IE, text_TE: normalised features.
        pairs: rows of these; the scene's own first.
    """
    image_P2 = torch.tensor([pair.images for pair in pairs], device=image_IE.device)
    text_P2 = torch.tensor([pair.texts for pair in pairs], device=text_TE.device)
    score_P22 = torch.einsum("pie,pte->pit", image_IE[image_P2], text_TE[text_P2])
    own_P2 = score_P22.diagonal(dim1=1, dim2=2)
    other_text_P2 = score_P22.flip(2).diagonal(dim1=1, dim2=2)  # the same picture with the other caption
    other_image_P2 = score_P22.flip(1).diagonal(dim1=1, dim2=2)
    return _wins(own_P2 - other_text_P2).mean(1), _wins(own_P2 - other_image_P2).mean(1)


def _wins(margin: Tensor) -> Tensor:
    return torch.where(margin.abs() <= TIE_TOLERANCE, 0.5, (margin > 0).float())


def twins_report(
    encoder: Encoder,
    number: int = NUM_SCENES,
    *,
    batch_size: int = 64,
    workers: int = 0,
    precision: Precision = "fp32",
) -> dict[str, Any]:
    """`twins_reports` of one encoder."""
    options: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "precision": precision}
    return twins_reports([encoder], number, **options)[0]


def twins_reports(
    encoders: Sequence[Encoder],
    number: int = NUM_SCENES,
    *,
    batch_size: int = 64,
    workers: int = 0,
    precision: Precision = "fp32",
) -> list[dict[str, Any]]:
    """Choices between twins, by change and zone, and recall among all scenes, with and without their twins.

    Scenes are drawn once for all encoders, which for small ones is a third of the work.

    Args:
        encoders: the CLIPs.
        number: of scenes; each has up to 6 twins.
        batch_size: images or texts a step.
        workers: processes that draw scenes.
        precision: of the encoder's passes.

    Returns:
        For each encoder a report as `retrieval_report`: "metrics" are recalls with the pictures and captions of all
        scenes and of all twins to choose from, "without_twins" those of the scenes alone. "choices" lists change,
        zone, shares right both ways with their standard errors, and how many pairs; zone "all" and change "all" stand
        for all of them. "pairs" has (change, zone, image to text, text to image) of each pair, for a paired comparison
        of two reports.
    """
    drawn, images = _draw(encoders, number, batch_size, workers, precision)
    return [
        _report(encoder, image_IE, drawn, batch_size, precision)
        for encoder, image_IE in zip(encoders, images, strict=True)
    ]


def _report(
    encoder: Encoder, image_IE: Tensor, drawn: "_Drawn", batch_size: int, precision: Precision
) -> dict[str, Any]:
    number = len(drawn.own)
    text_TE, cut_texts = encode_texts(encoder, drawn.texts, batch_size, precision)
    found = torch.stack(choices(image_IE, text_TE, drawn.pairs), 1).tolist()
    rows = [(pair.change, pair.zone, *shares) for pair, shares in zip(drawn.pairs, found, strict=True)]
    own_images, own_texts = (list(column) for column in zip(*drawn.own, strict=True))
    return {
        "model": encoder.describe(),
        "data": {
            "name": f"{NAME}:{number}",
            "protocol": f"scenes of seed {SEED} with {NUM_OBJECTS[0]} to {NUM_OBJECTS[1]} objects, and their twins",
            "images": len(image_IE),
            "texts": len(drawn.texts),
            "pairs": len(drawn.pairs),
            "texts_that_fill_the_context": cut_texts,
            "skipped": skipped_report([]),
        },
        "precision": precision,
        "tie_rule": f"{TIE_RULE}; in a choice between two a tie counts half",
        "metrics": retrieval_metrics(image_IE, text_TE, drawn.text_to_image, progress=True),
        "without_twins": retrieval_metrics(image_IE[own_images], text_TE[own_texts], range(number)),
        "choices": summarize_choices(rows),
        "pairs": rows,
    }


@dataclass(frozen=True)
class _Drawn:
    """All captions, whose picture each describes, the pairs, and each scene's own picture and caption."""

    texts: list[str]
    text_to_image: list[int]
    pairs: list[Pair]
    own: list[tuple[int, int]]


def _draw(
    encoders: Sequence[Encoder], number: int, batch_size: int, workers: int, precision: Precision
) -> tuple[_Drawn, list[Tensor]]:
    """What is drawn, and the features of all pictures, (I, E) for each encoder."""
    features: list[list[Tensor]] = [[] for _ in encoders]
    texts: list[str] = []
    text_to_image: list[int] = []
    pairs: list[Pair] = []
    own: list[tuple[int, int]] = []
    size = max(1, batch_size // (1 + len(scenes.CHANGES)))  # scenes a step
    loader = DataLoader(TwinScenes(number), size, num_workers=workers, collate_fn=list)
    first = 0  # row of the scene's own picture
    for batch in tqdm(loader, desc="scenes and twins", unit="batch"):
        for encoder, own_features in zip(encoders, features, strict=True):
            image_BCHW = torch.stack([encoder.preprocess(image) for images, _, _ in batch for image in images])
            own_features.append(encode_images(encoder, image_BCHW, precision))
        for images, twins, caption in batch:
            own.append((first, len(texts)))
            originals = {text: len(texts) + n for n, text in enumerate({caption: 0} | {t.original: 0 for t in twins})}
            texts += originals
            text_to_image += [first] * len(originals)
            for row, twin in enumerate(twins, first + 1):
                pair = (originals[twin.original], len(texts))
                pairs.append(Pair(twin.change, scenes.difference_zone(twin), (first, row), pair))
                texts.append(twin.caption)
                text_to_image.append(row)
            first += len(images)
    return _Drawn(texts, text_to_image, pairs, own), [torch.cat(own_features) for own_features in features]


def summarize_choices(rows: Sequence[tuple[str, str, float, float]]) -> list[dict[str, Any]]:
    """Means and standard errors by change and zone, of each change, of each zone, and of all."""
    groups: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for change, zone, *shares in rows:
        for group in ((change, zone), (change, "all"), ("all", zone), ("all", "all")):
            groups[group].append((shares[0], shares[1]))
    order = [(change, zone) for change in (*scenes.CHANGES, "all") for zone in (*scenes.DIFFERENCE_ZONES, "all")]
    found = []
    for change, zone in filter(groups.__contains__, order):
        entry: dict[str, Any] = {"change": change, "zone": zone, "pairs": len(groups[change, zone])}
        for column, direction in enumerate(("image_to_text", "text_to_image")):
            values = [shares[column] for shares in groups[change, zone]]
            entry[direction] = statistics.mean(values)
            entry[f"{direction}_standard_error"] = (
                statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
            )
        found.append(entry)
    return found


def format_choices(report: dict[str, Any]) -> str:
    """Choices between twins as lines for a terminal: % right, image to text / text to image, and how many pairs."""
    cells = {(entry["change"], entry["zone"]): entry for entry in report["choices"]}
    zones = (*scenes.DIFFERENCE_ZONES, "all")
    lines = ["choices between a scene and its twin: % right, image to text / text to image (pairs); chance is 50"]
    lines.append(f"{'tokens at the difference':<26}" + "".join(f"{zone:>22}" for zone in zones))
    for change in (*scenes.CHANGES, "all"):
        shown = []
        for zone in zones:
            entry = cells.get((change, zone))
            values = [100 * entry[name] for name in ("image_to_text", "text_to_image")] if entry else []
            shown.append(f"{values[0]:.1f} / {values[1]:.1f} ({entry['pairs']})" if entry else "-")
        lines.append(f"{change:<26}" + "".join(f"{cell:>22}" for cell in shown))
    return "\n".join(lines)


def smallest_difference(pairs: int, *, share: float = 0.5, seeds: int = 3, seed_spread: float = 0.0) -> float:
    """The smallest difference between two methods that can be shown: two-sided 5 %, power 80 %.

    Both methods are trained with `seeds` seeds each and answer the same N = `pairs` pairs, of which a share p is
    right. The standard error of the difference of their means over seeds is at most sqrt(2 p (1 - p) / N +
    2 s^2 / seeds), with the first part not divided by the seeds, since all of them answer the same pairs. It is
    multiplied by the sum of Student's quantiles at 97.5 % and 80 %, with 2 (seeds - 1) degrees of freedom:
    2.776 + 0.941 for 3 seeds.

    Example: N = 5000, p = 0.5, s = 0.01 and 3 seeds give 3.717 * sqrt(0.0001 + 0.0000667) = 0.048.

    Args:
        pairs: N.
        share: p, from 0 to 1; 0.5 is the worst case.
        seeds: trainings of each method, 2 to 5.
        seed_spread: s, the standard deviation of the share between seeds of one method.

    Raises:
        ValueError: no pair, a share outside 0 to 1, or a number of seeds for which there is no quantile here.
    """
    if pairs < 1 or not 0 <= share <= 1 or seeds not in QUANTILES:
        raise ValueError(f"pairs={pairs}, share={share}, seeds={seeds}: at least 1, 0 to 1, {min(QUANTILES)} to 5")
    variance = 2 * share * (1 - share) / pairs + 2 * seed_spread**2 / seeds
    return sum(QUANTILES[seeds]) * math.sqrt(variance)


# Student's quantiles at 97.5 % and 80 % for 2 (seeds - 1) degrees of freedom.
QUANTILES = {2: (4.303, 1.061), 3: (2.776, 0.941), 4: (2.447, 0.906), 5: (2.306, 0.889)}
