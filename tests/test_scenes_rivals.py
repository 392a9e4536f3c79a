"""The table of methods: stages that wait for the tuning, a bootstrap against numbers by hand, verdicts."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from scenes import report, run

sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines" / "scenes"))
import rivals

from fixclip_core.scenes import DIFFERENCE_ZONES


def metrics(value):
    names = [f"{kind}_{d}_recall_at_1" for kind in ("long", "short") for d in rivals.DIRECTIONS]
    rows = [{"step": step, **dict.fromkeys(names, value * step / 1000)} for step in (500, 1000)]
    return "".join(json.dumps(row) + "\n" for row in [{"step": 1, "loss": 2.0}, *rows])


def finish(stage, value):
    folder = run.ROOT / stage.result.parents[1]
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    (folder / "metrics.jsonl").write_text(metrics(value))


def test_reported_seeds_wait_for_rates_that_were_tuned_alike_on_another_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "ROOT", tmp_path)
    tuning = run.rival_tuning()
    assert len(tuning) == len(run.TUNED) * len(run.LEARNING_RATES)
    assert run.TUNING_SEED not in run.SEEDS
    names = [stage.name for stage in run.rivals()]
    assert not any(name.endswith("seed0") for name in names)
    for stage in tuning:
        best = {"fixclip": "3e-05", "longclip": "0.0003"}.get(stage.name.split("/")[1].split("-lr")[0], "0.0001")
        finish(stage, 0.9 if f"-lr{best}-" in stage.name else 0.5)
    names = [stage.name for stage in run.rivals()]
    wanted = {"fixclip": "3e-05", "fixclip_no_groups": "3e-05", "longclip": "0.0003", "debias": "0.0003"}
    for method, rate in (*wanted.items(), ("finetune", "0.0001")):
        reported = [name for name in names if name.startswith(f"rivals/{method}-lr") and "seed100" not in name]
        assert reported == [f"rivals/{method}-lr{rate}-seed{seed}" for seed in run.SEEDS]
        assert f"twins/{method}-lr{rate}-seed2" in names
    assert all(stage.name not in names or "rivals" in stage.name for stage in run.select([]))  # by name only
    needs = {stage.name: stage.needs for stage in run.rivals()}
    assert needs["twins/fixclip-lr3e-05-seed1"] == ("rivals/fixclip-lr3e-05-seed1",)
    assert set(rivals.LABELS) == {*run.RIVALS, *run.UNTRAINED}


def test_the_interval_takes_pairs_and_seeds():
    one, other = np.full((3, 50), 0.75), np.full((3, 50), 0.5)
    found = rivals.difference(one, other, draws=20)
    assert (found["mean"], found["interval"]) == (0.25, [0.25, 0.25])
    # Pairs alone: the standard error of the mean of 400 differences that are 0 or 1 is 0.5 / 20.
    pairs = np.tile([0.0, 1.0], 200)[None]
    low, high = rivals.difference(pairs, np.zeros((1, 400)))["interval"]
    assert (high - low) / 2 == pytest.approx(1.96 * 0.5 / math.sqrt(400), rel=0.15)
    # Seeds alone: three of either method, each at 0 or 1 as a whole; the means of three drawn anew reach from 0 to 1.
    seeds = np.repeat([[0.0], [0.0], [1.0]], 10, axis=1)
    low, high = rivals.difference(seeds, np.zeros((3, 10)))["interval"]
    assert (low, high) == (0.0, 1.0)
    related = np.random.default_rng(1).random((3, 200))
    low, high = rivals.difference(related, related - 0.01)["interval"]
    assert low < 0.01 < high
    assert high - low < 0.1


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
    assert rivals.verdict({"interval": interval, "smallest": 0.015}) == wanted


def twins_json(share, pairs=40):
    """A report of `fixclip evaluate --data scenes-twins` of which a share of the choices is right."""
    recalls = {f"{d}_recall_at_1": share for d in rivals.DIRECTIONS}
    zones = (*DIFFERENCE_ZONES, "all")
    choices = [{"change": "all", "zone": zone, **dict.fromkeys(rivals.DIRECTIONS, share)} for zone in zones]
    choices.append({"change": "colour", "zone": "all", **dict.fromkeys(rivals.DIRECTIONS, 0.0)})
    right = round(share * pairs)
    rows = [["colour", "all", float(n < right), float(n < right)] for n in range(pairs)]
    return json.dumps({"without_twins": recalls, "metrics": recalls, "choices": choices, "pairs": rows})


def test_what_was_measured_becomes_tables_and_curves(tmp_path, monkeypatch):
    folder, results = tmp_path / "rivals", tmp_path / "results"
    (folder / "twins").mkdir(parents=True)
    results.mkdir()
    monkeypatch.setattr(report, "RESULTS", results)
    monkeypatch.setattr(report, "IMAGES", tmp_path)
    assert report.rivals_table() == report.verdicts_table() == "Not measured yet."
    (folder / "twins" / "base.json").write_text(twins_json(0.5))
    for method, share in (("fixclip", 0.9), ("fixclip_no_groups", 0.5)):
        for seed in range(3):
            name = f"{method}-lr1e-05-seed{seed}"
            (folder / "twins" / f"{name}.json").write_text(twins_json(share + 0.025 * seed))
            (folder / name).mkdir()
            (folder / name / "metrics.jsonl").write_text(metrics(share))
    (results / "rivals.json").write_text(json.dumps(rivals.collect(folder)))
    rows = [line.strip("| ").split(" | ") for line in report.rivals_table().splitlines() if line.startswith("|")]
    by_method = {row[0]: row for row in rows}
    assert by_method["FIX-CLIP"][:5] == ["FIX-CLIP", "1e-05", "3", "92.5 ± 2.5", "92.5 ± 2.5"]
    assert by_method["FIX-CLIP"][-1] == "90.0 ± 0.0"  # short captions, from the last line of the training's metrics
    assert by_method["base, cut at 77"][1:4] == ["–", "1", "50.0"]
    assert [row[0] for row in rows[2:]] == ["base, cut at 77", "FIX-CLIP", "FIX-CLIP without hierarchical alignment"]
    verdicts = report.verdicts_table()
    assert "| hierarchical alignment | +40.0 |" in verdicts
    assert verdicts.count("| gains |") == 1
    assert (tmp_path / "results_rivals.png").stat().st_size > 5000
