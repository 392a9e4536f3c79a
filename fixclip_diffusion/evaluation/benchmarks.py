"""Benchmarks of long prompts as they are published: what is in their folders, and how their pictures are named.

A benchmark is one `Layout` in `LAYOUTS`; its official score is in `official.py`. Nothing of a benchmark is in this
repository: unpack it as it is published and name its folder.
"""

import csv
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fixclip_core.files import parse_json
from fixclip_diffusion.evaluation.prompts import Prompt, Question, number_prompts, read_prompts

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Layout:
    """How a benchmark is published.

    Attributes:
        name: as in `--benchmark NAME FOLDER`.
        title, licence, judged_by: for reports.
        contents: what its folder holds, for error messages.
        recognise: whether a folder or file looks like it.
        read: its prompts, in the benchmark's order.
        picture: the file of one prompt's picture in a folder of pictures made elsewhere, or None if there is none.
        grid: whether several pictures of a prompt are one file, tiled 2 x 2.
    """

    name: str
    title: str
    licence: str
    judged_by: str
    contents: str
    recognise: Callable[[Path], bool]
    read: Callable[[Path], list[Prompt]]
    picture: Callable[[Path, Prompt, int], Path | None]
    grid: bool = False


@dataclass(frozen=True)
class Benchmark:
    """Prompts to draw and what is known about them."""

    name: str
    prompts: tuple[Prompt, ...]
    source: str
    licence: str = ""
    layout: Layout | None = None


def open_benchmark(source: str, name: str | None = None, check_scenes: bool | None = None) -> Benchmark:
    """Read a benchmark's folder, a file of prompts, or `scenes:N`.

    Args:
        source: the folder or file.
        name: which benchmark it is; None recognises it by what is in it.
        check_scenes: see `prompts.read_prompts`.

    Raises:
        ValueError: an unknown name, a folder that is incomplete or damaged, or a format that nothing recognises.
    """
    path = Path(source)
    if name is not None and name not in LAYOUTS:
        raise ValueError(f"benchmark {name!r}: valid are {', '.join(LAYOUTS)}")
    if name is None and path.exists():
        name = next((layout.name for layout in LAYOUTS.values() if layout.recognise(path)), None)
        if name is None and path.is_dir():
            raise ValueError(_nothing_recognised(path))
    if name is None:
        prompts = read_prompts(source, check_scenes)
        what = "scenes" if prompts[0].scene is not None else "prompts"
        return Benchmark(what, tuple(prompts), source)
    layout = LAYOUTS[name]
    if not path.exists():
        raise ValueError(f"{path}: no such folder; {name} is {layout.contents}")
    prompts = layout.read(path)
    if not prompts:
        raise ValueError(f"{path}: no prompt of {layout.title} in it; it is {layout.contents}")
    _check_unique(path, prompts)
    return Benchmark(layout.name, tuple(number_prompts(prompts)), source, layout.licence, layout)


def _nothing_recognised(path: Path) -> str:
    inside = sorted(p.name + ("/" if p.is_dir() else "") for p in path.iterdir())
    shown = ", ".join(inside[:8]) + (f" and {len(inside) - 8} more" if len(inside) > 8 else "")
    known = "; ".join(f"{layout.name}: {layout.contents}" for layout in LAYOUTS.values())
    return f"{path}: no benchmark that is known; it holds {shown or 'nothing'}. Known are {known}"


def _check_unique(path: Path, prompts: Sequence[Prompt]) -> None:
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise ValueError(f"{path}: two prompts have the id {prompt.id!r}")
        seen.add(prompt.id)


# -- reading -------------------------------------------------------------------------------------------------


def _json_lines(path: Path, needs: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, object) of each line; every object has the fields in `needs`."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable text file: {error}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                row = parse_json(line)
            except ValueError:
                raise ValueError(f"{where}: not JSON") from None
            yield where, _with_fields(where, row, needs)


def _with_fields(where: str, row: Any, needs: Sequence[str]) -> dict[str, Any]:
    if not isinstance(row, dict) or any(name not in row for name in needs):
        found = ", ".join(list(row)[:8]) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{where}: expected an object with {', '.join(needs)}; found {found}")
    return row


