"""Prompts to draw, the questions that their pictures are asked, and where in the prompt each question's subject lies.

A sentence is "before" the 77th token if all of it is read by a stock encoder, "across" if that stops inside it,
"after" if it lies behind and within 248 tokens, and "past" if it does not.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from fixclip_core import scenes
from fixclip_core.data.captions import split_sentences
from fixclip_core.files import parse_json
from fixclip_core.scenes.grammar import with_articles
from fixclip_diffusion.tokenizer import FixClipTokenizer

ZONES: tuple[str, ...] = get_args(scenes.Zone)
WHOLE = "whole"  # a question about all of the prompt, or about no sentence that could be found
WINDOW = 75  # tokens of text that one pass of a stock encoder reads, without start and end
SCALE = 5  # best score of a question that is answered by a number

AnswerKind = Literal["yes_no", "word", "score"]


@dataclass(frozen=True)
class Question:
    """One question to a picture of a prompt.

    Attributes:
        id: unique within its prompt.
        text: as it is put to a judge, without instructions how to answer.
        expected: the answer that a picture which follows the prompt gets: "yes", "no", a word such as "three", or
            "" where the answer is a score from 1 to 5.
        parents: ids of questions that must be right too, e.g. "Is there a chef?" for "Does the chef wear white?".
        about: the part of the prompt that it asks about, word for word; "" if the benchmark does not say.
        category: for scores by category, e.g. "entity - whole".
        fact: where the exact checker of scenes looks the answer up: (place, "shape", "colour", "size" or several of
            them with blanks between) or ("", "background").
    """

    id: str
    text: str
    expected: str = "yes"
    parents: tuple[str, ...] = ()
    about: str = ""
    category: str = ""
    fact: tuple[str, str] | None = None

    @property
    def kind(self) -> AnswerKind:
        if not self.expected:
            return "score"
        return "yes_no" if self.expected.lower() in ("yes", "no") else "word"


@dataclass(frozen=True)
class Prompt:
    """A prompt, and what its picture is judged by.

    Attributes:
        text: the prompt.
        scene: the scene that it describes, where the exact checker of scenes can judge its picture.
        id: unique within a benchmark.
        category: for scores by category.
        twin_of: id of the long prompt that this one says in short; "" if it is no short twin.
        questions: see `Question`.
        extra: fields of the benchmark that its official score needs.
    """

    text: str
    scene: scenes.Scene | None = None
    id: str = ""
    category: str = ""
    twin_of: str = ""
    questions: tuple[Question, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        ids = [question.id for question in self.questions]
        if len(set(ids)) < len(ids):
            raise ValueError(
                f"prompt {self.id!r}: two questions share the id {next(i for i in ids if ids.count(i) > 1)!r}"
            )
        for question in self.questions:
            if unknown := [parent for parent in question.parents if parent not in ids]:
                raise ValueError(
                    f"prompt {self.id!r}, question {question.id!r}: its parent {unknown[0]!r} is no question of it"
                )


# -- files of one's own --------------------------------------------------------------------------------------


def read_prompts(source: str, check_scenes: bool | None = None) -> list[Prompt]:
    """Prompts of a file, or captions of the procedural world.

    Args:
        source: a .jsonl file (one object a line) or .json file (a list of objects) with `prompt` and, if wanted, `id`,
            `category`, `short` (its short twin) and `questions`, see `Question`; a text file with one prompt a line; or
            `scenes:N` for N held-out scene captions.
        check_scenes: read each prompt as a scene's caption; None does so where all of them can be read.

    Raises:
        ValueError: no such file, a format that is none of these, a line that is no prompt, no prompt at all, an id
            that recurs, or a prompt that describes no scene although `check_scenes` is set.
    """
    name, colon, number = source.partition(":")
    if colon and name in SCENE_SETS:
        if not number.isdecimal() or int(number) < 1:
            raise ValueError(f"prompts {source!r}: give the number of scenes, like {name}:64")
        return number_prompts([SCENE_SETS[name](index) for index in range(int(number))])
    found = list(_read_file(Path(source)))
    if not found:
        raise ValueError(f"{source}: it holds no prompt")
    prompts = [prompt for _, twins in found for prompt in twins]
    lines = [line for line, twins in found for _ in twins]
    _check_ids(source, lines, prompts)
    return number_prompts(_with_scenes(source, lines, prompts, check_scenes))


def number_prompts(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts, with their number as id where they have none and the checker's questions where they have a scene."""
    return [
        replace(
            prompt,
            id=prompt.id or f"{number:05d}",
            questions=prompt.questions or (scene_questions(prompt.text, prompt.scene) if prompt.scene else ()),
        )
        for number, prompt in enumerate(prompts)
    ]


