"""The table of methods: stages at the rates of the tuning, intervals against numbers by hand, verdicts."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from scenes import report, rivals, run

from fixclip_core.evaluation.twins import smallest_difference, summarize_choices
from fixclip_core.scenes import CHANGES, DIFFERENCE_ZONES
from fixclip_core.training.encoder.recipe import EncoderRecipe
from fixclip_core.training.encoder.trainer import EncoderTrainer
from fixclip_core.training.recipe import load_recipe


def metrics(value):
    names = [f"{kind}_{d}_recall_at_1" for kind in ("long", "short") for d in rivals.DIRECTIONS]
    rows = [{"step": step, **dict.fromkeys(names, value * step / 1000)} for step in (500, 1000)]
    return "".join(json.dumps(row) + "\n" for row in [{"step": 1, "loss": 2.0}, *rows])


def finish(stage, value):
    folder = run.ROOT / stage.result.parents[1]
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    (folder / "metrics.jsonl").write_text(metrics(value))


def test_reported_seeds_take_rates_that_were_tuned_alike_on_another_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "ROOT", tmp_path)
    tuning = run.rival_tuning()
    assert len(tuning) == len(run.TUNED_RATES) * len(run.RIVAL_RATES)
    assert run.TUNING_SEED not in run.SEEDS
    assert set(run.TUNED_RATES) == {*run.TUNED, "debias"}
    assert set(run.TUNED_RATES.values()) <= set(run.RIVAL_RATES)
    before = {stage.name for stage in run.rivals()}
    for method, rate in run.TUNED_RATES.items():
        assert {f"rivals/{method}-lr{rate:g}-seed{seed}" for seed in run.SEEDS} <= before
    for stage in tuning:
        tuned = {"fixclip": "3e-05", "longclip": "0.0003", "debias": "1e-05"}
        best = tuned.get(stage.name.split("/")[1].split("-lr")[0], "0.0001")
        finish(stage, 0.9 if f"-lr{best}-" in stage.name else 0.5)
    names = [stage.name for stage in run.rivals()]
    wanted = {"fixclip": "3e-05", "fixclip_no_groups": "3e-05", "longclip": "0.0003", "debias": "1e-05"}
    for method, rate in (*wanted.items(), ("finetune", "0.0001")):
        reported = [name for name in names if name.startswith(f"rivals/{method}-lr") and "seed100" not in name]
        assert reported == [f"rivals/{method}-lr{rate}-seed{seed}" for seed in run.SEEDS]
    assert all(stage.name not in names or "rivals" in stage.name for stage in run.select([]))  # by name only
    judged = [stage for stage in run.rivals() if stage.name.startswith("twins/")]
    needed = [need for stage in judged for need in stage.needs]
    assert sorted(needed) == sorted(name for name in names if name.startswith("rivals/"))  # each once
    for stage in judged:
        assert [f"rivals/{name}" for name in stage.command[2:] if name != "base"] == list(stage.needs)
        assert stage.result.stem == stage.command[-1]  # written last, in the order of the command
    assert set(rivals.LABELS) == {*run.RIVALS, *run.UNTRAINED}


@pytest.mark.parametrize("overrides", sorted({*run.METHODS.values(), *run.RIVALS.values()}), ids=" ".join)
def test_every_method_trains_on_the_embedded_clip(overrides, tmp_path):
    """Hours of trainings must not end at one whose recipe the miniature's tokenizer or model does not fit."""
    small = ["train.steps=1", "train.batch_size=4", "optim.warmup_steps=0", "train.precision=fp32", "eval.source=null"]
    fields = ["model.name=builtin:scenes/clip", f"output.folder={tmp_path}", *small, *overrides]
    recipe = load_recipe(EncoderRecipe, run.ROOT / run.HERE / "encoder.yaml", fields)
    assert (EncoderTrainer(recipe).train() / "config.json").is_file()


