"""What a GPU is asked for, on machines without one: its streams and events are stood in for."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from distill.device import repeatable
from distill.transfer import on_device
from storage.errors import ConfigError

GPU = torch.device("cuda")


class Gpu:
    """Says what is done with it, in order."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def wait_event(self, event: "Event") -> None:
        self.log.append(f"wait for copy {event.number}")


class Event(NamedTuple):
    gpu: Gpu
    number: int

    def synchronize(self) -> None:
        self.gpu.log.append(f"copy {self.number} is over")


class Copies:
    """The stream beside the current one."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.count = gpu, 0

    def record_event(self) -> Event:
        self.count += 1
        return Event(self.gpu, self.count - 1)


class Kept(NamedTuple):
    """A tensor."""

    gpu: Gpu
    number: int

    def record_stream(self, stream: Gpu) -> None:
        self.gpu.log.append(f"keep {self.number}")


class Batch(NamedTuple):
    gpu: Gpu
    number: int

    def to(self, device: torch.device) -> "Batch":
        self.gpu.log.append(f"copy {self.number}")
        return self

    def tensors(self) -> Iterator[Tensor]:
        yield Kept(self.gpu, self.number)  # type: ignore[misc]


def test_memory_is_filled_again_only_when_its_copy_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ring that holds two batches fills the memory of number n again when number n + 2 is asked for."""
    gpu = Gpu()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Copies(gpu))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *device: gpu)

    def ring() -> Iterator[Batch]:
        for number in range(4):
            if number >= 2:
                gpu.log.append(f"fill memory of {number - 2}")
            yield Batch(gpu, number)

    seen = []
    for batch in on_device(ring(), GPU):
        gpu.log.append(f"work on {batch.number}")
        seen.append(batch.number)
    assert seen == [0, 1, 2, 3]
    log = gpu.log
    for number in seen:
        assert log.index(f"wait for copy {number}") < log.index(f"keep {number}") < log.index(f"work on {number}")
    for number in (0, 1):
        assert log.index(f"copy {number} is over") < log.index(f"fill memory of {number}")
    for number in (1, 2, 3):
        assert log.index(f"copy {number}") < log.index(f"work on {number - 1}"), (
            "copied while the one before is in work"
        )


def test_on_a_cpu_batches_are_as_they_come() -> None:
    batches: Any = iter([1, 2, 3])
    assert list(on_device(batches, torch.device("cpu"))) == [1, 2, 3]


def test_algorithms_are_repeatable_for_the_block() -> None:
    """Attention has both kinds, and takes the other one where torch is asked for no more than a warning."""
    with repeatable(GPU, wanted=True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    assert not torch.are_deterministic_algorithms_enabled()
    for device, wanted in [(torch.device("cpu"), True), (GPU, False)]:
        with repeatable(device, wanted=wanted):
            assert not torch.are_deterministic_algorithms_enabled()


def test_what_cannot_be_repeated_is_said_with_the_setting() -> None:
    with (
        pytest.raises(ConfigError, match=r"put_.*does not have a deterministic.*distill\.run\.deterministic=false"),
        repeatable(GPU, wanted=True),
    ):
        torch.zeros(3).put_(torch.tensor([0]), torch.tensor([1.0]))
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError, match="shapes"), repeatable(GPU, wanted=True):
        torch.ones(2, 3) @ torch.ones(2, 3)
