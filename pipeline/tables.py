"""Results to the table that a run ends with."""

import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

from storage.stage import StageResult


class Row(NamedTuple):
    """One line of the table; accuracies are shares of `n` held-out images."""

    name: str
    accuracies: tuple[float, ...]
    n: int
    seconds: float
    note: str = ""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds; None for one."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None

    @property
    def accuracy_text(self) -> str:
        spread = "" if self.spread is None else f" +- {100 * self.spread:.1f}"
        return f"{100 * self.mean:.1f}{spread}"


_START_NAMES = {"scratch": "student from scratch", "distilled": "student after feature distillation"}


def result_rows(results: Mapping[str, StageResult]) -> list[Row]:
    """The lines for whatever stages have a result."""
    rows = []
    if "finetune" in results:
        metrics = results["finetune"].metrics
        rows.append(Row("always the most frequent class", (metrics["majority_accuracy"],), metrics["num_eval"], 0.0))
        starts = list(dict.fromkeys(member["start"] for member in metrics["members"]))
        rows += [_start_row(start, [m for m in metrics["members"] if m["start"] == start]) for start in starts]
    if "evaluate" in results:
        metrics = results["evaluate"].metrics
        for key, name in (
            ("student_probe", "student's frozen features, linear probe"),
            ("teacher_probe", "teacher's frozen features, linear probe"),
        ):
            probe = metrics[key]
            rows.append(Row(name, (probe["accuracy"],), probe["num_eval"], probe["seconds"]))
    return rows


def _start_row(start: str, members: list[dict[str, Any]]) -> Row:
    accuracies = tuple(member["accuracy"] for member in members)
    seconds = sum(member["train_seconds"] for member in members)
    return Row(_START_NAMES[start], accuracies, members[0]["num_eval"], seconds)


def findings(results: Mapping[str, StageResult]) -> list[str]:
    """What the numbers show, and what they do not, in sentences. Every number is one of this run."""
    if "finetune" not in results:
        return []
    rows = {row.name: row for row in result_rows(results)}
    sentences = []
    scratch, distilled = (rows.get(name) for name in _START_NAMES.values())
    if scratch and distilled:
        gain = round(100 * (distilled.mean - scratch.mean), 1)
        found = f"{abs(gain):.1f} points {'more' if gain > 0 else 'less'} than" if gain else "the same as"
        noise = 100 * sum(row.mean * (1 - row.mean) / row.n for row in (scratch, distilled)) ** 0.5
        seeds = len(distilled.accuracies)
        sentences.append(
            f"After feature distillation the same student scores {found} from scratch (mean of {seeds} "
            f"seed{'s' if seeds > 1 else ''}, n = {scratch.n}; the standard error of such a difference is about "
            f"{noise:.1f} points)."
        )
    if "evaluate" in results:
        held_out = results["evaluate"].metrics["held_out"]
        sentences.append(
            f"On images that distillation never saw, its tokens have a cosine of {held_out['cosine']:.3f} with the "
            f"teacher's (loss {held_out['loss']:.4f}; predicting zero would give {held_out['zero_loss']:.4f})."
        )
    sentences.append(
        "Not shown: the gain on other data, teachers or sizes. One distillation was fine-tuned with every seed, so the "
        "spread is that of fine-tuning; the student from scratch saw the labelled images only."
    )
    return sentences
