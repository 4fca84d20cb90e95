"""Parameter groups, and the learning rate as a function of the step."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from distill.config import OptimConfig

REFERENCE_BATCH = 512
"""Learning rates are given for this many images a step (authors' code)."""
_NO_DECAY_NAMES = ("cls_token", "pos_embed")


def build_optimizer(
    model: nn.Module, cfg: OptimConfig, *, lr_scale: Callable[[str], float] | None = None
) -> torch.optim.AdamW:
    """AdamW. Vectors, biases and the CLS token are not decayed; the relative-position table is (authors' code).

    Args:
        lr_scale: parameter name to its share of the learning rate (layer-wise decay).
    """
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_decayed = parameter.ndim > 1 and not name.endswith(_NO_DECAY_NAMES)
        scale = lr_scale(name) if lr_scale else 1.0
        group = groups.setdefault(
            (scale, is_decayed),
            {"params": [], "lr_scale": scale, "weight_decay": cfg.weight_decay if is_decayed else 0.0},
        )
        group["params"].append(parameter)
    return torch.optim.AdamW(list(groups.values()), lr=cfg.base_lr, betas=(0.9, 0.999), eps=1e-8, fused=True)


def learning_rate(step: int, *, cfg: OptimConfig, num_steps: int, steps_per_epoch: float, batch_size: int) -> float:
    """Linear warm-up as a prefix, then a cosine over the remaining steps down to the floor."""
    peak, floor = (lr * batch_size / REFERENCE_BATCH for lr in (cfg.base_lr, cfg.min_lr))
    warmup = min(round(cfg.warmup_epochs * steps_per_epoch), num_steps - 1)
    if step < warmup:
        return floor + (peak - floor) * step / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float, floor: float = 0.0) -> None:
    """Give every group its share; the floor is the same absolute value for all (authors' code)."""
    for group in optimizer.param_groups:
        group["lr"] = max(lr * group["lr_scale"], floor)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """The optimiser's state as named tensors, in the order of its parameters."""
    for number, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            yield f"{number}.{name}", value


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
