"""The scenes miniature from nothing to report: `python pipelines/scenes/run.py [STAGE ...] [--jobs 2] [--list]`.

A stage is one command, done when its result exists; whatever is interrupted goes on from its checkpoint at the next
call. Every stage is a recipe of this folder with its overrides, so each can be run alone by the command that --list
prints.
"""

import difflib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from fixclip_core.files import write_atomically

ROOT = Path(__file__).resolve().parents[2]
HERE = Path("pipelines/scenes")
OUT = Path("outputs/scenes")
SEEDS = (0, 1, 2)
LEARNING_RATES = (3e-5, 1e-4, 3e-4)
ABLATION_STEPS = 150


@dataclass(frozen=True)
class Stage:
    """A command, what must be there before it starts, and what is there when it is done."""

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...]
    result: Path
    processes: int = 1


def launched(script: str, *arguments: str, processes: int = 1) -> tuple[str, ...]:
    """A training script in so many processes on the CPU."""
    return ("-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone", script, *arguments)


def pretraining(name: str, kind: str, needs: Sequence[str] = (), processes: int = 1) -> Stage:
    command = launched(f"{HERE}/pretrain.py", kind, f"{HERE}/{name}.yaml", processes=processes)
    return Stage(name, command, tuple(needs), OUT / name / "model", processes)


def adapter(name: str, needs: Sequence[str], *overrides: str, recipe: str = "adapter") -> Stage:
    command = launched("train_adapter.py", f"{HERE}/{recipe}.yaml", f"output.folder={OUT / name}", *overrides)
    return Stage(name, command, tuple(needs), OUT / name / "adapter" / "adapter.safetensors")


def adapters(name: str, needs: Sequence[str], cache: str, *overrides: str, on: str | None = None) -> list[Stage]:
    """An adapter in two stages: a start on the text states of captions that refer, then with the UNet on all kinds.

    Adapters on the same encoder, read by the same conditioning, share both caches of features, whatever their seeds.

    Args:
        on: the adapter whose start this one's goes on from, on hidden states that are near to its own; None: it starts
            from nothing.
    """
    start, folder = f"{name}_start", f"features.folder={OUT}/cache/{cache}"
    read = (f"{folder}_references", *overrides)
    if on is None:
        first = adapter(start, needs, *read, recipe="adapter_start")
    else:
        before = f"adapter.start_from={OUT / on}_start/adapter"
        first = adapter(start, [*needs, f"{on}_start"], *read, before, recipe="adapter_transfer")
    return [first, adapter(name, [start], folder, f"adapter.start_from={OUT / start}/adapter", *overrides)]


def encoder(name: str, *overrides: str) -> list[Stage]:
    """FIX-CLIP with state alignment, and its export, whose short prompts are the base's."""
    folder = OUT / f"{name}_diffusers"
    recipe = ("train_encoder.py", f"{HERE}/encoder_aligned.yaml", f"output.folder={OUT / name}", *overrides)
    export = ("-m", "fixclip_cli", "export", str(OUT / name), str(folder), "--format", "diffusers")
    options = ("--dtype", "float16", "--short-weights", str(OUT / "base"))
    return [
        Stage(name, launched(*recipe), ("clip",), OUT / name / "model" / "config.json"),
        Stage(folder.name, (*export, *options), (name, "base"), folder / "text_encoder"),
    ]


# Cache and overrides.
OVERLAP = ("overlap", "model.encoder=null", "model.conditioning=overlap")
STRETCHED = ("stretched", "model.encoder=null", "model.conditioning=one_pass")


def chain() -> list[Stage]:
    """What the package holds: base CLIP, base Stable Diffusion, an adapter on its windows, FIX-CLIP and its adapter."""
    return [
        pretraining("clip", "clip"),
        pretraining("vae", "vae"),
        pretraining("robust", "robust", ["vae"]),
        pretraining("unet", "unet", ["clip", "robust"], processes=2),
        Stage("base", (f"{HERE}/package.py", "base"), ("unet",), OUT / "base" / "model_index.json"),
        *encoder("encoder"),
        *adapters("adapter_overlap_text", ["base"], *OVERLAP, "adapter.scope=text"),
        *adapters("adapter", ["base", "encoder_diffusers"], "encoder", on="adapter_overlap_text"),
    ]