def _one_file(folder: Path, name: str, layout: str) -> Path:
    """The file of that name in the folder or one level below; the folder may be the file itself."""
    if folder.is_file():
        return folder
    found = [folder / name] if (folder / name).is_file() else sorted(folder.glob(f"*/{name}"))
    if not found:
        raise ValueError(f"{folder}: {name} is missing; {layout} is {LAYOUTS[layout].contents}")
    return found[0]


def _has(*names: str) -> Callable[[Path], bool]:
    def recognise(path: Path) -> bool:
        if path.is_file():
            return path.name in names
        return any((path / name).is_file() or any(path.glob(f"*/{name}")) for name in names)

    return recognise


# DPG-Bench: a CSV with a proposition a row; prompts/ID.txt holds each prompt once more.

DPG_COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")


def _read_dpg(folder: Path) -> list[Prompt]:
    path = _one_file(folder, "dpg_bench.csv", "dpg")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a readable CSV file: {error}") from None
    items: dict[str, list[dict[str, str]]] = {}
    for number, row in enumerate(rows, 2):
        if None in row:
            raise ValueError(f"{path}:{number}: more columns than the first line names; quote texts that hold a comma")
        if missing := [name for name in DPG_COLUMNS if not row.get(name)]:
            raise ValueError(f"{path}:{number}: no {missing[0]}; found {', '.join(k for k, v in row.items() if v)}")
        items.setdefault(row["item_id"], []).append(row)
    first = rows[0]["item_id"] if rows else ""
    prompts = [_dpg_prompt(path, item, own, first=item == first) for item, own in items.items()]
    texts = path.parent / "prompts"
    if texts.is_dir():
        if missing := [p.id for p in prompts if not (texts / f"{p.id}.txt").is_file()]:
            raise ValueError(f"{texts}: {len(missing)} prompts are missing, e.g. {missing[0]}.txt")
        if extra := sorted({p.stem for p in texts.glob("*.txt")} - {p.id for p in prompts}):
            raise ValueError(f"{path}: {len(extra)} prompts of {texts.name}/ have no question, e.g. {extra[0]}.txt")
    return prompts


def _dpg_prompt(path: Path, item: str, rows: Sequence[Mapping[str, str]], first: bool) -> Prompt:
    questions = []
    for row in rows:
        parents = tuple(p.strip() for p in row["dependency"].split(",") if p.strip() not in ("", "0"))
        questions.append(
            Question(
                id=row["proposition_id"].strip(),
                text=row["question_natural_language"].strip(),
                parents=parents,
                category=row["tuple"].split("(")[0].strip(),
            )
        )
    extra = {"first_row": rows[0]["proposition_id"].strip()} if first else {}
    try:
        return Prompt(rows[0]["text"].strip(), id=item, questions=tuple(questions), extra=extra)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


# TIIF: two folders of .jsonl files with a line a prompt, the prompts' and the questions'.


def _tiif_folders(path: Path) -> tuple[Path, Path] | None:
    for root in (path, path / "data", path / "prompts"):
        for prompts, questions in (
            ("testmini_prompts", "testmini_eval_prompts"),
            ("test_prompts", "test_eval_prompts"),
            ("generation", "evaluation"),
        ):
            if (root / prompts).is_dir() and (root / questions).is_dir():
                return root / prompts, root / questions
    return None


def _read_tiif(folder: Path) -> list[Prompt]:
    folders = _tiif_folders(folder)
    if folders is None:
        raise ValueError(f"{folder}: no testmini_prompts/ with testmini_eval_prompts/ in it")
    prompts = []
    for file in sorted(folders[0].glob("*.jsonl")):
        dimension = re.sub(r"_prompts$", "", file.stem)
        judged = folders[1] / f"{dimension}_eval_prompts.jsonl"
        rows = list(_json_lines(file, ("type", "short_description", "long_description")))
        if not judged.is_file():
            raise ValueError(f"{judged}: missing; it holds the questions of {file.name}")
        asked = list(_json_lines(judged, ("type", "yn_question_list", "yn_answer_list")))
        if len(rows) != len(asked):
            raise ValueError(f"{judged}: {len(asked)} lines for the {len(rows)} prompts of {file.name}")
        for index, ((_, row), (where, own)) in enumerate(zip(rows, asked, strict=True)):
            if row["type"] != own["type"]:
                raise ValueError(f"{where}: type {own['type']!r}, but the prompt's is {row['type']!r}")
            prompts += _tiif_twins(where, index, row, own)
    return prompts


