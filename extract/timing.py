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


class Bottleneck(NamedTuple):
    """Which part of a shard's way bounds an extraction."""

    part: str
    """`decode`, `forward`, `encode`, `write`, or `idle`: workers without work."""
    share: float
    """Of the workers' time that goes into this part, or into waiting for it."""
    advice: str
    """The setting to change."""

    def __str__(self) -> str:
        return f"bound by {self.part} ({self.share:.0%} of the workers' time): {self.advice}"


_ADVICE = {
    "decode": "more extract.run.render_threads or workers if cores are idle, images on a faster disk, or several "
    "teachers in one pass (TEACHER=a,b)",
    "forward": "the teacher sets the pace, as it should; more GPUs or workers, extract.precision=float16 on a GPU, "
    "extract.run.compile=true or another extract.run.batch_size",
    "encode": "ENCODING=fp16 or int8, which cost least to encode",
    "write": "a faster disk for the store, or fewer bytes (ENCODING=int8)",
    "idle": "there are more workers than shards to keep them busy; fewer workers, or smaller ones "
    "(extract.records_per_shard)",
}
_IS_BUSY = 0.6
"""Share of the time from which on a teacher is taken for busy, though other parts may seem to take as long: on a GPU
they belong to another shard, and are done meanwhile."""


def find_bottleneck(seconds: StageSeconds, worker_seconds: float) -> Bottleneck | None:
    """What bounds an extraction; None where nothing was done.

    Args:
        seconds: of all its shards.
        worker_seconds: for which its workers were up, all of them together.
    """
    if worker_seconds <= 0 or not any(seconds):
        return None
    spent = {
        "forward": seconds.forward,
        "decode": seconds.wait,  # what was decoded while the teacher ran held nobody up
        "encode": seconds.encode,
        "write": seconds.write,
        "idle": max(0.0, worker_seconds - seconds.forward - seconds.wait - seconds.encode - seconds.write),
    }
    part = max(spent, key=lambda name: spent[name])
    if spent["forward"] >= _IS_BUSY * worker_seconds:
        part = "forward"
    return Bottleneck(part, min(1.0, spent[part] / worker_seconds), _ADVICE[part])


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
