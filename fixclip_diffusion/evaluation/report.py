"""The report of an evaluation: Markdown for a terminal and report.md, one HTML page, and a sheet of pictures."""

import base64
import html
import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from PIL import Image

from fixclip_core import scenes
from fixclip_core.files import write_atomically
from fixclip_diffusion.evaluation.clip_score import ClipScore
from fixclip_diffusion.evaluation.generate import SYSTEM_KEYS, Picture
from fixclip_diffusion.evaluation.judges import as_tensor
from fixclip_diffusion.evaluation.prompts import WHOLE, ZONES, Prompt

MOST_SHOWN = 60  # prompts whose pictures the page shows, so that it stays one file that opens
SIDE = 288  # largest side of a picture on the page, in pixels
ZONE_TITLES = {
    "before": "before token 77",
    "across": "across it",
    "after": "after, up to 248",
    "past": "past 248",
    WHOLE: "whole prompt",
}
GROUP_TITLES = {
    "zone": "Where the question's sentence lies",
    "window": "Window of 75 tokens that the sentence ends in",
    "position": "Token at which the sentence ends",
    "length": "Length of the prompt in tokens",
    "question": "Kind of question",
    "prompt": "Kind of prompt",
}
COLOURS = ("#4464ad", "#d1662f", "#3d8b5f", "#a2437d", "#7a6a4f", "#2b8ca3", "#9a8b1d", "#6d5bb0")


def percent(value: Mapping[str, Any] | None) -> str:
    """A mean with its standard error in percent, e.g. "63.2 ± 1.4"; a single value has none: "63.2"."""
    return _with_error(value, 100, 1)


def _with_error(value: Mapping[str, Any] | None, factor: float, digits: int) -> str:
    if value is None:
        return "–"
    mean, error = value["mean"], value["standard_error"]
    shown = f"{factor * mean:.{digits}f}"
    return shown if error is None else f"{shown} ± {factor * error:.{digits}f}"


# -- Markdown ------------------------------------------------------------------------------------------------


def markdown(report: Mapping[str, Any]) -> str:
    """The report's tables: right answers in percent ± standard error over prompts, for each judge."""
    settings = report["settings"]
    benchmark = settings["benchmark"]
    number = settings["drawing"]["num_seeds"]
    parts = [f"{len(report['prompts'])} prompts of {benchmark['name']}, {number} picture(s) each"]
    if benchmark["licence"]:
        parts[0] += f" (licence of the benchmark: {benchmark['licence']})"
    for judge, found in report["judges"].items():
        parts.append(
            f"## Judged by {judge}\n\nQuestions answered as they should be, in %, ± standard error over prompts."
        )
        parts.append(_scores_table(found["systems"]))
        parts += _references(found["systems"], report.get("guesses", {}))
        parts += _differences(found) + _twins(found) + _official(found)
        if found["unanswered"]:
            parts.append(_unanswered(found))
    if report["cosines"]:
        parts.append(f"## {cosines_title(report)}\n\n{_cosines_table(report['cosines'])}")
    if not report["judges"] and not report["cosines"]:
        parts.append("nothing was scored: choose a --judge or a --scorer, or prompts of the scenes")
    parts.append(f"## How it was made\n\nDrawing: {drawing_line(settings)}.")
    parts.append(table(*system_rows(settings)))
    return "\n\n".join(parts)


