"""A ring of buffers: every batch once and in order, from few buffers that are not filled while somebody holds them."""

import contextlib
import functools
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from storage.errors import DamagedError
from storage.ring import iter_filled

Buffer = NDArray[np.int64]


class Maker:
    """Makes buffers and counts them."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self) -> Buffer:
        self.made += 1
        return np.full(1000, -1, np.int64)


def fill(step: int, buffer: Buffer) -> Buffer:
    buffer[:] = step
    return buffer


def workers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("decant-ring")}


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert condition()


# ---- what comes ------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    first=st.integers(0, 30), count=st.integers(0, 25), threads=st.integers(1, 8), spare=st.integers(0, 6),
    held=st.integers(1, 4), look_ahead=st.integers(1, 6), slow=st.sets(st.integers(0, 55), max_size=3),
)  # fmt: skip
def test_every_step_comes_once_in_order_and_stays_while_it_is_held(
    first: int, count: int, threads: int, spare: int, held: int, look_ahead: int, slow: set[int]
) -> None:
    """A consumer that looks at the batches that it holds only when it has all of them."""
    make, last = Maker(), first + count
    hinted: list[int] = []
    found: list[int] = []

    def fill_slowly(step: int, buffer: Buffer) -> Buffer:
        if step in slow:
            time.sleep(0.002)
        return fill(step, buffer)

    newest: list[Buffer] = []
    for batch in iter_filled(
        fill_slowly, make, first, last, threads=threads, depth=held + spare, held=held, hint=hinted.append,
        look_ahead=look_ahead,
    ):  # fmt: skip
        newest = [*newest, batch][-held:]
        found.append(int(batch[0]))
        assert [set(held_batch.tolist()) for held_batch in newest] == [{step} for step in found[-held:]]
    assert found == list(range(first, last))
    assert sorted(hinted) == found, "each step is announced once"
    assert make.made == min(held + spare, count)


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize(("fill_seconds", "use_seconds"), [(0.002, 0), (0, 0.002)])
def test_slow_fills_and_slow_consumers(threads: int, fill_seconds: float, use_seconds: float) -> None:
    def fill_slowly(step: int, buffer: Buffer) -> Buffer:
        buffer[:500] = step
        time.sleep(fill_seconds)
        buffer[500:] = step
        return buffer

    for step, batch in enumerate(iter_filled(fill_slowly, Maker(), 0, 60, threads=threads, depth=6)):
        assert (batch == step).all()
        time.sleep(use_seconds)
        assert (batch == step).all(), "filled again while it was held"


def test_a_batch_that_is_let_go_of_is_filled_again() -> None:
    """The other side of the promise: nothing is copied, so a consumer that keeps too much would see it change."""
    batches = iter_filled(fill, Maker(), 0, 10, threads=1, depth=3, held=2)
    first, second = next(batches), next(batches)
    assert (first == 0).all()
    next(batches)
    wait_for(lambda: bool((first == 3).all()))
    assert (second == 1).all()


def test_it_works_ahead_but_no_further_than_its_buffers() -> None:
    begun: list[int] = []

    def note(step: int, buffer: Buffer) -> Buffer:
        begun.append(step)
        return fill(step, buffer)

    batches = iter_filled(note, Maker(), 0, 100, threads=3, depth=5, held=2)
    assert not begun, "nothing starts before the first batch is asked for"
    next(batches)
    wait_for(lambda: len(begun) == 5)
    next(batches)
    time.sleep(0.02)
    assert sorted(begun) == [0, 1, 2, 3, 4], "two are held"
    next(batches)
    wait_for(lambda: len(begun) == 6)


def test_several_threads_are_at_work_together() -> None:
    """A barrier that only three at the same time can pass."""
    barrier = threading.Barrier(3)

    def meet(step: int, buffer: Buffer) -> Buffer:
        barrier.wait(timeout=30)
        return fill(step, buffer)

    assert len(list(iter_filled(meet, Maker(), 0, 9, threads=3, depth=3))) == 9


def test_rings_can_be_entered_again_and_side_by_side() -> None:
    for _ in range(3):
        assert [int(b[0]) for b in iter_filled(fill, Maker(), 0, 5, threads=2, depth=2)] == [0, 1, 2, 3, 4]
    one, other = (iter_filled(fill, Maker(), first, first + 5, threads=2, depth=2) for first in (0, 50))
    pairs = [(int(a[0]), int(b[0])) for a, b in zip(one, other, strict=True)]
    assert pairs == [(n, 50 + n) for n in range(5)]


def test_a_forked_child_can_have_rings_of_its_own(fork: Callable[[Callable[[], object]], int]) -> None:
    """Also in the middle of its parent's: threads do not come along."""
    batches = iter_filled(fill, Maker(), 0, 10, threads=2, depth=4)
    next(batches)

    def work() -> None:
        found = [int(batch[0]) for batch in iter_filled(fill, Maker(), 0, 20, threads=2, depth=4)]
        assert found == list(range(20))

    _, status = os.waitpid(fork(work), 0)
    assert status == 0
    assert [int(batch[0]) for batch in batches] == list(range(1, 10))


