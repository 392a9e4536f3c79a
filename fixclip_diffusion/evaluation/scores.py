"""Scores over prompts: of all questions, and by where in the prompt the question's sentence lies.

Each prompt counts once in a mean, however many questions or pictures it has, and the standard error is over prompts.
Two systems are compared on the prompts they share, by a paired bootstrap.

Shape letters: N prompts, R resamplings.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fixclip_core import scenes
from fixclip_diffusion.evaluation.answers import Answer
from fixclip_diffusion.evaluation.prompts import WHOLE, ZONES, Place, Prompt, PromptTokens, Question
from fixclip_diffusion.tokenizer import FixClipTokenizer

NUM_RESAMPLINGS = 10_000
POSITION_STEP = 50  # tokens
LENGTHS = ((77, "up to 77"), (154, "78 to 154"), (248, "155 to 248"), (math.inf, "over 248"))

Interval = tuple[float, float]


@dataclass(frozen=True)
class Asked:
    """One question of one picture with its answer and its place.

    Attributes:
        prompt, question, place: what was asked and where its subject lies.
        num_tokens: length of the prompt, start and end included.
        right: from 0 to 1, after its parents; 0 without an answer.
        probability: of the expected answer, after its parents as `right`; `right` where the judge gives none.
        answered: whether it has an answer.
    """

    prompt: Prompt
    question: Question
    place: Place
    num_tokens: int
    right: float
    probability: float
    answered: bool


def after_parents(questions: Sequence[Question], value: Mapping[str, float]) -> dict[str, float]:
    """Values in which a question counts 0 where one of its parents does, and theirs: DPG-Bench's rule.

    Without the chef ("Is there a chef?": 0) nobody wears a white hat ("Does the chef wear a white hat?": 1 becomes 0).
    A parent of 0.5 and more is a yes.
    """
    parents = {question.id: question.parents for question in questions}
    known: dict[str, bool] = {}

    def holds(name: str, above: tuple[str, ...] = ()) -> bool:
        if name in above:  # a circle of parents
            return True
        if name not in known:
            known[name] = value[name] >= 0.5 and all(holds(parent, (*above, name)) for parent in parents[name])
        return known[name]

    return {q.id: value[q.id] if all(holds(parent, (q.id,)) for parent in q.parents) else 0.0 for q in questions}


def place_questions(prompts: Sequence[Prompt], tokenizer: FixClipTokenizer) -> dict[str, tuple[int, dict[str, Place]]]:
    """For each prompt's id its length in tokens, and the place of each of its questions."""
    found = {}
    for prompt in prompts:
        tokens = PromptTokens(prompt.text, tokenizer)
        found[prompt.id] = (tokens.num_tokens, {q.id: tokens.find(q) for q in prompt.questions})
    return found


def join(
    prompts: Sequence[Prompt],
    places: Mapping[str, tuple[int, Mapping[str, Place]]],
    answers: Iterable[Answer],
    seeds: Iterable[int],
) -> list[Asked]:
    """One entry for each question and picture of one system; what was never answered is there with 0."""
    by_picture: dict[tuple[str, int], dict[str, Answer]] = {}
    for answer in answers:
        by_picture.setdefault((answer.prompt, answer.seed), {})[answer.question] = answer
    found = []
    for prompt in prompts:
        num_tokens, own_places = places[prompt.id]
        for seed in seeds:
            own = by_picture.get((prompt.id, seed), {})
            right = {q.id: _value(own.get(q.id)) for q in prompt.questions}
            soft = {q.id: _probability(own.get(q.id)) for q in prompt.questions}
            right_after = after_parents(prompt.questions, right)
            for q in prompt.questions:
                lost = right_after[q.id] < right[q.id]
                answered = q.id in own and own[q.id].right is not None
                probability = 0.0 if lost else soft[q.id]
                found.append(Asked(prompt, q, own_places[q.id], num_tokens, right_after[q.id], probability, answered))
    return found


def _value(answer: Answer | None) -> float:
    return 0.0 if answer is None or answer.right is None else answer.right


def _probability(answer: Answer | None) -> float:
    return _value(answer) if answer is None or answer.probability is None else answer.probability


# -- means ---------------------------------------------------------------------------------------------------


