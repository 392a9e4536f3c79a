"""FIX-CLIP's modules against its rivals: what the stages `rivals` of run.py measured, as tables, curves and verdicts.

Every method has three seeds at a learning rate that was chosen on a fourth. Two methods are compared on the same
pairs of a scene and its near twin, all of them and those of each zone of the caption, and by R@1 of long and of short
captions; the 95 % interval is Student's, over the seeds of both and over the pairs or scenes. "No gain" is said only
where the whole interval is smaller than a third of what training brings at all. The smallest difference that could be
shown, by the same test without pairing and spread, was stated before any model was looked at (`evaluation.twins`).
"""

import base64
import copy
import hashlib
import json
import math
import statistics
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot
from safetensors.torch import load_file

from fixclip_core.evaluation.twins import NUM_SCENES, QUANTILES, smallest_difference
from fixclip_core.scenes import CHANGES, DIFFERENCE_ZONES

LABELS = {
    "base": "base, cut at 77",
    "stretched": "stretched, untrained",
    "finetune": "plain fine-tuning",
    "longclip": "Long-CLIP recipe",
    "debias": "Long-CLIP recipe, DeBias-CLIP's sampling",
    "fixclip": "FIX-CLIP",
    "fixclip_no_prompts": "FIX-CLIP without regional prompts",
    "fixclip_no_masking": "FIX-CLIP without masking",
    "fixclip_no_groups": "FIX-CLIP without hierarchical alignment",
    "fixclip_debias": "FIX-CLIP, DeBias-CLIP's sampling",
    "fixclip_debias_three": "the same, three short captions an image",
    "fixclip_states": "FIX-CLIP, state alignment of weight 3",
}
TRAINING = "training at all"
QUESTIONS = {  # what is asked: the method with, and the one without
    "regional prompts": ("fixclip", "fixclip_no_prompts"),
    "masking (dual branch)": ("fixclip", "fixclip_no_masking"),
    "hierarchical alignment": ("fixclip", "fixclip_no_groups"),
    "FIX-CLIP against plain fine-tuning": ("fixclip", "finetune"),
    "FIX-CLIP against the Long-CLIP recipe": ("fixclip", "longclip"),
    "DeBias sampling, on the Long-CLIP recipe": ("debias", "longclip"),
    "DeBias sampling, on FIX-CLIP": ("fixclip_debias", "fixclip"),
    "three short captions an image": ("fixclip_debias_three", "fixclip_debias"),
    "state alignment of weight 3, on FIX-CLIP": ("fixclip_states", "fixclip"),
    TRAINING: ("finetune", "stretched"),
}
DIRECTIONS = ("image_to_text", "text_to_image")
ZONES = (*DIFFERENCE_ZONES, "all")
BEHIND = list(DIFFERENCE_ZONES)[-1]
SHORT_SCENES = 1000  # on which trainings measure short R@1, eval.source of encoder.yaml
EIGHTHS = 8  # a pair asks four questions, of which a tie counts half


# -- collecting ----------------------------------------------------------------------------------------------