def _tiif_twins(where: str, index: int, row: Mapping[str, Any], asked: Mapping[str, Any]) -> list[Prompt]:
    texts, answers = asked["yn_question_list"], asked["yn_answer_list"]
    if len(texts) != len(answers):
        raise ValueError(f"{where}: {len(texts)} questions and {len(answers)} answers")
    questions = tuple(
        Question(str(n), text.strip(), answer.strip().lower(), category=row["type"])
        for n, (text, answer) in enumerate(zip(texts, answers, strict=True), 1)
    )
    name = f"{row['type']}/{index}"
    long = Prompt(row["long_description"].strip(), id=f"{name}/long", category=row["type"], questions=questions)
    short = Prompt(
        row["short_description"].strip(),
        id=f"{name}/short",
        category=row["type"],
        twin_of=long.id,
        questions=questions,
    )
    return [long, short]


# LongBench-T2I: a line a prompt, with a description for each of nine dimensions; a judge gives each a score from 1 to
# 5.


def _read_longbench(folder: Path) -> list[Prompt]:
    path = _one_file(folder, "instruction.jsonl", "longbench")
    prompts = []
    rows = list(_json_lines(path, ("instruction", "label")))
    for index, (where, row) in enumerate(rows):
        label = row["label"][0] if isinstance(row["label"], list) and row["label"] else None
        if not isinstance(label, dict) or not label:
            raise ValueError(f"{where}: label is no list with an object of dimensions")
        questions = tuple(Question(name, f"{name}: {text}", expected="", category=name) for name, text in label.items())
        extra = {"number": len(rows)}
        prompts.append(Prompt(row["instruction"].strip(), id=str(index), questions=questions, extra=extra))
    return prompts


# LGBench: a list of prompts with goals.


