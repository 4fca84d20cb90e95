"""`make precision`: what each precision of a teacher changes, and how fast it is."""

import importlib
from typing import get_args

from extract.spec import Precision
from pipeline.planning import Plan
from pipeline.screen import console

NUM_VIEWS = 32
_LINE = "{:<10}{:>12}{:>13}{:>10}{:>7}"


def show_precisions(plan: Plan) -> None:
    """Measure on some of the plan's images; one line a precision, as soon as it is known."""
    cfg = plan.config.extract
    console.print(_LINE.format("precision", "mean cosine", "worst token", "views/s", "batch"))
    num_views = 0
    for row in importlib.import_module("extract.measure").measure(cfg, plan.data_path, get_args(Precision), NUM_VIEWS):
        found, num_views = row.agreement, row.agreement.num_views
        cosines = f"{found.mean_cosine:.6f}", f"{found.worst_cosine:.6f}"
        console.print(_LINE.format(found.precision, *cosines, f"{row.views_per_second:,.1f}", row.batch_size))
    console.print(
        f"teacher {cfg.teacher}; cosines between its whitened tokens and those of plain float32, over all tokens of "
        f"{num_views} views; views/s of the forward pass alone. Choose with SET=extract.precision=... (now "
        f"{cfg.precision})"
    )