def collect(folder: Path, before: Mapping[str, Any] | None = None, clip: Path | None = None) -> dict[str, Any]:
    """What report.py keeps of `outputs/scenes/rivals`: figures and answers of each run, and verdicts.

    The trainings take hours, so what was kept before stays, and runs of other seeds or methods join it.

    Args:
        folder: of the runs, their hard sets in twins/METHOD-lrRATE-seedN.json.
        before: what was kept.
        clip: folder of the CLIP that the runs began with.

    Returns:
        {} before there is any run. "pairs" has change and zone of each pair and "answers" the share of right choices,
        both as `packed`; "clip" is the digest of the CLIP's weights.

    Raises:
        ValueError: runs that cannot be compared with the others: other pairs, another number of steps, or another CLIP
            that they began with.
    """
    found = {"pairs": {}, "runs": {}} | copy.deepcopy(dict(before or {}))
    files = sorted((folder / "twins").glob("*.json"))
    if files and clip is not None:
        own = half_digest(clip / "model.safetensors")
        if found.setdefault("clip", own) != own:
            raise ValueError(
                f"{folder}: its runs began with {clip}, and what was kept with another CLIP; train all anew"
            )
    for file in files:
        method, lr, seed = named(file.stem)
        report = json.loads(file.read_text())
        changes, zones = ([pair[n] for pair in report["pairs"]] for n in (0, 1))
        pairs = {"changes": packed(map(CHANGES.index, changes)), "zones": packed(map(ZONES.index, zones))}
        if found["pairs"] and found["pairs"] != pairs:
            raise ValueError(f"{file}: its pairs are not those of the reports before it; evaluate all with one version")
        found["pairs"] = pairs
        if method not in LABELS:
            raise ValueError(
                f"{file}: LABELS of {Path(__file__).name} has no words for the method {method!r}; add them"
            )
        kept = found["runs"].setdefault(method, {"lr": lr, "seeds": {}})
        if kept["lr"] != lr:
            raise ValueError(
                f"{file}: a run at {lr}, where runs of {method} at {kept['lr']} were kept; seeds are compared at one "
                f"rate, so remove this file, or {method} from the kept rivals.json"
            )
        answers = packed(round(EIGHTHS * statistics.mean(pair[2:])) for pair in report["pairs"])
        figures_of_run = {**figures(report), **trained_figures(folder / file.stem), "answers": answers}
        found["runs"][method]["seeds"][str(seed)] = figures_of_run
    steps = {
        seed["curve"][-1][0] for own in found["runs"].values() for seed in own["seeds"].values() if "curve" in seed
    }
    if len(steps) > 1:
        raise ValueError(f"trainings of {' and '.join(map(str, sorted(steps)))} steps cannot be compared; see {folder}")
    return found | {"differences": answered(found)} if found["runs"] else {}


def half_digest(file: Path) -> str:
    """SHA-256 of a file's weights in half precision, as they are published, names included."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(file).items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.half().contiguous().numpy().tobytes())
    return digest.hexdigest()


def answered(found: Mapping[str, Any]) -> dict[str, Any]:
    """The differences that answer each of `QUESTIONS` whose two methods are there."""
    runs = found["runs"]
    zone_P = np.array(ZONES)[unpacked(found["pairs"]["zones"])]
    shares = {
        method: np.stack([unpacked(seed["answers"]) / EIGHTHS for _, seed in sorted(own["seeds"].items())])
        for method, own in runs.items()
    }
    return {
        question: differences(shares[one], shares[other], zone_P) | recall_differences(runs[one], runs[other])
        for question, (one, other) in QUESTIONS.items()
        if one in shares and other in shares
    }


def packed(values: Iterable[int]) -> str:
    """Numbers from 0 to 255 as text: a byte each, zlib, base 85; about 8 kB for the 29,000 answers of a run."""
    return base64.b85encode(zlib.compress(bytes(values), 9)).decode()


def unpacked(text: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b85decode(text)), np.uint8)


def short_recalls(own: Mapping[str, Any]) -> list[float]:
    """R@1 of short captions, of each seed of a method that was trained."""
    return [seed["short"] for seed in own["seeds"].values() if "short" in seed]


def long_recalls(own: Mapping[str, Any]) -> list[float]:
    """R@1 of long captions among 5,000 scenes, the mean of both directions, of each seed."""
    return [statistics.mean(seed["scenes"]) for seed in own["seeds"].values()]


def named(name: str) -> tuple[str, str, int]:
    """Method, learning rate and seed of a run's name; an untrained model has no rate, and seed 0."""
    method, _, rest = name.partition("-lr")
    rate, _, seed = rest.rpartition("-seed")
    return method, rate, int(seed or 0)


