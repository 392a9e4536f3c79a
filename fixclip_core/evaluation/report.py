"""What the reports of retrieval and classification have in common, as JSON and as lines for a terminal."""

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fixclip_core.data.samples import Skipped


def skipped_report(skipped: list[Skipped], first: int = 20) -> dict[str, Any]:
    return {
        "count": len(skipped),
        "reasons": dict(Counter(item.reason for item in skipped)),
        "first": [asdict(item) for item in skipped[:first]],
    }


def format_table(report: dict[str, Any]) -> str:
    """The report as a few lines for a terminal."""
    model, data, metrics = report["model"], report["data"], report["metrics"]
    lines = [
        f"model  {model['source']} ({model['format']}, {model['context_length']} tokens, {model['resolution']} px)",
        f"data   {data['name']}: {data['protocol']}",
    ]
    counts = [f"{data[key]} {key}" for key in ("images", "texts", "classes") if key in data]
    if data.get("texts_that_fill_the_context"):
        counts.append(f"{data['texts_that_fill_the_context']} of them fill the context")
    if data["skipped"]["count"]:
        counts.append(f"{data['skipped']['count']} samples skipped")
    lines += [f"       {', '.join(counts)}", ""]
    ks = [key.rsplit("_", 1)[1] for key in metrics if key.startswith("image_to_text_recall_at_")]
    if not ks:
        return "\n".join(lines + [f"{key:<26}{100 * value:7.2f}" for key, value in metrics.items()])
    lines.append(" " * 14 + "".join(f"{'R@' + k:>8}" for k in ks))
    for direction in ("image_to_text", "text_to_image"):
        values = [metrics[f"{direction}_recall_at_{k}"] for k in ks]
        lines.append(f"{direction.replace('_', ' '):<14}" + "".join(f"{100 * value:8.2f}" for value in values))
    return "\n".join(lines)


def write_json(report: Any, path: str | Path) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
