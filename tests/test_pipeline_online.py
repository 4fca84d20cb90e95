"""A student of a teacher that works in every step: what it learns, and when it is made anew."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import apply_overrides
from pipeline.planning import Plan, make_plan
from pipeline.presets import load_preset
from pipeline.stages import STAGES
from pipeline.workspace import Workspace
from storage.errors import ConfigError
from storage.stage import StageResult

Decant = Callable[..., Any]
MakeImages = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("toy_large")
BOTH = ("--preset", "smoke", "--teacher", "toy,toy-large")


def students(work: Path) -> list[StageResult]:
    """Results of distillation, the newest first."""
    return [result for _, result in Workspace(work).results(STAGES["distill"])]


def losses(result: StageResult) -> list[float]:
    return [point["loss"] for point in result.metrics["history"]]


# ---- a teacher at work -----------------------------------------------------------------------------------------------


def test_an_online_run_needs_no_store_and_learns_what_it_would_say(
    decant: Decant, make_images: MakeImages, tmp_path: Path
) -> None:
    work = ("--work", tmp_path / "runs")
    outcome = decant("distill", "--preset", "smoke", "--data", make_images(), "--online", *work)
    assert outcome.code == 0, outcome.err
    assert (
        "distill asks the teacher toy in every step (ONLINE=1, distill.online): it needs no store of it" in outcome.out
    )
    assert not (tmp_path / "runs" / "stores").exists()
    [online] = students(tmp_path / "runs")
    assert set(online.inputs) == {"data", "weights", "teacher"}
    assert "distill skip up to date" in decant("plan", *work).out

    blocked = decant("evaluate", *work)
    assert blocked.code == 2
    assert "evaluate and extract_eval need extract, which is not done" in blocked.err
    assert decant("extract", *work).code == 0
    for command in ("finetune", "evaluate", "report"):
        outcome = decant(command, *work)
        assert outcome.code == 0, outcome.err
    assert len(students(tmp_path / "runs")) == 1, "later commands find the same student"

    assert decant("distill", "--no-online", *work).code == 0
    stored = students(tmp_path / "runs")[0]
    assert set(stored.inputs) == {"extract"}
    assert losses(stored) == pytest.approx(losses(online), rel=1e-3), "the same views, the same targets"


@pytest.mark.parametrize("settings", ["distill.whiten=false", "distill.target=pooled"])
def test_targets_of_the_teachers_own_tokens_are_those_of_a_store(
    settings: str, decant: Decant, make_images: MakeImages, tmp_path: Path
) -> None:
    work = ("--work", tmp_path / "runs", "--set", settings, "--set", "distill.epochs=1")
    assert decant("extract", "--preset", "smoke", "--data", make_images(), *work).code == 0
    for way in ("--online", "--no-online"):
        outcome = decant("distill", way, *work)
        assert outcome.code == 0, outcome.err
    stored, online = students(tmp_path / "runs")
    assert losses(stored) == pytest.approx(losses(online), rel=1e-3)


def test_checkpoints_stay_until_there_is_a_result(
    decant: Decant, make_images: MakeImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that is cut off after the last step goes on there."""
    work = ("--work", tmp_path / "runs")
    settings = ("--preset", "smoke", "--data", make_images(), "--set", "distill.run.checkpoint_seconds=1e-9")
    assert decant("extract", *settings, *work).code == 0

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.runner.digest_outputs", stop)
        assert decant("distill", *work).code == 130
    [kept] = (tmp_path / "runs" / "students").glob("*/checkpoints")
    assert decant("distill", *work).code == 0
    assert not kept.exists()
    [result] = students(tmp_path / "runs")
    assert result.metrics["resumed_at"] == [result.metrics["steps"]]


def test_a_whole_run_may_be_online(decant: Decant, make_images: MakeImages, tmp_path: Path) -> None:
    work = ("--work", tmp_path / "runs")
    outcome = decant("run", "--preset", "smoke", "--data", make_images(), "--online", *work)
    assert outcome.code == 0, outcome.err
    assert decant("plan", *work).out.count(" skip ") == len(STAGES)
    planned = decant("plan", "--no-online", *work)
    assert "distill run distill.online: true -> false" in planned.out


