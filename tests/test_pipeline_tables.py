"""The table and the sentences under it: numbers as they are, in words that fit them."""

import statistics
from typing import Any

import pytest

from pipeline.tables import Row, findings, result_rows
from storage.stage import StageResult


def result(stage: str, metrics: dict[str, Any]) -> StageResult:
    return StageResult(
        stage=stage, fingerprint="f", inputs={}, config={}, metrics=metrics, seconds=1.0, command="c", code_version="v",
        machine={},
    )  # fmt: skip


def finetuned(scratch: tuple[float, ...], distilled: tuple[float, ...], n: int = 400) -> StageResult:
    members = [
        {"start": start, "seed": seed, "accuracy": accuracy, "num_eval": n, "train_seconds": 10.0 + seed}
        for start, accuracies in (("scratch", scratch), ("distilled", distilled))
        for seed, accuracy in enumerate(accuracies)
    ]
    return result("finetune", {"members": members, "num_eval": n, "majority_accuracy": 0.55})


EVALUATED = result(
    "evaluate",
    {
        "teacher_probe": {"accuracy": 0.91, "num_eval": 400, "seconds": 3.0},
        "student_probe": {"accuracy": 0.87, "num_eval": 400, "seconds": 4.0},
        "held_out": {"cosine": 0.7512, "loss": 0.12345, "zero_loss": 0.2471},
    },
)


def test_one_row_for_each_result() -> None:
    rows = result_rows({"finetune": finetuned((0.8, 0.7, 0.75), (0.9, 0.85, 0.95)), "evaluate": EVALUATED})
    assert [(row.name, row.accuracy_text, row.n, len(row.accuracies), row.seconds) for row in rows] == [
        ("always the most frequent class", "55.0", 400, 1, 0.0),
        ("student from scratch", "75.0 +- 5.0", 400, 3, 33.0),
        ("student after feature distillation", "90.0 +- 5.0", 400, 3, 33.0),
        ("student's frozen features, linear probe", "87.0", 400, 1, 4.0),
        ("teacher's frozen features, linear probe", "91.0", 400, 1, 3.0),
    ]


def test_mean_and_spread_are_those_of_the_statistics_module() -> None:
    accuracies = (0.8123, 0.7991, 0.8222, 0.8001)
    row = Row("name", accuracies, 400, 1.0)
    assert row.mean == pytest.approx(statistics.mean(accuracies))
    assert row.spread == pytest.approx(statistics.stdev(accuracies))
    assert row.accuracy_text == "80.8 +- 1.1"


def test_one_seed_has_no_spread() -> None:
    row = Row("name", (0.5,), 10, 1.0)
    assert (row.spread, row.accuracy_text) == (None, "50.0")


def test_rows_for_what_there_is() -> None:
    assert result_rows({}) == []
    assert [row.name for row in result_rows({"finetune": finetuned((), (0.9,))})] == [
        "always the most frequent class", "student after feature distillation",
    ]  # fmt: skip
    assert len(result_rows({"evaluate": EVALUATED})) == 2


@pytest.mark.parametrize(
    ("scratch", "distilled", "said"),
    [
        ((0.80,), (0.85,), "scores 5.0 points more than from scratch (mean of 1 seed, n = 400;"),
        ((0.85,), (0.80,), "scores 5.0 points less than from scratch (mean of 1 seed,"),
        ((0.80,), (0.80,), "scores the same as from scratch"),
        ((0.80, 0.82), (0.81, 0.8101), "scores the same as from scratch (mean of 2 seeds,"),
        ((0.80, 0.82), (0.81, 0.7899), "scores 1.0 points less than from scratch (mean of 2 seeds,"),
        ((1.0,), (1.0,), "scores the same as from scratch"),
    ],
)
def test_the_sentence_agrees_with_the_numbers(
    scratch: tuple[float, ...], distilled: tuple[float, ...], said: str
) -> None:
    sentence, *rest = findings({"finetune": finetuned(scratch, distilled)})
    assert said in sentence
    assert "-0.0" not in sentence
    assert [text for text in rest if text.startswith("Not shown: ")] == rest


def test_standard_error_of_a_difference_of_shares() -> None:
    """sqrt(p1 (1 - p1) / n + p2 (1 - p2) / n), here 100 * sqrt((0.16 + 0.09) / 400) = 2.5."""
    [sentence, _] = findings({"finetune": finetuned((0.8,), (0.9,))})
    assert "the standard error of such a difference is about 2.5 points" in sentence


def test_held_out_tokens_in_words() -> None:
    sentences = findings({"finetune": finetuned((0.8,), (0.9,)), "evaluate": EVALUATED})
    assert sentences[1] == (
        "On images that distillation never saw, its tokens have a cosine of 0.751 with the teacher's (loss 0.1235; "
        "predicting zero would give 0.2471)."
    )


def test_no_comparison_without_both_starts() -> None:
    assert findings({}) == []
    assert findings({"evaluate": EVALUATED}) == []
    assert [s for s in findings({"finetune": finetuned((), (0.9,))}) if "from scratch (" in s] == []
