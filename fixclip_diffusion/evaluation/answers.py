"""Asking judges about all pictures, so that no answer is asked for twice and none is lost.

Each answer is one line of JSON in answers/JUDGE/PROCESS.jsonl, written when it comes. A run that was stopped, or whose
judge went
down, goes on where it was: what has an answer is not asked again; what has a problem instead of one is.
"""

import hashlib
import itertools
import json
import logging
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from fixclip_diffusion.evaluation.generate import Picture
from fixclip_diffusion.evaluation.judges import MISSING, UNREADABLE, Judge, JudgeError, Reply
from fixclip_diffusion.evaluation.prompts import Prompt, Question

logger = logging.getLogger(__name__)

Key = tuple[str, str, int, str]  # system, prompt, seed, question


@dataclass(frozen=True)
class Answer:
    """A line of the answers' file.

    Attributes:
        system, prompt, seed, question: names of the system, ids of prompt and question, and the picture's seed.
        text, expected: what was asked, and what a right picture is answered.
        answer, right, probability, problem, reply, token_probability: see `judges.Reply`; its `raw` is the reply here.
        judge: its name.
        picture: the file, and `digest` a hash of its content: a picture that changed is judged again.
    """

    system: str
    prompt: str
    seed: int
    question: str
    text: str
    expected: str
    answer: str | None
    right: float | None
    probability: float | None
    problem: str
    reply: str
    judge: str
    picture: str | None
    digest: str
    token_probability: float | None = None  # files of version 0.1 lack it

    @property
    def key(self) -> Key:
        return self.system, self.prompt, self.seed, self.question


@dataclass(frozen=True)
class Work:
    """A picture and what it is to be asked."""

    system: str
    prompt: Prompt
    picture: Picture
    digest: str
    questions: tuple[Question, ...]


def read_answers(folder: Path) -> dict[Key, Answer]:
    """All answers of one judge; of several lines about the same question one with an answer counts, else the last.

    A line that was cut off, as a process that is killed leaves it, is passed over.
    """
    found: dict[Key, Answer] = {}
    for file in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            try:
                answer = Answer(**json.loads(line))
            except (ValueError, TypeError):
                logger.warning("%s:%d: not a whole line, it is asked again", file, number)
                continue
            before = found.get(answer.key)
            if before is None or answer.right is not None or before.right is None or before.digest != answer.digest:
                found[answer.key] = answer
    return found


def find_work(
    system: str, prompts: Sequence[Prompt], pictures: Sequence[Sequence[Picture]], known: Mapping[Key, Answer]
) -> tuple[list[Work], list[Answer]]:
    """What is still to be asked, and the answers that stand."""
    work, standing = [], []
    for prompt, own in zip(prompts, pictures, strict=True):
        for picture in own:
            digest = _digest(picture)
            questions = []
            for question in prompt.questions:
                answer = known.get((system, prompt.id, picture.seed, question.id))
                same = answer is not None and (answer.digest, answer.text, answer.expected) == (
                    digest, question.text, question.expected,
                )  # fmt: skip
                if answer is not None and same and answer.right is not None:
                    standing.append(answer)
                else:
                    questions.append(question)
            if questions:
                work.append(Work(system, prompt, picture, digest, tuple(questions)))
    return work, standing


def _digest(picture: Picture) -> str:
    if picture.path is None or not picture.path.is_file():
        return ""
    return hashlib.blake2b(picture.path.read_bytes(), digest_size=8).hexdigest() + f"/{picture.tile or 0}"


def ask(judge: Judge, work: Sequence[Work], file: Path) -> list[Answer]:
    """Ask everything and append each answer to `file` as it comes.

    Raises:
        JudgeError: the judge is down or refuses everything; says how many answers are kept.
    """
    if not work:
        return []
    file.parent.mkdir(parents=True, exist_ok=True)
    _end_last_line(file)
    answers: list[Answer] = []
    stop, lock = threading.Event(), threading.Lock()
    total = sum(len(item.questions) for item in work)
    with file.open("a", encoding="utf-8") as out, tqdm(total=total, desc=judge.name, unit="question") as bar:

        def run(item: Work) -> None:
            for answer in _replies(judge, item):
                with lock:
                    _write(out, answer)
                    answers.append(answer)
                    bar.update()
                if stop.is_set():
                    return

        with ThreadPoolExecutor(judge.workers) as pool:
            futures = [pool.submit(run, item) for item in work]
            try:
                for future in futures:
                    future.result()
            except BaseException as error:
                stop.set()
                pool.shutdown(cancel_futures=True)
                if isinstance(error, JudgeError):
                    raise JudgeError(
                        f"{error}; {len(answers)} of {total} questions of this run were answered and are kept: the "
                        "same command goes on from there"
                    ) from error
                raise
    return answers


def _replies(judge: Judge, item: Work) -> Iterator[Answer]:
    try:
        image = item.picture.load()
    except OSError as error:
        reply = Reply(str(error), problem=MISSING if item.picture.path is None else UNREADABLE)
        replies: Iterator[Reply] = itertools.repeat(reply, len(item.questions))
    else:
        replies = judge.answers(image, item.prompt, item.questions)
    for question, reply in zip(item.questions, replies, strict=True):
        path = item.picture.path
        yield Answer(
            system=item.system,
            prompt=item.prompt.id,
            seed=item.picture.seed,
            question=question.id,
            text=question.text,
            expected=question.expected,
            answer=reply.answer,
            right=reply.right,
            probability=reply.probability,
            problem=reply.problem,
            reply=reply.raw,
            judge=judge.name,
            picture=None if path is None else path.name,
            digest=item.digest,
            token_probability=reply.token_probability,
        )


def _write(out: TextIO, answer: Answer) -> None:
    out.write(json.dumps(asdict(answer), ensure_ascii=False) + "\n")
    out.flush()


def _end_last_line(file: Path) -> None:
    """Close the line that a killed process left open, so that the next one is not joined to it."""
    if file.is_file() and (content := file.read_bytes()) and not content.endswith(b"\n"):
        with file.open("ab") as out:
            out.write(b"\n")


def problems(answers: Sequence[Answer]) -> dict[str, int]:
    """How many questions have no answer, by reason."""
    return dict(Counter(answer.problem for answer in answers if answer.problem))
