"""Does the picture follow the prompt? Several systems draw the same prompts, judges answer questions about them.

The four stages are draw, ask, score, report. The first two write as they go, so a run that was stopped goes on where
it was when the same command is given again; the last two start from what is on disk and take seconds.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fixclip_core.evaluation.encoders import Encoder
from fixclip_core.files import prepare_folder, write_atomically
from fixclip_diffusion import builtin
from fixclip_diffusion.evaluation import scores
from fixclip_diffusion.evaluation.answers import Answer, ask, find_work, problems, read_answers
from fixclip_diffusion.evaluation.benchmarks import Benchmark
from fixclip_diffusion.evaluation.clip_score import ClipScore
from fixclip_diffusion.evaluation.generate import (
    Drawing,
    Painter,
    Picture,
    System,
    draw_missing,
    find_pictures,
    own_pictures,
)
from fixclip_diffusion.evaluation.judges import Judge, text_scores
from fixclip_diffusion.evaluation.official import OFFICIAL
from fixclip_diffusion.evaluation.prompts import PromptTokens, sentences
from fixclip_diffusion.evaluation.report import write_report, write_sheet
from fixclip_diffusion.tokenizer import FixClipTokenizer

Pictures = dict[str, list[list[Picture]]]


@dataclass(frozen=True)
class Processes:
    """This process among those that `accelerate launch` or `torchrun` started; one alone without them."""

    rank: int = 0
    number: int = 1
    wait: Callable[[], None] = lambda: None
    device: str | None = None

    @staticmethod
    def found() -> "Processes":
        """Those that the environment speaks of.

        Raises:
            ValueError: Accelerate does not see as many as the launcher started; each would do all of the work.
        """
        number = int(os.environ.get("WORLD_SIZE", "1"))
        if number == 1:
            return Processes()
        from accelerate import PartialState
        from accelerate.utils import parse_flag_from_env

        use_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
        state = PartialState(cpu=use_cpu, timeout=timedelta(days=2))  # a process may wait hours for the slowest one
        if state.num_processes != number:
            raise ValueError(f"{number} processes were started, Accelerate sees {state.num_processes}")
        return Processes(state.process_index, state.num_processes, state.wait_for_everyone, str(state.device))

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def evaluate_images(
    base: str,
    benchmark: Benchmark,
    systems: Sequence[System],
    drawing: Drawing,
    folder: Path,
    *,
    judges: Sequence[Judge] = (),
    scorer: Encoder | ClipScore | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    partial: bool = False,
    official: bool = False,
    processes: Processes | None = None,
) -> dict[str, Any]:
    """Let every system draw every prompt from the same seeds, let judges look at the pictures, and compare.

    Args:
        base: Stable Diffusion 1.x or 2.x, folder or hub name, for systems that are no pipeline of their own.
        benchmark: see `benchmarks.open_benchmark`.
        systems: see `System`; their names must differ.
        drawing: steps, guidance, size and seeds.
        folder: pictures, answers and the report; what is there already is not made again.
        judges: answer the prompts' questions; none leaves them out.
        scorer: a long-context CLIP for image-text cosines, or torchmetrics' CLIPScore; None leaves them out.
        device, dtype: of the drawing.
        partial: let pictures made elsewhere be missing; they count 0.
        official: add the benchmark's own score, see `official.py`.
        processes: this one among several that share the work and the folder.

    Returns:
        What report.json holds; docs/benchmarks.md describes it. Empty in all processes but the first.

    Raises:
        ValueError: nothing to draw or to draw with, names that recur, a part that cannot be loaded, pictures that are
            missing or of another prompt, a benchmark without an official score, or a folder that cannot be written to.
        JudgeError: a judge is down; what was answered is kept.
    """
    processes = processes or Processes()
    _check(benchmark, systems, judges, official)
    painter = Painter(base, device, dtype)
    for system in systems:  # what cannot be loaded is found out before hours of drawing
        system.check_names()
    for system in systems:
        painter.check(system)
    tokenizer = _tokenizer(base, systems)
    prepare_folder(folder)
    known = {judge.name: read_answers(folder / "answers" / judge.name) for judge in judges}
    processes.wait()
    pictures = _draw(painter, benchmark, systems, drawing, folder, partial, processes)
    painter.release()
    processes.wait()
    prompts = benchmark.prompts
    mine = slice(processes.rank, None, processes.number)
    for judge in judges:
        for system in systems:
            own = pictures[system.name]
            work, _ = find_work(system.name, prompts[mine], own[mine], known[judge.name])
            ask(judge, work, folder / "answers" / judge.name / f"{processes.rank:03d}.jsonl")
    processes.wait()
    if not processes.is_main:
        return {}
    cosines = {s.name: _cosines(benchmark, pictures[s.name], tokenizer, scorer) for s in systems} if scorer else {}
    report = _report(benchmark, systems, drawing, folder, pictures, judges, tokenizer, cosines, official)
    report["settings"] |= {"base": base, "scorer": None if scorer is None else scorer.describe()}
    write_atomically(folder / "report.json", (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())
    write_report(report, folder)
    write_sheet(folder / "sheet.png", pictures, prompts)
    return report


def _check(benchmark: Benchmark, systems: Sequence[System], judges: Sequence[Judge], official: bool) -> None:
    for what, names in (("systems", [s.name for s in systems]), ("judges", [judge.name for judge in judges])):
        if len(set(names)) < len(names) or (what == "systems" and not names):
            raise ValueError(f"{what} {names}: at least one system, every name once")
    if not benchmark.prompts:
        raise ValueError("no prompts: at least one")
    if official and benchmark.name not in OFFICIAL:
        raise ValueError(f"{benchmark.name} has no official score; those of {', '.join(OFFICIAL)} are known")
    if judges and not any(prompt.questions for prompt in benchmark.prompts):
        raise ValueError(f"{benchmark.source}: its prompts have no questions, there is nothing to ask a judge")


def _tokenizer(base: str, systems: Sequence[System]) -> FixClipTokenizer:
    """What tokens are counted with: the base's tokenizer if it draws, else CLIP's own, whatever the pipeline reads."""
    if any(system.pipeline is None and system.pictures is None for system in systems):
        return FixClipTokenizer.from_pretrained(builtin.base_of(base), subfolder="tokenizer")
    from fixclip_core.weights.write import clip_tokenizer

    model = json.loads(clip_tokenizer().backend_tokenizer.to_str())["model"]
    return FixClipTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])


def _draw(
    painter: Painter,
    benchmark: Benchmark,
    systems: Sequence[System],
    drawing: Drawing,
    folder: Path,
    partial: bool,
    processes: Processes,
) -> Pictures:
    pictures: Pictures = {}
    prompts = benchmark.prompts
    for system in systems:  # made elsewhere first: missing ones are found out before anything is drawn
        if system.pictures is not None:
            root = Path(system.pictures)
            pictures[system.name] = find_pictures(root, prompts, drawing, benchmark.layout, partial)
    for system in systems:
        if system.pictures is None:
            own = folder / "images" / system.name
            draw_missing(painter, system, prompts[processes.rank :: processes.number], drawing, own)
            pictures[system.name] = [own_pictures(own, prompt, drawing) for prompt in prompts]
    return pictures


def _cosines(
    benchmark: Benchmark,
    pictures: Sequence[Sequence[Picture]],
    tokenizer: FixClipTokenizer,
    scorer: Encoder | ClipScore,
) -> list[tuple[list[str], list[float]]]:
    """For each prompt the zones of its sentences, and the cosines of the whole prompt and of each sentence."""
    found = []
    for prompt, own in zip(tqdm(benchmark.prompts, desc="cosines"), pictures, strict=True):
        parts = sentences(prompt.text, tokenizer)
        images = [picture.load() for picture in own if picture.path is not None]
        texts = [prompt.text, *(part.text for part in parts)]
        if not images:
            cosine = [0.0] * len(texts)
        elif isinstance(scorer, ClipScore):
            cosine = scorer.scores(images, texts)
        else:
            (cosine,) = text_scores([images], [texts], scorer)
        found.append(([part.zone for part in parts], cosine))
    return found


# -- the report's data ---------------------------------------------------------------------------------------


def _report(
    benchmark: Benchmark,
    systems: Sequence[System],
    drawing: Drawing,
    folder: Path,
    pictures: Pictures,
    judges: Sequence[Judge],
    tokenizer: FixClipTokenizer,
    cosines: Mapping[str, Sequence[tuple[list[str], list[float]]]],
    official: bool,
) -> dict[str, Any]:
    places = scores.place_questions(benchmark.prompts, tokenizer)
    standing: dict[str, dict[str, list[Answer]]] = {}
    for judge in judges:
        known = read_answers(folder / "answers" / judge.name)
        standing[judge.name] = {s.name: _current(known, s.name, pictures[s.name], benchmark) for s in systems}
    report: dict[str, Any] = {
        "settings": {
            "benchmark": {"name": benchmark.name, "source": benchmark.source, "licence": benchmark.licence},
            "systems": [asdict(system) for system in systems],
            "drawing": asdict(drawing),
            "judges": {judge.name: judge.describe() for judge in judges},
        },
        "judges": {name: _judged(benchmark, places, own, drawing, official) for name, own in standing.items()},
        "guesses": scores.reference_guesses(benchmark.prompts),
        "cosines": {name: scores.clip_metrics(rows) for name, rows in cosines.items()},
        "prompts": _rows(benchmark, places, tokenizer, pictures, standing, cosines, folder, drawing),
    }
    return report


def _current(
    known: Mapping[Any, Answer], system: str, pictures: Sequence[Sequence[Picture]], benchmark: Benchmark
) -> list[Answer]:
    """Answers about the pictures and questions as they are now; of those without an answer, too."""
    work, standing = find_work(system, benchmark.prompts, pictures, known)
    for item in work:
        for question in item.questions:
            answer = known.get((system, item.prompt.id, item.picture.seed, question.id))
            if answer is not None and answer.digest == item.digest:
                standing.append(answer)
    return standing


def _judged(
    benchmark: Benchmark,
    places: Mapping[str, Any],
    answers: Mapping[str, Sequence[Answer]],
    drawing: Drawing,
    official: bool,
) -> dict[str, Any]:
    """What one judge's answers amount to, for all systems."""
    prompts = benchmark.prompts
    asked = {name: scores.join(prompts, places, own, drawing.seeds) for name, own in answers.items()}
    found: dict[str, Any] = {
        "systems": {name: scores.scores(own) for name, own in asked.items()},
        "differences": scores.differences(asked),
        "twins": {name: result for name, own in asked.items() if (result := scores.twins(own))},
        "problems": {name: problems(own) for name, own in answers.items()},
        "unanswered": [
            {key: getattr(a, key) for key in ("system", "prompt", "seed", "question", "text", "problem", "reply")}
            for own in answers.values()
            for a in own
            if a.right is None
        ],
    }
    if official:
        score = OFFICIAL[benchmark.name]
        found["official"] = {name: score(prompts, own, drawing.seeds) for name, own in answers.items()}
    return found


