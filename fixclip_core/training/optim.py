"""The optimiser and its parameter groups, the learning rate's schedule, averaged weights, and one guarded step."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from timm.optim.muon import zeropower_via_newtonschulz
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fixclip_core.device import supports_bf16
from fixclip_core.training.recipe import OptimSection

_MOMENTUM = 0.95
_NEWTON_SCHULZ = [(3.4445, -4.7750, 2.0315)] * 5  # a, b, c of X <- a X + b X X'X + c X X'X X'X


def parameter_groups(
    model: nn.Module, is_new: Callable[[str], bool], no_decay: Callable[[str, nn.Parameter], bool], optim: OptimSection
) -> list[dict[str, Any]]:
    """Groups: pre-trained or new (their own learning rates), with or without weight decay, and what `Muon` moves.

    With `optim.optimizer=muon` those are the matrices with weight decay, but for tables of embeddings.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    groups: dict[tuple[bool, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = no_decay(name, parameter)
            muon = optim.optimizer == "muon" and parameter.ndim == 2 and not plain and id(parameter) not in tables
            groups.setdefault((is_new(name), plain, muon), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": optim.lr_new if new else optim.lr,
            "weight_decay": 0.0 if plain else optim.weight_decay,
            "muon": muon,
        }
        for (new, plain, muon), parameters in groups.items()
    ]


class Muon(torch.optim.AdamW):
    """AdamW, but for the matrices of groups with `muon`: they move by their orthogonalised momentum.

    The average of a matrix' gradients (over about 20 steps, the newest counted once more: Nesterov) is replaced by the
    nearest matrix whose singular values are all 1, as five Newton-Schulz steps find it, roughly. So what the gradient
    asks for weakly but steadily is learnt as fast as what it asks for strongly (Jordan et al. 2024,
    kellerjordan.github.io/posts/muon). The step is the learning rate times 0.2 sqrt(max(rows, columns)), as large as
    AdamW's are (Liu et al. 2025, arXiv 2502.16982, section 2.2).
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; AdamW's own, which leaves parameters without gradient alone, for all other groups."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moved: list[tuple[Tensor, Tensor]] = []
        for group in self.param_groups:
            for matrix in group["params"] if group.get("muon") else []:
                if matrix.grad is not None:
                    self._move(matrix, matrix.grad, group["lr"], group["weight_decay"])
                    moved.append((matrix, matrix.grad))
                    matrix.grad = None
        super().step()
        for matrix, gradient in moved:
            matrix.grad = gradient
        return loss

    def _move(self, matrix_RC: Tensor, gradient_RC: Tensor, lr: float, weight_decay: float) -> None:
        """Move a matrix of R rows and C columns."""
        state = self.state[matrix_RC]
        if not state:
            state["momentum"] = torch.zeros_like(gradient_RC)
            state["step"] = torch.tensor(0.0)  # AdamW asks every loaded state for it
        state["step"] += 1
        momentum_RC = state["momentum"].lerp_(gradient_RC, 1 - _MOMENTUM)
        # Emulated, bfloat16 takes 10 to 70 times as long as where a CPU has it, float32 twice as long.
        dtype = torch.bfloat16 if supports_bf16(matrix_RC.device) else torch.float32
        ahead_RC = gradient_RC.lerp(momentum_RC, _MOMENTUM)
        direction_RC = zeropower_via_newtonschulz(ahead_RC, len(_NEWTON_SCHULZ), _NEWTON_SCHULZ, dtype=dtype)
        matrix_RC.mul_(1 - lr * weight_decay)
        matrix_RC.add_(direction_RC.to(matrix_RC.dtype), alpha=-lr * 0.2 * math.sqrt(max(matrix_RC.shape)))


def make_optimizer(accelerator: Accelerator, groups: list[dict[str, Any]], optim: OptimSection) -> torch.optim.AdamW:
    """AdamW or `Muon`, as the recipe says.

    Raises:
        ValueError: Muon where the weights are sharded (FSDP, DeepSpeed), so that no process has a whole matrix.
    """
    if optim.optimizer == "muon":
        if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError(f"optim.optimizer=muon: with {accelerator.distributed_type.value} it must be adamw")
        return Muon(groups, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    # The parameters may still lie on the CPU: `Accelerator.prepare` moves them.
    fused = accelerator.device.type == "cuda" or None
    return torch.optim.AdamW(groups, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=fused)


def make_schedule(optimizer: torch.optim.Optimizer, optim: OptimSection, total_steps: int) -> LambdaLR:
    factor = partial(lr_factor, warmup=optim.warmup_steps, total=total_steps, schedule=optim.schedule)
    return LambdaLR(optimizer, factor)


def hyperparameters(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What a recipe decides of each parameter group: the peak learning rate, betas, eps and weight decay."""
    names = ("initial_lr", "betas", "eps", "weight_decay")
    return [{name: group[name] for name in names} for group in optimizer.param_groups]


def moved_by_muon(optimizer: torch.optim.Optimizer) -> list[bool]:
    """Of each parameter group, whether its matrices move by `Muon`; never in a checkpoint older than it."""
    return [group.get("muon", False) for group in optimizer.param_groups]


def set_hyperparameters(optimizer: torch.optim.Optimizer, schedule: LambdaLR, values: list[dict[str, Any]]) -> None:
    """Give the parameter groups these hyperparameters at the schedule's current step, as a loaded checkpoint
    brings those that it was saved with."""
    schedule.base_lrs = [value["initial_lr"] for value in values]
    for group, value, factor in zip(optimizer.param_groups, values, schedule.lr_lambdas, strict=True):
        group.update(value, lr=value["initial_lr"] * factor(schedule.last_epoch))


def lr_factor(step: int, warmup: int, total: int, schedule: str) -> float:
    """Share of the peak learning rate at a step: linear up to 1 over `warmup` steps, then a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


def make_ema(accelerator: Accelerator, model: nn.Module, decay: float | None) -> AveragedModel | None:
    """An exponential moving average of the weights, registered for checkpoints; None without a decay.

    Raises:
        ValueError: the weights are sharded (FSDP, DeepSpeed), so no process could average them.
    """
    if decay is None:
        return None
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(f"train.ema_decay={decay}: with {accelerator.distributed_type.value} it must be null")
    ema = AveragedModel(accelerator.unwrap_model(model), multi_avg_fn=get_ema_multi_avg_fn(decay))
    accelerator.register_for_checkpointing(ema)
    return ema


def optimizer_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float | None,
) -> tuple[float, bool]:
    """Clip and step, unless the gradient is not finite: then nothing changes.

    The norm is that of the gradient summed over the processes, so all of them decide alike. In fp16 the
    scaler must see the overflow to lower its scale; it leaves the weights alone by itself.

    Returns:
        The gradient's norm before clipping and whether the weights changed.
    """
    norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm or math.inf)
    grad_norm = 0.0 if norm is None else float(norm)  # DeepSpeed clips and steps inside backward
    finite = math.isfinite(grad_norm)
    if finite or accelerator.scaler is not None:
        optimizer.step()
    optimizer.zero_grad()
    return grad_norm, finite and not accelerator.optimizer_step_was_skipped


def check_finite(model: nn.Module) -> None:
    """Refuse to save poisoned weights.

    Raises:
        FloatingPointError: a weight of this process is NaN or infinite.
    """
    for name, parameter in model.named_parameters():
        shard = parameter.to_local() if hasattr(parameter, "to_local") else parameter  # of a DTensor
        if not torch.isfinite(shard.detach()).all():
            raise FloatingPointError(f"{name} is not finite, so it was not saved")