def system_rows(settings: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and a row for each system: what it is made of; parts that none has are left out."""
    keys = [key for key in SYSTEM_KEYS if any(system.get(key) for system in settings["systems"])]
    rows = [[system["name"], *(system.get(key) or "–" for key in keys)] for system in settings["systems"]]
    return ["system", *keys], rows


def drawing_line(settings: Mapping[str, Any]) -> str:
    """Such as "base X; 30 steps, guidance 7.5, seeds from 0"; nothing is said of pictures that were made elsewhere."""
    drawing = settings["drawing"]
    if all(system.get("pictures") for system in settings["systems"]):
        return "none, the pictures were made elsewhere"
    base = f"base {settings['base']}; " if settings.get("base") else ""
    return f"{base}{drawing['steps']} steps, guidance {drawing['guidance_scale']:g}, seeds from {drawing['seed']}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up in a terminal too."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        return "| " + " | ".join([row[0].ljust(len(first)), *others]) + " |"

    ruler = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    return "\n".join([line(header), line(ruler), *map(line, rows)])


def _present(systems: Mapping[str, Any], group: str) -> list[str]:
    return list(dict.fromkeys(key for values in systems.values() for key in values[group]))


def _scores_table(systems: Mapping[str, Any]) -> str:
    zones = [zone for zone in (*ZONES, WHOLE) if zone in _present(systems, "zone")]
    rows = [
        [name, percent(v["all"]), *(percent(v["zone"].get(z)) for z in zones), f"{v['unanswered']} of {v['asked']}"]
        for name, v in systems.items()
    ]
    return table(["system", "all", *(ZONE_TITLES[zone] for zone in zones), "unanswered"], rows)


def _references(systems: Mapping[str, Any], guesses: Mapping[str, Mapping[str, float]]) -> list[str]:
    """What is right where another sentence says it, by the distance to that sentence, above what guessing reaches."""
    if not guesses:
        return []
    rows = [[name, *(percent(values["question"].get(key)) for key in guesses)] for name, values in systems.items()]
    luck = {
        "guess: any value": "uniform",
        "guess: one that the prompt names": "named",
        "guess: the first that it names": "first",
    }
    rows += [[name, *(f"{100 * values[field]:.1f}" for values in guesses.values())] for name, field in luck.items()]
    intro = (
        "What another sentence of the prompt says of an object, by the distance in tokens between the two sentences."
    )
    return [intro, table(["system", *(key.removeprefix("reference ") for key in guesses)], rows)]


def interval(value: Mapping[str, Any]) -> str:
    low, high = value["interval"]
    return f"{100 * value['mean']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def pairs(differences: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """{"a − b": {zone: difference}}."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for difference in differences:
        found.setdefault(f"{difference['a']} − {difference['b']}", {})[difference["zone"]] = difference
    return found


def _differences(found: Mapping[str, Any]) -> list[str]:
    if not found["differences"]:
        return []
    zones = [zone for zone in ("all", *ZONES) if any(d["zone"] == zone for d in found["differences"])]
    rows = [
        [name, *(interval(values[zone]) if zone in values else "–" for zone in zones)]
        for name, values in pairs(found["differences"]).items()
    ]
    header = ["difference", *(ZONE_TITLES.get(zone, zone) for zone in zones)]
    return ["Paired differences in points, with their 95 % interval (bootstrap over prompts).", table(header, rows)]


def _twins(found: Mapping[str, Any]) -> list[str]:
    if not found["twins"]:
        return []
    rows = [
        [name, percent(v["long"]), percent(v["short"]), interval(v["difference"])] for name, v in found["twins"].items()
    ]
    return ["Long prompts against their short twins.", table(["system", "long", "short", "long − short"], rows)]


def _official(found: Mapping[str, Any]) -> list[str]:
    if "official" not in found:
        return []
    parts = ["As the benchmark's own scorer computes it, quirks included (docs/benchmarks.md lists them)."]
    names = list(dict.fromkeys(key for v in found["official"].values() for key in v if not isinstance(v[key], dict)))
    rows = []
    for system, values in found["official"].items():
        cells = [values.get(name) for name in names]
        rows.append([system, *(f"{c:.2f}" if isinstance(c, float) else _short(c) for c in cells)])
    return [*parts, table(["system", *names], rows)]


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)} pictures"
    return "–" if value is None else str(value)


def _unanswered(found: Mapping[str, Any]) -> str:
    reasons: dict[str, int] = {}
    for counts in found["problems"].values():
        for reason, number in counts.items():
            reasons[reason] = reasons.get(reason, 0) + number
    listed = "; ".join(f"{number} {reason}" for reason, number in sorted(reasons.items(), key=lambda i: -i[1]))
    return f"Without an answer, counted 0: {listed}. report.json lists each; the same command asks them again."


def cosines_title(report: Mapping[str, Any]) -> str:
    scorer = report["settings"].get("scorer") or {}
    return ClipScore.title if scorer.get("format") == ClipScore.format else "Cosines of picture and text"


def _cosines_table(cosines: Mapping[str, Any]) -> str:
    metrics = list(dict.fromkeys(name for values in cosines.values() for name in values))
    rows = []
    for name, values in cosines.items():
        cells = [values.get(metric) for metric in metrics]
        rows.append([name, *(_with_error(value, 1, 4) for value in cells)])
    return table(["system", *metrics], rows)


# -- HTML ----------------------------------------------------------------------------------------------------


def write_report(report: Mapping[str, Any], folder: Path) -> None:
    """report.md and report.html, a page that needs no other file."""
    write_atomically(folder / "report.md", (markdown(report) + "\n").encode())
    environment = Environment(
        loader=PackageLoader("fixclip_diffusion.evaluation", "templates"),
        autoescape=select_autoescape(),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        "percent": percent, "interval": interval, "bars": bars, "zone_titles": ZONE_TITLES,
        "group_titles": GROUP_TITLES, "colours": COLOURS, "present": _plotted, "pairs": pairs, "right_of": _right_of,
        "cosines_title": cosines_title, "drawing_line": drawing_line, "system_rows": system_rows,
    }  # fmt: skip
    shown = _shown(report, folder)
    zones = [zone for zone in (*ZONES, WHOLE) if any(zone in _zones(found) for found in report["judges"].values())]
    page = environment.get_template("report.html").render(report=report, shown=shown, zones=zones)
    write_atomically(folder / "report.html", page.encode())