def controls() -> list[Stage]:
    """An adapter on single windows trained as that on all of them, one on the base stretched to 248 tokens trained as
    FIX-CLIP's, and a LoRA beside FIX-CLIP's."""
    return [
        *adapters("adapter_overlap", ["base"], *OVERLAP, "adapter.scope=window"),
        *adapters("adapter_stretched", ["base"], *STRETCHED, on="adapter_overlap_text"),
        adapter(
            "lora",
            ["adapter"],
            f"features.folder={OUT}/cache/encoder",
            f"adapter.start_from={OUT}/adapter/adapter",
            "optim.lr=0",  # the adapter stays as it is, so that one adapter serves with and without the LoRA
            "lora.rank=16",
            "train.steps=300",
            # The LoRA acts on short prompts too, where the adapter does not.
            "objectives.short_share=0.3",
            "objectives.weight_prediction=2",
        ),
    ]


DECIDING = {  # system of evaluate.py: the stage whose adapter it reads with
    "adapter": "adapter",
    "overlap_text_adapter": "adapter_overlap_text",
    "stretched_adapter": "adapter_stretched",
}


def pictures_of(system: str, needs: str | None, *sets: str) -> Stage:
    """Pictures of one system of evaluate.py, by default of every set of prompts; named in the order of its `SETS`."""
    options = [word for name in sets for word in ("--set", name)]
    command = (f"{HERE}/evaluate.py", "images", system, *options)
    done = OUT / "evaluation" / f"{sets[-1] if sets else 'references_heldout'}-{system}.json"
    return Stage(f"images-{system}", command, ("base", *([needs] if needs else [])), done)


def seeds() -> list[Stage]:
    """The rows that decide, with two further training seeds."""
    found: list[Stage] = []
    for seed in SEEDS[1:]:
        name, own = f"encoder_seed{seed}", f"seed={seed}"
        found += encoder(name, own)
        fixclip = (name, own, f"model.encoder={OUT}/{name}_diffusers")
        first = f"adapter_overlap_text_seed{seed}"
        found += adapters(first, ["base"], *OVERLAP, "adapter.scope=text", own)
        found += adapters(f"adapter_seed{seed}", ["base", f"{name}_diffusers"], *fixclip, on=first)
        found += adapters(f"adapter_stretched_seed{seed}", ["base"], *STRETCHED, own, on=first)
        for system, needs in DECIDING.items():
            found += [pictures_of(f"{system}_seed{seed}", f"{needs}_seed{seed}", "nine", "short", "references")]
    return found


RANKS = (16, 64)  # of the change that a text tower learns beside the base's weights


def deltas() -> list[Stage]:
    """FIX-CLIP with state alignment as a low-rank change of the base's text tower, drawn with without an adapter."""
    found: list[Stage] = []
    for rank in RANKS:
        name, file = f"encoder_rank{rank}", OUT / f"delta_rank{rank}" / "text_delta.safetensors"
        export = ("-m", "fixclip_cli", "export", str(OUT / name), str(file.parent), "--format", "delta")
        found += encoder(name, f"model.lora_rank={rank}")
        found += [Stage(file.parent.name, (*export, "--dtype", "float16"), (name,), file)]
        found += [pictures_of(f"trained_rank{rank}", f"{name}_diffusers", "nine", "references")]
    return found


DEPTHS = (2, 4, 6)
DEPTH_STEPS = 500  # of 16 captions
DEPTH_CAPTIONS = (f"train.steps={DEPTH_STEPS}", f"data.stop={1000 + 16 * DEPTH_STEPS}")  # none is read twice
ONE_PASS = ("model.conditioning=one_pass", "adapter.scope=window")


def depths() -> list[Stage]:
    """Adapters of several depths: a short start on text states, on windows that are joined and on FIX-CLIP's pass."""
    readings = {
        "overlap_text": (["base"], (*OVERLAP, "adapter.scope=text")),
        "adapter": (["base", "encoder_diffusers"], ("encoder", f"model.encoder={OUT}/encoder_diffusers", *ONE_PASS)),
    }
    found: list[Stage] = []
    for reading, (needs, (cache, *overrides)) in readings.items():
        for layers in DEPTHS:
            own = (f"features.folder={OUT}/cache/{cache}_references", *DEPTH_CAPTIONS, *overrides)
            name, depth = f"depths/{reading}-{layers}", f"adapter.num_layers={layers}"
            found += [adapter(name, needs, *own, depth, recipe="adapter_start")]
    return found