def test_the_interval_takes_seeds_and_questions():
    """t sqrt(s_1^2 / S_1 + s_2^2 / S_2 + v), by hand."""
    found = rivals.difference([0.6, 0.62, 0.64], [0.5, 0.5, 0.5], 0.0001)
    half = 2.776 * math.sqrt(0.02**2 / 3 + 0.0001)  # 4 degrees of freedom
    assert found["mean"] == pytest.approx(0.12)
    assert found["interval"] == pytest.approx([0.12 - half, 0.12 + half])
    low, high = rivals.difference([0.6, 0.62, 0.64], [0.5], 0.0)["interval"]  # 2 degrees, one of them untrained
    assert (high - low) / 2 == pytest.approx(4.303 * 0.02 / math.sqrt(3))
    assert rivals.difference([0.5, 0.6], [0.5], 0.0) == rivals.difference([0.5], [0.5], 0.0) == {}


def test_the_interval_holds_what_it_should():
    """Of 2,000 comparisons without a difference, three seeds of each, in about 95 %; seeds, pairs or both spread."""
    rng = np.random.default_rng(0)
    for of_seed, of_pair in ((0.02, 0.0), (0.0, 0.02), (0.02, 0.02)):
        held = 0
        for _ in range(2000):
            one, other = rng.normal(0, of_seed, (2, 3)) + np.array([[rng.normal(0, of_pair)], [0.0]])
            low, high = rivals.difference(one.tolist(), other.tolist(), of_pair**2)["interval"]
            held += low <= 0 <= high
        assert 0.935 <= held / 2000 <= 1.0
        assert of_pair or held / 2000 <= 0.98  # without pairs, seeds of one spread: neither too narrow nor too wide


def test_differences_by_zone():
    """Pairs alone: the standard error of the mean of 400 differences that are 0 or 1 is 0.5 / 20."""
    zone_P = np.array(["before 20"] * 400 + ["77 to 248"])
    one = np.tile([*np.tile([0.0, 1.0], 200), 0.5], (3, 1))
    found = rivals.differences(one, np.zeros((3, 401)), zone_P)
    assert set(found) == {"before 20", "77 to 248", "all"}
    assert found["before 20"]["mean"] == 0.5
    low, high = found["before 20"]["interval"]
    assert (high - low) / 2 == pytest.approx(2.776 * 0.5 / 20, rel=0.01)
    assert found["before 20"]["smallest"] == smallest_difference(400)
    assert found["77 to 248"]["interval"] == [0.5, 0.5]
    assert rivals.differences(one[:1], np.zeros((1, 401)), zone_P) == {}


@pytest.mark.parametrize(
    ("interval", "wanted"),
    [
        ((0.001, 0.03), "gains"),
        ((-0.03, -0.001), "loses"),
        ((-0.01, 0.012), "no gain"),
        ((-0.01, 0.02), "cannot be told"),
    ],
)
def test_verdicts(interval, wanted):
    assert rivals.verdict({"interval": interval}, margin=0.015) == wanted


def test_an_effect_of_a_third_of_the_training_is_none():
    brought = {rivals.TRAINING: {"all": {"mean": 0.03}, "before 20": {"mean": 0.045}}}
    assert rivals.margins(brought) == pytest.approx({"all": 0.01, "before 20": 0.015})
    assert rivals.margins({}) == {}


def test_the_interval_of_recalls_by_hand():
    def runs(shorts, longs):
        seeds = enumerate(zip(shorts, longs, strict=True))
        return {"seeds": {str(n): {"short": short, "scenes": [long, long]} for n, (short, long) in seeds}}

    one, other = runs([0.6, 0.62, 0.64], [0.8, 0.8, 0.8]), runs([0.5, 0.5, 0.5], [0.7, 0.7, 0.7])
    found = rivals.recall_differences(one, other)
    # p = 0.56 of 1,000 scenes; seeds of one spread by 0.02, of the other not at all.
    half = 2.776 * math.sqrt(2 * 0.56 * 0.44 / 1000 + 0.02**2 / 3)
    assert found["short"]["interval"] == pytest.approx([0.12 - half, 0.12 + half])
    assert found["short"]["smallest"] == pytest.approx(3.717 * math.sqrt(0.5 / 1000))
    half = 2.776 * math.sqrt(2 * 0.75 * 0.25 / 5000)
    assert found["scenes"]["interval"] == pytest.approx([0.1 - half, 0.1 + half])
    assert rivals.recall_differences(runs([0.6], [0.8]), runs([0.5], [0.7])) == {}
    assert set(rivals.recall_differences(one, {"seeds": {"0": {"scenes": [0.5, 0.5]}}})) == {"scenes"}  # not trained


