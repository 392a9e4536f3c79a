"""What a machine computes well, from what it says of itself."""

import os

import pytest
import torch

from fixclip_core.device import (
    best_device,
    choose_device,
    choose_precision,
    cpu_multiplies_bf16,
    limit_threads,
    loading_workers,
    supports_bf16,
    usable_cores,
)


@pytest.mark.parametrize(
    ("capabilities", "system", "expected"),
    [
        ({"architecture": "x86_64", "avx2": True}, "Linux", False),  # 100 times slower than fp32
        ({"architecture": "x86_64", "avx2": True, "avx512_f": True, "avx512_bw": True}, "Linux", False),
        ({"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": False}, "Linux", True),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}, "Windows", True),
        ({"architecture": "arm64", "bf16": True}, "Darwin", False),
        ({"architecture": "aarch64", "bf16": True}, "Linux", True),
        ({"architecture": "aarch64", "bf16": False}, "Linux", False),
        ({}, "Linux", False),
    ],
)
def test_bf16_where_the_cpu_has_instructions_for_it(capabilities, system, expected):
    assert cpu_multiplies_bf16(capabilities, system) is expected


def test_auto_is_what_the_device_supports_and_a_named_precision_stays():
    cpu = torch.device("cpu")
    assert choose_precision("auto", cpu) == ("bf16" if supports_bf16(cpu) else "fp32")
    assert choose_precision("auto", "mps") == "fp32"
    assert [choose_precision(name, cpu) for name in ("fp32", "bf16", "fp16")] == ["fp32", "bf16", "fp16"]


def test_cores_are_those_of_the_container_and_shared_by_its_processes(tmp_path, monkeypatch):
    everything = usable_cores(tmp_path / "missing")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert usable_cores(tmp_path / "cpu.max") == everything
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert usable_cores(tmp_path / "cpu.max") == 1
    if hasattr(os, "sched_getaffinity"):
        assert everything == len(os.sched_getaffinity(0))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert loading_workers(8) == 1
    assert loading_workers(0) == 0


def test_a_device_is_the_one_asked_for_or_the_best_and_must_be_there():
    assert choose_device("cpu") == "cpu"
    assert choose_device(None) == best_device()
    for wrong in ("cuda:99", "nonsense"):
        with pytest.raises(ValueError, match=f"device '{wrong}' cannot be used: .*; cuda, mps and cpu are known"):
            choose_device(wrong)


def test_torch_gets_no_more_threads_than_cores(monkeypatch):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(usable_cores() + 3)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        limit_threads()
        assert torch.get_num_threads() == usable_cores() + 3  # what is set by hand stays
        monkeypatch.delenv("OMP_NUM_THREADS")
        limit_threads()
        assert torch.get_num_threads() == usable_cores()
    finally:
        torch.set_num_threads(before)
