"""Progress in a log file: few lines, true rates, no control characters; on a terminal: a bar."""

import io
import re
import sys

import pytest
from rich.console import Console

from pipeline.progress import LOG_SECONDS, show_progress, show_when_slow
from tests.fixtures.clock import Clock


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), highlight=False, markup=False)


def lines(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_first_step_last_step_and_one_line_now_and_then(clock: Clock, console: Console) -> None:
    with show_progress("distill", console) as display:
        display.start(100, "steps")
        for _ in range(100):
            clock.now += 1
            display.advance(1, loss="0.5")
    counts = [int(line.split("/")[0].removeprefix("distill: ")) for line in lines(console)]
    assert counts == [1, *range(1 + int(LOG_SECONDS), 100, int(LOG_SECONDS)), 100]
    assert lines(console)[0] == "distill: 1/100 steps  1.0 steps/s  loss 0.5  eta 1:39"


def test_a_line_is_plain_text(clock: Clock, console: Console) -> None:
    with show_progress("extract", console) as display:
        display.start(2_000_000, "images")
        display.say("resuming: [3] of 4 shards [/tmp/x] are done")
        clock.now += 2
        display.advance(1_000_000, shards="2/4", bad=0)
        clock.now += 0.5
        display.advance(1_000_000, shards="4/4", bad=1)
    assert lines(console) == [
        "  resuming: [3] of 4 shards [/tmp/x] are done",
        "extract: 1,000,000/2,000,000 images  500,000 images/s  shards 2/4  bad 0  eta 0:02",
        "extract: 2,000,000/2,000,000 images  800,000 images/s  shards 4/4  bad 1  eta 0:00",
    ]
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", "\n".join(lines(console)))


def test_what_was_done_before_counts_for_nothing_in_the_rate(clock: Clock, console: Console) -> None:
    with show_progress("extract", console) as display:
        display.start(100, "images", done=50)
        clock.now += 10
        display.advance(10)
    assert lines(console) == ["extract: 60/100 images  1.0 images/s    eta 0:40"]


def test_a_second_start_begins_anew(clock: Clock, console: Console) -> None:
    """Fine-tuning starts once a member: neither counts nor time of the first may leak into the second."""
    with show_progress("finetune", console) as display:
        display.start(10, "steps")
        clock.now += 100
        display.advance(10)
        display.start(4, "steps")
        clock.now += 2
        display.advance(1)
        clock.now += 6
        display.advance(3)
    assert lines(console) == [
        "finetune: 10/10 steps  0.1 steps/s    eta 0:00",
        "finetune: 1/4 steps  0.5 steps/s    eta 0:06",
        "finetune: 4/4 steps  0.5 steps/s    eta 0:00",
    ]


def test_no_time_and_no_step_divide_by_nothing(clock: Clock, console: Console) -> None:
    with show_progress("distill", console) as display:
        display.start(0, "steps")
        display.advance(0)
        display.start(5, "steps", done=5)
    assert lines(console) == ["distill: 0/0 steps  0.0 steps/s    eta 0:00"]


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    console = Console(file=io.StringIO(), force_terminal=True, width=150, highlight=False)
    with show_progress("distill", console) as display:
        display.start(10, "steps")
        display.advance(4, loss="0.25")
        display.say("resuming at step 4 of 10")
        display.start(8, "steps", done=2)
        display.advance(6, loss="0.125")
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert "\x1b[" in shown
    assert "resuming at step 4 of 10" in plain
    assert "8/8" in plain.splitlines()[-1]
    assert "loss 0.125" in plain.splitlines()[-1]


def test_quick_work_shows_nothing_and_slow_work_says_how_far_it_is(clock: Clock, console: Console) -> None:
    with show_when_slow("reading images", console) as display:
        display.start(1000, "images", done=100)
        for _ in range(9):
            clock.now += 0.1
            display.advance(50)
        assert lines(console) == []
        clock.now += 0.2
        display.advance(50)
        clock.now += 1
        display.advance(200, read="30 MB/s")
        clock.now += 15
        display.advance(200, read="20 MB/s")
    assert lines(console) == [
        "reading images: 800/1,000 images  200 images/s  read 30 MB/s  eta 0:01",
        "reading images: 1,000/1,000 images  25.0 images/s  read 20 MB/s  eta 0:00",
    ]


def test_a_word_is_never_held_back(clock: Clock, console: Console) -> None:
    with show_when_slow("reading images", console) as display:
        display.say("a word")
        display.start(2, "images")
        clock.now += 1
        display.advance(2)
    assert lines(console) == ["  a word", "reading images: 2/2 images  2.0 images/s    eta 0:00"]