METHODS: dict[str, tuple[str, ...]] = {
    "fixclip": (),
    "longclip": ("method=longclip",),
    "finetune": ("method=finetune",),
    "prompt_flow_replace": ("model.prompt_flow=replace",),
    "no_masking": ("model.masking=none",),
    "mask_ratio_25": ("model.mask_ratio=0.25",),
    "mask_ratio_75": ("model.mask_ratio=0.75",),
    "first_sentence": ("captions.short_caption=first_sentence",),
    "no_groups": ("model.num_groups=0",),
}
ONE_SEED = ("mask_ratio_25", "mask_ratio_75")
TUNED = ("fixclip", "longclip", "finetune")


def retrieval_run(method: str, lr: float, seed: int) -> Stage:
    name = f"ablations/{method}-lr{lr:g}-seed{seed}"
    fields = (
        f"output.folder={OUT / name}",
        f"seed={seed}",
        f"optim.lr={lr:g}",
        f"train.steps={ABLATION_STEPS}",
        *METHODS[method],
    )
    command = launched("train_encoder.py", f"{HERE}/encoder.yaml", *fields)
    return Stage(name, command, ("clip",), OUT / name / "model" / "config.json")


def score(stage: Stage) -> float:
    """Mean of the four R@1 at the end of a run: long and short captions, both directions."""
    rows = [json.loads(line) for line in (ROOT / stage.result.parents[1] / "metrics.jsonl").read_text().splitlines()]
    last = next(row for row in reversed(rows) if "long_image_to_text_recall_at_1" in row)
    recalls = [value for name, value in last.items() if name.endswith("recall_at_1")]
    return sum(recalls) / len(recalls)


def tuning() -> list[Stage]:
    """The three methods at every learning rate, seed 0."""
    return [retrieval_run(method, lr, 0) for method in TUNED for lr in LEARNING_RATES]


def tuned(method: str) -> float:
    """The learning rate with the best score; FIX-CLIP without one of its modules takes FIX-CLIP's own."""
    method = method if method in TUNED else "fixclip"
    return max(LEARNING_RATES, key=lambda lr: score(retrieval_run(method, lr, 0)))


def ablations() -> list[Stage]:
    """Every method on every seed (other mask ratios on one), at its learning rate, once that is known."""
    if not all((ROOT / stage.result).exists() for stage in tuning()):
        return []
    runs = [(method, seed) for seed in SEEDS for method in METHODS if seed == 0 or method not in ONE_SEED]
    return [retrieval_run(method, tuned(method), seed) for method, seed in runs]


# -- FIX-CLIP's modules and its rivals (issue 21) ------------------------------------------------------------

DEBIASED = ("captions.short_caption=debiased", "captions.pad_short=true")
RIVALS: dict[str, tuple[str, ...]] = {
    "finetune": ("method=finetune",),
    "longclip": ("method=longclip",),
    "debias": ("method=longclip", *DEBIASED),
    "fixclip": (),
    "fixclip_no_prompts": ("model.num_prompts=0",),
    "fixclip_no_masking": ("model.masking=none",),
    "fixclip_no_groups": ("model.num_groups=0",),
    "fixclip_debias": DEBIASED,
    "fixclip_debias_three": (*DEBIASED, "captions.num_short=3"),
    "fixclip_states": ("train.weight_states=3",),
}
RIVALS_LAST = ("fixclip_debias_three",)  # in no paper's table
UNTRAINED = ("base", "stretched")
RIVAL_RATES = (1e-5, *LEARNING_RATES)  # plain fine-tuning is best at the lowest, DeBias sampling at the highest
TUNING_SEED = 100  # of the runs that choose the learning rates; it is in no table
TUNED_RATES = {"finetune": 1e-5, "longclip": 1e-4, "debias": 3e-4, "fixclip": 1e-4}  # what `rival_tuning` found
RIVAL_STEPS = 200  # a third of the recipe's: FIX-CLIP's R@1 is nearly flat from here on, see docs/results.md


def rival_run(method: str, lr: float, seed: int) -> Stage:
    name = f"rivals/{method}-lr{lr:g}-seed{seed}"
    fields = [f"output.folder={OUT / name}", f"seed={seed}", f"optim.lr={lr:g}", f"train.steps={RIVAL_STEPS}"]
    every = 50 if seed == SEEDS[0] else RIVAL_STEPS  # one seed shows the curves
    command = launched("train_encoder.py", f"{HERE}/encoder.yaml", *fields, f"eval.every={every}", *RIVALS[method])
    return Stage(name, command, ("clip",), OUT / name / "model" / "config.json")


def rival_tuning() -> list[Stage]:
    """Every method at every learning rate, all alike, on a seed that is not reported."""
    return [rival_run(method, lr, TUNING_SEED) for method in TUNED_RATES for lr in RIVAL_RATES]


