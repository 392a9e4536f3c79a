"""Means over prompts, of whole prompts and by where their sentences lie."""

import math
from collections.abc import Sequence
from typing import Any

from fixclip_diffusion.evaluation.prompts import ZONES


def summarize(values: Sequence[float]) -> dict[str, float]:
    """Mean, its standard error (0 for a single value) and how many."""
    number = len(values)
    mean = sum(values) / number
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (number - 1) / number) if number > 1 else 0.0
    return {"mean": mean, "standard_error": spread, "count": number}


def metrics(rows: Sequence[tuple[list[dict[str, Any]], dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """A system's means over prompts, of what each prompt has."""
    found: dict[str, list[float]] = {}

    def add(name: str, values: Sequence[float]) -> None:
        if values:
            found.setdefault(name, []).append(sum(values) / len(values))

    for parts, result in rows:
        if "whole" in result:
            add("whole", [result["whole"]])
            for zone in ZONES:
                chosen = zip(parts, result["per_sentence"], strict=True)
                add(f"sentence_{zone}", [score for part, score in chosen if part["zone"] == zone])
        for zone in ZONES if "objects" in result else ():
            objects = [item for item in result["objects"] if item["zone"] == zone]
            add(f"objects_right_{zone}", [item["right"] for item in objects])
            add(f"objects_colour_{zone}", [item["colour"] for item in objects])
        add("background_right", result.get("background", []))
    return {name: summarize(values) for name, values in found.items()}
