"""metrics.jsonl, the trackers and the plot of the loss curves."""

import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"


class MetricsLog:
    """metrics.jsonl, the trackers and a plot of the loss curves, written by the main process."""

    def __init__(self, accelerator: Accelerator, folder: Path, start_step: int):
        self.accelerator = accelerator
        self.is_main_process = accelerator.is_main_process
        self.path = folder / METRICS
        self.window: list[dict[str, Tensor]] = []
        self.samples = 0
        self.seconds = 0.0
        self.since = time.perf_counter()
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            _drop_after(self.path, start_step)

    def add(self, losses: dict[str, Tensor], samples: int, applied: bool) -> None:
        """Collect one step; the losses of a skipped one are not finite and would hide the others."""
        self.samples += samples
        self.seconds = time.perf_counter() - self.since
        if applied:
            self.window.append(losses)

    def flush(self, step: int, extra: dict[str, float]) -> dict[str, float]:
        """Write the means since the last flush, over all processes, and return them."""
        names = sorted({name for losses in self.window for name in losses})
        means = {name: torch.stack([losses[name].float() for losses in self.window]).mean() for name in names}
        reduced = self.accelerator.reduce(means, reduction="mean") if means else {}
        values = {name: float(value) for name, value in reduced.items()}
        values |= extra | {"samples_per_second": self.samples / max(self.seconds, 1e-9)}
        self.window, self.samples, self.seconds, self.since = [], 0, 0.0, time.perf_counter()
        self.write(step, values)
        return values

    def restart_clock(self) -> None:
        """Leave out of samples per second what was not training."""
        self.since = time.perf_counter() - self.seconds

    def write(self, step: int, values: dict[str, float]) -> None:
        self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as file:
                strict = {name: value if math.isfinite(value) else None for name, value in values.items()}
                file.write(json.dumps({"step": step, **strict}) + "\n")

    def plot(self) -> None:
        """Draw losses.png; a picture that fails must not cost the run."""
        if self.accelerator.is_main_process and self.path.exists():
            try:
                plot_losses(self.path, self.path.with_name("losses.png"))
            except (ImportError, OSError, ValueError) as error:
                logger.warning("The loss curves could not be drawn: %s", error)


def _drop_after(path: Path, step: int) -> None:
    """Forget what a resumed run is going to write again, and a line cut short by a kill."""
    if not path.exists():
        return
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(f"{json.dumps(row)}\n" for row in rows_until(path, step)))
    os.replace(temporary, path)


def rows_until(path: Path, step: int) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl up to a step, without a line cut short by a kill."""
    rows = [_row(line) for line in path.read_text().splitlines()]
    return [row for row in rows if row.get("step", step + 1) <= step]


def _row(line: str) -> dict[str, Any]:
    try:
        return json.loads(line)
    except ValueError:
        return {}


def plot_losses(metrics: Path, png: Path) -> None:
    """Draw every loss of a metrics.jsonl over the steps, and the recalls if there are any."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    panels = ("loss", "recall")
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, panel in zip(axes, panels, strict=True):
        for name in sorted({key for row in rows for key in row if panel in key}):
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            axis.plot(
                [step for step, _ in points],
                [value for _, value in points],
                label=name,
                marker="." if len(points) < 30 else None,
            )
        axis.set(xlabel="step", title=panel)
        if axis.lines:
            axis.legend(fontsize="x-small")
    figure.savefig(png, dpi=120)
    pyplot.close(figure)