def figures(found: Mapping[str, Any]) -> dict[str, Any]:
    """R@1 among 5,000 scenes, with and without their twins, and right choices by what differs and where."""
    choices: dict[str, dict[str, float]] = defaultdict(dict)
    for row in found["choices"]:
        choices[row["change"]][row["zone"]] = statistics.mean(row[direction] for direction in DIRECTIONS)
    return {
        "scenes": [found["without_twins"][f"{direction}_recall_at_1"] for direction in DIRECTIONS],
        "twins": [found["metrics"][f"{direction}_recall_at_1"] for direction in DIRECTIONS],
        "choices": dict(choices),
    }


def trained_figures(folder: Path) -> dict[str, Any]:
    """The curve of a training, (step, long R@1, short R@1), means of both directions, and its last short R@1."""
    file = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    curve = [
        [row["step"], *(statistics.mean(row[f"{kind}_{d}_recall_at_1"] for d in DIRECTIONS) for kind in KINDS)]
        for row in rows
        if "long_image_to_text_recall_at_1" in row
    ]
    return {"curve": curve, "short": curve[-1][2]} if curve else {}


KINDS = ("long", "short")


# -- comparing -----------------------------------------------------------------------------------------------


def differences(one_SP: np.ndarray, other_SP: np.ndarray, zone_P: np.ndarray) -> dict[str, Any]:
    """`difference` over the pairs of each zone of the caption, and over all; {} where there are too few seeds.

    Args:
        one_SP, other_SP: shares of right choices of each seed and pair, (S, P); the pairs are the same.
    """
    found: dict[str, Any] = {}
    for zone in ZONES:
        one, other = (shares_SP[:, (zone_P == zone) | (zone == "all")] for shares_SP in (one_SP, other_SP))
        number = one.shape[1]
        if number:
            of_pairs = float((one.mean(0) - other.mean(0)).var(ddof=1)) / number if number > 1 else 0.0
            of_zone = difference(one.mean(1).tolist(), other.mean(1).tolist(), of_pairs)
            found |= {zone: of_zone | {"smallest": smallest_difference(number)}} if of_zone else {}
    return found


def recall_differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """`difference` of two methods' R@1: "scenes", of long captions among 5,000 scenes, and "short"; as far as known.

    R@1 of each seed is all that is kept, so the answers of the two methods count as unrelated, which makes the interval
    wider than a paired one: their part of the variance is 2 p (1 - p) / N, of N scenes and the mean p of both methods.
    """
    found: dict[str, Any] = {}
    for name, recalls, number in (("scenes", long_recalls, NUM_SCENES), ("short", short_recalls, SHORT_SCENES)):
        values = recalls(one), recalls(other)
        if all(values):
            share = statistics.mean(map(statistics.mean, values))
            of_recall = difference(*values, 2 * share * (1 - share) / number)
            found |= {name: of_recall | {"smallest": smallest_difference(number)}} if of_recall else {}
    return found