def rival_lr(method: str) -> float:
    """The best learning rate of `rival_tuning`, or what it found before it is run here.

    A method with a module less or more takes that of the method itself.
    """
    own = method.partition("_")[0]
    if own not in TUNED_RATES:
        raise ValueError(
            f"method {method!r}: TUNED_RATES has no learning rate for {own!r}; give it one, or a rival's name"
        )
    tuning = {lr: rival_run(own, lr, TUNING_SEED) for lr in RIVAL_RATES}
    if not all((ROOT / stage.result).exists() for stage in tuning.values()):
        return TUNED_RATES[own]
    return max(tuning, key=lambda lr: score(tuning[lr]))


def twins_of(name: str, runs: Sequence[Stage]) -> Stage:
    """The hard retrieval sets for some runs at once: their pictures are drawn once for all."""
    folders = [Path(run.name).name for run in runs]
    result = OUT / "rivals" / "twins" / f"{folders[-1]}.json"
    return Stage(f"twins/{name}", (f"{HERE}/evaluate.py", "twins", *folders), tuple(run.name for run in runs), result)


def rivals() -> list[Stage]:
    """Three seeds of every method, and the hard sets for each of them and for what is not trained."""
    stretched = OUT / "rivals" / "stretched"
    found = [Stage("rivals/stretched", (f"{HERE}/package.py", "stretched"), ("clip",), stretched / "config.json")]
    twins, last = (f"{HERE}/evaluate.py", "twins", *UNTRAINED), OUT / "rivals" / "twins" / f"{UNTRAINED[-1]}.json"
    found += [Stage("twins/untrained", twins, ("rivals/stretched",), last)]
    own = [method for method in RIVALS if method not in RIVALS_LAST]
    parts = {f"seed{seed}-{part}": (own[part::2], [seed]) for seed in SEEDS for part in (0, 1)}
    for name, (methods, some) in (parts | {"last": (list(RIVALS_LAST), SEEDS)}).items():
        runs = [rival_run(method, rival_lr(method), seed) for method in methods for seed in some]
        found += [*runs, twins_of(name, runs)]  # two runs are trained while others are judged
    return found


def evaluations() -> list[Stage]:
    needs = {
        **dict.fromkeys(("stock", "windows", "overlap", "stretched")),
        "trained": "encoder_diffusers",
        **DECIDING,
        "lora": "lora",
        "overlap_adapter": "adapter_overlap",
    }
    script, folder = f"{HERE}/evaluate.py", OUT / "evaluation"
    retrieval = Stage("retrieval", (script, "retrieval"), ("encoder",), folder / "retrieval.json")
    paddings = Stage("paddings", (script, "paddings"), ("encoder_diffusers",), folder / "paddings.json")
    wordings = [
        Stage(
            f"wordings-{system}",
            (script, "wordings", system),
            ("base", *([stage] if stage else [])),
            folder / f"wordings-{system}.json",
        )
        for system, stage in needs.items()
        if system != "lora"  # which is the UNet's
    ]
    return [*(pictures_of(system, stage) for system, stage in needs.items()), *wordings, retrieval, paddings]


GROUPS: dict[str, Callable[[], list[Stage]]] = {
    "chain": chain,
    "controls": controls,
    "seeds": seeds,
    "deltas": deltas,
    "depths": depths,
    "evaluations": evaluations,
    "tuning": tuning,
    "ablations": ablations,
    "rivals": rivals,
    "rival_tuning": rival_tuning,
}
STAGES_HELP = f"Stages or groups ({', '.join(GROUPS)}); default: all but rivals and rival_tuning."
BY_NAME_ONLY = ("rivals", "rival_tuning")  # 30 trainings of 200 steps and 32 evaluations: about 5 hours of one core


def stages() -> list[Stage]:
    unique = {stage.name: stage for group in GROUPS.values() for stage in group()}
    return list(unique.values())


def select(names: Sequence[str]) -> list[Stage]:
    """The stages of these names and groups; for none all of them but those that run by name only.

    Raises:
        SystemExit: there is no such stage or group.
    """
    known = {stage.name: stage for stage in stages()}
    chosen: dict[str, Stage] = {}
    for name in names or [group for group in GROUPS if group not in BY_NAME_ONLY]:
        if name not in known and name not in GROUPS:
            near = difflib.get_close_matches(name, [*GROUPS, *known], n=1)
            raise SystemExit(
                f"no stage {name!r}{''.join(f'; did you mean {other!r}?' for other in near)} Groups are "
                f"{', '.join(GROUPS)}; --list names the stages"
            )
        for stage in GROUPS[name]() if name in GROUPS else [known[name]]:
            chosen[stage.name] = stage
    return list(chosen.values())


