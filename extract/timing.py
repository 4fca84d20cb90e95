"""Where a worker's time goes."""

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeVar

Item = TypeVar("Item")


class StageSeconds(NamedTuple):
    """Seconds spent in each part of a shard's way, and in waiting for the part before."""

    decode: float = 0.0
    """Reading and rendering images, summed over threads; beside the others, not between them."""
    wait: float = 0.0
    """The teacher had no batch."""
    forward: float = 0.0
    """The teacher's forward pass and whitening."""
    encode: float = 0.0
    """Encoding tokens and copying them from the device."""
    write: float = 0.0
    """Packing, digests, writing and fsync."""

    def plus(self, other: "StageSeconds") -> "StageSeconds":
        return StageSeconds(*(here + there for here, there in zip(self, other, strict=True)))


class Meter:
    """Adds up where the time of one shard goes, from several threads."""

    def __init__(self) -> None:
        self.seconds, self._turn = StageSeconds(), threading.Lock()

    def add(self, part: str, seconds: float) -> None:
        """
        Args:
            part: a field of `StageSeconds`.
        """
        with self._turn:
            self.seconds = self.seconds.plus(StageSeconds(**{part: seconds}))

    @contextlib.contextmanager
    def measure(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(part, time.perf_counter() - began)

    def iterate(self, part: str, items: Iterable[Item]) -> Iterator[Item]:
        """The same items; waiting for them is measured."""
        iterator = iter(items)
        while True:
            with self.measure(part):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item