def _read_lgbench(folder: Path) -> list[Prompt]:
    path = _one_file(folder, "t2i_1000.json", "lgbench")
    try:
        rows = parse_json(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a list of prompts, found {type(rows).__name__}")
    prompts = []
    for number, row in enumerate(rows, 1):
        row = _with_fields(f"{path}, entry {number}", row, ("id", "prompt", "goals"))
        goals = [_with_fields(f"{path}, entry {number}", goal, ("type", "description")) for goal in row["goals"]]
        questions = tuple(
            Question(str(n), f'Does the image show this: "{goal["description"].strip()}"?', category=str(goal["type"]))
            for n, goal in enumerate(goals, 1)
        )
        category = "/".join(str(row[name]) for name in ("category", "subcategory") if row.get(name))
        prompts.append(Prompt(row["prompt"].strip(), id=str(row["id"]), category=category, questions=questions))
    return prompts


# GenEval 2: a line a prompt, with pairs of question and answer.


def _read_geneval2(folder: Path) -> list[Prompt]:
    path = _one_file(folder, "geneval2_data.jsonl", "geneval2")
    prompts = []
    for index, (where, row) in enumerate(_json_lines(path, ("prompt", "atom_count", "vqa_list", "skills"))):
        if len(row["vqa_list"]) != len(row["skills"]):
            raise ValueError(f"{where}: {len(row['vqa_list'])} questions and {len(row['skills'])} skills")
        questions = tuple(
            Question(str(n), text.strip(), str(answer).strip(), category=str(skill))
            for n, ((text, answer), skill) in enumerate(zip(row["vqa_list"], row["skills"], strict=True), 1)
        )
        extra = {"atom_count": int(row["atom_count"])}
        prompts.append(Prompt(row["prompt"].strip(), id=f"{index:05d}", questions=questions, extra=extra))
    return prompts


# -- pictures made elsewhere ---------------------------------------------------------------------------------


def _with_stem(folder: Path, stem: str) -> Path | None:
    return next((folder / f"{stem}{suffix}" for suffix in SUFFIXES if (folder / f"{stem}{suffix}").is_file()), None)


def plain_picture(root: Path, prompt: Prompt, seed: int) -> Path | None:
    """ID-seedN.png as `evaluate-images` names its own, or ID.png."""
    stem = picture_stem(prompt)
    return _with_stem(root, f"{stem}-seed{seed}") or _with_stem(root, stem)


def picture_stem(prompt: Prompt) -> str:
    """The prompt's id as a file name: what is no letter, digit, point or hyphen becomes an underline."""
    return re.sub(r"[^\w.-]", "_", prompt.id)


def _tiif_picture(root: Path, prompt: Prompt, seed: int) -> Path | None:
    """DIMENSION/MODEL/{short,long}_description/N.png of a single model."""
    dimension, index, length = prompt.id.rsplit("/", 2)
    models = sorted(p for p in (root / dimension).glob("*") if p.is_dir())
    if len(models) > 1:
        raise ValueError(
            f"{root / dimension}: pictures of {len(models)} models, {', '.join(m.name for m in models)}: keep one"
        )
    return _with_stem(models[0] / f"{length}_description", index) if models else plain_picture(root, prompt, seed)


def _longbench_picture(root: Path, prompt: Prompt, seed: int) -> Path | None:
    """N/stepK/generated_image_J.jpg, the last step and its last picture; or N/ANY.png if it is the only one.

    The scorer pairs the folders, sorted by number, with the prompts, so N may begin at 0 or at 1.
    """
    from_one = not (root / "0").is_dir() and (root / str(prompt.extra["number"])).is_dir()
    folder = root / str(int(prompt.id) + from_one)
    if not folder.is_dir():
        return plain_picture(root, prompt, seed)

    def number(path: Path) -> int:
        return int(re.findall(r"\d+", path.stem or path.name)[-1]) if re.search(r"\d", path.stem) else -1

    steps = sorted((p for p in folder.iterdir() if p.is_dir() and re.match(r"(?i)step\d", p.name)), key=number)
    pictures = [p for p in (steps[-1] if steps else folder).iterdir() if p.suffix.lower() in SUFFIXES]
    return max(pictures, key=number, default=None)


def _geneval2_picture(root: Path, prompt: Prompt, seed: int) -> Path | None:
    """By a JSON object {prompt: path}, as GenEval 2's scorer reads it; else like a plain folder."""
    if root.is_dir():
        return plain_picture(root, prompt, seed)
    try:
        paths = parse_json(root.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{root}: not a JSON object of prompt and path: {error}") from None
    if not isinstance(paths, dict):
        raise ValueError(f"{root}: expected a JSON object of prompt and path, found {type(paths).__name__}")
    if prompt.text not in paths:
        return None
    path = Path(str(paths[prompt.text]))  # relative to the JSON file, or to the working directory as the scorer has it
    return next((found for found in (root.parent / path, path) if found.is_file()), None)


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout(
            "dpg", "DPG-Bench", "Apache 2.0", "yes/no questions; a child counts 0 if its parent is no",
            "a folder with dpg_bench.csv and prompts/", _has("dpg_bench.csv"), _read_dpg, plain_picture, grid=True,
        ),
        Layout(
            "tiif", "TIIF-Bench", "none stated", "yes/no questions about a short and a long form of each prompt",
            "a folder with testmini_prompts/ and testmini_eval_prompts/",
            lambda path: _tiif_folders(path) is not None, _read_tiif, _tiif_picture,
        ),
        Layout(
            "longbench", "LongBench-T2I", "MIT", "a score from 1 to 5 for each of nine dimensions",
            "a folder with instruction.jsonl", _has("instruction.jsonl"), _read_longbench, _longbench_picture,
        ),
        Layout(
            "lgbench", "LGBench", "Apache 2.0", "yes/no questions, one a goal",
            "a folder with t2i_1000.json", _has("t2i_1000.json"), _read_lgbench, plain_picture,
        ),
        Layout(
            "geneval2", "GenEval 2", "CC BY-NC 4.0: not for commercial use",
            "the probability of the right answer to each question",
            "a folder with geneval2_data.jsonl", _has("geneval2_data.jsonl"), _read_geneval2, _geneval2_picture,
        ),
    )
}  # fmt: skip
