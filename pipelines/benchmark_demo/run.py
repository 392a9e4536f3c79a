"""`make benchmark-demo`: the whole path of `fixclip evaluate-images` on the embedded model, with two judges.

Scenes become a benchmark of questions. Every system of the embedded model draws them; the exact checker judges, and
beside it a judge on loopback that errs at a stated rate. What the report shows of it: errors of a judge pull every
score towards 50 % and so make differences between systems smaller, their intervals hardly; with enough prompts the
order stays.
"""

from pathlib import Path
from typing import Annotated

import typer
from diffusers.utils import logging as diffusers_logging
from noisy_judge import NoisyJudge, serving
from transformers.utils import logging as transformers_logging

from fixclip_diffusion import builtin
from fixclip_diffusion.evaluation import generate, report, run
from fixclip_diffusion.evaluation.benchmarks import open_benchmark
from fixclip_diffusion.evaluation.judges import SceneChecker
from fixclip_diffusion.evaluation.vision_judges import VisionServer

MODEL = "builtin:scenes"


def main(
    output: Annotated[Path, typer.Option("--output", "-o")] = Path("outputs/benchmark-demo"),
    prompts: Annotated[int, typer.Option(min=1, help="Scenes of nine objects.")] = 24,
    error_rate: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the second judge's answers that is wrong.")
    ] = 0.2,
    steps: int = 20,
) -> None:
    """Draw, judge twice, report."""
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
    parts = builtin.complete(MODEL, None, None, None)
    systems = generate.default_systems(parts.base, parts.encoder, parts.adapter, parts.lora)
    drawing = generate.Drawing(steps=steps, guidance_scale=2.0, batch_size=8)
    benchmark = open_benchmark(f"scenes:{prompts}")
    with serving(NoisyJudge(error_rate)) as server:
        noisy = VisionServer(server.url, f"errs-{round(100 * error_rate)}-percent", workers=2)
        found = run.evaluate_images(MODEL, benchmark, systems, drawing, output, judges=[SceneChecker(), noisy])
    typer.echo(report.markdown(found))
    typer.echo(f"\n{output / 'report.html'}")


if __name__ == "__main__":
    typer.run(main)