def twins_json(share, pairs=40):
    """A report of `fixclip evaluate --data scenes-twins` of which a share of the choices is right.

    The share is that of 40 changes of a colour in the middle zone; one before it is right, and one behind it wrong,
    where a swap is half right.
    """
    recalls = {f"{d}_recall_at_1": share for d in rivals.DIRECTIONS}
    right = round(share * pairs)
    rows = [["colour", "20 to 77", float(n < right), float(n < right)] for n in range(pairs)]
    rows += [["colour", "before 20", 1.0, 1.0], ["colour", "77 to 248", 0.0, 0.0], ["swap", "77 to 248", 0.5, 0.5]]
    choices = summarize_choices(rows)
    return json.dumps({"without_twins": recalls, "metrics": recalls, "choices": choices, "pairs": rows})


def test_before_anything_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    (tmp_path / "twins").mkdir()
    assert rivals.collect(tmp_path) == {}
    assert report.rivals_table() == report.choices_table() == report.verdicts_table() == "Not measured yet."


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Three seeds of two methods and the base, collected."""
    folder, results = tmp_path / "rivals", tmp_path / "results"
    (folder / "twins").mkdir(parents=True)
    results.mkdir()
    monkeypatch.setattr(report, "RESULTS", results)
    monkeypatch.setattr(report, "IMAGES", tmp_path)
    (folder / "twins" / "base.json").write_text(twins_json(0.5))
    for method, share in (("fixclip", 0.9), ("fixclip_no_groups", 0.5)):
        for seed in range(3):
            name = f"{method}-lr1e-05-seed{seed}"
            (folder / "twins" / f"{name}.json").write_text(twins_json(share + 0.025 * seed))
            (folder / name).mkdir()
            (folder / name / "metrics.jsonl").write_text(metrics(share))
    (results / "rivals.json").write_text(json.dumps(rivals.collect(folder)))
    return folder


def test_what_was_measured_becomes_tables_and_curves(measured, tmp_path):
    rows = [line.strip("| ").split(" | ") for line in report.rivals_table().splitlines() if line.startswith("|")]
    by_method = {row[0]: row for row in rows}
    assert by_method["FIX-CLIP"][:5] == ["FIX-CLIP", "1e-05", "3", "92.5 ± 2.5", "92.5 ± 2.5"]
    assert by_method["FIX-CLIP"][-1] == "90.0 ± 0.0"  # short captions, from the last line of the training's metrics
    assert by_method["base, cut at 77"][1:4] == ["–", "1", "50.0"]
    assert [row[0] for row in rows[2:]] == ["base, cut at 77", "FIX-CLIP", "FIX-CLIP without hierarchical alignment"]
    assert (tmp_path / "results_rivals.png").stat().st_size > 5000


def table_rows(text):
    return {row[0]: row for row in (line.strip("| ").split(" | ") for line in text.splitlines())}


def test_choices_by_zone_and_by_what_differs(measured):
    rows = table_rows(report.choices_table())
    assert rows["method"] == ["method", *DIFFERENCE_ZONES, "all", *CHANGES]
    own = dict(zip(rows["method"], rows["FIX-CLIP"], strict=True))
    assert own["20 to 77"] == "92.5 ± 2.5"
    assert own["before 20"] == "100.0 ± 0.0"
    assert own["77 to 248"] == "25.0 ± 0.0"  # of a colour 0, of a swap 0.5
    assert own["swap"] == "50.0 ± 0.0 (50.0)"
    assert own["colour"] == "90.5 ± 2.4 (0.0)"  # 36, 37 and 38 of 40 and one of two
    assert own["place"] == "–"
    assert rows["base, cut at 77"][5] == "50.0 (0.0)"


def test_verdicts_by_zone_and_of_short_captions(measured):
    rows = table_rows(report.verdicts_table())
    choices = ["choices, all", *(f"choices, {zone}" for zone in DIFFERENCE_ZONES)]
    assert rows["question"][1:] == [*choices, "R@1 of 5,000", "short R@1"]
    every, before, middle, behind, long, short = rows["hierarchical alignment"][1:]
    assert middle.startswith("gains: +40.0 (")
    assert every.startswith("gains: +37.2 (")  # 40 of the 43 pairs
    assert before == behind == "cannot be told: +0.0 (+0.0 to +0.0)"  # no margin is known
    assert long.startswith("gains: +40.0 (")
    half = 277.6 * math.sqrt(2 * 0.7 * 0.3 / 1000)
    assert short == f"gains: +40.0 ({40 - half:+.1f} to {40 + half:+.1f})"
    assert rows["smallest that could be shown"][1:] == [
        f"{100 * smallest_difference(pairs):.1f}" for pairs in (43, 1, 40, 2, 5000, rivals.SHORT_SCENES)
    ]


def test_what_was_kept_stays_and_other_runs_join_it(measured, tmp_path):
    kept = report.read_results("rivals.json")
    assert rivals.collect(tmp_path / "nothing here", kept) == kept
    for file in (measured / "twins").glob("*seed[12].json"):
        file.rename(tmp_path / file.name)
    (measured / "twins" / "base.json").unlink()
    first = json.loads(json.dumps(rivals.collect(measured)))
    assert list(first["runs"]["fixclip"]["seeds"]) == ["0"]
    for file in tmp_path.glob("*seed[12].json"):
        file.rename(measured / "twins" / file.name)
    for file in (measured / "twins").glob("*seed0.json"):
        file.unlink()
    joined = rivals.collect(measured, first)
    assert joined["differences"] == kept["differences"]
    assert {k: v["seeds"] for k, v in joined["runs"].items()} == {
        k: v["seeds"] for k, v in kept["runs"].items() if k != "base"
    }


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fixclip-lr0.0001-seed1", "a run at 0.0001, where runs of fixclip at 1e-05 were kept"),
        ("mine-lr1e-05-seed0", "LABELS of rivals.py has no words for the method 'mine'"),
    ],
)
def test_runs_that_the_table_has_no_place_for_are_refused(measured, name, message, tmp_path):
    kept = report.read_results("rivals.json")
    (measured / "twins" / f"{name}.json").write_text(twins_json(0.5))
    with pytest.raises(ValueError, match=message):
        rivals.collect(measured, kept)
    assert report.read_results("rivals.json") == kept


def test_a_method_without_a_rate_is_told(monkeypatch):
    with pytest.raises(ValueError, match="method 'mine_too': TUNED_RATES has no learning rate for 'mine'"):
        run.rival_lr("mine_too")


def test_trainings_of_other_lengths_are_refused(measured):
    file = measured / "fixclip-lr1e-05-seed0" / "metrics.jsonl"
    file.write_text(file.read_text().replace('"step": 1000', '"step": 900'))
    with pytest.raises(ValueError, match="trainings of 900 and 1000 steps cannot be compared"):
        rivals.collect(measured)


@given(st.lists(st.integers(0, 255)))
def test_answers_survive_packing(values):
    assert rivals.unpacked(rivals.packed(values)).tolist() == values


def test_reports_of_other_pairs_are_refused(measured):
    other = json.loads(twins_json(0.5))
    other["pairs"][0][1] = "before 20"
    (measured / "twins" / "stretched.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"stretched\.json: its pairs are not those of the reports before it"):
        rivals.collect(measured)


def test_runs_that_began_with_another_clip_are_refused(measured, tmp_path):
    """Weights as published, in half precision, count as those that they were shortened from."""
    weights = torch.randn(3, 4)
    save_file({"x": weights}, tmp_path / "model.safetensors")
    kept = rivals.collect(measured, clip=tmp_path)
    save_file({"x": weights.half()}, tmp_path / "model.safetensors")
    assert rivals.collect(measured, kept, tmp_path) == kept
    assert rivals.collect(tmp_path / "nothing here", kept, tmp_path / "nor here") == kept
    save_file({"x": weights + 1}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="what was kept with another CLIP; train all anew"):
        rivals.collect(measured, kept, tmp_path)
