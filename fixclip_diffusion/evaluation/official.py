"""The scores as each benchmark's own scorer computes them, from the same answers, quirks included and named.

They compare with published figures only if judge, resolution and number of pictures are the published ones too.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Any

from fixclip_diffusion.evaluation.answers import Answer
from fixclip_diffusion.evaluation.prompts import SCALE, Prompt

LEAST = 1e-12  # a probability of 0 would make a geometric mean 0, whatever the others


def _by_picture(answers: Iterable[Answer]) -> dict[str, dict[int, dict[str, Answer]]]:
    """{prompt: {seed: {question: answer}}} of those that have an answer."""
    found: dict[str, dict[int, dict[str, Answer]]] = {}
    for answer in answers:
        if answer.right is not None:
            found.setdefault(answer.prompt, {}).setdefault(answer.seed, {})[answer.question] = answer
    return found


def dpg(prompts: Sequence[Prompt], answers: Iterable[Answer], seeds: Sequence[int]) -> dict[str, Any]:
    """DPG-Bench as compute_dpg_bench.py scores it.

    Its quirks: the first row of the CSV is passed over, so the first prompt lacks its first question; a prompt that
    any error stops, such as a child whose parent was passed over or a picture that is missing, is left out of the
    mean, which rises; the scores of categories are those of the last picture, before parents count.
    """
    found = _by_picture(answers)
    means: list[float] = []
    categories: dict[str, list[float]] = {}
    left_out = []
    for prompt in prompts:
        lost = prompt.extra.get("first_row")
        questions = [question for question in prompt.questions if question.id != lost]
        own = found.get(prompt.id, {})
        complete = all(question.id in own.get(seed, {}) for seed in seeds for question in questions)
        if not complete or not questions or any(lost in question.parents for question in questions):
            left_out.append(prompt.id)
            continue
        pictures = []
        for seed in seeds:
            right = {question.id: float(own[seed][question.id].answer == "yes") for question in questions}
            before = dict(right)
            for question in questions:  # in the order of the rows, so that a parent may be 0 because of its own
                if any(right[parent] == 0 for parent in question.parents):
                    right[question.id] = 0.0
            pictures.append(fmean(right.values()))
        means.append(fmean(pictures))
        for question in questions:
            categories.setdefault(question.category, []).append(before[question.id])
    broad: dict[str, list[float]] = {}
    for category, values in categories.items():
        broad.setdefault(category.split("-")[0].strip(), []).extend(values)
    return {
        "DPG-Bench score": 100 * fmean(means) if means else None,
        "categories": {name: 100 * fmean(values) for name, values in sorted(broad.items())},
        "detailed categories": {name: 100 * fmean(values) for name, values in sorted(categories.items())},
        "left out": left_out,
    }


def tiif(prompts: Sequence[Prompt], answers: Iterable[Answer], seeds: Sequence[int]) -> dict[str, Any]:
    """TIIF-Bench: of each dimension and length the share of right answers, and the mean of those shares.

    Its quirk: a picture that is missing, or whose answers are not all there, is left out.
    """
    found = _by_picture(answers)
    right: dict[str, list[float]] = {}
    left_out = []
    for prompt in prompts:
        for seed in seeds:
            own = found.get(prompt.id, {}).get(seed, {})
            if any(question.id not in own for question in prompt.questions):
                left_out.append(prompt.id)
                continue
            length = "short" if prompt.twin_of else "long"
            values = [float(own[q.id].answer == q.expected) for q in prompt.questions]
            right.setdefault(f"{prompt.category} {length}", []).extend(values)
    shares = {name: fmean(values) for name, values in sorted(right.items())}
    return {"mean accuracy": fmean(shares.values()) if shares else None, "accuracy": shares, "left out": left_out}


def longbench(prompts: Sequence[Prompt], answers: Iterable[Answer], seeds: Sequence[int]) -> dict[str, Any]:
    """LongBench-T2I: mean score from 1 to 5, of the prompts and of each dimension.

    Its quirks: a prompt without a picture is left out; a dimension without a score counts 0 in its prompt's mean and
    is left out of its dimension's; means are rounded to two places before they are averaged.
    """
    found = _by_picture(answers)
    means: list[float] = []
    dimensions: dict[str, list[int]] = {}
    left_out = []
    for prompt in prompts:
        for seed in seeds:
            own = found.get(prompt.id, {}).get(seed, {})
            if not own:
                left_out.append(prompt.id)
                continue
            score = {q.id: int(own[q.id].answer or 0) for q in prompt.questions if q.id in own}
            means.append(round(sum(score.values()) / len(prompt.questions), 2))
            for name, value in score.items():
                dimensions.setdefault(name, []).append(value)
    return {
        f"average score of {SCALE}": round(fmean(means), 2) if means else None,
        "dimensions": {name: round(fmean(values), 2) for name, values in dimensions.items()},
        "left out": left_out,
    }


def geneval2(prompts: Sequence[Prompt], answers: Iterable[Answer], seeds: Sequence[int]) -> dict[str, Any]:
    """GenEval 2's Soft-TIFA: arithmetic (AM) and geometric mean (GM) of the probabilities of a prompt's right answers.

    A judge without probabilities gives 1 or 0, which is TIFA and not Soft-TIFA: "probabilities" says so. AM is by
    skill, GM by the number of atoms. A question without an answer counts 0.
    """
    found = _by_picture(answers)
    arithmetic: list[float] = []
    geometric: list[float] = []
    skills: dict[str, list[float]] = {}
    atoms: dict[str, list[float]] = {}
    soft = True
    for prompt in prompts:
        for seed in seeds:
            own = found.get(prompt.id, {}).get(seed, {})
            values = []
            for question in prompt.questions:
                answer = own.get(question.id)
                if answer is not None and answer.probability is None:
                    soft = False
                value = (
                    0.0
                    if answer is None
                    else float(answer.right or 0)
                    if answer.probability is None
                    else answer.probability
                )
                values.append(value)
                skills.setdefault(question.category, []).append(value)
            arithmetic.append(fmean(values))
            geometric.append(math.exp(fmean(math.log(max(value, LEAST)) for value in values)))
            atoms.setdefault(str(prompt.extra["atom_count"]), []).append(geometric[-1])
    return {
        "AM": 100 * fmean(arithmetic),
        "GM": 100 * fmean(geometric),
        "AM by skill": {name: 100 * fmean(values) for name, values in sorted(skills.items())},
        "GM by atoms": {name: 100 * fmean(values) for name, values in sorted(atoms.items(), key=lambda i: int(i[0]))},
        "probabilities": soft,
    }


Official = Callable[[Sequence[Prompt], Iterable[Answer], Sequence[int]], dict[str, Any]]

OFFICIAL: dict[str, Official] = {"dpg": dpg, "tiif": tiif, "longbench": longbench, "geneval2": geneval2}
