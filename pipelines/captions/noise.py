"""What caption noise costs in retrieval: `python pipelines/captions/noise.py [KEY=VALUE ...]`.

For each kind of captions: the scenes captioner writes them (with or without its mistakes, filtered or not), FIX-CLIP
is trained on them from the embedded CLIP with each seed, and R@1 is measured on true captions of other scenes. A stage
whose result exists is not run again. KEY=VALUE override fields of the training recipe. Everything together takes about
20 minutes of one CPU core.

noise.json holds what came out; `python pipelines/scenes/report.py --collect` puts it into docs/results.md.
"""

import json
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from fixclip_core.data.config import DataConfig
from fixclip_core.files import write_atomically
from fixclip_core.synthesis.drivers.server import ServerOptions, caption
from fixclip_core.synthesis.job import Job
from fixclip_core.synthesis.recipe import CaptionRecipe
from fixclip_core.synthesis.scenes_server import MODEL, Mistakes, ScenesServer

ROOT = Path(__file__).resolve().parents[2]
FIRST_SCENE = 1000  # those before are for evaluation
NO_FILTERS = {
    "cut_off": False,
    "refusal": False,
    "max_prompt_share": None,
    "language": None,
    "min_sentences": None,
    "min_words": None,
    "max_words": None,
    "max_repeated_share": None,
    "max_word_run": None,
    "min_letter_share": None,
    "min_words_per_clause": None,
    "max_same": None,
}
STRONG = Mistakes(
    left_out=0.2, wrong_colour=0.2, repeated=0.1, cut_off=0.1, refusal=0.05, echo=0.05, german=0.05, same=0.05
)


@dataclass(frozen=True)
class Captions:
    """A kind of captions: the captioner's mistakes, and whether broken answers are filtered out."""

    name: str
    mistakes: Mistakes
    filtered: bool


KINDS = (
    Captions("true", Mistakes.none(), True),
    Captions("few_mistakes_filtered", Mistakes(), True),
    Captions("many_mistakes_filtered", STRONG, True),
    Captions("many_mistakes", STRONG, False),
    # What no filter finds, alone: objects left out or of a wrong colour.
    Captions("many_wrong_objects", replace(Mistakes.none(), left_out=0.2, wrong_colour=0.2), True),
)


def write_captions(kind: Captions, folder: Path, scenes: int) -> None:
    """Caption `scenes` scenes into shards; goes on where it was."""
    recipe = CaptionRecipe.model_validate({"short": "ask", "filters": {} if kind.filtered else NO_FILTERS})
    config = DataConfig(source="scenes", start=FIRST_SCENE, stop=FIRST_SCENE + scenes)
    with ScenesServer(kind.mistakes).running() as server:
        caption(Job(config, folder, recipe, MODEL), ServerOptions(server.url, concurrency=4))


def train(data: Path, folder: Path, recipe: str, seed: int, overrides: list[str]) -> None:
    """Train an encoder on the shards; goes on from its last checkpoint."""
    shards = [f"data.source={data}", "data.start=0", "data.stop=null"]
    fields = [f"output.folder={folder}", *shards, f"seed={seed}", *overrides]
    command = [sys.executable, "-m", "fixclip_cli", "train", "encoder", recipe, *fields]
    done = subprocess.run(command, cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)  # the training has said why


def recalls(folder: Path) -> dict[str, float]:
    """The four R@1 at the end of a run: long and short captions, both directions."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = next(row for row in reversed(rows) if "long_image_to_text_recall_at_1" in row)
    return {name: value for name, value in last.items() if name.endswith("recall_at_1")}


def results(out: Path, kind: Captions, seeds: int) -> dict[str, Any]:
    """What the captioner did, and the recalls of each seed."""
    report = json.loads((out / kind.name / "captions" / "report.json").read_text())
    return {
        "mistakes": asdict(kind.mistakes),
        "filtered": kind.filtered,
        **{name: report[name] for name in ("samples", "written", "counts", "answers")},
        "seeds": {str(seed): recalls(out / kind.name / f"seed{seed}") for seed in range(seeds)},
    }


def main(
    overrides: Annotated[list[str] | None, typer.Argument(help="Fields of the training recipe.")] = None,
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("outputs/captions/noise"),
    recipe: Annotated[str, typer.Option(help="Of the training.")] = "pipelines/captions/noise.yaml",
    scenes: Annotated[int, typer.Option(min=1, help="Captioned for each kind.")] = 1920,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings for each kind.")] = 3,
    kinds: Annotated[list[str] | None, typer.Option("--kind", help="Only this kind; repeatable.")] = None,
) -> None:
    """Caption, train and compare; noise.json is written anew after each kind."""
    unknown = set(kinds or []) - {kind.name for kind in KINDS}
    if unknown:
        raise SystemExit(f"--kind {', '.join(unknown)}: choose of {', '.join(kind.name for kind in KINDS)}")
    out = out.resolve()
    found: dict[str, Any] = {}
    for kind in [kind for kind in KINDS if kind.name in (kinds or [kind.name])]:
        data = out / kind.name / "captions"
        if not (data / "report.json").exists():
            write_captions(kind, data, scenes)
        for seed in range(seeds):
            folder = out / kind.name / f"seed{seed}"
            if not (folder / "model" / "config.json").exists():
                train(data, folder, recipe, seed, overrides or [])
        found[kind.name] = results(out, kind, seeds)
        write_atomically(out / "noise.json", json.dumps(found, indent=1).encode())
        means = [statistics.mean(recall.values()) for recall in found[kind.name]["seeds"].values()]
        typer.echo(f"{kind.name}: mean R@1 {', '.join(f'{mean:.3f}' for mean in means)}")
    typer.echo(f"{out / 'noise.json'}")


if __name__ == "__main__":
    typer.run(main)