def summarize(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, its standard error (None of a single value, which tells nothing of a spread) and how many."""
    number = len(values)
    mean = sum(values) / number
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (number - 1) / number) if number > 1 else None
    return {"mean": mean, "standard_error": spread, "count": number}


def by_prompt(asked: Iterable[Asked], value: Callable[[Asked], float] = lambda item: item.right) -> dict[str, float]:
    """The mean of each prompt's questions over all of its pictures."""
    found: dict[str, list[float]] = {}
    for item in asked:
        found.setdefault(item.prompt.id, []).append(value(item))
    return {name: sum(values) / len(values) for name, values in found.items()}


def length_of(num_tokens: int) -> str:
    """The class of lengths that a prompt belongs to, e.g. "78 to 154"."""
    return next(name for limit, name in LENGTHS if num_tokens <= limit)


def position_of(place: Place) -> str:
    """Where a sentence ends, in steps of 50 tokens, e.g. "51-100"."""
    if place.zone == WHOLE:
        return WHOLE
    start = (place.last - 1) // POSITION_STEP * POSITION_STEP
    return f"{start + 1}-{start + POSITION_STEP}"


GROUPS: dict[str, Callable[[Asked], str]] = {
    "zone": lambda item: item.place.zone,
    "window": lambda item: WHOLE if item.place.zone == WHOLE else f"window {item.place.window}",
    "position": lambda item: position_of(item.place),
    "length": lambda item: length_of(item.num_tokens),
    "question": lambda item: item.question.category or "-",
    "prompt": lambda item: item.prompt.category or "-",
}


def scores(asked: Sequence[Asked]) -> dict[str, Any]:
    """A system's scores: {"all", "probability", and for each of `GROUPS` {group: mean, standard error, count}}."""
    found: dict[str, Any] = {
        "all": summarize(list(by_prompt(asked).values())),
        "probability": summarize(list(by_prompt(asked, lambda item: item.probability).values())),
        "asked": len(asked),
        "unanswered": sum(not item.answered for item in asked),
    }
    for name, group in GROUPS.items():
        split: dict[str, list[Asked]] = {}
        for item in asked:
            split.setdefault(group(item), []).append(item)
        found[name] = {
            key: summarize(list(by_prompt(split[key]).values())) for key in sorted(split, key=lambda k: _order(name, k))
        }
    return found


def _order(group: str, key: str) -> tuple[int, str]:
    if key == WHOLE:
        return 10**9, key
    if group == "zone":
        return ZONES.index(key), key
    if group == "length":
        return [name for _, name in LENGTHS].index(key), key
    digits = "".join(c for c in key.split("-")[0] if c.isdecimal())
    return (int(digits) if group in ("window", "position") and digits else 0), key


def reference_guesses(prompts: Sequence[Prompt]) -> dict[str, dict[str, float]]:
    """How often questions about references are right by luck, by their category: {"reference over 150": ...}.

    "uniform" is a draw from all values of the world, "named" the values of an object of the prompt that names its own,
    "first" those of the first such object; see `scenes.blind_guess`. Each prompt counts once, as in `scores`.
    """
    found: dict[str, dict[str, list[scenes.Guess]]] = {}
    for prompt in prompts:
        if prompt.scene is None or not any(q.category.startswith("reference ") for q in prompt.questions):
            continue
        caption = scenes.annotate_caption(prompt.text)
        categories = {q.fact[0]: q.category for q in prompt.questions if q.fact and q.id.endswith("/reference")}
        for reference in caption.references:
            guess = scenes.blind_guess(prompt.scene, caption, reference)
            found.setdefault(categories[reference.place], {}).setdefault(prompt.id, []).append(guess)
    means = {
        category: np.mean([np.mean(own, axis=0) for own in by_prompt.values()], axis=0)
        for category, by_prompt in found.items()
    }
    ordered = [f"reference {bucket}" for bucket in scenes.DISTANCES]
    return {
        name: dict(zip(scenes.Guess._fields, means[name].tolist(), strict=True)) for name in ordered if name in means
    }


# -- differences ---------------------------------------------------------------------------------------------


def bootstrap_interval(difference_N: np.ndarray, seed: int = 0) -> Interval:
    """95 % interval of the mean of paired differences: prompts are drawn anew with replacement, 10,000 times."""
    rng = np.random.default_rng(seed)
    number = len(difference_N)
    means = []
    for _ in range(0, NUM_RESAMPLINGS, 500):  # (500, N) indices at a time
        index_RN = rng.integers(0, number, (500, number))
        means.append(difference_N[index_RN].mean(1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)


def compare(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, Any] | None:
    """Mean of a - b over the prompts that both have, its standard error and 95 % interval; None without any."""
    shared = [name for name in a if name in b]
    if not shared:
        return None
    difference = [a[name] - b[name] for name in shared]
    return {**summarize(difference), "interval": list(bootstrap_interval(np.array(difference)))}


def differences(by_system: Mapping[str, Sequence[Asked]]) -> list[dict[str, Any]]:
    """Every system against every earlier one: over all questions, and over those of each zone."""
    names = list(by_system)
    found = []
    for number, b in enumerate(names):
        for a in names[number + 1 :]:
            for zone in ("all", *ZONES):
                own, other = (by_prompt(i for i in by_system[name] if zone in ("all", i.place.zone)) for name in (a, b))
                if result := compare(own, other):
                    found.append({"a": a, "b": b, "zone": zone, **result})
    return found


def twins(asked: Sequence[Asked]) -> dict[str, Any] | None:
    """Long prompts against their short twins, for prompts that have both: what the additional words cost or bring."""
    each = by_prompt(asked)
    pairs = {i.prompt.twin_of: i.prompt.id for i in asked if i.prompt.twin_of in each}
    if not pairs:
        return None
    long = {name: each[name] for name in pairs}
    short = {name: each[twin] for name, twin in pairs.items()}
    return {
        "long": summarize(list(long.values())),
        "short": summarize(list(short.values())),
        "difference": compare(long, short),
    }


# -- cosines -------------------------------------------------------------------------------------------------


def clip_metrics(rows: Sequence[tuple[Sequence[str], Sequence[float]]]) -> dict[str, dict[str, float | None]]:
    """Means of a CLIP's cosines: "whole" and "sentence_ZONE".

    Args:
        rows: for each prompt the zones of its sentences, and the cosines of the prompt and of each sentence.
    """
    found: dict[str, list[float]] = {}
    for zones, (whole, *each) in rows:
        found.setdefault("whole", []).append(whole)
        for zone in ZONES:
            chosen = [score for own, score in zip(zones, each, strict=True) if own == zone]
            if chosen:
                found.setdefault(f"sentence_{zone}", []).append(sum(chosen) / len(chosen))
    return {name: summarize(values) for name, values in found.items()}