def test_a_teacher_of_another_input_size_is_asked_about_its_own_pixels(
    decant: Decant, make_images: MakeImages, tmp_path: Path
) -> None:
    work = ("--work", tmp_path / "runs")
    options = ("--preset", "smoke", "--teacher", "toy-large", "--data", make_images(), *work)
    assert decant("distill", *options, "--online").code == 0
    assert decant("extract", "--set", "distill.run.image_cache_mb=0", *work).code == 0
    assert decant("distill", "--no-online", *work).code == 0
    stored, online = students(tmp_path / "runs")
    assert losses(stored) == pytest.approx(losses(online), rel=1e-3)


@pytest.fixture
def plan(make_images: MakeImages, tmp_path: Path) -> Callable[..., Plan]:
    """A plan of a student, with settings changed. Nothing has run."""
    images = make_images()

    def make(*changes: tuple[str, Any], names: tuple[str, ...] = ("distill",)) -> Plan:
        config = apply_overrides(load_preset("smoke"), [("data.path", str(images)), *changes])
        return make_plan(config, Workspace(tmp_path / "runs"), names)

    return make


ONLINE = ("distill.online", True)


@pytest.mark.parametrize(
    "change",
    [
        ("extract.views", 3), ("extract.sampler.seed", 1), ("extract.renderer.kernel", "bicubic"),
        ("extract.input_px", 64), ("extract.teacher", "toy-large"), ("extract.whitening.kind", "none"),
        ("extract.precision", "float16"), ("data.eval_fraction", 0.4), ("data.split_seed", 1), ("distill.epochs", 5),
    ],
)  # fmt: skip
def test_what_a_store_would_depend_on_makes_another_online_student(
    plan: Callable[..., Plan], change: tuple[str, Any]
) -> None:
    if change[0] == "extract.whitening.kind":
        change = "extract.whitening", {"kind": "none"}
    before, after = plan(ONLINE), plan(ONLINE, change)
    assert list(before.stages) == ["distill"]
    assert before.stages["distill"].fingerprint != after.stages["distill"].fingerprint


@pytest.mark.parametrize(
    "change",
    [
        ("extract.encoding", {"kind": "int8"}), ("extract.layout", "wds"), ("extract.keep_views", True),
        ("extract.token_fraction", 0.5), ("extract.run.workers", 3), ("extract.tap", "final_norm"),
    ],
)  # fmt: skip
def test_how_a_store_would_be_kept_does_not(plan: Callable[..., Plan], change: tuple[str, Any]) -> None:
    before, after = plan(ONLINE), plan(ONLINE, change)
    assert before.stages["distill"].fingerprint == after.stages["distill"].fingerprint


def test_the_plan_says_what_an_online_student_would_be_made_of_anew(
    decant: Decant, make_images: MakeImages, tmp_path: Path
) -> None:
    images, work = make_images(), ("--work", tmp_path / "runs")
    assert decant("distill", "--preset", "smoke", "--data", images, "--online", *work).code == 0
    assert "distill run teacher changed" in decant("plan", *work, "--views", "5").out
    (images / "dark" / "009.png").unlink()
    assert "distill run data changed" in decant("plan", *work).out


def test_other_weights_make_another_online_student(plan: Callable[..., Plan], tmp_path: Path) -> None:
    weights = tmp_path / "weights.bin"
    weights.write_bytes(b"one")
    given = ONLINE, ("extract.weights", str(weights))
    before = plan(*given).stages["distill"].fingerprint
    weights.write_bytes(b"other")
    assert plan(*given).stages["distill"].fingerprint != before


def test_a_store_and_a_teacher_at_work_exclude_each_other(plan: Callable[..., Plan]) -> None:
    with pytest.raises(ConfigError, match="leave out ONLINE or STORE"):
        plan(ONLINE, ("distill.store", "/a"))
