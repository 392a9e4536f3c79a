"""Judges answer questions about pictures: the exact checker of scenes here, models in `vision_judges.py`.

A judge's reply becomes an answer by one rule for all judges, `read_reply`. What cannot be read as an answer is a
problem that is named; it counts 0 and is listed, see `answers.py`. Cosines of a CLIP are here too.

Shape letters: B pictures, C, H, W channels, height and width, E embedding width.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fixclip_core import scenes
from fixclip_core.evaluation.encoders import Encoder, encode_images, encode_texts
from fixclip_diffusion.evaluation.prompts import SCALE, Prompt, Question
from fixclip_diffusion.tokenizer import FixClipTokenizer

# -- replies -------------------------------------------------------------------------------------------------

REFUSED, NO_ANSWER, UNREADABLE, MISSING, FAILED = (
    "refused", "no answer", "picture unreadable", "picture missing", "request failed",
)  # fmt: skip
_NUMBERS = re.findall(
    r"\w+",
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty",
)
_REFUSAL = re.compile(
    r"\s*(i'?m sorry|i am sorry|sorry|i (can ?not|can't|won't|am unable|am not able)|as an ai)", re.IGNORECASE
)


class JudgeError(ValueError):
    """The judge can answer nothing any more: it is down, or refuses the model, the key or every request."""


@dataclass(frozen=True)
class Reply:
    """What a judge said to one question.

    Attributes:
        raw: the reply as it came.
        answer: "yes", "no", a word or a score from "1" to "5"; None if it is no answer.
        right: 1 if the answer is the expected one, 0 if not, (score - 1) / 4 of a score; None without an answer.
        probability: of the expected answer, where the judge gives probabilities of tokens: of "yes" and "no" together
            for questions answered by them, of all tokens else.
        problem: why there is no answer, "" if there is one.
        token_probability: of the expected answer among all tokens, for "yes" and "no", too: what the judge gave.
    """

    raw: str
    answer: str | None = None
    right: float | None = None
    probability: float | None = None
    problem: str = ""
    token_probability: float | None = None


class Judge(Protocol):
    """Answers questions about a picture.

    Attributes:
        name: for files and tables.
        workers: pictures that it is asked about at a time.
    """

    name: str
    workers: int

    def describe(self) -> dict[str, Any]:
        """What it is, for the report."""

    def answers(self, image: Image.Image, prompt: Prompt, questions: Sequence[Question]) -> Iterator[Reply]:
        """A reply to each question, in their order.

        Raises:
            JudgeError: it can answer nothing any more.
        """


def instruction(question: Question) -> str:
    """The question with how to answer it, as models are asked."""
    if question.kind == "yes_no":
        return f"{question.text} Answer with yes or no."
    if question.kind == "word":
        return f"{question.text} Answer with one word."
    return (
        "How well does the image show what follows? Look at this alone.\n\n"
        f"{question.text}\n\n"
        "5: all of it, as described. 4: with small differences. 3: in part, important things are missing or wrong. "
        "2: very little of it. 1: nothing of it. Answer with the number alone."
    )


def read_reply(question: Question, raw: str, token_probabilities: Mapping[str, float] | None = None) -> Reply:
    """A model's reply as an answer.

    Thoughts (`<think>...</think>`) are left out. Yes or no must begin the reply, follow "answer:" or stand on the last
    line alone: "there is no star, so..." is not read as no. With probabilities of the first token, the likelier of yes
    and no is the answer, whatever the text.

    Args:
        question: what was asked.
        raw: the reply.
        token_probabilities: probability of each candidate for the first token; None where the judge gives none.
    """
    text = re.sub(r"<think>.*?</think>", "", raw, flags=re.DOTALL).strip().strip("*`\"' ")
    if "<think>" in text:  # it thought until its tokens were used up
        return Reply(raw, problem=NO_ANSWER)
    read = {"yes_no": _read_yes_no, "word": _read_word, "score": _read_score}[question.kind]
    probabilities = token_probabilities if "</think>" not in raw else None
    by_word = _by_word(probabilities or {})
    answer, probability = read(question, text, by_word)
    if answer is None:
        return Reply(raw, problem=REFUSED if _REFUSAL.match(text) else NO_ANSWER)
    if question.kind == "score":
        return Reply(raw, answer, (int(answer) - 1) / (SCALE - 1))
    right = float(_same(answer, question.expected))
    if not probabilities:
        return Reply(raw, answer, right)
    share = sum(by_word.get(word, 0.0) for word in expected_words(question))
    return Reply(raw, answer, right, probability, token_probability=share)


def expected_words(question: Question) -> set[str]:
    """How the expected answer is written, in lower case: {"three", "3"}, {"yes"}."""
    expected = question.expected.lower()
    return {expected, str(_NUMBERS.index(expected)) if expected in _NUMBERS else expected}


def _by_word(probabilities: Mapping[str, float]) -> dict[str, float]:
    """Probabilities of " Yes", "YES" and "yes" added up under "yes"."""
    found: dict[str, float] = {}
    for token, probability in probabilities.items():
        word = token.strip(" ▁Ġ\n.,:*\"'").lower()
        found[word] = found.get(word, 0.0) + probability
    return found


def _read_yes_no(question: Question, text: str, by_word: Mapping[str, float]) -> tuple[str | None, float | None]:
    yes, no = by_word.get("yes", 0.0), by_word.get("no", 0.0)
    if yes + no >= 0.5:  # else the first token is the beginning of something else
        share = (yes if question.expected.lower() == "yes" else no) / (yes + no)
        return ("yes" if yes > no else "no"), share
    last_line = text.splitlines()[-1].strip(" *.`") if text else ""
    patterns = (
        re.match(r"\W*(yes|no)\b", text, re.IGNORECASE),
        re.search(r"\banswer(?: is)?\W{0,6}(yes|no)\b", text, re.IGNORECASE),
        re.fullmatch(r"(yes|no)", last_line, re.IGNORECASE),
    )
    match = next(filter(None, patterns), None)
    return (match[1].lower() if match else None), None


def _read_word(question: Question, text: str, by_word: Mapping[str, float]) -> tuple[str | None, float | None]:
    words = re.findall(r"[\w'-]+", text.lower())
    if not words or _REFUSAL.match(text):
        return None, None
    share = sum(by_word.get(word, 0.0) for word in expected_words(question))
    if _is_number(question.expected.lower()) and len(words) > 1:
        numbers = [word for word in words if _is_number(word)]
        return (numbers[0] if len(set(numbers)) == 1 else None), share
    if len(words) > 3:
        return None, share
    return " ".join(words), share


def _read_score(question: Question, text: str, by_word: Mapping[str, float]) -> tuple[str | None, float | None]:
    patterns = (
        re.match(r"\W*([1-5])(?:\s*/\s*5)?(?![\d.])", text),
        re.search(r"\bscore\W{0,8}([1-5])(?![\d.]\d)", text, re.IGNORECASE),
    )
    match = next(filter(None, patterns), None)
    return (match[1] if match else None), None


def _is_number(word: str) -> bool:
    return word.isdecimal() or word in _NUMBERS


def _same(answer: str, expected: str) -> bool:
    """Whether two answers are the same word, "3" and "Three" included."""

    def plain(word: str) -> str:
        word = re.sub(r"[^\w]", "", word.lower())
        return str(_NUMBERS.index(word)) if word in _NUMBERS else word

    return plain(answer) == plain(expected)


# -- the exact checker of scenes -----------------------------------------------------------------------------


class SceneChecker:
    """Compares each place of a picture with everything that the procedural world can draw there; it does not err."""

    name = "checker"
    workers = 1

    def describe(self) -> dict[str, Any]:
        return {"kind": "exact checker of scenes"}

    def answers(self, image: Image.Image, prompt: Prompt, questions: Sequence[Question]) -> Iterator[Reply]:
        """See `Judge`.

        Raises:
            JudgeError: the prompt describes no scene, or a question is none of `prompts.scene_questions`.
        """
        if prompt.scene is None or any(question.fact is None for question in questions):
            raise JudgeError(
                f"the checker judges scenes alone; prompt {prompt.id!r} has questions about something else"
            )
        (check,) = scenes.check_batch(as_tensor(image)[None], [prompt.scene])
        verdicts = {verdict.place: verdict for verdict in check.objects}
        for question in questions:
            assert question.fact is not None
            place, what = question.fact
            if what == "background":
                right, seen = check.background_right, check.background
            else:
                verdict = verdicts[place]
                right = all(getattr(verdict, f"{kind}_right") for kind in what.split())
                seen = "nothing" if verdict.seen is None else f"{verdict.seen.colour} {verdict.seen.shape}"
            yield Reply(f"{seen} seen", "yes" if right else "no", float(right))


# -- cosines -------------------------------------------------------------------------------------------------


@torch.no_grad()
def text_scores(
    pictures: Sequence[Sequence[Image.Image]], texts: Sequence[Sequence[str]], encoder: Encoder
) -> list[list[float]]:
    """Cosine between a prompt's pictures (mean over them) and each of its texts.

    Args:
        pictures: of each prompt.
        texts: of each prompt, any number.
        encoder: a CLIP; choose one that reads as many tokens as the prompts have.
    """
    flat = [text for those in texts for text in those]
    text_TE, _ = encode_texts(encoder, flat)
    scores, start = [], 0
    for those, own in zip(pictures, texts, strict=True):
        image_BE = encode_images(encoder, torch.stack([encoder.preprocess(picture) for picture in those]))
        cosine_BT = image_BE @ text_TE[start : start + len(own)].T
        scores.append(cosine_BT.mean(0).tolist())
        start += len(own)
    return scores


def scene_verdicts(pictures: Sequence[Image.Image], prompt: Prompt, tokenizer: FixClipTokenizer) -> dict[str, Any]:
    """What the exact checker says of a scene's pictures: each object's zone, and whether it is right."""
    assert prompt.scene is not None
    clean = tokenizer.clean(prompt.text)
    offsets = tokenizer(clean, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    zones = scenes.object_zones(scenes.annotate_caption(str(clean)), offsets, long_length=tokenizer.context_length)
    objects = []
    checks = scenes.check_batch(torch.stack([as_tensor(p) for p in pictures]), [prompt.scene] * len(pictures))
    for check in checks:
        objects += [
            {"zone": zones[v.place], "right": v.right, "shape": v.shape_right, "colour": v.colour_right}
            for v in check.objects
        ]
    return {"objects": objects, "background": [check.background_right for check in checks]}


def as_tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