def _with_scenes(
    source: str, lines: Sequence[int], prompts: Sequence[Prompt], check_scenes: bool | None
) -> Sequence[Prompt]:
    if check_scenes is False:
        return prompts
    found = []
    for line, prompt in zip(lines, prompts, strict=True):
        try:
            scene = scenes.read_caption(prompt.text)
            if not scene.objects:  # "a red bicycle against a white wall" has a background, too
                raise ValueError("it names no object of the world")
            found.append(replace(prompt, scene=scene))
        except ValueError as error:
            if check_scenes:
                raise ValueError(f"{source}:{line}: no scene's caption: {error}") from None
            return prompts
    return found


def _check_ids(source: str, lines: Sequence[int], prompts: Sequence[Prompt]) -> None:
    first: dict[str, int] = {}
    for line, prompt in zip(lines, prompts, strict=True):
        if prompt.id and first.setdefault(prompt.id, line) != line:
            raise ValueError(f"{source}:{line}: id {prompt.id!r} stands in line {first[prompt.id]} already")


def _read_file(path: Path) -> Iterator[tuple[int, list[Prompt]]]:
    """(line number, the prompt and its short twin, if any) of a file."""
    if path.is_dir():
        inside = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise ValueError(
            f"prompts {str(path)!r}: a folder with {inside}; of no benchmark that is known (see --benchmark)"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts {str(path)!r}: not a readable text file: {error}") from None
    start = text.lstrip()[:1]
    if path.suffix == ".json":
        yield from _read_list(path, text)
        return
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                yield number, _as_prompts(f"{path}:{number}", _parsed(f"{path}:{number}", line))
        return
    if start in ("{", "[") or path.suffix in (".csv", ".tsv", ".parquet", ".yaml", ".yml"):
        what = "JSON" if start in ("{", "[") else f"a {path.suffix} table"
        raise ValueError(
            f"prompts {str(path)!r}: it looks like {what}; a text file has one prompt a line, name the file .json or "
            ".jsonl if it holds objects with `prompt`"
        )
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield number, [Prompt(line.strip())]


def _parsed(where: str, text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        raise ValueError(f"{where}: expected a JSON object with `prompt`") from None


def _read_list(path: Path, text: str) -> Iterator[tuple[int, list[Prompt]]]:
    try:
        rows = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(rows, list):
        found = f"an object with {', '.join(list(rows)[:5])}" if isinstance(rows, dict) else type(rows).__name__
        raise ValueError(f"{path}: expected a list of objects with `prompt`, found {found}")
    for number, row in enumerate(rows, 1):
        yield number, _as_prompts(f"{path}, entry {number}", row)


FIELDS = ("prompt", "id", "category", "short", "questions")
QUESTION_FIELDS = ("id", "text", "expected", "parents", "about", "category", "fact")


def _as_prompts(where: str, row: Any) -> list[Prompt]:
    if not isinstance(row, Mapping) or "prompt" not in row:
        found = f", found {', '.join(list(row)[:6]) or 'none'}" if isinstance(row, Mapping) else ""
        raise ValueError(f"{where}: expected a JSON object with `prompt`{found}")
    for name in ("prompt", "short"):
        text = row.get(name)
        if (name == "prompt" or text is not None) and (not isinstance(text, str) or not text.strip()):
            raise ValueError(f"{where}: {name} is {text!r}, it must be a text")
    questions = tuple(_as_question(where, n, q) for n, q in enumerate(row.get("questions") or (), 1))
    try:
        long = Prompt(
            row["prompt"].strip(),
            id=str(row.get("id", "")),
            category=str(row.get("category", "")),
            questions=questions,
        )
        if row.get("short") is None:
            return [long]
        if not long.id:
            raise ValueError("a prompt with `short` needs an `id`")
        twin_questions = tuple(replace(q, about=q.about if q.about in row["short"] else "") for q in questions)
        twin = replace(
            long, text=row["short"].strip(), id=f"{long.id}/short", twin_of=long.id, questions=twin_questions
        )
        return [long, twin]
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _as_question(where: str, number: int, row: Any) -> Question:
    if isinstance(row, str):
        row = {"text": row}
    if not isinstance(row, Mapping) or not isinstance(row.get("text"), str) or not row["text"].strip():
        raise ValueError(f"{where}: question {number} is {row!r}; expected an object with `text`")
    if unknown := [key for key in row if key not in QUESTION_FIELDS]:
        raise ValueError(f"{where}: question {number} has {unknown[0]!r}; valid are {', '.join(QUESTION_FIELDS)}")
    fact = row.get("fact")
    return Question(
        id=str(row.get("id", number)),
        text=row["text"].strip(),
        expected=str(row.get("expected", "yes")),
        parents=tuple(map(str, row.get("parents") or ())),
        about=str(row.get("about") or ""),
        category=str(row.get("category", "")),
        fact=None if fact is None else (str(fact[0]), str(fact[1])),
    )


def as_row(prompt: Prompt) -> dict[str, Any]:
    """A prompt as plain data for JSON; `from_row` reads it back."""
    questions = [{key: getattr(q, key) for key in QUESTION_FIELDS} for q in prompt.questions]
    scene = None if prompt.scene is None else prompt.scene.to_dict()
    return {
        "id": prompt.id, "prompt": prompt.text, "category": prompt.category, "twin_of": prompt.twin_of,
        "questions": questions, "scene": scene, "extra": dict(prompt.extra),
    }  # fmt: skip


# -- questions about scenes ----------------------------------------------------------------------------------


def scene_questions(text: str, scene: scenes.Scene) -> tuple[Question, ...]:
    """Two questions for each object and one for the background, each with the sentence that it is about.

    "Is there a star in the centre?" is the parent of "Is the star in the centre red?". Where the text has references,
    one question more for each asks for what it gives, see `reference_questions`.
    """
    spans = {span.place: text[span.start : span.end].strip() for span in scenes.annotate_caption(text).spans}
    questions = list(reference_questions(text, scene))
    for item in scene.objects:
        where = "in the centre" if item.place == "centre" else f"at the {item.place}"
        about = spans.get(item.place, "")
        shape = f"{item.place}/shape"
        questions += [
            Question(
                shape, f"Is there a {item.shape} {where}?", about=about, category="shape", fact=(item.place, "shape")
            ),
            Question(
                f"{item.place}/colour", f"Is the {item.shape} {where} {item.colour}?", parents=(shape,), about=about,
                category="colour", fact=(item.place, "colour"),
            ),
        ]  # fmt: skip
    background = Question(
        "background", f"Is the background {scene.background}?", category="background", fact=("", "background")
    )
    return (*questions, background)


def reference_questions(text: str, scene: scenes.Scene) -> Iterator[Question]:
    """ "Is the object in the centre red?", where only another sentence says so: one question for each reference.

    Its category is the distance to this other sentence, e.g. "reference over 150", in words and punctuation marks:
    CLIP's tokens, but for a few.
    """
    caption = scenes.annotate_caption(text)
    objects = {item.place: item for item in scene.objects}
    distances = scenes.reference_distances(caption, scenes.count_words) if caption.references else []
    spans = {span.place: text[span.start : span.end].strip() for span in caption.spans}
    for reference, distance in zip(caption.references, distances, strict=True):
        item = objects[reference.place]
        where = "in the centre" if item.place == "centre" else f"at the {item.place}"
        values = [getattr(item, kind) for kind in ("size", "colour", "shape") if kind in reference.properties]
        what = with_articles(" ".join(["a", *values])) if "shape" in reference.properties else " ".join(values)
        yield Question(
            f"{item.place}/reference",
            f"Is the object {where} {what}?",
            about=spans[item.place],
            category=f"reference {scenes.distance_bucket(distance)}",
            fact=(item.place, " ".join(reference.properties)),
        )


def held_out_scene(index: int) -> Prompt:
    """A scene of nine objects in sentences and words that no training caption has."""
    scene = scenes.scene_at(1, index, num_objects=len(scenes.PLACES))
    return Prompt(scenes.long_caption(scene, index, split="heldout").text, scene)


def referring_scene(index: int) -> Prompt:
    """A held-out caption with references: each kind at each distance once in 16 prompts."""
    scene, caption = scenes.reference_at(1, index, split="heldout")
    return Prompt(caption.text, scene)


# NAME:N takes the first N of a set.
SCENE_SETS: dict[str, Callable[[int], Prompt]] = {"scenes": held_out_scene, "scenes-references": referring_scene}


# -- where a question's subject lies -------------------------------------------------------------------------


@dataclass(frozen=True)
class Sentence:
    """A sentence of a prompt and where it lies, see the top of this file."""

    text: str
    zone: str


@dataclass(frozen=True)
class Place:
    """Where the sentence that a question is about lies in its prompt, in tokens of text counted from 1.

    Attributes:
        zone: "before", "across", "after" or "past", see the top of this file, or "whole" if it is about no one
            sentence.
        first, last: its tokens; 0 for "whole".
        window: the window of 75 tokens that its last token lies in, from 1; 0 for "whole".
    """

    zone: str
    first: int = 0
    last: int = 0

    @property
    def window(self) -> int:
        return 0 if self.zone == WHOLE else (self.last - 1) // WINDOW + 1


class PromptTokens:
    """The tokens of one prompt and where its sentences lie.

    Args:
        text: the prompt.
        tokenizer: counts the tokens, and says how many fit into one pass (248).
    """

    def __init__(self, text: str, tokenizer: FixClipTokenizer):
        self.text = str(tokenizer.clean(text))
        encoded = tokenizer(tokenizer.clean(text), add_special_tokens=False, return_offsets_mapping=True)
        self.offsets = [(int(start), int(end)) for start, end in encoded["offset_mapping"]]
        self.context_length = tokenizer.context_length
        spans = [
            (start + _leading(self.text[start:end]), start + len(self.text[start:end].rstrip()))
            for start, end in split_sentences(self.text)
        ]
        self.sentences = [(start, end) for start, end in spans if end > start]

    @property
    def num_tokens(self) -> int:
        """Length in tokens, start and end included."""
        return len(self.offsets) + 2

    def place(self, start: int, end: int) -> Place:
        """Where characters start..end lie."""
        caption = scenes.Caption(self.text, (scenes.Span(start, end, ""),))
        ((first, last),) = scenes.token_ranges(caption, self.offsets)
        zone = scenes.object_zones(caption, self.offsets, long_length=self.context_length)[""]
        return Place(zone, first, last)

    def find(self, question: Question) -> Place:
        """Where a question's subject lies: what it is `about`, else the sentence that shares most words with it.

        A word counts the more, the fewer sentences have it. Where no sentence shares a word, or two share equally
        much, the place is "whole". Questions answered by a score are about the whole prompt.
        """
        if question.about:
            about = " ".join(question.about.split())
            start = self.text.find(about)
            return self.place(start, start + len(about)) if start >= 0 else Place(WHOLE)
        if question.kind == "score":
            return Place(WHOLE)
        words = [_content_words(self.text[start:end]) for start, end in self.sentences]
        wanted = _content_words(question.text)
        shared = [sum(1 / sum(word in other for other in words) for word in wanted & own) for own in words]
        best = max(shared, default=0.0)
        if best == 0 or (shared.count(best) > 1):
            return Place(WHOLE)
        return self.place(*self.sentences[shared.index(best)])


_COMMON = frozenset(
    re.findall(
        r"\w+",
        "a an the is are was were be been being do does did there here this that these those it its in on at of to "
        "from by with without and or not no yes any some all as for how many what which who whose where when image "
        "picture photo scene shown show shows present visible appear appears have has had",
    )
)


def _content_words(text: str) -> set[str]:
    """Words without a final s and without the commonest words: "Are the chefs' hats white?" -> chef, hat, white."""
    words = re.findall(r"[^\W_]+", text.lower())
    return {word.removesuffix("s") for word in words if word not in _COMMON}


def sentences(text: str, tokenizer: FixClipTokenizer) -> list[Sentence]:
    """The sentences of a prompt in their order, as `tokenizer` reads them."""
    tokens = PromptTokens(text, tokenizer)
    return [Sentence(tokens.text[start:end], tokens.place(start, end).zone) for start, end in tokens.sentences]


def _leading(text: str) -> int:
    return len(text) - len(text.lstrip())
