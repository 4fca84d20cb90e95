"""What the benchmark makes of its seconds: ratios, who is ahead, the files and the page. No speed is measured here."""

from pathlib import Path

import pytest

from tests.bench.picture import draw
from tests.bench.report import as_markdown, as_text
from tests.bench.results import Report, Row, Section
from tests.bench.timing import Contender, race, speed_rows
from tests.bench.write_docs import BEGIN, END, write_docs


def nothing() -> None:
    pass


CONTENDERS = [
    Contender("raw", "limit", nothing),
    Contender("store", "ours", nothing, target=0.9),
    Contender("fast peer", "peer", nothing),
    Contender("absent peer", "peer", None),
    Contender("other raw", "limit", nothing),
    Contender("other store", "ours", nothing, target=0.9),
]
SECONDS = {
    "raw": [2.0, 1.0], "store": [1.25, 3.0], "fast peer": [0.5], "absent peer": [], "other raw": [4.0],
    "other store": [4.0],
}  # fmt: skip


@pytest.fixture
def report() -> Report:
    reads = Section("Reads", "made up", speed_rows(CONTENDERS, SECONDS, gigabytes=2, unit="GB/s"))
    sizes = Section(
        "Sizes", "made up",
        (
            Row("ours", "ours", 101.0, "bytes", ratio=1.01, target=1.006, limit="tokens", is_less_better=True),
            Row("theirs", "peer", 98.0, "bytes", ratio=0.98, limit="tokens", is_less_better=True),
            Row("even", "peer", 100.0, "bytes", ratio=1.0, limit="tokens", is_less_better=True),
            Row("open", "ours", 3.0, "ms", target=5.0, is_less_better=True),
        ),
    )  # fmt: skip
    return Report({"cpu": "made up"}, {"numpy": "9"}, (reads, sizes))


def test_best_rounds_are_held_against_the_limit_above(report: Report) -> None:
    rows = {row.what: row for row in report.sections[0].rows}
    assert [rows[name].ratio for name in rows] == [1.0, 0.8, 2.0, None, 1.0, 1.0]
    assert [rows[name].value for name in rows] == [2.0, 1.6, 4.0, None, 0.5, 0.5]
    assert [rows[name].is_met for name in rows] == [None, False, None, None, None, True]
    assert rows["other store"].limit == "other raw"


def test_ratios_within_rounds() -> None:
    contenders = [Contender("disk", "limit", nothing), Contender("store", "ours", nothing, every=2)]
    seconds = {"disk": [9.0, 2.0, 9.0, 6.0, 9.0, 3.0], "store": [4.0, 2.0, 3.0]}
    _, row = speed_rows(contenders, seconds, gigabytes=1, unit="GB/s", by_round=True)
    assert (row.ratio, row.value) == (1.0, 0.5)


def test_peers_that_are_ahead_are_named(report: Report) -> None:
    assert [row.what for section in report.sections for row in section.winning_peers()] == ["fast peer", "theirs"]
    text = as_text(report)
    assert text.count("AHEAD OF US") == 2
    assert "MISSED" in text
    assert "not installed" in text
    assert "fast peer (reads); theirs (sizes)" in as_markdown(report)


def test_smaller_is_better_where_it_is(report: Report) -> None:
    ours, *_, opened = report.sections[1].rows
    assert (ours.is_met, opened.is_met) == (False, True)


def test_a_report_comes_back_from_its_file(report: Report, tmp_path: Path) -> None:
    report.save(tmp_path / "bench.json")
    assert Report.load(tmp_path / "bench.json") == report


def test_the_page_keeps_its_words(report: Report, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold numbers\n{END}\nafter\n")
    write_docs(report, page)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old numbers" not in text
    assert "| **store** | 1.6 GB/s | 0.80 | >= 0.9 MISSED | |" in text
    write_docs(report, page)
    assert page.read_text() == text
    assert page.with_suffix(".svg").read_text().count("fast peer") == 1
    page.write_text("no marks")
    with pytest.raises(ValueError, match="has no"):
        write_docs(report, page)


def test_the_picture_has_no_date_in_it(report: Report, tmp_path: Path) -> None:
    draw(report, tmp_path / "a.svg")
    draw(report, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_contenders_take_turns_and_slow_ones_do_a_part() -> None:
    calls: list[str] = []
    now = iter(range(1000))
    contenders = [
        Contender("a", "limit", lambda: calls.append("a"), prepare=lambda: calls.append("clear")),
        Contender("b", "peer", lambda: calls.append("b"), share=0.25, every=2),
        Contender("c", "peer", None),
    ]
    seconds = race(contenders, rounds=2, clock=lambda: float(next(now)))
    assert calls == ["clear", "a", "b", "clear", "a", "clear", "a", "b"]
    assert seconds == {"a": [1.0, 1.0], "b": [4.0], "c": []}
