"""Batches go to a GPU ahead of time, and their memory is not used again before they are there. The GPU is played."""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.transfer import on_device


class Batch:
    def __init__(self, number: int, log: list[str]) -> None:
        self.number, self.log = number, log

    def to(self, device: torch.device) -> "Batch":
        self.log.append(f"copy {self.number}")
        return self

    def tensors(self) -> Iterator[Tensor]:
        log, number = self.log, self.number
        yield SimpleNamespace(record_stream=lambda stream: log.append(f"keep {number}"))  # type: ignore[misc]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is done on a GPU that only takes notes."""
    done: list[str] = []
    copied = iter(range(100))

    def record_event() -> Any:
        number = next(copied)
        return SimpleNamespace(number=number, synchronize=lambda: done.append(f"copied {number}"))

    current = SimpleNamespace(wait_event=lambda event: done.append(f"wait {event.number}"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(record_event=record_event))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    return done


def test_a_batch_is_copied_while_the_one_before_is_in_work(log: list[str]) -> None:
    def incoming() -> Iterator[Batch]:
        for number in range(4):
            log.append(f"ask {number}")
            yield Batch(number, log)

    for batch in on_device(incoming(), torch.device("cuda", 0)):
        log.append(f"work {batch.number}")
    assert [line for line in log if line.startswith("work")] == [f"work {number}" for number in range(4)]
    for number in range(4):
        assert log.index(f"wait {number}") < log.index(f"keep {number}") < log.index(f"work {number}")
    for number in range(3):
        assert log.index(f"copy {number + 1}") < log.index(f"work {number}")
    for number in range(2):  # two batches are held: the memory of one is free when the second after it is asked for
        assert log.index(f"copied {number}") < log.index(f"ask {number + 2}")


def test_on_a_cpu_batches_stay_where_they_are() -> None:
    batches = [Batch(number, []) for number in range(3)]
    assert list(on_device(iter(batches), torch.device("cpu"))) == batches
    assert not batches[0].log
