"""Batches made ahead: all of them, in order, whatever the threads do; and the memory for decoded images."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from distill.prefetch import ImageCache, prefetch
from storage.errors import BadImageError
from storage.image_index import ImageIndex, ImageList


@settings(max_examples=60, deadline=None)
@given(
    first=st.integers(0, 30), count=st.integers(0, 40), threads=st.integers(1, 6), ahead=st.integers(1, 9),
    slow=st.sets(st.integers(0, 70), max_size=4),
)  # fmt: skip
def test_every_step_comes_once_and_in_order(first: int, count: int, threads: int, ahead: int, slow: set[int]) -> None:
    """Slow steps are overtaken by later ones; nobody may notice."""

    def load(step: int) -> str:
        if step in slow:
            time.sleep(0.003)
        return f"batch {step}"

    found = list(prefetch(load, first, first + count, threads=threads, ahead=ahead))
    assert found == [f"batch {step}" for step in range(first, first + count)]


def test_it_works_ahead_but_no_further_than_told() -> None:
    begun: list[int] = []

    def load(step: int) -> int:
        begun.append(step)
        return step

    batches = prefetch(load, 0, 100, threads=3, ahead=4)
    assert next(batches) == 0
    deadline = time.monotonic() + 10
    while len(begun) < 5 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert sorted(begun) == [0, 1, 2, 3, 4], "the one at work and four more"
    batches.close()  # type: ignore[attr-defined]


def test_several_threads_are_at_work_together() -> None:
    """A barrier that only three at the same time can pass."""
    barrier = threading.Barrier(3)
    found = list(prefetch(lambda step: barrier.wait(timeout=30) * 0 + step, 0, 9, threads=3, ahead=3))
    assert found == list(range(9))


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("decant-ring")]


def test_an_error_comes_at_its_place_and_ends_the_threads() -> None:
    def load(step: int) -> int:
        if step == 3:
            raise BadImageError("no picture")
        return step

    before, found = workers(), []
    with pytest.raises(BadImageError, match="no picture"):
        for step in prefetch(load, 0, 10, threads=2, ahead=6):
            found.append(step)
    assert found == [0, 1, 2]
    assert workers() == before


def test_threads_end_when_the_loop_is_left() -> None:
    before = workers()
    begun: list[int] = []

    def load(step: int) -> int:
        begun.append(step)
        return step

    for step in prefetch(load, 0, 10_000, threads=4, ahead=8):
        if step == 5:
            break
    assert workers() == before
    assert len(begun) < 20
    seen = len(begun)
    time.sleep(0.02)
    assert len(begun) == seen


# ---- decoded images --------------------------------------------------------------------------------------------------


class Decoder:
    """Images of 10 x 20 pixels (600 bytes); counts how often each is decoded."""

    def __init__(self) -> None:
        self.reads: list[int] = []

    def read_image(self, position: int) -> NDArray[np.uint8]:
        self.reads.append(position)
        return np.full((20, 10, 3), position, np.uint8)


@pytest.mark.parametrize(("budget", "kept"), [(0, 0), (599, 0), (600, 1), (1850, 3), (10_000, 5)])
def test_images_are_kept_while_the_budget_lasts(budget: int, kept: int) -> None:
    decoder = Decoder()
    cache = ImageCache(cast(ImageList, decoder), budget)
    for _ in range(3):
        for position in range(5):
            assert (cache.read(position) == position).all()
    assert sorted(decoder.reads) == sorted([*range(5), *(2 * list(range(kept, 5)))])


def test_one_image_read_by_many_threads_is_counted_once() -> None:
    """All of them decode it before the first can keep it."""
    decoder, barrier = Decoder(), threading.Barrier(8)

    def read_together(position: int) -> NDArray[np.uint8]:
        barrier.wait(timeout=30)
        return Decoder().read_image(position)

    cache = ImageCache(cast(ImageList, SimpleNamespace(read_image=read_together)), 1200)
    threads = [threading.Thread(target=cache.read, args=(0,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cache.images = cast(ImageList, decoder)
    for position in (0, 1, 1, 2, 2):
        cache.read(position)
    assert decoder.reads == [1, 2, 2], "there was room for exactly one more"


def test_a_bad_image_is_not_kept() -> None:
    def fail(position: int) -> NDArray[np.uint8]:
        raise BadImageError("cut short")

    cache = ImageCache(cast(ImageList, SimpleNamespace(read_image=fail)), 10_000)
    for _ in range(2):
        with pytest.raises(BadImageError):
            cache.read(0)


def test_the_same_pixels_with_and_without_memory(make_index: Callable[..., tuple[Path, ImageIndex]]) -> None:
    images = make_index(per_class=3)[1].split("train")
    kept, fresh = ImageCache(images, 1 << 20), ImageCache(images, 0)
    for position in [*range(len(images))] * 2:
        assert kept.read(position).tobytes() == fresh.read(position).tobytes()
