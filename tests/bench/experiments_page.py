"""What experiments found, as a table and a picture in docs/experiments.md."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from tests.bench.experiments import EPOCHS, SETTINGS, Found

PAGE = Path(__file__).parents[2] / "docs" / "experiments.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
COLOURS = {"views": "#0072B2", "online": "#D55E00", "bytes": "#009E73"}


def write_page(found: Sequence[Found], where: str, page: Path = PAGE) -> None:
    """Replace what stands between the marks of the page, and the picture beside it.

    Args:
        where: the machine and versions, a sentence.

    Raises:
        ValueError: the page has no marks.
    """
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} has no {BEGIN} ... {END}")
    draw(found, page.with_suffix(".svg"))
    page.write_text(f"{before}{BEGIN}\n\n{as_markdown(found, where)}\n{END}{after}")


def as_markdown(found: Sequence[Found], where: str) -> str:
    """The tables, with the command of each row."""
    seeds = len(found[0].accuracies)
    lines = [f"{where} {seeds} seed{'s' if seeds > 1 else ''} a row; after +- the standard deviation over them."]
    for group, title in (("views", "How many views"), ("bytes", "Which encoding, for the same bytes")):
        lines += [
            "",
            f"### {title}",
            "",
            "| stored | kB an image | probe accuracy % | cosine with the teacher | made by |",
        ]
        lines.append("|---|---|---|---|---|")
        lines += [_row(each) for each in found if each.group == group]
    lines += ["", "Each command also has `PRESET=demo DATA=<folder>`, and `SET=` with all of", "", "```"]
    lines += [*SETTINGS, "distill.seed=0 (1, 2)", "```", ""]
    return "\n".join(lines)


def _row(each: Found) -> str:
    stored = f"{each.bytes_per_image / 1e3:,.0f}" if each.bytes_per_image else "none"
    accuracy, cosine = _spread([100 * value for value in each.accuracies], 1), _spread(each.cosines, 3)
    return f"| {each.name} | {stored} | {accuracy} | {cosine} | `{each.command}` |"


def _spread(values: Sequence[float], digits: int) -> str:
    mean = f"{fmean(values):.{digits}f}"
    return f"{mean} +- {stdev(values):.{digits}f}" if len(values) > 1 else mean


def draw(found: Sequence[Found], path: Path) -> None:
    """Accuracy against the number of views, and of stores of the same size; every seed is a dot."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "decant", "svg.fonttype": "none"})
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(9, 3.4), width_ratios=[3, 2], sharey=True, layout="constrained"
    )
    stored = [each for each in found if each.group == "views" and each.bytes_per_image]
    places = list(range(len(stored)))
    _points(left, places, stored, COLOURS["views"])
    (online,) = [each for each in found if not each.bytes_per_image]
    mean = 100 * fmean(online.accuracies)
    left.axhline(mean, color=COLOURS["online"], linewidth=1.2)
    left.text(
        0, mean, f" online: a new view in each of {EPOCHS} epochs", color=COLOURS["online"], va="bottom", fontsize=9
    )
    if len(online.accuracies) > 1:
        spread = 100 * stdev(online.accuracies)
        left.axhspan(mean - spread, mean + spread, color=COLOURS["online"], alpha=0.12, linewidth=0)
    left.set_xticks(places, [each.name for each in stored])
    left.set_ylabel("linear probe, % of held-out images")
    left.set_title("Views stored of each image", loc="left", fontsize=11)
    same = [each for each in found if each.group == "bytes"]
    _points(right, list(range(len(same))), same, COLOURS["bytes"])
    right.set_xticks(
        range(len(same)), [each.name.replace(", ", "\n", 1).replace(" of the", "\nof the") for each in same]
    )
    right.set_xlim(-0.5, len(same) - 0.5)
    right.set_title("Stores of the same size", loc="left", fontsize=11)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def _points(axis: Any, places: Sequence[int], rows: Sequence[Found], colour: str) -> None:
    means = [100 * fmean(each.accuracies) for each in rows]
    axis.plot(
        places, means, color=colour, marker="_", markersize=18, linewidth=1.2 if colour == COLOURS["views"] else 0
    )
    for place, each in zip(places, rows, strict=True):
        axis.scatter([place] * len(each.accuracies), [100 * a for a in each.accuracies], color=colour, s=16, alpha=0.7)
