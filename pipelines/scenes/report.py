"""docs/results.md and its plots, from JSON alone: `python pipelines/scenes/report.py`.

`--collect` first gathers the JSON of outputs/scenes (evaluations, and the last evaluation of every training run) into
pipelines/scenes/results/, which is in the repository; without it the page is made of what is there.
"""

import itertools
import json
import math
import statistics
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
import typer
import yaml

matplotlib.use("Agg")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # other pipelines have files of the same names
from matplotlib import pyplot
from safetensors import safe_open
from scenes import rivals, run

from fixclip_core import scenes

OUT = Path("outputs/scenes")
NOISE = Path("outputs/captions/noise/noise.json")
RESULTS = Path("pipelines/scenes/results")
PAGE = Path("docs/results.md")
IMAGES = Path("docs/images")
DIFFERENCES = (
    ("overlap_text_adapter", "overlap"),
    ("overlap_text_adapter", "overlap_adapter"),
    ("overlap_text_adapter", "adapter"),
    ("adapter", "stretched_adapter"),
    ("adapter", "trained"),
    ("lora", "adapter"),
    ("trained", "overlap"),
)
SYSTEMS = {
    "stock": "`stock`: cut at 77 tokens",
    "windows": "`chunks`: base encoder in windows of 77",
    "overlap": "`overlap`: base encoder in overlapping windows, untrained",
    "stretched": "`one_pass`: base encoder stretched to 248 tokens, untrained",
    "trained": "`one_pass`: FIX-CLIP with state alignment, no adapter",
    "adapter": "`one_pass`: FIX-CLIP + adapter",
    "lora": "`one_pass`: FIX-CLIP + adapter + LoRA of the UNet",
    "stretched_adapter": "`one_pass`: base encoder stretched + adapter",
    "overlap_adapter": "`overlap`: base encoder + adapter on each window",
    "overlap_text_adapter": "`overlap`: base encoder + adapter on all windows, joined",
}
SIDES = ("before 77", "after 77", "references from 77 tokens on")  # of differences
SEEDED = ("overlap_text_adapter", "adapter", "stretched_adapter")  # with further training seeds
TRAINING_SEEDS = (0, 1, 2)
COLOURS = {
    "stock": "#9a9a9a",
    "windows": "#c98f3a",
    "overlap": "#b5533c",
    "stretched": "#8fb8de",
    "trained": "#4f86c6",
    "adapter": "#3f9b6b",
    "lora": "#1d6b45",
    "overlap_adapter": "#dd9c8a",
    "overlap_text_adapter": "#7a2e1d",
    "stretched_adapter": "#b9a3d6",
}
METHODS = {
    "fixclip": "FIX-CLIP, an eighth of the patches masked",
    "prompt_flow_replace": "without carried prompts (`prompt_flow: replace`)",
    "no_masking": "without masking",
    "mask_ratio_25": "25 % of the patches masked",
    "mask_ratio_75": "75 % of the patches masked, as in the paper",
    "first_sentence": "short caption: the long one's first sentence",
    "no_groups": "without hierarchical groups",
    "longclip": "Long-CLIP recipe",
    "finetune": "plain fine-tuning",
}
GUESSES = {
    "chance": "guess: any value of the world",
    "named": "guess: an object of the caption",
    "first": "guess: the first object of the caption",
}
DEPTHS = {"overlap_text": "the base's windows, joined", "adapter": "FIX-CLIP's pass"}
NOT_YET = "Not measured yet."
CAPTIONS = {
    "true": "true",
    "few_mistakes_filtered": "few mistakes, filtered",
    "many_mistakes_filtered": "many mistakes, filtered",
    "many_mistakes": "many mistakes, no filter",
    "many_wrong_objects": "objects left out or of a wrong colour alone",
}
MEASURES = {
    "bound": "place, shape, colour and size all read off the text",
    "root_mean_square": "root mean square error (pictures from -1 to 1)",
    "objects_right": "objects right",
    "objects_colour_right": "colours right",
}
TIMED = ("chain", "controls", "evaluations")
RECALLS = tuple(f"{c}_{d}_recall_at_1" for c in ("long", "short") for d in ("image_to_text", "text_to_image"))


# -- collecting ----------------------------------------------------------------------------------------------


def collect() -> None:
    """Copy what has been measured into the repository; what is not there yet stays as it was."""
    for file in sorted((OUT / "evaluation").glob("*.json")):
        (RESULTS / file.name).write_text(file.read_text())
    for name, found in {"deltas": collect_deltas(), "depths": collect_depths()}.items():
        add_results(f"{name}.json", found)
    for part, values in collect_times().items():
        times = read_results("times.json")
        add_results("times.json", {part: times.get(part, {}) | values})
    runs = {}
    for folder in sorted((OUT / "ablations").glob("*")):
        if (folder / "model" / "config.json").exists():
            runs[folder.name] = last_evaluation(folder)
    add_results("ablations.json", runs)
    if compared := rivals.collect(OUT / "rivals", read_results("rivals.json"), OUT / "clip" / "model"):
        (RESULTS / "rivals.json").write_text(json.dumps(compared, indent=1) + "\n")
    parts = {name: OUT / name for name in ("clip", "vae", "robust", "unet", "encoder")}
    training = {name: evaluations(folder) for name, folder in parts.items() if (folder / "metrics.jsonl").exists()}
    add_results("training.json", training)
    if NOISE.exists():
        (RESULTS / "caption_noise.json").write_text(NOISE.read_text() + "\n")


