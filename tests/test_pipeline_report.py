"""The report: one page that needs nothing else, and says what the results say."""

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import ReportConfig
from pipeline.report import render_page
from pipeline.stages import STAGES
from pipeline.workspace import Workspace
from storage.stage import StageResult

Read = tuple[dict[str, StageResult], dict[str, Path]]


class Page(HTMLParser):
    """Links, table cells and visible text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.rows: list[list[str]] = []
        self.is_top: list[bool] = []
        self.stack: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.stack += [] if tag in ("meta", "img", "link", "use", "path") else [tag]
        self.links += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href", "action")]
        if tag == "tr":
            self.rows.append([])
            self.is_top.append(("class", "top") in attributes)
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.stack:
            while self.stack.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if "td" in self.stack:
            self.rows[-1][-1] += data.strip()
        if "style" not in self.stack:
            self.words += data.split()

    @property
    def text(self) -> str:
        return " ".join(self.words)


@pytest.fixture
def results(finished_run: tuple[Path, Path]) -> Read:
    """The results of a finished run and their folders, by stage."""
    found = {name: Workspace(finished_run[1]).results(STAGES[name])[0] for name in STAGES["report"].needs}
    return {name: result for name, (_, result) in found.items()}, {name: folder for name, (folder, _) in found.items()}


def with_metrics(results: Read, stage: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Read:
    changed = results[0][stage].model_copy(update={"metrics": change(results[0][stage].metrics)})
    return results[0] | {stage: changed}, results[1]


def members(*accuracies: tuple[str, float]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(metrics: dict[str, Any]) -> dict[str, Any]:
        made = [
            metrics["members"][0] | {"start": start, "seed": seed, "accuracy": accuracy}
            for seed, (start, accuracy) in enumerate(accuracies)
        ]
        return metrics | {"members": made}

    return change


def test_the_page_needs_nothing_else(results: Read) -> None:
    text = render_page(ReportConfig(), *results)
    page = Page(text)
    assert page.links
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.links)
    assert not re.search(r"<(script|link|iframe|object)|@import|url\((?!#)", text)
    addresses = set(re.findall(r'[a-z]+://[^\s"<]+', text))
    names = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert addresses <= names, "names of XML vocabularies are no addresses that are fetched"
    assert page.stack == [], "every element is closed"


def test_numbers_are_those_of_the_results(results: Read) -> None:
    page = Page(render_page(ReportConfig(title="Cells & <stars>"), *results))
    found, cells = results[0], {row[0]: row for row in page.rows if row}
    for start, name in (("scratch", "student from scratch"), ("distilled", "student after feature distillation")):
        [member] = [m for m in found["finetune"].metrics["members"] if m["start"] == start]
        assert cells[name][1] == f"{100 * member['accuracy']:.1f}"
        assert cells[name][3:5] == [str(member["num_eval"]), "1"]
    for key, name in (("student_probe", "student's"), ("teacher_probe", "teacher's")):
        probe = found["evaluate"].metrics[key]
        assert cells[f"{name} frozen features, linear probe"][1] == f"{100 * probe['accuracy']:.1f}"
    assert "Cells & <stars>" in page.text
    assert f"a cosine of {found['evaluate'].metrics['held_out']['cosine']:.3f}" in page.text
    assert "Teacher toy, 16 training images seen in 2 views each, 4 held-out images, 2 classes." in page.text
    assert "32 views x 17 tokens x 24 channels, fp16" in page.text
    assert "4 epochs, 8 steps of 8" in page.text
    for name, result in found.items():
        assert (
            f"{name} {result.seconds:,.0f} s, code {result.code_version}, fingerprint {result.fingerprint[:10]}"
            in page.text
        )
        assert result.command in page.text


def test_all_seeds_are_there(results: Read) -> None:
    seeds = (("scratch", 0.5), ("scratch", 0.75), ("scratch", 1.0), ("distilled", 1.0), ("distilled", 1.0),
             ("distilled", 1.0))  # fmt: skip
    page = Page(render_page(ReportConfig(), *with_metrics(results, "finetune", members(*seeds))))
    cells = {row[0]: row for row in page.rows if row}
    assert cells["student from scratch"][1:5] == ["75.0 ± 25.0", "", "4", "3"]
    assert cells["student after feature distillation"][1:5] == ["100.0 ± 0.0", "", "4", "3"]
    assert "25.0 points more than from scratch (mean of 3 seeds" in page.text


@pytest.mark.parametrize(
    ("scratch", "distilled", "top"),
    [(0.5, 0.9, ["student after feature distillation"]), (0.9, 0.5, ["student from scratch"]),
     (0.9, 0.9, ["student from scratch", "student after feature distillation"])],
)  # fmt: skip
def test_the_highest_row_is_marked_not_the_one_we_like(
    results: Read, scratch: float, distilled: float, top: list[str]
) -> None:
    lower = {"accuracy": 0.2, "num_eval": 4, "seconds": 1.0}
    changed = with_metrics(results, "finetune", members(("scratch", scratch), ("distilled", distilled)))
    changed = with_metrics(changed, "evaluate", lambda m: m | {"teacher_probe": lower, "student_probe": lower})
    page = Page(render_page(ReportConfig(), *changed))
    assert [row[0] for row, is_top in zip(page.rows, page.is_top, strict=True) if is_top] == top


def test_one_start_alone_and_bad_images(results: Read) -> None:
    changed = with_metrics(results, "finetune", members(("distilled", 0.5)))
    bad = [{"key": f"{n}.png", "reason": "<b>"} for n in range(3)]
    changed = with_metrics(changed, "extract", lambda metrics: metrics | {"bad_images": bad})
    page = Page(render_page(ReportConfig(), *changed))
    assert "3 unusable images" in page.text
    assert "from scratch (" not in page.text


def test_without_pictures_there_is_no_empty_section(results: Read, tmp_path: Path) -> None:
    full = Page(render_page(ReportConfig(), *results))
    assert full.text.count(", cosine ") == 2
    page = Page(render_page(ReportConfig(), results[0], results[1] | {"evaluate": tmp_path}))
    assert "What teacher and student see" in full.text
    assert "What teacher and student see" not in page.text


def test_names_of_images_are_escaped(decant: Any, make_images: Callable[..., Path], tmp_path: Path) -> None:
    root = make_images(classes=("<b>a</b>", "x & y"), per_class=3)
    outcome = decant("run", "--preset", "smoke", "--data", root, "--work", tmp_path / "runs")
    assert outcome.code == 0, outcome.err
    text = (tmp_path / "runs" / "report.html").read_text()
    assert "<b>a</b>" not in text
    assert "&lt;b&gt;a&lt;/b&gt;/" in text
    assert "x &amp; y/" in text


def test_the_newest_report_lies_on_top(finished_run: tuple[Path, Path]) -> None:
    work = finished_run[1]
    [(folder, result)] = Workspace(work).results(STAGES["report"])
    assert (work / "report.html").read_bytes() == (folder / "report.html").read_bytes()
    assert result.metrics["num_bytes"] == (folder / "report.html").stat().st_size
