"""Scores against numbers that were computed by hand, official quirks included, and where two runs differ."""

import json
from dataclasses import replace

import benchmark_folders as folders
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixclip_diffusion.evaluation import official, scores
from fixclip_diffusion.evaluation.answers import Answer
from fixclip_diffusion.evaluation.benchmarks import open_benchmark
from fixclip_diffusion.evaluation.compare import compare_runs
from fixclip_diffusion.evaluation.prompts import Place, Prompt, Question
from fixclip_diffusion.evaluation.report import drawing_line


def answers(prompts, given, system="a"):
    """Answers {(prompt, seed): "yes no ..."}, a word a question; - is none, and "yes:0.9" has a probability."""
    found = []
    known = {prompt.id: prompt for prompt in prompts}
    for (name, seed), words in given.items():
        for question, word in zip(known[name].questions, words.split(), strict=True):
            answer, _, probability = word.partition(":")
            none = answer == "-"
            is_word = question.expected or none
            right = float(answer == question.expected.lower()) if is_word else (float(answer) - 1) / 4
            found.append(
                Answer(
                    system, name, seed, question.id, question.text, question.expected, None if none else answer,
                    None if none else right, float(probability) if probability else None, "no answer" if none else "",
                    answer, "judge", "x.png", "0", float(probability) if probability else None,
                )
            )  # fmt: skip
    return found


# -- parents and means ---------------------------------------------------------------------------------------


def test_a_child_counts_nothing_without_its_parents_and_theirs():
    questions = [
        Question("3", "?", parents=("2",)),
        Question("1", "?"),
        Question("2", "?", parents=("1",)),
        Question("4", "?"),
    ]
    value = {"1": 0.0, "2": 1.0, "3": 1.0, "4": 0.7}
    assert scores.after_parents(questions, value) == {"3": 0.0, "1": 0.0, "2": 0.0, "4": 0.7}
    assert scores.after_parents(questions, {**value, "1": 0.5}) == {"3": 1.0, "1": 0.5, "2": 1.0, "4": 0.7}
    circle = [Question("1", "?", parents=("2",)), Question("2", "?", parents=("1",))]
    assert scores.after_parents(circle, {"1": 1.0, "2": 1.0}) == {"1": 1.0, "2": 1.0}


ZONED = Prompt(
    "A horse. A boat.",
    id="p",
    questions=(
        Question("1", "horse?", category="x"),
        Question("2", "boat?", category="y"),
        Question("3", "big?", parents=("2",)),
    ),
)
PLACES = {"1": Place("before", 1, 40), "2": Place("after", 80, 120), "3": Place("after", 80, 120)}


def test_scores_by_place_count_each_prompt_once():
    """Two prompts with two pictures: right answers 1 0 0 | 1 1 1 and, of the second, 0 1 - | 1 1 0."""
    other = Prompt("A tree.", id="q", questions=ZONED.questions)
    places = {"p": (150, PLACES), "q": (60, {**PLACES, "2": Place("whole")})}
    given = answers(
        [ZONED, other],
        {("p", 0): "yes no no", ("p", 1): "yes yes yes", ("q", 0): "no yes -", ("q", 1): "yes yes:0.8 no"},
    )
    found = scores.scores(scores.join([ZONED, other], places, given, range(2)))
    assert found["all"]["mean"] == pytest.approx((4 / 6 + 3 / 6) / 2)
    assert found["all"]["standard_error"] == pytest.approx(np.std([4 / 6, 3 / 6], ddof=1) / np.sqrt(2))
    assert found["probability"]["mean"] == pytest.approx((4 / 6 + 2.8 / 6) / 2)
    assert (found["asked"], found["unanswered"]) == (12, 1)
    assert {name: (v["mean"], v["count"]) for name, v in found["zone"].items()} == {
        "before": (pytest.approx((1 + 1 / 2) / 2), 2),
        "after": (pytest.approx((2 / 4 + 0) / 2), 2),
        "whole": (1.0, 1),
    }
    assert {name: v["mean"] for name, v in found["window"].items()} == {
        "window 1": 0.75, "window 2": 0.25, "whole": 1.0,
    }  # fmt: skip
    assert list(found["position"]) == ["1-50", "101-150", "whole"]
    assert {name: v["mean"] for name, v in found["length"].items()} == {
        "up to 77": pytest.approx(3 / 6), "78 to 154": pytest.approx(4 / 6),
    }  # fmt: skip
    assert {name: v["mean"] for name, v in found["question"].items()} == {"x": 0.75, "y": 0.75, "-": 0.25}