def difference(one: Sequence[float], other: Sequence[float], variance: float) -> dict[str, Any]:
    """Difference of two methods' means over training seeds, and its 95 % interval; {} for fewer than two seeds of both.

    t sqrt(s_1^2 / S_1 + s_2^2 / S_2 + v), with the standard deviations s of the S seeds of each method and Student's
    quantile t for S_1 + S_2 - 2 degrees of freedom, 2.776 for three seeds of each. A bootstrap over three seeds would
    be too narrow: in simulations its intervals hold what they should in 80 % of the cases instead of 95 %.

    Args:
        one, other: a figure of each seed.
        variance: v, of the difference because of the questions that were asked, a sample of all that could be.
    """
    freedom = len(one) + len(other) - 2
    if freedom < 2:
        return {}
    seeds = sum(statistics.variance(values) / len(values) for values in (one, other) if len(values) > 1)
    half = QUANTILES[freedom // 2 + 1][0] * math.sqrt(seeds + variance)
    mean = statistics.mean(one) - statistics.mean(other)
    return {"mean": mean, "interval": [mean - half, mean + half]}


def verdict(found: Mapping[str, Any], margin: float) -> str:
    """gains, loses, no gain (the interval lies within plus and minus `margin`), or cannot be told."""
    low, high = found["interval"]
    if low > 0:
        return "gains"
    if high < 0:
        return "loses"
    return "no gain" if max(-low, high) < margin else "cannot be told"


def margins(differences: Mapping[str, Any]) -> dict[str, float]:
    """{zone: a third of what training at all brings there}, the largest effect that counts as none; {} before that is
    known."""
    return {zone: own["mean"] / 3 for zone, own in differences.get(TRAINING, {}).items()}


# -- tables --------------------------------------------------------------------------------------------------


def methods_rows(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and a row a method: R@1, means over seeds ± their standard deviation, in %."""
    header = ["method", "lr", "seeds", "R@1 of 5,000, i2t", "t2i", "with twins, i2t", "t2i", "short R@1 of 1,000"]
    rows = []
    for method, own in in_order(found):
        seeds = list(own["seeds"].values())
        columns = [[seed[kind][d] for seed in seeds] for kind in ("scenes", "twins") for d in (0, 1)]
        columns.append(short_recalls(own))
        rows.append([LABELS[method], own["lr"] or "–", str(len(seeds)), *map(spread, columns)])
    return header, rows


def choices_rows(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and a row a method: right choices by zone, and by kind of change, in brackets those behind token 77."""
    rows = []
    for method, own in in_order(found):
        seeds = [seed["choices"] for seed in own["seeds"].values()]
        cells = [spread(chosen(seeds, "all", zone)) for zone in ZONES]
        for change in CHANGES:
            behind = chosen(seeds, change, BEHIND)
            bracket = f" ({100 * statistics.mean(behind):.1f})" if behind else ""
            cells.append(spread(chosen(seeds, change, "all")) + bracket)
        rows.append([LABELS[method], *cells])
    return ["method", *ZONES, *CHANGES], rows


def chosen(seeds: Sequence[Mapping[str, Any]], change: str, zone: str) -> list[float]:
    """Right choices of the seeds that have any of this change in this zone."""
    return [choices[change][zone] for choices in seeds if zone in choices.get(change, {})]


def in_order(found: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return sorted(found["runs"].items(), key=lambda item: list(LABELS).index(item[0]))


def spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{deviation}"


def verdict_rows(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and a row a question: verdict and interval of the difference, in points, of each zone and of short texts.

    The last rows have the margin of "no gain", and the smallest difference that could be shown, computed before.
    """
    columns = ("all", *DIFFERENCE_ZONES, "scenes", "short")
    margin = margins(found["differences"])
    rows = [
        [question, *(verdict_cell(own[c], margin.get(c, 0.0)) if c in own else "–" for c in columns)]
        for question, own in found["differences"].items()
    ]
    smallest = {column: own[column]["smallest"] for own in found["differences"].values() for column in own}
    for name, values in (("margin of no gain", margin), ("smallest that could be shown", smallest)):
        rows.append([name, *(f"{100 * values[c]:.1f}" if c in values else "–" for c in columns)])
    choices = [f"choices, {zone}" for zone in ("all", *DIFFERENCE_ZONES)]
    return ["question", *choices, "R@1 of 5,000", "short R@1"], rows


def verdict_cell(found: Mapping[str, Any], margin: float) -> str:
    low, high = (100 * value for value in found["interval"])
    return f"{verdict(found, margin)}: {100 * found['mean']:+.1f} ({low:+.1f} to {high:+.1f})"


def plot_curves(found: Mapping[str, Any], path: Path) -> None:
    """Long and short R@1 over the steps, means over the seeds that were evaluated on the way: have they flattened?"""
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 5), layout="constrained")
    for method, own in in_order(found):
        curves = [np.array(seed["curve"]) for seed in own["seeds"].values() if len(seed.get("curve", [])) > 1]
        if not curves:
            continue
        mean = np.mean(curves, axis=0)
        for column, axis in enumerate(axes, 1):
            axis.plot(mean[:, 0], 100 * mean[:, column], label=LABELS[method])
    for kind, axis in zip(KINDS, axes, strict=True):
        axis.set(xlabel="steps", ylabel="R@1, %", title=f"{kind} captions, 1,000 scenes")
    if axes[0].lines:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
