"""Parameter groups, and the learning rate as a function of the step."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.models.beit import Beit
from torch import nn

from distill.config import OptimConfig

REFERENCE_BATCH = 512
"""Learning rates are given for this many images a step (authors' code)."""
_NO_DECAY_ENDINGS = ("cls_token", "pos_embed", ".bias")
_NO_DECAY_PARTS = (".meta_mlp.",)
"""The position MLP of timm's SwinV2-CR, which does not exempt it itself."""


def build_optimizer(
    model: nn.Module, cfg: OptimConfig, *, lr_scale: Callable[[str], float] | None = None
) -> torch.optim.AdamW:
    """AdamW with the authors' weight decay (optimizer.py): none on vectors, biases, CLS and absolute positions, nor on
    what timm's network exempts itself, such as SwinV2's position MLP and attention scale. But a ViT's table of relative
    positions is decayed.

    Args:
        lr_scale: parameter name to its share of the learning rate (layer-wise decay).
    """
    exempt = _exempted_by_timm(model)
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_exempt = name.endswith(_NO_DECAY_ENDINGS) or name in exempt or any(part in name for part in _NO_DECAY_PARTS)
        is_decayed = parameter.ndim > 1 and not is_exempt
        scale = lr_scale(name) if lr_scale else 1.0
        group = groups.setdefault(
            (scale, is_decayed),
            {"params": [], "lr_scale": scale, "weight_decay": cfg.weight_decay if is_decayed else 0.0},
        )
        group["params"].append(parameter)
    return torch.optim.AdamW(list(groups.values()), lr=cfg.base_lr, betas=(0.9, 0.999), eps=1e-8, fused=True)


def _exempted_by_timm(model: nn.Module) -> set[str]:
    """Full names of what timm would not decay, in all its networks but `Beit`, whose table of positions it exempts."""
    exempt: set[str] = set()
    for prefix, module in model.named_modules():
        tell: Any = getattr(module, "no_weight_decay", None)
        if tell is not None and not isinstance(module, Beit):
            exempt |= {f"{prefix}.{name}" if prefix else name for name in tell()}
    return exempt


def learning_rate(
    step: int, *, cfg: OptimConfig, num_steps: int, steps_per_epoch: float, batch_size: int, scale: float = 1.0
) -> float:
    """Linear warm-up as a prefix, then a cosine over the remaining steps down to the floor.

    As timm's `CosineLRScheduler` with `warmup_prefix` in the authors' lr_scheduler.py, except that their first rate is
    used for two steps and each following one a step later.

    Args:
        scale: a group's share of the peak (layer-wise decay). Start and floor are the same for all groups, so the rate
            of a group whose peak is below them falls to its peak, and rises to the floor.
    """
    start, peak, floor = (lr * batch_size / REFERENCE_BATCH for lr in (cfg.warmup_lr, cfg.base_lr, cfg.min_lr))
    peak *= scale
    warmup = min(round(cfg.warmup_epochs * steps_per_epoch), num_steps - 1)
    if step < warmup:
        return start + (peak - start) * step / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the same rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


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