def test_what_was_never_asked_counts_nothing():
    found = scores.scores(scores.join([ZONED], {"p": (150, PLACES)}, [], range(1)))
    assert (found["all"]["mean"], found["unanswered"]) == (0.0, 3)


def test_means_and_standard_errors():
    assert scores.summarize([1.0, 2.0, 6.0]) == {
        "mean": 3.0,
        "standard_error": pytest.approx(np.std([1, 2, 6], ddof=1) / np.sqrt(3)),
        "count": 3,
    }
    assert scores.summarize([2.0]) == {"mean": 2.0, "standard_error": None, "count": 1}


@pytest.mark.parametrize(
    ("tokens", "name"), [(3, "up to 77"), (77, "up to 77"), (78, "78 to 154"), (248, "155 to 248"), (249, "over 248")]
)
def test_classes_of_length(tokens, name):
    assert scores.length_of(tokens) == name


# -- differences ---------------------------------------------------------------------------------------------


def test_the_interval_is_that_of_the_mean():
    """For many prompts the bootstrap agrees with the normal interval; for equal differences it is a point."""
    difference = np.random.default_rng(1).normal(0.1, 0.5, 400)
    low, high = scores.bootstrap_interval(difference)
    error = difference.std(ddof=1) / 20
    assert low == pytest.approx(difference.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(difference.mean() + 1.96 * error, abs=0.15 * error)
    assert scores.bootstrap_interval(np.full(5, 0.25)) == (0.25, 0.25)


values = st.dictionaries(st.sampled_from("abcdef"), st.floats(0, 1))


@given(values, values)
def test_differences_are_paired_and_change_sign(a, b):
    there, back = scores.compare(a, b), scores.compare(b, a)
    if not a.keys() & b.keys():
        assert there is back is None
        return
    assert there["count"] == len(a.keys() & b.keys())
    assert there["mean"] == pytest.approx(-back["mean"])
    low, high = there["interval"]
    assert back["interval"] == pytest.approx([-high, -low], abs=0.06)
    each = [a[name] - b[name] for name in a.keys() & b.keys()]
    assert min(each) - 1e-9 <= low <= high <= max(each) + 1e-9


def test_long_prompts_against_their_short_twins():
    long = [Prompt("long", id=n, questions=(Question("1", "?"),)) for n in "ab"]
    short = [Prompt("short", id=f"{n}/s", twin_of=n, questions=(Question("1", "?"),)) for n in "ab"]
    places = {p.id: (10, {"1": Place("whole")}) for p in (*long, *short)}
    given = {("a", 0): "no", ("b", 0): "yes", ("a/s", 0): "yes", ("b/s", 0): "yes"}
    found = scores.twins(scores.join([*long, *short], places, answers([*long, *short], given), range(1)))
    assert (found["long"]["mean"], found["short"]["mean"], found["difference"]["mean"]) == (0.5, 1.0, -0.5)
    assert scores.twins(scores.join(long, places, answers(long, {("a", 0): "no"}), range(1))) is None


def test_cosines_by_zone():
    found = scores.clip_metrics([(["before", "after"], [0.3, 0.1, 0.5]), (["before"], [0.1, 0.3])])
    assert found["whole"]["mean"] == pytest.approx(0.2)
    assert {n: (v["mean"], v["count"]) for n, v in found.items() if n != "whole"} == {
        "sentence_before": (pytest.approx(0.2), 2),
        "sentence_after": (0.5, 1),
    }


# -- official scores -----------------------------------------------------------------------------------------


def test_dpg_loses_its_first_proposition_and_pictures_that_fail(tmp_path):
    """The kitchen's question 1 is lost with the first row; its question 2 has no parent then, and it is left out."""
    prompts = open_benchmark(str(folders.dpg(tmp_path))).prompts
    given = {("kitchen", 0): "yes yes yes", ("harbour", 0): "yes no yes", ("harbour", 1): "yes yes no"}
    given[("kitchen", 1)] = "yes yes yes"
    found = official.dpg(prompts, answers(prompts, given), range(2))
    assert found["left out"] == ["kitchen"]
    # harbour: picture 0 is 1, 0, and 0 for the relation whose parent is no; picture 1 is 1, 1, 0.
    assert found["DPG-Bench score"] == pytest.approx(100 * (1 / 3 + 2 / 3) / 2)
    # of the last picture alone, before parents count
    assert found["categories"] == {"entity": 100.0, "attribute": 100.0, "relation": 0.0}
    assert list(found["detailed categories"]) == ["attribute - color", "entity - whole", "relation - spatial"]
    # Ours counts both prompts, and the kitchen's first question.
    places = {p.id: (30, {q.id: Place("whole") for q in p.questions}) for p in prompts}
    ours = scores.scores(scores.join(prompts, places, answers(prompts, given), range(2)))
    assert ours["all"]["mean"] == pytest.approx((1 + 1 / 2) / 2)


def test_dpg_without_a_child_of_the_lost_proposition(tmp_path):
    folder = folders.dpg(tmp_path)
    rows = (folder / "dpg_bench.csv").read_text().replace(",2,1,", ",2,0,", 1)
    (folder / "dpg_bench.csv").write_text(rows)
    prompts = open_benchmark(str(folder)).prompts
    given = {("kitchen", 0): "no yes no", ("harbour", 0): "yes - yes"}
    found = official.dpg(prompts, answers(prompts, given), range(1))
    assert found["left out"] == ["harbour"]
    assert found["DPG-Bench score"] == 50.0


def test_dpg_meets_the_lost_parent_unless_another_before_it_is_no(tmp_path):
    """The kitchen's question 3 depends on 2 and then 1, which was lost: the scorer looks at 2 first."""
    folder = folders.dpg(tmp_path)
    rows = (folder / "dpg_bench.csv").read_text().replace(",2,1,", ",2,0,", 1).replace(",3,0,", ',3,"2, 1",', 1)
    (folder / "dpg_bench.csv").write_text(rows)
    prompts = open_benchmark(str(folder)).prompts
    harbour = {("harbour", 0): "yes yes yes"}
    found = official.dpg(prompts, answers(prompts, {("kitchen", 0): "yes no yes", **harbour}), range(1))
    assert (found["left out"], found["DPG-Bench score"]) == ([], 50.0)  # (0 + 0) / 2, and 1
    found = official.dpg(prompts, answers(prompts, {("kitchen", 0): "yes yes yes", **harbour}), range(1))
    assert (found["left out"], found["DPG-Bench score"]) == (["kitchen"], 100.0)


def test_tiif(tmp_path):
    prompts = open_benchmark(str(folders.tiif(tmp_path))).prompts
    given = {
        ("color/0/long", 0): "yes no",
        ("color/0/short", 0): "yes yes",
        ("negation/0/long", 0): "yes no",
        ("negation/0/short", 0): "- no",
    }
    found = official.tiif(prompts, answers(prompts, given), range(1))
    assert found["accuracy"] == {"color long": 0.5, "color short": 1.0, "negation long": 1.0}
    assert found["mean accuracy"] == pytest.approx(2.5 / 3)
    assert found["left out"] == ["negation/0/short"]
    assert found["groups"] == {"attribute long": 0.5, "attribute short": 1.0, "reasoning long": 1.0}
    assert (found["overall short"], found["overall long"]) == (1.0, 0.75)


def test_tiif_takes_the_mean_over_groups_of_dimensions():
    """Of 39 dimensions; the two of a group weigh as much as the one of another, and shares have four places."""
    given, prompts = {}, []
    for dimension, right in (("color+texture", "yes yes no"), ("shape+color", "yes yes yes"), ("text", "no no no")):
        questions = tuple(Question(str(n), "?") for n in range(3))
        prompts.append(Prompt("x", id=dimension, category=dimension, questions=questions))
        given[dimension, 0] = right
    found = official.tiif(prompts, answers(prompts, given), range(1))
    assert found["groups"] == {"attribute long": pytest.approx((0.6667 + 1) / 2, abs=1e-9), "text long": 0.0}
    assert found["overall long"] == pytest.approx(0.83335 / 2, abs=1e-9)
    assert found["overall short"] is None
    assert [official.tiif_group(name) for name in ("action+2d", "3d_spatial_relation", "negation+color", "style")] == [
        "relation", "relation", "attribute+reasoning", "style",
    ]  # fmt: skip
    assert official.tiif_group("comparison+3d") == official.tiif_group("numeracy+2d") == "reasoning+relation"


def test_longbench(tmp_path):
    prompts = open_benchmark(str(folders.longbench(tmp_path))).prompts
    found = official.longbench(prompts, answers(prompts, {("0", 0): "4 -"}), range(1))
    assert found == {"average score of 5": 2.0, "dimensions": {"Object": 4.0}, "left out": ["1"]}
    found = official.longbench(prompts, answers(prompts, {("0", 0): "4 5", ("1", 0): "1 2"}), range(1))
    assert (found["average score of 5"], found["dimensions"]) == (3.0, {"Object": 2.5, "Color and Tone": 3.5})
    failed = [replace(a, problem="request failed") if a.problem else a for a in answers(prompts, {("0", 0): "4 -"})]
    assert official.longbench(prompts, failed, range(1))["average score of 5"] == 4.0
    missing = [replace(a, problem="picture missing") for a in answers(prompts, {("0", 0): "- -", ("1", 0): "- -"})]
    assert official.longbench(prompts, missing, range(1))["left out"] == ["0", "1"]


def test_geneval2(tmp_path):
    prompts = open_benchmark(str(folders.geneval2(tmp_path))).prompts
    given = {("00000", 0): "three:0.9 yes:0.4", ("00001", 0): "two:0.1 -"}
    found = official.geneval2(prompts, answers(prompts, given), range(1))
    assert found["AM"] == pytest.approx(100 * (0.65 + 0.05) / 2)
    assert found["GM"] == pytest.approx(100 * np.sqrt(0.36) / 2)
    assert found["AM by skill"] == {"attribute": pytest.approx(20.0), "count": pytest.approx(50.0)}
    assert found["GM by atoms"] == {"2": 0.0, "3": pytest.approx(60.0)}
    assert (found["probabilities"], found["answers of probability 0"]) == (True, 0)
    given = {("00000", 0): "three:0.9 yes:0.0", ("00001", 0): "three:0.4 yes:1e-6"}
    found = official.geneval2(prompts, answers(prompts, given), range(1))
    assert found["GM"] == pytest.approx(100 * np.sqrt(0.4e-6) / 2)
    assert found["answers of probability 0"] == 1
    hard = official.geneval2(prompts, answers(prompts, {("00000", 0): "three yes", ("00001", 0): "two no"}), range(1))
    assert (hard["AM"], hard["probabilities"]) == (50.0, False)


# -- two runs ------------------------------------------------------------------------------------------------


def write_run(folder, counted, system="a", judge="j", text="A horse. A boat."):
    """A report of three prompts with two questions; `counted` is "10 11 00": what the questions of each count."""
    rows = [
        {
            "id": str(n), "prompt": f"{text} {n}", "questions": [
                {"id": "1", "text": "Is there a horse?", "zone": "before"}, {"id": "2", "text": "A boat?", "zone":
                "after"},
            ],
            "systems": {system: {"judges": {judge: [[{"counted": float(c)} for c in values]]}}},
        }
        for n, values in enumerate(counted.split())
    ]  # fmt: skip
    folder.mkdir()
    report = {"settings": {"systems": [{"name": system}]}, "judges": {judge: {}}, "prompts": rows}
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def test_two_runs_differ_largest_first(tmp_path):
    a, b = write_run(tmp_path / "a", "11 10 00"), write_run(tmp_path / "b", "00 11 00", system="other")
    text = compare_runs(a, b)
    assert "## a minus other, judged by j" in text
    assert "3 prompts in common of 3 and 3" in text
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert "+16.7 [" in rows["all"]
    assert "+33.3 [" in rows["before token 77"]
    assert "+0.0 [" in rows["after, up to 248"]
    changed = [line for line in text.splitlines() if line.startswith(("- ", "  - "))]
    assert changed == [
        "- +100.0 0: A horse. A boat. 0",
        "  - 0.00 → 1.00 Is there a horse?",
        "  - 0.00 → 1.00 A boat?",
        "- -50.0 1: A horse. A boat. 1",
        "  - 1.00 → 0.00 A boat?",
    ]
    assert "Every prompt scores the same" in compare_runs(a, a)
    assert "The runs differ" not in text


def test_what_two_runs_did_otherwise_is_said_first(tmp_path):
    a, b = write_run(tmp_path / "a", "11 10 00"), write_run(tmp_path / "b", "00 11 00")
    for folder, encoder, more in ((a, None, "overlap+adapter"), (b, "E", "one_pass+adapter")):
        report = json.loads((folder / "report.json").read_text())
        report["settings"] |= {"base": "B", "systems": [{"name": "a", "encoder": encoder}, {"name": more}]}
        (folder / "report.json").write_text(json.dumps(report))
    _, settings, *_ = compare_runs(a, b).split("\n\n## ")[0].split("\n\n", 1)
    assert settings.split("\n\n")[1].splitlines() == [
        "- encoder of a: None and E",
        "- only in the first, and not compared: overlap+adapter",
        "- only in the second, and not compared: one_pass+adapter",
    ]


def test_pictures_made_elsewhere_are_not_said_to_be_drawn():
    drawing = {"steps": 30, "guidance_scale": 7.5, "seed": 0}
    settings = {"base": "B", "drawing": drawing, "systems": [{"name": "a", "pictures": "folder"}]}
    assert drawing_line(settings) == "none, the pictures were made elsewhere"
    settings["systems"] += [{"name": "b", "pictures": None}]
    assert drawing_line(settings) == "base B; 30 steps, guidance 7.5, seeds from 0"


def test_runs_without_judges_are_not_compared(tmp_path):
    a = write_run(tmp_path / "a", "11 10")
    report = json.loads((a / "report.json").read_text())
    report["judges"] = {}
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "report.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match="none: no judge in it; --compare needs runs with a --judge"):
        compare_runs(a, tmp_path / "none")
    with pytest.raises(ValueError, match=r"report\.json: no report of evaluate-images: No such file or directory$"):
        compare_runs(a, tmp_path)


def test_runs_that_cannot_be_compared(tmp_path):
    a = write_run(tmp_path / "a", "11 10")
    with pytest.raises(ValueError, match=r"not the same prompts, e\.g\. '0' is another text"):
        compare_runs(a, write_run(tmp_path / "b", "11 10", text="A cow."))
    with pytest.raises(ValueError, match="no report of evaluate-images"):
        compare_runs(a, tmp_path / "none")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "report.json").write_text("{}")
    with pytest.raises(ValueError, match="no report of evaluate-images: it has no judges"):
        compare_runs(a, tmp_path / "c")
