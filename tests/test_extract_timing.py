"""Where a worker's time goes: it is added up from several threads, and the part that bounds an extraction is named."""

import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extract.timing import Meter, StageSeconds, find_bottleneck


@pytest.mark.parametrize(
    ("seconds", "workers", "part", "setting"),
    [
        (StageSeconds(decode=300, wait=2, forward=90, encode=1, write=3), 100, "forward", "extract.run.compile"),
        (StageSeconds(decode=99, wait=60, forward=30, encode=1, write=3), 100, "decode", "extract.run.render_threads"),
        (StageSeconds(decode=99, wait=5, forward=30, encode=50, write=3), 100, "encode", "ENCODING"),
        (StageSeconds(decode=99, wait=5, forward=30, encode=2, write=55), 100, "write", "ENCODING=int8"),
        (StageSeconds(decode=20, wait=2, forward=20, encode=1, write=3), 100, "idle", "extract.records_per_shard"),
        # two shards at a time: while one waits or writes, the other one has the GPU
        (StageSeconds(decode=400, wait=70, forward=80, encode=10, write=75), 100, "forward", "GPUs"),
    ],
)
def test_the_part_that_bounds_is_named_with_its_setting(
    seconds: StageSeconds, workers: float, part: str, setting: str
) -> None:
    found = find_bottleneck(seconds, workers)
    assert found is not None
    assert found.part == part and setting in found.advice
    assert str(found).startswith(f"bound by {part} ({found.share:.0%}")


def test_nothing_bounds_what_did_nothing() -> None:
    assert find_bottleneck(StageSeconds(), 10) is None
    assert find_bottleneck(StageSeconds(forward=1), 0) is None


parts = st.floats(0, 1e6)


@given(st.builds(StageSeconds, parts, parts, parts, parts, parts), st.floats(1e-3, 1e6))
def test_a_share_is_a_share(seconds: StageSeconds, workers: float) -> None:
    found = find_bottleneck(seconds, workers)
    assert found is None or 0 <= found.share <= 1


def test_threads_add_up() -> None:
    meter = Meter()

    def work() -> None:
        for _ in range(400):
            meter.add("decode", 0.25)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert meter.seconds == StageSeconds(decode=400.0)


def test_only_waiting_for_items_is_measured() -> None:
    def slow() -> Iterator[int]:
        for number in range(3):
            time.sleep(0.02)
            yield number

    meter, began = Meter(), time.perf_counter()
    for _ in meter.iterate("wait", slow()):
        with meter.measure("forward"):
            time.sleep(0.05)
    assert meter.seconds.wait >= 0.06
    assert meter.seconds.forward >= 0.15
    assert meter.seconds.wait + meter.seconds.forward <= time.perf_counter() - began


def test_what_raises_is_measured_too() -> None:
    meter = Meter()
    with pytest.raises(ValueError), meter.measure("write"):
        raise ValueError
    assert meter.seconds.write > 0
