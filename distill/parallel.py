"""One model on several devices: each process holds all of it (DDP), or a part of each tensor (FSDP2).

Everything that is saved is whole tensors under their own names, so a checkpoint does not depend on how many processes
wrote it or on how they divided the model.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from storage.stage import Interrupted

_TIMEOUT = timedelta(minutes=30)
"""Of one exchange between processes; the first one waits for the slowest to open its stores."""


class Team(NamedTuple):
    """The processes that train one model, as one of them sees it."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """One process writes, reports and decides."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, *wishes: bool) -> list[bool]:
        """For each wish, whether some process has it."""
        if self.size == 1:
            return list(wishes)
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        return [bool(votes) for votes in self.total(torch.tensor(wishes, dtype=torch.int32, device=device)).tolist()]

    def agree(self, value: Any) -> Any:
        """What the first process says."""
        if self.size == 1:
            return value
        said = [value]
        dist.broadcast_object_list(said, src=0)
        return said[0]


ALONE = Team()


@contextlib.contextmanager
def join_team(device: torch.device) -> Iterator[Team]:
    """This process's place among those that a launcher started, by the variables that it set (RANK, WORLD_SIZE, ...);
    or in the group that it has made already.

    After an error the group is left as it is: the others may wait in an exchange that this process never joins, and
    with GPUs leaving it would wait for them. The process ends anyway, and says why.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 and not dist.is_initialized():
        yield ALONE
        return
    is_ours = not dist.is_initialized()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if is_ours:
        store, rank, size = next(rendezvous("env://"))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # or they would find the words of an earlier one
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT, rank=rank, world_size=size,
            store=dist.PrefixStore(f"attempt-{attempt}", store),  # type: ignore[attr-defined]
            device_id=device if device.type == "cuda" else None,
        )  # fmt: skip
    try:
        yield Team(dist.get_rank(), dist.get_world_size())
    except Interrupted:  # all leave together
        _leave(is_ours)
        raise
    _leave(is_ours)


def _leave(is_ours: bool) -> None:
    if is_ours:
        dist.destroy_process_group()


def distribute(model: nn.Module, team: Team, device: torch.device, strategy: str) -> nn.Module:
    """What is called in the place of `model`, so that gradients are means over all processes. With `fsdp` the model's
    own parameters become parts."""
    if team.size == 1:
        return model
    if strategy == "fsdp":
        mesh = init_device_mesh(device.type, (team.size,))
        for block in blocks_of(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def settle(model: nn.Module, compute: Callable[[], Sequence[Tensor]]) -> None:
    """Let DDP settle into the order in which it sums gradients: it begins with one and takes another when it has seen a
    backward pass. Sums over three and more processes differ in their last bits by that order, so that a run which went
    on from a checkpoint would not be the same to the bit. Other models are left alone.

    Args:
        compute: outputs of a forward pass of the shapes of training; what it changes of the model is put back.
    """
    if not isinstance(model, DistributedDataParallel):
        return
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.stack([output.float().sum() for output in compute()]).sum().backward()
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of a network, as timm's models name them."""
    found = [getattr(module, "blocks", None) for module in model.modules()]
    return [block for blocks in found if isinstance(blocks, nn.Module) for block in blocks.children()]


@contextlib.contextmanager
def without_exchange(model: nn.Module, *, wanted: bool) -> Iterator[None]:
    """Gradients of the block's backward pass stay here, to be summed with those of the next one."""
    if not wanted:
        yield
    elif isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)
    else:
        yield


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; of one that is spread, every process must ask at the same time."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_like(value: Tensor, wanted: Tensor) -> Tensor:
    """A whole tensor as the process needs it that holds `wanted`."""
    value = value.to(wanted.device)
    if not isinstance(wanted, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value, wanted.device_mesh, wanted.placements)