# -- running -------------------------------------------------------------------------------------------------


class Stopwatch:
    """When a stage ran, in logs/STAGE.times.json: [start, end] in seconds since 1970 for each time that it was started.

    The end is brought up to date while the stage runs, so that a run that is cut off counts too.
    """

    def __init__(self, stage: Stage):
        self.file = log_of(stage).with_suffix(".times.json")
        before = json.loads(self.file.read_text())["times"] if self.file.exists() else []
        self.content: dict[str, Any] = {"processes": stage.processes, "times": [*before, [time.time(), time.time()]]}
        self.write(again_after=0)

    @property
    def minutes(self) -> float:
        """In all, over every start."""
        return sum(end - start for start, end in self.content["times"]) / 60

    def write(self, again_after: float = 20) -> None:
        """Record that the stage runs still; at once, or where the last record is so many seconds old."""
        last = self.content["times"][-1]
        if time.time() - last[1] >= again_after:
            last[1] = time.time()
            write_atomically(self.file, (json.dumps(self.content) + "\n").encode())


def log_of(stage: Stage) -> Path:
    return ROOT / OUT / "logs" / f"{stage.name.replace('/', '-')}.log"


def run(chosen: Sequence[Stage], jobs: int) -> None:
    """Run what is not done, in `jobs` processes of one thread: two such processes beat one with two threads.

    Raises:
        SystemExit: a stage failed; the others that run are finished first.
    """
    waiting = [stage for stage in chosen if not (ROOT / stage.result).exists()]
    done = {stage.name for stage in stages() if (ROOT / stage.result).exists()}
    running: dict[subprocess.Popen[bytes], tuple[Stage, Stopwatch]] = {}
    failed: list[str] = []
    settings = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, **settings, "ACCELERATE_USE_CPU": "true"}
    while waiting or running:
        for stage in [stage for stage in waiting if set(stage.needs) <= done]:
            busy = sum(other.processes for other, _ in running.values())
            if failed or (running and busy + stage.processes > jobs):
                break
            waiting.remove(stage)
            log = log_of(stage)
            log.parent.mkdir(parents=True, exist_ok=True)
            typer.echo(f"{stage.name}: started, log in {log.relative_to(ROOT)}")
            with log.open("ab") as file:
                process = subprocess.Popen(
                    [sys.executable, *stage.command], cwd=ROOT, env=environment, stdout=file, stderr=file
                )
            running[process] = (stage, Stopwatch(stage))
        if not running:
            break
        time.sleep(1)
        for _, stopwatch in running.values():
            stopwatch.write()
        for process in [process for process in running if process.poll() is not None]:
            stage, stopwatch = running.pop(process)
            stopwatch.write(again_after=0)
            if process.returncode == 0 and (ROOT / stage.result).exists():
                done.add(stage.name)
                typer.echo(f"{stage.name}: done after {stopwatch.minutes:.1f} min")
            else:
                failed.append(stage.name)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; see {OUT}/logs")
    if waiting:
        missing = sorted({need for stage in waiting for need in stage.needs} - done)
        restore = f"; `python {HERE}/package.py restore` lays out what is published of the chain"
        published = restore if set(missing) & {stage.name for stage in chain()} else ""
        names = ", ".join(stage.name for stage in waiting[:3]) + (" and others" if len(waiting) > 3 else "")
        raise SystemExit(f"{names}: first run {', '.join(missing)}{published}")


def main(
    names: Annotated[
        list[str] | None,
        typer.Argument(help=STAGES_HELP),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Stages that run at the same time, with a thread each.")] = 2,
    show: Annotated[
        bool,
        typer.Option("--list", help="Print the stages, done or open (still to run), and their commands; run none."),
    ] = False,
) -> None:
    """Make the scenes miniature: base, FIX-CLIP, adapter and LoRA, the controls and their evaluation."""
    if show:
        for stage in select(names or []):
            state = "done" if (ROOT / stage.result).exists() else "open"
            typer.echo(f"{state}  {stage.name}\n      python {shlex.join(stage.command)}")
        return
    while chosen := [stage for stage in select(names or []) if not (ROOT / stage.result).exists()]:
        run(chosen, jobs)  # and again: tuned learning rates bring new stages
    typer.echo("All done; `python pipelines/scenes/report.py` makes the page of results")


if __name__ == "__main__":
    typer.run(main)
