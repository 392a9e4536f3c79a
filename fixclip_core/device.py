"""What this machine computes well: its fastest device, its usable cores, and the precision that suits them."""

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

Precision = Literal["fp32", "bf16", "fp16"]
AnyPrecision = Literal["auto", "fp32", "bf16", "fp16"]


def best_device() -> str:
    """cuda, mps or cpu, the first of them that there is."""
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def choose_device(device: str | None) -> str:
    """A device that can be used, before a model is loaded for it: the one that is asked for, else `best_device`.

    Raises:
        ValueError: there is no such device here.
    """
    device = device or best_device()
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {device!r} cannot be used: {str(error).split(':')[0]}; cuda, mps and cpu are known"
        ) from error
    return device


def choose_precision(precision: AnyPrecision, device: torch.device | str) -> Precision:
    """`auto` as bf16 where the device multiplies matrices in it by instructions of its own, else fp32.

    Emulated, a product in bf16 takes up to 100 times as long as in fp32 (measured on a CPU with AVX2 alone).
    """
    if precision != "auto":
        return precision
    return "bf16" if supports_bf16(torch.device(device)) else "fp32"


def supports_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for products of bf16 matrices."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and cpu_multiplies_bf16(_cpu_capabilities(), platform.system())


def cpu_multiplies_bf16(capabilities: Mapping[str, Any], system: str) -> bool:
    """Whether torch uses bf16 instructions of a CPU.

    Args:
        capabilities: `torch.cpu.get_capabilities()`.
        system: `platform.system()`; torch's ARM kernels for bf16 are those of Linux.
    """
    if capabilities.get("architecture") in ("arm64", "aarch64"):
        return system == "Linux" and bool(capabilities.get("bf16"))
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _cpu_capabilities() -> Mapping[str, Any]:
    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    names = {"avx512_bf16": "_is_avx512_bf16_supported", "amx_bf16": "_is_amx_tile_supported"}  # before torch 2.11
    return {name: getattr(torch.cpu, function)() for name, function in names.items()}


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores that this process may use: those it is bound to, and no more than a container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = cgroup.read_text().split()
        return max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or "max": no quota
        return cores


def limit_threads() -> None:
    """Give torch no more threads than cores that this process may use: of a container's quota it does not know."""
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > usable_cores():
        torch.set_num_threads(usable_cores())


def loading_workers(wanted: int) -> int:
    """Loading processes for this process, at most its share of the cores: more only get in each other's way."""
    together = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(wanted, max(1, usable_cores() // together))
