"""How fast work goes now, with a clock that the test turns."""

import pytest

from storage.pace import Pace
from tests.fixtures.clock import Clock


def work(clock: Clock, measured: Pace, seconds: int, amount: float, every: float = 1.0) -> None:
    for _ in range(round(seconds / every)):
        clock.now += every
        measured.add(amount * every)


@pytest.mark.parametrize("every", [0.1, 0.25, 1.0, 5.0, 30.0])
def test_a_steady_rate_is_told_however_the_amounts_come(clock: Clock, every: float) -> None:
    measured = Pace()
    work(clock, measured, 600, 7.0, every)
    assert measured.per_second() == pytest.approx(7.0, rel=0.02)
    assert measured.seconds_for(70) == pytest.approx(10, rel=0.02)
    assert len(measured.amounts) <= 70, "it keeps a minute, not everything"


def test_the_last_minute_counts(clock: Clock) -> None:
    measured = Pace()
    work(clock, measured, 3600, 100.0)
    work(clock, measured, 90, 10.0)
    assert measured.per_second() == pytest.approx(10.0, rel=0.02)


def test_rare_amounts_are_looked_at_however_old(clock: Clock) -> None:
    """A shard of a large teacher takes minutes: one a minute would else be none or one."""
    measured = Pace()
    work(clock, measured, 3600, 2.0, every=240.0)
    assert measured.per_second() == pytest.approx(2.0)


def test_it_sinks_while_nothing_comes(clock: Clock) -> None:
    measured = Pace()
    work(clock, measured, 60, 10.0)
    before = measured.per_second()
    clock.now += 60
    for _ in range(100):
        measured.add(0)
    assert measured.per_second() == pytest.approx(before / 2)


def test_nothing_tells_before_something_was_done(clock: Clock) -> None:
    measured = Pace()
    clock.now += 10
    assert (measured.per_second(), measured.seconds_for(5), measured.seconds_for(0)) == (0.0, None, 0.0)
    measured.begin()
    clock.now += 2
    measured.add(4)
    assert measured.per_second() == pytest.approx(2.0), "what came before its beginning was no work"
