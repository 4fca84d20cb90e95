"""Batches to the device while the one before is computed."""

from collections.abc import Iterator
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor


class Movable(Protocol):
    """A batch that can be had on another device."""

    def to(self, device: torch.device) -> Self: ...
    def tensors(self) -> Iterator[Tensor]: ...


Batch = TypeVar("Batch", bound=Movable)


def on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches on `device`; on a GPU each is copied from pinned memory by a stream of its own while the one
    before is in work, so that the copy costs no time. At most two of the incoming batches are in use at a time."""
    if device.type != "cuda":
        yield from batches
        return
    copies = torch.cuda.Stream(device)
    ahead: tuple[Batch, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(copies):
            moved = batch.to(device)
            done = copies.record_event()
        if ahead is not None:
            yield _ready(*ahead)
            ahead[1].synchronize()  # its pinned memory is filled again once the next is asked for
        ahead = moved, done
    if ahead is not None:
        yield _ready(*ahead)


def _ready(batch: Batch, done: torch.cuda.Event) -> Batch:
    """A copied batch that the current stream may use; its memory is not given away before that stream is through."""
    current = torch.cuda.current_stream()
    current.wait_event(done)
    for tensor in batch.tensors():
        tensor.record_stream(current)
    return batch
