"""Put a report's tables and picture into the documentation.

python -m tests.bench.write_docs runs/bench/bench.json
"""

import sys
from pathlib import Path

from tests.bench.picture import draw
from tests.bench.report import as_markdown
from tests.bench.results import Report

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def write_docs(report: Report, page: Path = PAGE) -> None:
    """Replace what stands between the marks of the page, and the picture beside it.

    Raises:
        ValueError: the page has no marks.
    """
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} has no {BEGIN} ... {END}")
    page.write_text(f"{before}{BEGIN}\n\n{as_markdown(report)}\n\n{END}{after}")
    draw(report, page.with_suffix(".svg"))


if __name__ == "__main__":
    write_docs(Report.load(Path(sys.argv[1])))