def _rows(
    benchmark: Benchmark,
    places: Mapping[str, Any],
    tokenizer: FixClipTokenizer,
    pictures: Pictures,
    standing: Mapping[str, Mapping[str, Sequence[Answer]]],
    cosines: Mapping[str, Sequence[tuple[list[str], list[float]]]],
    folder: Path,
    drawing: Drawing,
) -> list[dict[str, Any]]:
    """Per prompt: its questions with their places, and each system's pictures with each judge's answers."""
    index = {judge: {a.key: a for own in by_system.values() for a in own} for judge, by_system in standing.items()}
    rows = []
    for number, prompt in enumerate(benchmark.prompts):
        num_tokens, own_places = places[prompt.id]
        tokens = PromptTokens(prompt.text, tokenizer)
        row: dict[str, Any] = {
            "id": prompt.id,
            "prompt": prompt.text,
            "category": prompt.category,
            "twin_of": prompt.twin_of,
            "num_tokens": num_tokens,
            "sentences": [{"text": s.text, "zone": s.zone} for s in sentences(tokens.text, tokenizer)],
            "questions": [
                {**{k: getattr(q, k) for k in ("id", "text", "expected", "parents")}, **asdict(own_places[q.id])}
                for q in prompt.questions
            ],
            "systems": {},
        }
        for system, own in pictures.items():
            result: dict[str, Any] = {"pictures": [_relative(picture, folder) for picture in own[number]]}
            if system in cosines:
                result["whole"], *result["per_sentence"] = cosines[system][number][1]
            result["judges"] = {
                judge: [_answers(by_key, system, prompt, seed) for seed in drawing.seeds]
                for judge, by_key in index.items()
            }
            row["systems"][system] = result
        rows.append(row)
    return rows


def _answers(by_key: Mapping[Any, Answer], system: str, prompt: Any, seed: int) -> list[dict[str, Any]]:
    """For each question of one picture: the answer, how far it is right by itself and after its parents, the reply."""
    own = {q.id: by_key.get((system, prompt.id, seed, q.id)) for q in prompt.questions}
    right = {name: 0.0 if a is None or a.right is None else a.right for name, a in own.items()}
    counted = scores.after_parents(prompt.questions, right)
    return [
        {
            "answer": a.answer if a else None,
            "right": a.right if a else None,
            "counted": counted[name],
            "reply": (a.reply or a.problem) if a else "never asked",
        }
        for name, a in own.items()
    ]


def _relative(picture: Picture, folder: Path) -> str | None:
    if picture.path is None:
        return None
    inside = picture.path.is_relative_to(folder)
    where = str(picture.path.relative_to(folder) if inside else picture.path.resolve())
    return where if picture.tile is None else f"{where}#{picture.tile}"
