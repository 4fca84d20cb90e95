"""A report as one picture: a panel a section, a bar a row, the limit as a line at 1, targets as ticks."""

from pathlib import Path
from typing import Any

from tests.bench.results import Report, Row, Section

COLOURS = {"limit": "#999999", "ours": "#0072B2", "peer": "#E69F00", "reference": "#D0D0D0"}
"""Told apart with any colour vision, and in grey by their lightness."""
LABELS = {"limit": "the limit", "ours": "this store", "peer": "others", "reference": "for comparison"}
_ROW_INCHES, _PANEL_INCHES, _TARGET = 0.27, 0.6, "#000000"


def draw(report: Report, path: Path) -> None:
    """Write the picture; the suffix says which kind."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "decant", "svg.fonttype": "none"})
    from matplotlib import pyplot

    panels = [(section, [row for row in section.rows if row.ratio is not None]) for section in report.sections]
    panels = [(section, rows) for section, rows in panels if rows]
    counts = [len(rows) for _, rows in panels]
    height = sum(counts) * _ROW_INCHES + len(panels) * _PANEL_INCHES
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(9, height), height_ratios=counts, squeeze=False, layout="constrained"
    )
    for axis, (section, rows) in zip(axes[:, 0], panels, strict=True):
        _panel(axis, section, rows)
    figure.legend(handles=_legend(), loc="outside upper center", ncols=5, frameon=False)
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, dpi=110, metadata=metadata)
    pyplot.close(figure)


def _panel(axis: Any, section: Section, rows: list[Row]) -> None:
    places = range(len(rows) - 1, -1, -1)
    ratios = [row.ratio or 0 for row in rows]
    axis.barh(places, ratios, height=0.72, color=[COLOURS[row.role] for row in rows])
    axis.axvline(1, color=COLOURS["limit"], linewidth=1, zorder=0)
    end = max(1.0, *ratios, *(row.target or 0 for row in rows))
    for place, row in zip(places, rows, strict=True):
        edge = row.ratio or 0
        if row.target is not None:
            axis.plot([row.target] * 2, [place - 0.46, place + 0.46], color=_TARGET, linewidth=2.2, zorder=3)
            if abs(edge - row.target) < 0.04 * end or edge < row.target < edge + 0.12 * end:
                edge = max(edge, row.target)
        digits = 3 if edge < 0.1 or row.is_less_better else 2
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
        axis.text(edge + 0.012 * end, place, f"{row.ratio:.{digits}f}", va="center", fontsize=8.5, bbox=box)
    axis.set_yticks(list(places), [row.what for row in rows], fontsize=8.5)
    axis.set_xlim(0, 1.12 * end)
    axis.set_ylim(-0.6, len(rows) - 0.4)
    better = "shorter is better" if rows[0].is_less_better else "longer is better"
    axis.set_title(f"{section.title} ({better})", loc="left", fontsize=10, fontweight="bold")
    axis.tick_params(axis="x", labelsize=8)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)


def _legend() -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    bars = [Patch(color=COLOURS[role], label=LABELS[role]) for role in ("ours", "peer", "limit", "reference")]
    return [*bars, Line2D([], [], color=_TARGET, linewidth=2.2, label="aim")]