def _zones(found: Mapping[str, Any]) -> list[str]:
    return _present(found["systems"], "zone")


def _shown(report: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """The prompts whose pictures the page shows, those first whose systems differ most, with their pictures as text."""

    def spread(row: Mapping[str, Any]) -> float:
        means = []
        for system in row["systems"].values():
            counted = [a["counted"] for judge in system["judges"].values() for own in judge for a in own]
            means.append(sum(counted) / len(counted) if counted else 0.0)
        return max(means) - min(means)

    rows = sorted(report["prompts"], key=spread, reverse=True)[:MOST_SHOWN]
    shown = []
    for row in rows:
        images = {name: _as_url(folder, system["pictures"][0]) for name, system in row["systems"].items()}
        shown.append({**row, "images": images})
    return shown


def _as_url(folder: Path, name: str | None) -> str | None:
    """A picture made small enough for the page; None where it is missing or damaged."""
    if name is None:
        return None
    path, _, tile = name.partition("#")
    try:
        image = Picture(folder / path, 0, int(tile) if tile else None).load()
    except OSError:
        return None
    if max(image.size) > SIDE:
        image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="webp", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _plotted(systems: Mapping[str, Any], group: str) -> list[str]:
    return [name for name in _present(systems, group) if group == "zone" or name != WHOLE]


def _right_of(picture: Sequence[Mapping[str, Any]]) -> str:
    """How many questions of a picture count, e.g. "12" or, with scores, "3.5"."""
    return f"{sum(answer['counted'] for answer in picture):.3g}"


def bars(systems: Mapping[str, Any], group: str) -> str:
    """A bar chart as SVG: a cluster for each class of the group, a bar for each system with its standard error."""
    classes = _plotted(systems, group)
    bar, gap, height, left, top = 16, 18, 150, 34, 8
    cluster = bar * len(systems) + gap
    width = left + cluster * len(classes) + gap
    parts = [
        f'<svg viewBox="0 0 {width} {height + 46}" style="width:{min(width, 1000)}px" role="img" '
        f'aria-label="{html.escape(GROUP_TITLES[group])}">'
    ]
    for step in (0, 25, 50, 75, 100):
        y = top + height - height * step / 100
        parts.append(f'<line class="grid" x1="{left}" x2="{width}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{left - 4}" y="{y + 4}" text-anchor="end">{step}</text>')
    for column, name in enumerate(classes):
        x = left + gap / 2 + column * cluster
        for number, (system, values) in enumerate(systems.items()):
            value = values[group].get(name)
            if value is not None:
                parts.append(
                    _bar(x + number * bar, bar, top, height, value, COLOURS[number % len(COLOURS)], system, name)
                )
        label = ZONE_TITLES.get(name, name) if group == "zone" else name
        middle = x + (cluster - gap) / 2
        for line, text in enumerate(_wrapped(label, max(6, cluster // 6))):
            y = top + height + 14 + 11 * line
            parts.append(f'<text class="tick" x="{middle}" y="{y}" text-anchor="middle">{html.escape(text)}</text>')
    return "".join([*parts, "</svg>"])


def _bar(
    x: float, width: int, top: int, height: int, value: Mapping[str, Any], colour: str, system: str, name: str
) -> str:
    mean, error = value["mean"], value["standard_error"] or 0
    y = top + height * (1 - mean)
    middle = x + width / 2 - 1
    low, high = (top + height * (1 - min(1.0, max(0.0, mean + sign * error))) for sign in (-1, 1))
    title = html.escape(f"{system}, {name}: {percent(value)} over {value['count']} prompts")
    return (
        f"<g><title>{title}</title>"
        f'<rect x="{x}" y="{y:.1f}" width="{width - 2}" height="{height * mean:.1f}" fill="{colour}"/>'
        f'<line class="error" x1="{middle}" x2="{middle}" y1="{low:.1f}" y2="{high:.1f}"/></g>'
    )


def _wrapped(text: str, width: int) -> list[str]:
    """At most three lines of about `width` letters."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width and len(lines) < 3:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


# -- a sheet -------------------------------------------------------------------------------------------------


def write_sheet(
    path: Path, pictures: Mapping[str, Sequence[Sequence[Picture]]], prompts: Sequence[Prompt], most: int = 16
) -> None:
    """The first picture of the first prompts, a prompt in each row and a system in each column."""
    images, labels = [], []
    for row, prompt in enumerate(prompts[:most]):
        for name, own in pictures.items():
            try:
                images.append(as_tensor(own[row][0].load()))
            except OSError:
                images.append(as_tensor(Image.new("RGB", (64, 64), "lightgrey")))
            labels.append(f"{name}\n{textwrap.shorten(prompt.text, 28, placeholder=' …')}")
    side = max(192, min(512, images[0].shape[-1]))
    sheet = scenes.sheet(images, labels, columns=len(pictures), side=side)
    write_atomically(path, lambda partial: sheet.save(partial, format="png"))
