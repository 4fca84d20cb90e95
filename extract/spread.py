"""A network over several GPUs, for a teacher that one has no memory for: its blocks in order, equal shares on each."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from storage.errors import ConfigError


def spread(module: nn.Module, devices: Sequence[torch.device]) -> None:
    """Place a network's blocks on devices, by their bytes; all else is on the first one. What a block is given is moved
    to where it is, and what comes after the blocks back to the first device.

    Works for networks whose blocks stand in lists and are called one after the other, as those of timm and open_clip
    are. One device works while the others wait: this is for memory, not for speed.

    Raises:
        ConfigError: fewer blocks than devices.
    """
    blocks = list(_blocks(module))
    if len(blocks) < len(devices):
        raise ConfigError(
            f"a {type(module).__name__} has {len(blocks)} blocks that could be spread over {len(devices)} GPUs; "
            "lower extract.run.gpus_per_worker"
        )
    homes = dict(zip(blocks, _shares([_num_bytes(block) for block in blocks], devices), strict=True))
    module.to(devices[0])
    for block, device in homes.items():
        block.to(device)
    _bring_inputs(module, homes, devices[0])


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The members of lists whose members are alike, in order; of stages with such lists, theirs."""
    for child in module.children():
        members = list(child.children()) if isinstance(child, nn.ModuleList | nn.Sequential) else []
        if len(members) > 1 and len({type(member) for member in members}) == 1:
            for member in members:
                yield from list(_blocks(member)) or [member]
        elif members or _has_list(child):
            yield from _blocks(child)


def _has_list(module: nn.Module) -> bool:
    """Whether it holds blocks, as a CLIP tower's `transformer` does."""
    return any(isinstance(child, nn.ModuleList) and len(child) > 1 for child in module.children())


def _shares(sizes: Sequence[int], devices: Sequence[torch.device]) -> list[torch.device]:
    """Each block's device: consecutive ones, equal bytes as far as blocks allow, none without a block."""
    total, before, places = sum(sizes), 0, list[int]()
    for number, size in enumerate(sizes):
        middle = (before + size / 2) / total if total else 0.0
        place = min(int(middle * len(devices)), len(devices) - 1)
        last = places[-1] if places else -1
        left = len(sizes) - number  # as many blocks as there are, this one among them
        places.append(min(max(place, last, len(devices) - left), last + 1))
        before += size
    return [devices[place] for place in places]


def _bring_inputs(module: nn.Module, homes: dict[nn.Module, torch.device], first: torch.device) -> None:
    """Let every block, and every part that holds none, move its inputs to itself."""
    for child in module.children():
        if child in homes or not any(part in homes for part in child.modules()):
            move = functools.partial(_move_inputs, homes.get(child, first))
            child.register_forward_pre_hook(move, with_kwargs=True)
        else:
            _bring_inputs(child, homes, first)


def _move_inputs(device: torch.device, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return _moved(args, device), _moved(kwargs, device)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {name: _moved(part, device) for name, part in value.items()}
    if isinstance(value, list | tuple):
        parts = [_moved(part, device) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _num_bytes(module: nn.Module) -> int:
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
