"""The systems of benchmarks/adapter_step.py take their steps."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import adapter_step


@pytest.fixture(scope="module")
def models():
    return adapter_step.build_models("small")


@pytest.mark.parametrize("system", adapter_step.SYSTEMS)
def test_every_system_takes_a_step(system, models, tmp_path):
    run, step = adapter_step.build(system, "small", 2, models, tmp_path)
    before = {name: weight.detach().clone() for name, weight in run.module.named_parameters()}
    step()
    weights = dict(run.module.named_parameters())
    assert all(weight.isfinite().all() for weight in weights.values())
    assert any(not torch.equal(weight, before[name]) for name, weight in weights.items())