# ---- announcements ---------------------------------------------------------------------------------------------------


def test_steps_are_announced_some_steps_before_they_are_filled() -> None:
    events: list[tuple[str, int]] = []

    def note(step: int, buffer: Buffer) -> Buffer:
        events.append(("fill", step))
        return buffer

    hint = lambda step: events.append(("hint", step))  # noqa: E731
    list(iter_filled(note, Maker(), 5, 11, threads=1, depth=2, hint=hint, look_ahead=3))
    assert events == [
        ("hint", 5), ("hint", 6), ("hint", 7), ("hint", 8), ("fill", 5), ("hint", 9), ("fill", 6), ("hint", 10),
        ("fill", 7), ("fill", 8), ("fill", 9), ("fill", 10),
    ]  # fmt: skip


@pytest.mark.parametrize("error", [DamagedError("the shard is missing"), OSError("no hints here")])
def test_an_announcement_that_fails_is_left_to_the_fill(error: Exception) -> None:
    def fail(step: int) -> None:
        raise error

    assert len(list(iter_filled(fill, Maker(), 0, 4, threads=2, depth=2, hint=fail))) == 4


def test_a_bug_in_an_announcement_is_not_hidden() -> None:
    def fail(step: int) -> None:
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        list(iter_filled(fill, Maker(), 0, 4, threads=2, depth=2, hint=fail))


# ---- ends ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_an_error_comes_at_its_place_and_ends_the_threads(threads: int) -> None:
    def fail(step: int, buffer: Buffer) -> Buffer:
        if step in (3, 4):
            raise DamagedError(f"record of step {step}")
        return fill(step, buffer)

    found = []
    with pytest.raises(DamagedError, match="step 3"):
        for batch in iter_filled(fail, Maker(), 0, 10, threads=threads, depth=6):
            found.append(int(batch[0]))
    assert found == [0, 1, 2]
    assert not workers()


def test_a_buffer_that_cannot_be_made_ends_the_threads() -> None:
    def fail() -> Buffer:
        raise MemoryError("no pinned memory")

    with pytest.raises(MemoryError):
        next(iter_filled(fill, fail, 0, 10, threads=2, depth=4))
    assert not workers()


def leave(batches: Iterator[Buffer], how: str) -> None:
    for batch in batches:
        if int(batch[0]) == 3:
            if how == "break":
                break
            if how == "close":
                batches.close()  # type: ignore[attr-defined]
                return
            raise KeyboardInterrupt


@pytest.mark.parametrize("how", ["break", "close", "raise"])
def test_threads_end_when_the_loop_is_left(how: str) -> None:
    begun: list[int] = []

    def note(step: int, buffer: Buffer) -> Buffer:
        begun.append(step)
        return fill(step, buffer)

    with contextlib.suppress(KeyboardInterrupt):  # and with it goes the last reference to the ring
        leave(iter_filled(note, Maker(), 0, 10_000, threads=4, depth=8), how)
    assert not workers()
    count = len(begun)
    assert count <= 4 + 8
    time.sleep(0.02)
    assert len(begun) == count


def test_closing_does_not_wait_for_batches_that_were_not_begun() -> None:
    begun: list[int] = []

    def fill_slowly(step: int, buffer: Buffer) -> Buffer:
        begun.append(step)
        time.sleep(0.01 if step else 0)
        return buffer

    batches = iter_filled(fill_slowly, Maker(), 0, 100, threads=1, depth=20)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert len(begun) <= 4


def test_a_ring_that_was_never_begun_leaves_nothing() -> None:
    make = Maker()
    batches = iter_filled(fill, make, 0, 10, threads=2, depth=4)
    del batches
    assert make.made == 0
    assert not workers()


def test_buffers_go_with_the_ring() -> None:
    """Gigabytes of pinned memory must not wait for a collection of cycles."""
    gc.disable()
    try:
        kept: list[int] = []

        class Tracked:
            def __del__(self) -> None:
                kept.remove(id(self))

        def make() -> Tracked:
            tracked = Tracked()
            kept.append(id(tracked))
            return tracked

        for step in iter_filled(lambda step, _: step, make, 0, 20, threads=2, depth=4):
            assert len(kept) == 4
            if step == 12:
                break
        assert kept == []
    finally:
        gc.enable()


@pytest.mark.parametrize("numbers", [{"threads": 0}, {"held": 0}, {"held": 3}, {"look_ahead": 0}, {"depth": 0}])
def test_impossible_rings_are_refused(numbers: dict[str, int]) -> None:
    ring = functools.partial(iter_filled, fill, Maker(), 0, 5, threads=1, depth=2)
    with pytest.raises(ValueError, match="a ring of"):
        next(ring(**numbers))  # type: ignore[arg-type]
