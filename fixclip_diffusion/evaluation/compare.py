"""Where two runs differ: the same benchmark drawn or judged twice."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fixclip_diffusion.evaluation.generate import SYSTEM_KEYS
from fixclip_diffusion.evaluation.prompts import ZONES
from fixclip_diffusion.evaluation.report import ZONE_TITLES, interval, table
from fixclip_diffusion.evaluation.scores import compare

MOST_PROMPTS = 20
MOST_QUESTIONS = 5  # of one prompt


def compare_runs(a: Path, b: Path) -> str:
    """Markdown: for each system and judge of both runs the difference a - b with its interval, and the prompts that
    differ most with the questions that were answered otherwise, largest first.

    Where each run has a single system, these two are compared whatever their names; likewise a single judge.

    Raises:
        ValueError: no report there, no prompt, system or judge in common.
    """
    first, second = _load(a), _load(b)
    rows = _shared(first, second, a, b)
    parts = [f"{a} minus {b}: {len(rows)} prompts in common of {len(first['prompts'])} and {len(second['prompts'])}."]
    systems = _pairs("system", list(_names(first)), list(_names(second)), a, b)
    judges = _pairs("judge", list(first["judges"]), list(second["judges"]), a, b)
    parts += _settings(first["settings"], second["settings"], systems)
    for system in systems:
        for judge in judges:
            parts += _compare_pair(rows, system, judge)
    return "\n\n".join(parts)


Pair = tuple[str, str]
Row = Mapping[str, Any]


def _load(folder: Path) -> dict[str, Any]:
    file = folder / "report.json" if folder.is_dir() else folder
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        if "judges" not in report or "prompts" not in report:
            raise ValueError("it has no judges")
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{file}: no report of evaluate-images: {getattr(error, 'strerror', None) or error}") from None
    return report


def _names(report: Mapping[str, Any]) -> list[str]:
    return [system["name"] for system in report["settings"]["systems"]]


def _settings(first: Mapping[str, Any], second: Mapping[str, Any], systems: list["Pair"]) -> list[str]:
    """What was drawn or read otherwise in the two runs, and the systems that only one of them has."""
    lines = []
    for name in ("base", "drawing"):
        if first.get(name) != second.get(name):
            lines.append(f"- {name}: {first.get(name)} and {second.get(name)}")
    one, other = ({system["name"]: system for system in run["systems"]} for run in (first, second))
    for a, b in systems:
        keys = [key for key in SYSTEM_KEYS if one[a].get(key) != other[b].get(key)]
        lines += [f"- {key} of {a}: {one[a].get(key)} and {other[b].get(key)}" for key in keys]
    for names, paired, which in ((one, {a for a, _ in systems}, "first"), (other, {b for _, b in systems}, "second")):
        if left := [name for name in names if name not in paired]:
            lines.append(f"- only in the {which}, and not compared: {', '.join(left)}")
    return ["The runs differ in:\n\n" + "\n".join(lines)] if lines else []


def _shared(first: Mapping[str, Any], second: Mapping[str, Any], a: Path, b: Path) -> list[tuple[Row, Row]]:
    known = {row["id"]: row for row in second["prompts"]}
    rows = [(row, known[row["id"]]) for row in first["prompts"] if row["id"] in known]
    if different := [own["id"] for own, other in rows if own["prompt"] != other["prompt"]]:
        raise ValueError(f"{a} and {b}: not the same prompts, e.g. {different[0]!r} is another text")
    if not rows:
        raise ValueError(f"{a} and {b}: no prompt in common")
    return rows


def _pairs(what: str, first: list[str], second: list[str], a: Path, b: Path) -> list[Pair]:
    if len(first) == len(second) == 1:
        return [(first[0], second[0])]
    shared = [(name, name) for name in first if name in second]
    if not shared:
        if not first or not second:
            raise ValueError(f"{a if not first else b}: no {what} in it; --compare needs runs with a --judge")
        raise ValueError(
            f"{what}s {', '.join(first)} of {a} and {', '.join(second)} of {b}: none in common; "
            f"the same --{what} must have been given to both"
        )
    return shared


def _values(row: Row, system: str, judge: str, zone: str = "all") -> list[float]:
    """What each question of the prompt counts, over all pictures."""
    pictures = row["systems"][system]["judges"][judge]
    chosen = [n for n, q in enumerate(row["questions"]) if zone in ("all", q["zone"])]
    return [picture[n]["counted"] for picture in pictures for n in chosen]


def _compare_pair(rows: list[tuple[Row, Row]], system: Pair, judge: Pair) -> list[str]:
    title = system[0] if system[0] == system[1] else f"{system[0]} minus {system[1]}"
    by = judge[0] if judge[0] == judge[1] else f"{judge[0]} minus {judge[1]}"
    lines = []
    for zone in ("all", *ZONES):
        own, other = (
            {row[side]["id"]: _values(row[side], system[side], judge[side], zone) for row in rows} for side in (0, 1)
        )
        means = [{name: sum(v) / len(v) for name, v in values.items() if v} for values in (own, other)]
        if result := compare(means[0], means[1]):
            lines.append([ZONE_TITLES.get(zone, zone), interval(result), str(result["count"])])
    parts = [f"## {title}, judged by {by}", table(["where", "difference [95 %]", "prompts"], lines)]
    changed = [(_difference(row, system, judge), row) for row in rows]
    changed = sorted((c for c in changed if c[0] != 0), key=lambda c: -abs(c[0]))
    if not changed:
        return [*parts, "Every prompt scores the same in both."]
    parts.append(f"{len(changed)} prompts differ; the {min(MOST_PROMPTS, len(changed))} that differ most:")
    return [*parts, "\n".join(_describe(d, row, system, judge) for d, row in changed[:MOST_PROMPTS])]


def _difference(row: tuple[Row, Row], system: Pair, judge: Pair) -> float:
    means = []
    for side in (0, 1):
        values = _values(row[side], system[side], judge[side])
        means.append(sum(values) / len(values) if values else 0.0)
    return means[0] - means[1]


def _describe(difference: float, row: tuple[Row, Row], system: Pair, judge: Pair) -> str:
    text = " ".join(row[0]["prompt"].split())
    lines = [f"- {100 * difference:+.1f} {row[0]['id']}: {text[:80]}{'…' if len(text) > 80 else ''}"]
    found = []
    for n, question in enumerate(row[0]["questions"]):
        counts = []
        for side in (0, 1):
            pictures = row[side]["systems"][system[side]]["judges"][judge[side]]
            counts.append(sum(picture[n]["counted"] for picture in pictures) / len(pictures))
        if counts[0] != counts[1]:
            found.append((abs(counts[0] - counts[1]), f"  - {counts[1]:.2f} → {counts[0]:.2f} {question['text']}"))
    found.sort(key=lambda item: -item[0])
    lines += [line for _, line in found[:MOST_QUESTIONS]]
    if len(found) > MOST_QUESTIONS:
        lines.append(f"  - and {len(found) - MOST_QUESTIONS} more questions")
    return "\n".join(lines)
