"""Values that threads share: each is made once, memory stays bounded, and an error is not kept."""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from storage.held_values import HeldValues


def test_never_more_memory_than_allowed_whatever_the_threads_want() -> None:
    held, lock, alive, most = HeldValues[bytes](100, len), threading.Lock(), [0], [0]

    def make(size: int) -> bytes:
        with lock:
            alive[0] += size
            most[0] = max(most[0], alive[0])
        time.sleep(0.0005)
        with lock:
            alive[0] -= size
        return bytes(size)

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(60):
            size = chance.randint(1, 60)
            assert len(held.get(size, size, lambda size=size: make(size))) == size  # type: ignore[misc]
            assert sum(entry.num_bytes for entry in list(held._mine.held.values())) <= 100

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert 60 < most[0] <= 100


def test_the_oldest_give_way_and_a_use_makes_new() -> None:
    held, made = HeldValues[bytes](30, len), list[str]()

    def get(key: str) -> None:
        held.get(key, 10, lambda: made.append(key) or bytes(10))  # type: ignore[func-returns-value]

    for key in "abcadab":
        get(key)
    assert made == list("abcdb")


def test_a_value_counts_for_what_it_really_takes() -> None:
    held = HeldValues[bytes](100, len)
    for key in range(20):
        held.get(key, 1, lambda: bytes(40))
    assert list(held._mine.held) == [18, 19]
    held.get("large", 1, lambda: bytes(1000))
    assert list(held._mine.held) == ["large"]


def test_threads_wait_for_the_first_and_an_error_is_tried_again() -> None:
    held, calls, begun = HeldValues[bytes](100, len), list[int](), threading.Barrier(4)

    def make() -> bytes:
        calls.append(1)
        time.sleep(0.05)
        if len(calls) == 1:
            raise ValueError("first")
        return b"x"

    def work(_: int) -> object:
        begun.wait()
        try:
            return held.get("key", 1, make)
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        found = sorted(map(str, pool.map(work, range(4))))
    assert found == [*[str(b"x")] * 3, "first"] and len(calls) == 2


@pytest.mark.timeout(20)
def test_a_value_larger_than_all_memory_waits_until_it_is_alone() -> None:
    held, running = HeldValues[bytes](10, len), threading.Lock()

    def make() -> bytes:
        assert running.acquire(blocking=False), "two at a time"
        time.sleep(0.002)
        running.release()
        return bytes(50)

    with ThreadPoolExecutor(4) as pool:
        assert {len(value) for value in pool.map(lambda key: held.get(key, 50, make), range(12))} == {50}