def read_results(name: str) -> dict[str, Any]:
    """What a file of results holds; nothing where there is none."""
    file = RESULTS / name
    return json.loads(file.read_text()) if file.exists() else {}


def add_results(name: str, found: dict[str, Any]) -> None:
    """Put what was found in its place among what the file holds: runs that are not on this machine stay in it."""
    if found:
        (RESULTS / name).write_text(json.dumps(read_results(name) | found, indent=1) + "\n")


def evaluations(folder: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics that hold an evaluation on held-out scenes."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if any("recall" in key or key.startswith("objects_") for key in row)]


def last_evaluation(folder: Path) -> dict[str, float]:
    last = evaluations(folder)[-1]
    return {name: last[name] for name in ("step", *RECALLS)}


# -- images --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """One object of one picture."""

    picture: tuple[int, int]  # prompt, seed
    zone: str
    end: int  # position of its sentence's last token
    right: bool
    shape: bool
    colour: bool
    objects: int
    tokens: int

    @property
    def after(self) -> bool:
        """Whether a stock encoder fails to read all of its sentence."""
        return self.zone != "e"


def load(name: str, system: str) -> list[Judged]:
    file = RESULTS / f"{name}-{system}.json"
    if not file.exists():
        return []
    found = []
    for number, row in enumerate(json.loads(file.read_text())["prompts"]):
        for seed, (right, shape, colour) in enumerate(zip(row["right"], row["shape"], row["colour"], strict=True)):
            for zone, end, *marks in zip(row["zones"], row["ends"], right, shape, colour, strict=True):
                is_right, has_shape, has_colour = (mark == "1" for mark in marks)
                picture, objects = (number, seed), len(right)
                found.append(Judged(picture, zone, end, is_right, has_shape, has_colour, objects, row["tokens"]))
    return found


def share(judged: Iterable[Judged], what: str = "right") -> float:
    values = [getattr(item, what) for item in judged]
    return sum(values) / len(values) if values else math.nan


def by_seed(judged: Sequence[Judged], what: str = "right") -> tuple[float, float]:
    """Mean over the noise seeds, and their standard deviation."""
    seeds = sorted({item.picture[1] for item in judged})
    values = [share([item for item in judged if item.picture[1] == seed], what) for seed in seeds]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def percent(value: float, spread: float = math.nan) -> str:
    if math.isnan(value):
        return "-"
    return f"{100 * value:.1f}" + ("" if math.isnan(spread) else f" ± {100 * spread:.1f}")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def sides(judged: Sequence[Judged]) -> list[list[Judged]]:
    """Objects whose sentence ends before token 77, and after it."""
    return [[item for item in judged if item.after is after] for after in (False, True)]


def systems_table() -> str:
    """Nine objects a prompt, before and after token 77; short prompts."""
    rows = []
    for system, label in SYSTEMS.items():
        judged, short = (load(name, system) for name in ("nine", "short"))
        if judged:
            parts = [*sides(judged), short]
            rows.append([label, *(percent(*by_seed(part)) if part else "-" for part in parts)])
    return table(["system", "right, before 77", "right, after 77", "short prompts"], rows)


def colours_table() -> str:
    """What is wrong where an object is wrong: its colour or its shape."""
    rows = []
    for system, label in SYSTEMS.items():
        parts = sides(load("nine", system))
        if any(parts):
            rows.append([label, *(percent(share(part, what)) for part in parts for what in ("colour", "shape"))])
    return table(["system", "colour before", "shape before", "colour after", "shape after"], rows)


def differences_table() -> str:
    """Paired differences between systems, with 95 % intervals by bootstrap over prompts."""
    rows = []
    for one, other in DIFFERENCES:
        cells = differences(one, other, (0,))
        if set(cells) != {"-"}:
            rows.append([f"{SYSTEMS[one]} - {SYSTEMS[other]}", *cells])
    return table(["difference, points", *SIDES], rows)


def differences(one: str, other: str, seeds: Sequence[int]) -> list[str]:
    """One cell for each of `SIDES`, "-" where one of the two was not measured."""
    pairs = [(count(one, seeds), count(other, seeds)) for count in COUNTS]
    return [interval(*pair) if all(map(len, pair)) else "-" for pair in pairs]


def of_seed(system: str, seed: int) -> str:
    """The system with the adapter (and the encoder, if it has its own) of another training seed."""
    return f"{system}_seed{seed}" if seed else system


def trained_seeds(system: str) -> list[int]:
    """Those of which every set is drawn that the tables of seeds need."""
    sets = ("nine", "short", "references")
    return [
        seed
        for seed in TRAINING_SEEDS
        if all((RESULTS / f"{name}-{of_seed(system, seed)}.json").exists() for name in sets)
    ]


def seeds_table() -> str:
    """The rows that decide: mean over the training seeds, and their standard deviation."""
    rows = []
    for system in SEEDED:
        seeds = trained_seeds(system)
        if len(seeds) < 2:
            continue
        measured: dict[str, list[float]] = {"before": [], "after": [], "references": [], "pointing": [], "short": []}
        for name in (of_seed(system, seed) for seed in seeds):
            nine = load("nine", name)
            measured["before"].append(share([item for item in nine if not item.after]))
            measured["after"].append(share([item for item in nine if item.after]))
            far = [item for item in load_references("references", name) if item["distance"] >= 77]
            measured["references"].append(mean([item["right"] for item in far]))
            measured["pointing"].append(mean([item["right"] for item in far if points_to_another(item)]))
            measured["short"].append(share(load("short", name)))
        cells = [
            percent(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else math.nan)
            for values in measured.values()
        ]
        rows.append([SYSTEMS[system], str(len(seeds)), *cells])
    header = ["system", "training seeds", *(f"right, {side}" for side in SIDES[:2]), SIDES[2]]
    return table([*header, "of these, sentences that point", "short"], rows) if rows else NOT_YET


def seeds_references_table() -> str:
    """References of the rows that decide from 77 tokens on, each training seed by itself, by what they refer to."""
    rows: list[list[str]] = []
    kinds = dict(itertools.islice(POINTING.items(), 3)) | {"all sentences that point": points_to_another}
    counts = [0] * len(kinds)
    for system in SEEDED:
        seeds = trained_seeds(system)
        for seed in seeds if len(seeds) > 1 else []:
            far = [item for item in load_references("references", of_seed(system, seed)) if item["distance"] >= 77]
            parts = [[item["right"] for item in far if test(item)] for test in kinds.values()]
            counts = [len(part) for part in parts]
            rows.append([SYSTEMS[system], str(seed), *(percent(mean(part)) for part in parts)])
    header = [f"{kind} ({count})" for kind, count in zip(kinds, counts, strict=True)]
    return table(["system", "training seed", *header], rows) if rows else NOT_YET


def seeds_differences_table() -> str:
    """Paired differences of the rows that decide, over the training seeds that both have.

    In brackets the 95 % interval over prompts for these trainings, then half of that over training seeds and prompts.
    """
    rows = []
    for number, one in enumerate(SEEDED):
        for other in SEEDED[number + 1 :]:
            seeds = [seed for seed in trained_seeds(one) if seed in trained_seeds(other)]
            if len(seeds) > 1:
                cells = [over_seeds(one, other, seeds, count) for count in COUNTS]
                rows.append([f"{SYSTEMS[one]} - {SYSTEMS[other]}", str(len(seeds)), *cells])
    return table(["difference, points", "training seeds", *SIDES], rows) if rows else NOT_YET


def by_prompt(system: str, after: bool, seeds: Sequence[int] = (0,)) -> np.ndarray:
    """(prompts, 2): objects right and objects, over all noises and training seeds, of one side of token 77."""
    counts: dict[int, list[int]] = {}
    for item in (item for seed in seeds for item in load("nine", of_seed(system, seed))):
        row = counts.setdefault(item.picture[0], [0, 0])
        if item.after == after:
            row[0] += item.right
            row[1] += 1
    return np.array([counts[number] for number in sorted(counts)])


def far_by_prompt(system: str, seeds: Sequence[int]) -> np.ndarray:
    """(prompts, 2): references over 77 tokens and more that are right, and how many there are."""
    counts: dict[int, list[float]] = {}
    for item in (item for seed in seeds for item in load_references("references", of_seed(system, seed))):
        row = counts.setdefault(item["prompt"], [0, 0])
        if item["distance"] >= 77:
            row[0] += item["right"]
            row[1] += 1
    return np.array([counts[number] for number in sorted(counts)])


COUNTS: tuple[Callable[[str, Sequence[int]], np.ndarray], ...] = (  # of each of `SIDES`
    lambda system, seeds: by_prompt(system, False, seeds),
    lambda system, seeds: by_prompt(system, True, seeds),
    far_by_prompt,
)


def points(counts: np.ndarray) -> float:
    """What is right, in %, of (prompts, 2): right, and all."""
    right, count = counts.sum(0)
    return 100 * float(right / count)


def resampled(one: np.ndarray, other: np.ndarray, draws: int = 2000) -> np.ndarray:
    """(draws,): the difference of two systems over prompts that are drawn anew, in points."""
    generator = np.random.default_rng(0)
    rows = [generator.integers(0, len(one), len(one)) for _ in range(draws)]
    return np.array([points(one[chosen]) - points(other[chosen]) for chosen in rows])


def interval(one: np.ndarray, other: np.ndarray, draws: np.ndarray | None = None) -> str:
    """The difference of two shares in points, and the 2.5th and 97.5th percentile over resampled prompts (`draws`)."""
    low, high = np.percentile(resampled(one, other) if draws is None else draws, [2.5, 97.5])
    return f"{points(one) - points(other):+.1f} ({low:+.1f} to {high:+.1f})"


STUDENT = {2: 12.706, 3: 4.303}  # quantile at 97.5 % for so many training seeds, with one degree of freedom less


def over_seeds(one: str, other: str, seeds: Sequence[int], count: Callable[[str, Sequence[int]], np.ndarray]) -> str:
    """A mean difference over training seeds with two intervals of 95 %, in points.

    In brackets that over prompts, as `interval`; behind ± half of that over training seeds and prompts. Both
    systems of a seed begin with the same adapter, so a seed gives one difference. The root of the sum of two
    squares: t s / sqrt(S), with the standard deviation s of the differences of S seeds and Student's quantile t,
    and half of the interval over prompts (1.96 standard deviations). Example: differences of 0.30, 0.21 and 0.47
    have s = 0.13, 4.303 * 0.13 / sqrt(3) = 0.33; with 0.25 of prompts 0.41.
    """
    pair = count(one, seeds), count(other, seeds)
    draws = resampled(*pair)
    found = [points(count(one, (seed,))) - points(count(other, (seed,))) for seed in seeds]
    half = math.hypot(STUDENT[len(seeds)] * statistics.stdev(found) / math.sqrt(len(seeds)), 1.96 * float(draws.std()))
    return f"{interval(*pair, draws)}; ± {half:.1f}"


def counts_table() -> str:
    """Objects right by number of objects; nine come from the main set."""
    found = {s: [*load("by_count", s), *load("nine", s)] for s in SYSTEMS}
    rows = [
        [label, *(percent(share([j for j in found[s] if j.objects == n])) for n in range(1, 10))]
        for s, label in SYSTEMS.items()
        if found[s]
    ]
    return table(["objects", *map(str, range(1, 10))], rows)


def lengths_table() -> str:
    """All pictures by the length of their prompt; how many prompts there are stands behind it."""
    bounds = [(0, 77), (78, 110), (111, 140), (141, 160), (161, 248)]
    found = {s: [*load("by_count", s), *load("nine", s)] for s in SYSTEMS}
    rows = [
        [label, *(percent(share([j for j in found[s] if low <= j.tokens <= high])) for low, high in bounds)]
        for s, label in SYSTEMS.items()
        if found[s]
    ]
    sets = [load(name, "stock") for name in ("by_count", "nine")]
    tokens = [number for judged in sets for number in {item.picture[0]: item.tokens for item in judged}.values()]
    header = [
        f"{f'{low} to' if low else 'up to'} {high} ({sum(low <= number <= high for number in tokens)})"
        for low, high in bounds
    ]
    return table(["tokens of the prompt (how many)", *header], rows)


def held_out_table() -> str:
    """Nine objects in templates and words that only the base has met."""
    rows = []
    for system, label in SYSTEMS.items():
        parts = [part for name in ("heldout_templates", "heldout_words") for part in sides(load(name, system))]
        if any(parts):
            rows.append([label, *(percent(share(part)) for part in parts)])
    return table(["system", "templates, before", "after", "words, before", "after"], rows)


def references_table(name: str = "references") -> str:
    """References followed, by distance and by kind; how good guessing is stands below the systems."""
    found = {system: load_references(name, system) for system in SYSTEMS}
    found = {system: rows for system, rows in found.items() if rows}
    if not found:
        return NOT_YET
    columns: dict[str, tuple[str, str]] = {bucket: ("bucket", bucket) for bucket in scenes.DISTANCES} | {
        kind: ("kind", kind) for kind in scenes.KINDS
    }
    everything = next(iter(found.values()))
    lines = [(SYSTEMS[system], rows, "right") for system, rows in found.items()]
    lines += [(label, everything, field) for field, label in GUESSES.items() if field in everything[0]]
    rows = []
    for label, references, field in lines:
        parts = [[r for r in references if r[key] == value] for key, value in columns.values()]
        rows.append([label, *(percent(mean([r[field] for r in part])) for part in parts)])
    numbers = [sum(r[key] == value for r in everything) for key, value in columns.values()]
    header = [f"{column} ({number})" for column, number in zip(columns, numbers, strict=True)]
    return table(["references right, % (how many)", *header], rows)


def points_to_another(row: dict[str, Any]) -> bool:
    """Whether a reference points to another sentence; the other kinds are rules."""
    return row["kind"] in ("same", "again")


POINTING = {
    "a rule (`default`, `remainder`)": lambda row: not points_to_another(row),
    "a sentence of the first object": lambda row: points_to_another(row) and row["first"],
    "a sentence of another object": lambda row: points_to_another(row) and not row["first"],
    "named by its place": lambda row: row.get("pointer") == "place",
    "by its order": lambda row: row.get("pointer") == "order",
    "by its shape": lambda row: row.get("pointer") == "name",
}


def pointing_table() -> str:
    """References followed from 77 tokens on, by what they refer to: is it more than taking the first object?"""
    found: dict[str, list[list[dict[str, Any]]]] = {}
    for system, label in SYSTEMS.items():
        sets = [load_references(name, system) for name in ("references", "references_heldout")]
        if all(sets):
            found[label] = [[row for row in rows if row["distance"] >= 77] for rows in sets]
    if not found:
        return NOT_YET
    header, columns = ["right from 77 tokens on, %"], []
    for number, (forms, rows) in enumerate(zip(("train", "held-out"), next(iter(found.values())), strict=True)):
        for what, test in POINTING.items():
            if count := sum(map(bool, map(test, rows))):
                header.append(f"{what}, {forms} forms ({count})")
                columns.append((number, test))
    lines = []
    for label, sets in found.items():
        parts = [[row["right"] for row in sets[number] if test(row)] for number, test in columns]
        lines.append([label, *(percent(mean(part)) for part in parts)])
    return table(header, lines)


def wordings_table() -> str:
    """Which object the hidden states of a sentence that points to another take it for, see `evaluate.py wordings`."""
    tests = {
        "by place": lambda row: row["pointer"] == "place",
        "by order": lambda row: row["pointer"] == "order",
        "by name": lambda row: row["pointer"] == "name",
        "under 77 tokens": lambda row: row["distance"] < 77,
        "from 77 on": lambda row: row["distance"] >= 77,
        "all": lambda row: True,
    }
    files = {system: RESULTS / f"wordings-{system}.json" for system in SYSTEMS}
    found = {system: json.loads(file.read_text())["rows"] for system, file in files.items() if file.exists()}
    if not found:
        return NOT_YET
    some = next(iter(found.values()))
    lines = [(SYSTEMS[system], rows, "right") for system, rows in found.items()]
    header = [f"{name} ({sum(map(test, some))})" for name, test in tests.items()]
    rows = [
        [label, *(percent(mean([row[field] for row in own if test(row)])) for test in tests.values())]
        for label, own, field in [*lines, *((GUESSES[name], some, name) for name in ("named", "first"))]
    ]
    return table(["the object that is meant, %", *header], rows)


def load_references(name: str, system: str) -> list[dict[str, Any]]:
    """Every reference of a set with its prompt and bucket, and the share of its pictures that are right."""
    file = RESULTS / f"{name}-{system}.json"
    if not file.exists():
        return []
    return [
        item
        | {
            "prompt": number,
            "bucket": scenes.distance_bucket(item["distance"]),
            "right": mean([int(mark) for mark in item["right"]]),
        }
        for number, row in enumerate(json.loads(file.read_text())["prompts"])
        for item in row["references"]
    ]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def in_plot(system: str) -> str:
    return SYSTEMS[system].replace("`", "")


def plot_zones(path: Path) -> None:
    shown = [system for system in SYSTEMS if load("nine", system)]
    if not shown:
        return
    figure, axis = pyplot.subplots(figsize=(11, 4), layout="constrained")
    for offset, after, colour in ((-0.2, False, "#8fb8de"), (0.2, True, "#1d6b45")):
        stats = [by_seed([j for j in load("nine", s) if j.after is after]) for s in shown]
        places = [index + offset for index in range(len(shown))]
        label = "sentence after token 77" if after else "sentence before token 77"
        axis.bar(places, [100 * m for m, _ in stats], 0.4, yerr=[100 * s for _, s in stats], color=colour, label=label)
    axis.set_xticks(range(len(shown)), [textwrap.fill(in_plot(s), 16) for s in shown])
    axis.tick_params(axis="x", labelsize=7)
    axis.set(ylabel="objects right, %", ylim=(0, 119), title="Nine objects a prompt: shape, colour and place right")
    axis.legend(loc="upper center", ncols=2)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def plot_positions(path: Path) -> None:
    """The share right over where an object's sentence ends: what the reader of a long prompt feels."""
    width = 15
    figure, axis = pyplot.subplots(figsize=(9, 4.2), layout="constrained")
    drawn = False
    for system in SYSTEMS:
        bins = defaultdict(list)
        for item in load("nine", system):
            bins[item.end // width].append(item.right)
        points = [(width * (b + 0.5), 100 * sum(v) / len(v)) for b, v in sorted(bins.items()) if len(v) >= 30]
        if points:
            style = "--" if system.endswith("_adapter") else "-"
            axis.plot(
                *zip(*points, strict=True),
                style,
                marker="o",
                markersize=3,
                color=COLOURS[system],
                label=in_plot(system),
            )
            drawn = True
    axis.axvline(77, color="black", linewidth=0.8, linestyle=":")
    axis.set(xlabel="token at which an object's sentence ends", ylabel="objects right, %", ylim=(0, 100))
    if drawn:
        figure.legend(fontsize=7, loc="outside lower center", ncols=2)
        figure.savefig(path, dpi=130)
    pyplot.close(figure)


def plot_references(path: Path) -> None:
    """References followed, over how many tokens lie between: which of them a window of 77 can still see."""
    found = {system: load_references("references", system) for system in SYSTEMS}
    found = {system: rows for system, rows in found.items() if rows}
    if not found:
        return
    figure, axis = pyplot.subplots(figsize=(9, 4.4), layout="constrained")
    everything, width = next(iter(found.values())), 0.8 / len(found)
    buckets = [[row["bucket"] == bucket for row in everything] for bucket in scenes.DISTANCES]
    for index, (system, rows) in enumerate(found.items()):
        heights = [100 * mean([row["right"] for row in itertools.compress(rows, bucket)]) for bucket in buckets]
        places = [number + (index - (len(found) - 1) / 2) * width for number in range(len(buckets))]
        axis.bar(places, heights, width, color=COLOURS[system], label=in_plot(system))
    for number, bucket in enumerate(buckets):
        for field, style in (("named", ":"), ("first", "--")):
            guess = 100 * mean([row[field] for row in itertools.compress(everything, bucket)])
            label = "_" if number else GUESSES[field]  # one line in the legend
            axis.hlines(guess, number - 0.45, number + 0.45, "black", linewidth=0.8, linestyle=style, label=label)
    axis.set_xticks(range(len(buckets)), scenes.DISTANCES)
    axis.set(xlabel="tokens between a reference and what it refers to", ylabel="right, %", ylim=(0, 100))
    figure.legend(fontsize=7, loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


# -- FIX-CLIP as a low-rank change ---------------------------------------------------------------------------


def collect_deltas() -> dict[str, dict[str, float]]:
    """{rank or "full": recalls at the last step, and bytes in half precision of what whoever has the base needs}."""
    files = {"full": (OUT / "encoder", OUT / "encoder_diffusers" / "text_encoder" / "model.safetensors")}
    for folder in sorted(OUT.glob("delta_rank*")):
        rank = folder.name.removeprefix("delta_rank")
        files[rank] = (OUT / f"encoder_rank{rank}", folder / "text_delta.safetensors")
    return {
        name: last_evaluation(run) | {"bytes": trained_bytes(file)}
        for name, (run, file) in files.items()
        if file.exists() and (run / "metrics.jsonl").exists()
    }


def trained_bytes(file: Path) -> int:
    """Bytes of the tensors in a file, without the base's own for short prompts."""
    with safe_open(file, "pt") as tensors:
        names = [name for name in tensors.keys() if not name.startswith("short_text_model.")]  # noqa: SIM118 -- no mapping
        return sum(tensors.get_tensor(name).nbytes for name in names)


def deltas_table() -> str:
    """The whole tower trained, and changes of a low rank: file, retrieval and pictures without an adapter."""
    found: dict[str, dict[str, float]] = read_results("deltas.json")
    rows = []
    for name, values in sorted(found.items(), key=lambda item: (not item[0].isdigit(), item[0])):
        system = f"trained_rank{name}" if name.isdigit() else "trained"
        nine = sides(load("nine", system))
        if any(nine):
            label = f"a change of rank {name}" if name.isdigit() else "the whole tower"
            cells = [f"{values['bytes'] / 1e6:.1f} MB", *(f"{values[recall]:.3f}" for recall in RECALLS)]
            rows.append([label, *cells, *(percent(*by_seed(part)) for part in nine)])
    if len(rows) < 2:
        return NOT_YET
    header = ["trained", "file", "long i2t", "long t2i", "short i2t", "short t2i"]
    return table([*header, "right, before 77", "right, after 77"], rows)


# -- how deep an adapter is ----------------------------------------------------------------------------------

LAST_ROWS = 5  # of the metrics, 100 steps


def collect_depths() -> dict[str, dict[str, float]]:
    """{READING-LAYERS: what an adapter of so many layers leaves unexplained at the end of a short start}."""
    found = {}
    for folder in sorted((OUT / "depths").glob("*")):
        if (folder / "adapter" / "adapter.safetensors").exists():
            rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][-LAST_ROWS:]
            losses = ("loss_windows", "loss_plain")
            found[folder.name] = {name: statistics.mean(row[name] for row in rows) for name in losses}
    return found


def depths_table() -> str:
    found: dict[str, dict[str, float]] = read_results("depths.json")
    if not found:
        return NOT_YET
    rows = []
    for reading in dict.fromkeys(name.rsplit("-", 1)[0] for name in found):
        own = sorted((int(n.rsplit("-", 1)[1]), v) for n, v in found.items() if n.rsplit("-", 1)[0] == reading)
        rows += [[DEPTHS[reading], str(n), *(f"{value:.3f}" for value in v.values())] for n, v in own]
    return table(["adapter on", "layers", "of all states", "of those that refer"], rows)


# -- retrieval -----------------------------------------------------------------------------------------------


def retrieval_table() -> str:
    results = read_results("retrieval.json")
    if not results:
        return NOT_YET
    names = {"base": "base, cut at 77", "stretched": "stretched only", "trained": "FIX-CLIP"}
    kinds = ("long", "short", "long_heldout_templates", "long_heldout_words")
    rows = []
    for name, found in results.items():
        cells = [f"{found[k][f'{d}_recall_at_1']:.3f}" for k in kinds for d in ("image_to_text", "text_to_image")]
        pairs = [f"{one} / {other}" for one, other in zip(cells[::2], cells[1::2], strict=True)]
        rows.append([names[name], *pairs])
    return table(["model", "long", "short", "long, new templates", "long, new words"], rows)


def ablation_runs() -> dict[tuple[str, str], dict[int, dict[str, float]]]:
    """(method, learning rate) -> seed -> last evaluation."""
    found: dict[tuple[str, str], dict[int, dict[str, float]]] = defaultdict(dict)
    for name, values in read_results("ablations.json").items():
        method, rest = name.split("-lr", 1)
        rate, seed = rest.rsplit("-seed", 1)  # a rate such as 1e-05 has a hyphen of its own
        found[method, rate][int(seed)] = values
    return found


def mean_spread(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def ablations_table() -> str:
    runs = ablation_runs()
    rows = []
    for method, label in METHODS.items():
        own = {rate: seeds for (m, rate), seeds in runs.items() if m == method}
        if not own:
            continue
        rate = max(own, key=lambda r: (len(own[r]), score(own[r][min(own[r])])))
        seeds = own[rate]
        cells = [mean_spread([values[name] for values in seeds.values()]) for name in RECALLS]
        rows.append([label, rate, str(len(seeds)), *cells])
    if not rows:
        return NOT_YET
    header = ["method", "lr", "seeds", "long i2t", "long t2i", "short i2t", "short t2i"]
    return table(header, rows)


def score(values: dict[str, float]) -> float:
    """What learning rates were tuned for, see `run.score`."""
    return statistics.mean(values[name] for name in RECALLS)


def tuning_table() -> str:
    runs = ablation_runs()
    rates = sorted({rate for method, rate in runs if method in ("fixclip", "longclip", "finetune")}, key=float)
    rows = []
    for method in ("fixclip", "longclip", "finetune"):
        cells = [f"{score(runs[method, r][0]):.3f}" if 0 in runs.get((method, r), {}) else "-" for r in rates]
        if any(cell != "-" for cell in cells):
            rows.append([METHODS[method], *cells])
    return table(["learning rate", *rates], rows) if rows else NOT_YET


def rivals_table() -> str:
    found = read_results("rivals.json")
    if not found:
        return NOT_YET
    rivals.plot_curves(found, IMAGES / "results_rivals.png")
    return table(*rivals.methods_rows(found)) + "\n\n![R@1 over the steps](images/results_rivals.png)"


def choices_table() -> str:
    found = read_results("rivals.json")
    return table(*rivals.choices_rows(found)) if found else NOT_YET


def verdicts_table() -> str:
    found = read_results("rivals.json")
    return table(*rivals.verdict_rows(found)) if found.get("differences") else NOT_YET


def noise_table() -> str:
    """pipelines/captions/noise.py: what became of the captions, and the recalls after a training on them."""
    results = read_results("caption_noise.json")
    if not results:
        return NOT_YET
    rows = []
    for name, found in results.items():
        rejected = 1 - found["answers"].get("accepted", 0) / sum(found["answers"].values())
        recalls = found["seeds"].values()
        cells = [mean_spread([values[recall] for values in recalls]) for recall in RECALLS]
        rows.append([CAPTIONS[name], f"{rejected:.1%}", str(found["written"]), *cells])
    header = ["captions", "answers rejected", "scenes", "long i2t", "long t2i", "short i2t", "short t2i"]
    return table(header, rows)


def training_table() -> str:
    results = read_results("training.json")
    if not results:
        return NOT_YET
    names = {
        "clip": "CLIP",
        "vae": "VAE",
        "robust": "VAE, with noise on its latents",
        "unet": "UNet",
        "encoder": "FIX-CLIP",
    }
    rows = []
    for name, found in results.items():
        last = {key: value for key, value in found[-1].items() if key != "step" and not key.endswith(("_5", "_10"))}
        shown = ", ".join(f"{measure(key)} {value:.3f}" for key, value in last.items())
        rows.append([names[name], str(found[-1]["step"]), shown])
    return table(["part", "steps", "on held-out scenes"], rows)


def collect_times() -> dict[str, Any]:
    """Minutes of each stage that is done, over all its starts, and of the groups in which all are: of the wall clock,
    two stages at a time. Of a training also its steps at their median speed, which no pause is in."""
    spans: dict[str, list[list[float]]] = {}
    found: dict[str, Any] = {"stages": {}, "groups": {}}
    for stage in run.stages():
        file = run.log_of(stage).with_suffix(".times.json")
        if file.exists() and (run.ROOT / stage.result).exists():
            content = json.loads(file.read_text())
            spans[stage.name] = content["times"]
            minutes = sum(end - start for start, end in content["times"]) / 60
            row = {"minutes": round(minutes, 1), "processes": content["processes"]}
            found["stages"][stage.name] = row | steady_minutes(run.ROOT / run.OUT / stage.name)
    for group in TIMED:
        names = [stage.name for stage in run.GROUPS[group]()]
        if set(names) <= spans.keys():
            found["groups"][group] = round(covered([span for name in names for span in spans[name]]) / 60, 1)
    return found if spans else {}


def steady_minutes(folder: Path) -> dict[str, float]:
    """{"steady": minutes} that a training's steps take at the median speed of its log, {} of what is no training."""
    if not (folder / "metrics.jsonl").exists():
        return {}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    speed = statistics.median(row["samples_per_second"] for row in rows if "samples_per_second" in row)
    section = yaml.safe_load((folder / "recipe.yaml").read_text())["train"]
    return {"steady": round(section["steps"] * section["batch_size"] / speed / 60, 1)}


def covered(spans: Iterable[list[float]]) -> float:
    """Seconds in which at least one of the [start, end] lasted."""
    total, until = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def times_table() -> str:
    found = read_results("times.json")
    names = [stage.name for stage in run.chain() if stage.name in found.get("stages", {})]
    if not names:
        return NOT_YET
    rows = []
    for name in names:
        row = found["stages"][name]
        steady = f"{row['steady']:.0f}" if "steady" in row else "-"
        rows.append([f"`{name}`", f"{row['minutes']:.0f}", steady, str(row["processes"])])
    groups = [[f"all of `{g}`, two processes at a time", f"{m:.0f}", "-", "-"] for g, m in found["groups"].items()]
    return table(["stage", "minutes", "its steps at their median speed", "processes"], [*rows, *groups])


def measure(key: str) -> str:
    """A name of the metrics file in words."""
    if key.startswith("objects_right_at_"):
        return f"objects right with noise of {key.rsplit('_', 1)[1]} stds"
    return MEASURES.get(key, key.replace("_recall_at_1", " R@1").replace("_", " "))


# -- the page ------------------------------------------------------------------------------------------------


def page(text: str, parts: dict[str, str]) -> str:
    """Put the tables between their markers, `<!-- NAME -->` and `<!-- /NAME -->`; prose stays as it is.

    Raises:
        ValueError: a marker is missing.
    """
    for name, content in parts.items():
        start, stop = f"<!-- {name} -->", f"<!-- /{name} -->"
        if start not in text or stop not in text:
            raise ValueError(f"{PAGE}: it must have the markers {start} and {stop}")
        head, rest = text.split(start, 1)
        text = f"{head}{start}\n{content}\n{stop}{rest.split(stop, 1)[1]}"
    return text


TABLES = {
    "training": training_table,
    "systems": systems_table,
    "differences": differences_table,
    "seeds": seeds_table,
    "seeds references": seeds_references_table,
    "seeds differences": seeds_differences_table,
    "times": times_table,
    "deltas": deltas_table,
    "depths": depths_table,
    "colours": colours_table,
    "counts": counts_table,
    "lengths": lengths_table,
    "held-out": held_out_table,
    "references": references_table,
    "held-out references": lambda: references_table("references_heldout"),
    "pointing": pointing_table,
    "wordings": wordings_table,
    "retrieval": retrieval_table,
    "ablations": ablations_table,
    "tuning": tuning_table,
    "rivals": rivals_table,
    "rival choices": choices_table,
    "rival verdicts": verdicts_table,
    "caption noise": noise_table,
}


def main(
    gather: Annotated[bool, typer.Option("--collect", help="First copy new JSON of outputs/scenes here.")] = False,
) -> None:
    """Write the tables and plots of docs/results.md."""
    if gather:
        collect()
    IMAGES.mkdir(parents=True, exist_ok=True)
    plot_zones(IMAGES / "results_zones.png")
    plot_positions(IMAGES / "results_positions.png")
    plot_references(IMAGES / "results_references.png")
    parts: dict[str, Any] = {name: make() for name, make in TABLES.items()}
    PAGE.write_text(page(PAGE.read_text(), parts))
    typer.echo(f"{PAGE}, {IMAGES}/results_*.png")


if __name__ == "__main__":
    typer.run(main)
