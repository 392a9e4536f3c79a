"""The scores as each benchmark's own scorer computes them, from the same answers, quirks included and named.

They compare with published figures only if judge, resolution and number of pictures are the published ones too.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Any

from fixclip_diffusion.evaluation.answers import Answer
from fixclip_diffusion.evaluation.judges import NO_ANSWER, REFUSED
from fixclip_diffusion.evaluation.prompts import SCALE, Prompt


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
    any error stops is left out of the mean, which rises: a picture that is missing, or a child whose parent was passed
    over, unless another parent that stands before it is no; the scores of categories are those of the last picture,
    before parents count.
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
        pictures = []
        try:
            for seed in seeds if complete and questions else ():
                right = {question.id: float(own[seed][question.id].answer == "yes") for question in questions}
                before = dict(right)
                for question in questions:  # in the order of the rows, so that a parent may be 0 because of its own
                    if any(right[parent] == 0 for parent in question.parents):
                        right[question.id] = 0.0
                pictures.append(fmean(right.values()))
        except KeyError:  # the parent that was passed over
            pictures = []
        if not pictures:
            left_out.append(prompt.id)
            continue
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
    """TIIF-Bench: of each dimension and length the share of right answers, and means of those shares.

    "overall short" and "overall long" are the mean over nine groups of the mean over each group's dimensions; "mean
    accuracy" is that over all dimensions and lengths. Its quirks: a picture that is missing, or whose answers are not
    all there, is left out; shares are rounded to four places before the groups' means are taken.
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
    groups: dict[str, list[float]] = {}
    for name, share in shares.items():
        dimension, length = name.rsplit(" ", 1)
        groups.setdefault(f"{tiif_group(dimension)} {length}", []).append(round(share, 4))
    means = {name: fmean(values) for name, values in sorted(groups.items())}
    by_length = {
        length: [mean for name, mean in means.items() if name.endswith(f" {length}")] for length in ("short", "long")
    }
    return {
        **{f"overall {length}": fmean(values) if values else None for length, values in by_length.items()},
        "groups": means,
        "mean accuracy": fmean(shares.values()) if shares else None,
        "accuracy": shares,
        "left out": left_out,
    }


TIIF_KINDS = {
    **dict.fromkeys(("color", "texture", "shape"), "attribute"),
    **dict.fromkeys(("2d", "3d", "action", "2d_spatial_relation", "3d_spatial_relation"), "relation"),
    **dict.fromkeys(("numeracy", "negation", "differentiation", "comparison"), "reasoning"),
}


def tiif_group(dimension: str) -> str:
    """The group of a dimension: "action+color" is "attribute+relation", "color+texture" is "attribute"."""
    return "+".join(sorted({TIIF_KINDS.get(part, part) for part in dimension.split("+")}))


def longbench(prompts: Sequence[Prompt], answers: Iterable[Answer], seeds: Sequence[int]) -> dict[str, Any]:
    """LongBench-T2I: mean score from 1 to 5, of the prompts and of each dimension.

    Its quirks: a prompt without a picture is left out; a dimension whose reply holds no score counts 0 in its prompt's
    mean and is left out of its dimension's; one whose request failed is left out of both; means are rounded to two
    places before they are averaged.
    """
    found: dict[tuple[str, int], dict[str, Answer]] = {}
    for answer in answers:
        if answer.problem in ("", NO_ANSWER, REFUSED):
            found.setdefault((answer.prompt, answer.seed), {})[answer.question] = answer
    means: list[float] = []
    dimensions: dict[str, list[int]] = {}
    left_out = []
    for prompt in prompts:
        for seed in seeds:
            own = found.get((prompt.id, seed), {})
            if not own:
                left_out.append(prompt.id)
                continue
            score = {q.id: int(own[q.id].answer or 0) for q in prompt.questions if q.id in own}
            means.append(round(fmean(score.values()), 2))
            for name, value in score.items():
                if value:
                    dimensions.setdefault(name, []).append(value)
    return {
        f"average score of {SCALE}": round(fmean(means), 2) if means else None,
        "dimensions": {name: round(fmean(values), 2) for name, values in dimensions.items()},
        "left out": left_out,
    }


def geneval2(prompts: Sequence[Prompt], answers: Iterable[Answer], seeds: Sequence[int]) -> dict[str, Any]:
    """GenEval 2's Soft-TIFA: arithmetic (AM) and geometric mean (GM) of the probabilities of a prompt's right answers.

    The probability is that of the answer among all tokens. A judge without probabilities gives 1 or 0, which is TIFA
    and not Soft-TIFA: "probabilities" says so. AM is by skill, GM by the number of atoms. A question without an answer
    counts 0. One answer of probability 0 makes a prompt's GM 0; a server names the likeliest tokens alone, so
    "answers of probability 0" says how many were none of those, and GM is a lower bound then.
    """
    found = _by_picture(answers)
    arithmetic: list[float] = []
    geometric: list[float] = []
    skills: dict[str, list[float]] = {}
    atoms: dict[str, list[float]] = {}
    soft, zeros = True, 0
    for prompt in prompts:
        for seed in seeds:
            own = found.get(prompt.id, {}).get(seed, {})
            values = []
            for question in prompt.questions:
                answer = own.get(question.id)
                share = None if answer is None else answer.token_probability
                if answer is not None and share is None:
                    soft, share = False, answer.right
                value = share or 0.0
                zeros += answer is not None and value == 0
                values.append(value)
                skills.setdefault(question.category, []).append(value)
            arithmetic.append(fmean(values))
            geometric.append(math.exp(fmean(map(math.log, values))) if all(values) else 0.0)
            atoms.setdefault(str(prompt.extra["atom_count"]), []).append(geometric[-1])
    return {
        "AM": 100 * fmean(arithmetic),
        "GM": 100 * fmean(geometric),
        "AM by skill": {name: 100 * fmean(values) for name, values in sorted(skills.items())},
        "GM by atoms": {name: 100 * fmean(values) for name, values in sorted(atoms.items(), key=lambda i: int(i[0]))},
        "probabilities": soft,
        "answers of probability 0": zeros,
    }


Official = Callable[[Sequence[Prompt], Iterable[Answer], Sequence[int]], dict[str, Any]]

OFFICIAL: dict[str, Official] = {"dpg": dpg, "tiif": tiif, "longbench": longbench, "geneval2": geneval2}
