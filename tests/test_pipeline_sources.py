"""Where students learn from: several teachers' stores, stores made elsewhere, and what a command says of that."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from extract.resolve import resolve_settings
from pipeline.config import OtherTeacher, PipelineConfig, apply_overrides
from pipeline.planning import Plan, make_plan
from pipeline.presets import load_preset
from pipeline.settings import resolve_config
from pipeline.stages import STAGES, upstream
from pipeline.workspace import Workspace
from storage.atomic import write_json
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


@pytest.fixture
def plan(make_images: MakeImages, tmp_path: Path) -> Callable[..., Plan]:
    """A plan of a student, with settings changed. Nothing has run."""
    images = make_images()

    def make(*changes: tuple[str, Any], names: tuple[str, ...] = ("distill",)) -> Plan:
        config = apply_overrides(load_preset("smoke"), [("data.path", str(images)), *changes])
        return make_plan(config, Workspace(tmp_path / "runs"), names)

    return make


ONLINE = ("distill.online", True)


# ---- several teachers ------------------------------------------------------------------------------------------------


def test_one_student_learns_from_the_stores_of_two_teachers(
    decant: Decant, make_images: MakeImages, tmp_path: Path
) -> None:
    work = ("--work", tmp_path / "runs")
    assert decant("extract", *BOTH, "--data", make_images(), *work).code == 0
    outcome = decant("distill", "--teacher", "toy,toy-large", *work)
    assert outcome.code == 0, outcome.err
    assert "students learn from toy, toy-large: a projector and a loss for each" in outcome.out
    [both] = students(tmp_path / "runs")
    stores = {
        result.metrics["teacher"]: result for _, result in Workspace(tmp_path / "runs").results(STAGES["extract"])
    }
    assert both.inputs == {
        "extract": stores["toy"].fingerprint, "extract of toy-large": stores["toy-large"].fingerprint
    }  # fmt: skip
    assert both.config["also"] == [1.0]
    [folder] = (tmp_path / "runs" / "students").iterdir()
    assert folder.name.startswith("toy+toy-large-")
    for command in ("finetune", "evaluate", "report"):
        outcome = decant(command, *work)
        assert outcome.code == 0, outcome.err
    assert decant("plan", *work).out.count(" skip ") == len(STAGES) + 1

    outcome = decant("distill", "--teacher", "toy", *work)
    assert outcome.code == 0, outcome.err
    assert "distill run distill.also: [1.0] -> []" in outcome.out
    [alone, _] = students(tmp_path / "runs")
    assert set(alone.inputs) == {"extract"}


def test_a_store_that_is_not_there_is_named(decant: Decant, make_images: MakeImages, tmp_path: Path) -> None:
    work = ("--work", tmp_path / "runs")
    assert decant("extract", "--preset", "smoke", "--data", make_images(), *work).code == 0
    outcome = decant("distill", "--teacher", "toy,toy-large", *work)
    assert outcome.code == 2
    assert "distill needs the store of toy-large, which is not done" in outcome.err
    assert "run `make extract TEACHER=toy,toy-large` first" in outcome.err
    assert decant("extract", "--teacher", "toy,toy-large", *work).code == 0
    assert decant("distill", "--teacher", "toy,toy-large", *work).code == 0


def test_a_teacher_at_work_and_a_store_of_another(decant: Decant, make_images: MakeImages, tmp_path: Path) -> None:
    work = ("--work", tmp_path / "runs")
    assert decant("extract", *BOTH, "--data", make_images(), *work).code == 0
    assert decant("distill", "--teacher", "toy,toy-large", *work).code == 0
    outcome = decant("distill", "--online", *work)
    assert outcome.code == 0, outcome.err
    online, stored = students(tmp_path / "runs")
    assert set(online.inputs) == {"data", "weights", "teacher", "extract of toy-large"}
    assert losses(online) == pytest.approx(losses(stored), rel=1e-3)


def test_stores_made_elsewhere_are_known_by_their_content(
    decant: Decant, make_images: MakeImages, tmp_path: Path
) -> None:
    data = ("--data", make_images())
    assert decant("extract", *BOTH, *data, "--work", tmp_path / "runs").code == 0
    one, other = (
        folder
        for teacher in ("toy", "toy-large")
        for folder, result in Workspace(tmp_path / "runs").results(STAGES["extract"])
        if result.metrics["teacher"] == teacher
    )
    work = ("--work", tmp_path / "new")
    outcome = decant("distill", "--preset", "smoke", *data, "--store", f"{one},{other}", *work)
    assert outcome.code == 0, outcome.err
    [both] = students(tmp_path / "new")
    assert set(both.inputs) == {"store", "store 2"}
    assert len(set(both.inputs.values())) == 2
    assert not (tmp_path / "new" / "stores").exists()
    moved = shutil.copytree(other, tmp_path / "moved")
    assert "distill skip" in decant("distill", "--store", f"{one},{moved}", *work).out
    weighted = json.dumps([{"store": str(moved), "weight": 0.5}])
    outcome = decant("distill", "--set", f"distill.also={weighted}", *work)
    assert outcome.code == 0, outcome.err
    assert "distill run distill.also: [1.0] -> [0.5]" in outcome.out
    assert "distill run distill.also: [0.5] -> []" in decant("plan", "--store", one, *work).out

    # beside a store that is extracted here
    outcome = decant("distill", "--preset", "smoke", *data, "--set", f"distill.also={weighted}", "--work",
                     tmp_path / "runs")  # fmt: skip
    assert outcome.code == 0, outcome.err
    [result] = students(tmp_path / "runs")
    assert set(result.inputs) == {"extract", "store 2"}


def test_what_learns_from_several_stores_waits_for_each(plan: Callable[..., Plan]) -> None:
    learnt = [{"name": "toy-large", "loss_weight": 0.5}, {"name": "mae-b", "weights": "random"}]
    made = plan(("also", learnt))
    assert (list(made.stages), list(made.also)) == (["extract", "distill"], ["toy-large"])
    settings: Any = made.stages["distill"].settings
    [store] = settings.also
    assert (Path(store.store), store.weight) == (made.also["toy-large"].folder.absolute(), 0.5)
    assert list(plan(("also", learnt), names=("extract",)).also) == ["toy-large", "mae-b"]
    assert list(plan(("also", learnt), ONLINE).stages) == ["distill"]
    prints = {
        plan(("also", also)).stages["distill"].fingerprint
        for also in ([], learnt, [{"name": "toy-large", "loss_weight": 1.0}], [{"name": "toy-large"}])
    }
    assert len(prints) == 3, "one that no student learns from changes nothing"
    assert upstream(("distill",), load_preset("smoke")) == ["extract", "distill"]


# ---- the words of one command, and those of the next -----------------------------------------------------------------


@pytest.fixture
def resolve(tmp_path: Path) -> Callable[..., PipelineConfig]:
    """Settings of a command with some options, after those of another one."""
    from inspect import signature

    names = [name for name in signature(resolve_config).parameters if name not in ("workspace", "command")]

    def run(command: str, before: PipelineConfig, **options: Any) -> PipelineConfig:
        workspace = Workspace(tmp_path / "settings")
        write_json(workspace.current_path, before.to_json())
        return resolve_config(workspace, command=command, **(dict.fromkeys(names) | {"assignments": ()} | options))

    return run


def test_each_command_says_what_students_learn_from(resolve: Callable[..., PipelineConfig]) -> None:
    before = load_preset("smoke").model_copy(
        update={"also": (OtherTeacher(name="toy-large"), OtherTeacher(name="mae-b", weights="random"))}
    )
    both = resolve("distill", before, teacher="toy,mae-b", weights=",a.pth")
    assert [(other.name, other.weights, other.loss_weight) for other in both.also] == [
        ("mae-b", Path("a.pth"), 1.0), ("toy-large", None, None)
    ]  # fmt: skip
    assert resolve("finetune", both) == both
    weighted = resolve("distill", both, assignments=('also=[{"name": "mae-b", "loss_weight": 0.25}]',))
    assert resolve("distill", weighted, teacher="toy,mae-b") == weighted, "what is known of it stays"
    assert resolve("distill", both, teacher="toy").also_learnt == ()
    assert [other.name for other in resolve("distill", both, teacher="toy").also] == ["mae-b", "toy-large"]
    assert resolve("extract", both, teacher="toy,mae-b").also_learnt == ()
    stored = resolve("distill", both, store="/a,s3://b/c")
    assert (stored.distill.store, [o.store for o in stored.distill.also]) == ("/a", ["s3://b/c"])
    assert stored.also_learnt == ()
    again = resolve("distill", stored, teacher="toy,mae-b")
    assert (again.distill.store, again.distill.also, len(again.also_learnt)) == (None, (), 1)
    online = resolve("distill", stored, online=True)
    assert (online.distill.store, online.distill.online) == (None, True)
    assert resolve("finetune", online) == online
    assert not resolve("distill", online, store="/a").distill.online
    assert not resolve("distill", online, online=False).distill.online
    conflict = resolve("distill", online, online=True, store="/a").distill
    assert conflict.online and conflict.store == "/a", "planning refuses it"
    assert resolve_settings(online.online_teacher or online.extract).teacher == "toy"


def test_how_to_distil_on_several_devices(resolve: Callable[..., PipelineConfig]) -> None:
    options = {"gpus": 8, "launcher": "ray", "accumulate": 2, "ray_address": "auto"}
    run = resolve("distill", load_preset("smoke"), **options).distill.run
    assert (run.gpus, run.launcher, run.accumulate, run.ray_address) == (8, "ray", 2, "auto")
