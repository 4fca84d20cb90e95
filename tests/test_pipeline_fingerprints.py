"""Who depends on what: every setting and every byte changes the fingerprints that it must, and no other."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from extract.teachers import TEACHERS
from pipeline.config import PipelineConfig, apply_overrides, parse_assignment
from pipeline.planning import Plan, make_plan
from pipeline.presets import load_preset
from pipeline.stages import STAGES, upstream
from pipeline.workspace import Workspace
from storage.errors import ConfigError, InputError
from storage.image_index import load_index

ALL = tuple(STAGES)
FROM_EXTRACT = {"extract", "distill", "finetune", "evaluate", "report"}
FROM_DISTILL = FROM_EXTRACT - {"extract"}
FROM_FINETUNE = {"finetune", "report"}
FROM_EVALUATE = {"evaluate", "report"}
FROM_EVAL_STORE = {"extract_eval", *FROM_EVALUATE}
Prints = dict[str, str]


@pytest.fixture
def plan(make_images: Callable[..., Path], tmp_path: Path) -> Callable[..., Plan]:
    """A plan for all stages of the smoke preset, with settings changed. Nothing has run."""
    images = make_images()

    def make(*texts: str, data: Path | None = None, work: str = "runs") -> Plan:
        fixed = [("data.path", str(data or images)), ("extract.renderer.kernel", "bilinear")]
        config = apply_overrides(load_preset("smoke"), fixed)
        config = apply_overrides(config, [parse_assignment(text) for text in texts])
        return make_plan(config, Workspace(tmp_path / work), ALL)

    return make


def prints(plan: Plan) -> Prints:
    return {name: stage.fingerprint for name, stage in plan.stages.items()}


def changed(before: Plan, after: Plan) -> set[str]:
    return {name for name in ALL if prints(before)[name] != prints(after)[name]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data.eval_fraction=0.4", set(ALL)),
        ("data.split_seed=1", set(ALL)),
        ("extract.views=3", FROM_EXTRACT),
        ("extract.sampler.min_scale=0.1", FROM_EXTRACT),
        ("extract.sampler.seed=1", FROM_EXTRACT),
        ("extract.input_px=64", set(ALL)),
        ("extract.renderer.kernel=bicubic", set(ALL)),
        ("extract.records_per_shard=4", set(ALL)),
        ("extract.teacher=mae-b", set(ALL)),
        ("distill.epochs=5", FROM_DISTILL),
        ("distill.student.depth=3", FROM_DISTILL),
        ("distill.optim.base_lr=0.001", FROM_DISTILL),
        ("distill.drop_path=0.3", FROM_DISTILL),
        ("distill.seed=1", FROM_DISTILL),
        ("finetune.epochs=5", FROM_FINETUNE),
        ("finetune.seeds=[1]", FROM_FINETUNE),
        ('finetune.starts=["scratch"]', FROM_FINETUNE),
        ("finetune.sampler.min_scale=0.3", FROM_FINETUNE),
        ("finetune.eval_sampler.fraction=0.5", {*FROM_FINETUNE, *FROM_EVAL_STORE}),
        ("evaluate.penalties=[1]", FROM_EVALUATE),
        ("evaluate.pictures=1", FROM_EVALUATE),
        ("evaluate.seed=4", FROM_EVALUATE),
        ("report.title=Other", {"report"}),
    ],
)
def test_a_setting_changes_what_depends_on_it_and_nothing_else(
    plan: Callable[..., Plan], text: str, expected: set[str]
) -> None:
    assert changed(plan(), plan(text)) == expected


@pytest.mark.parametrize(
    "text",
    [
        *(f"{group}.run.threads=7" for group in ("extract", "distill", "finetune", "evaluate")),
        *(f"{group}.run.device=cpu" for group in ("extract", "distill", "finetune", "evaluate")),
        "extract.run.executor=ray", "extract.run.workers=3", "extract.run.batch_size=1", "extract.max_bad_fraction=0.5",
        "distill.run.loaders=9", "distill.run.prefetch=1", "distill.run.image_cache_mb=0", "finetune.run.loaders=3",
        "distill.run.checkpoint_seconds=1", "preset=mine",
    ],
)  # fmt: skip
def test_how_to_work_changes_nothing(plan: Callable[..., Plan], text: str) -> None:
    assert changed(plan(), plan(text)) == set()


@pytest.mark.parametrize(
    ("teacher", "same", "other"),
    [
        ("toy", ["tap=final_norm", "input_px=32", "block=-1"], "block=0"),
        ("esvit-b", ["block=3", "tap=final_norm", "input_px=224"], "input_px=448"),
        ("esvit-b-stage3", ["block=2", "block=-2", "tap=block"], "block=-3"),
        ("timm:test_vit", ["teacher=timm:test_vit.r160_in1k", "tap=final_norm", "input_px=160"], "tap=block"),
        ("mine.py", ["teacher=./mine.py", "teacher=elsewhere/../mine.py", "teacher=there/mine.py"], "teacher=toy"),
    ],
)
def test_what_a_teacher_is_anyway_can_be_said_too(
    plan: Callable[..., Plan], teacher: str, same: list[str], other: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "there").mkdir()
    text = "import torch\nfrom extract.spec import TeacherSpec\ndef teacher():\n"
    text += "    return torch.nn.Identity(), TeacherSpec(name='x', input_px=32, patch_px=8, channels=3)\n"
    for path in (tmp_path / "mine.py", tmp_path / "there" / "mine.py"):
        path.write_text(text)
    common = [f"extract.teacher={teacher}", *(["extract.weights=random"] if "esvit" in teacher else [])]
    before = plan(*common)
    for setting in same:
        after = plan(*common, f"extract.{setting}")
        assert changed(before, after) == set(), setting
        assert after.stages["extract"].folder == before.stages["extract"].folder
    assert changed(before, plan(*common, "extract.tap=block", f"extract.{other}")) == set(ALL)


def test_a_row_that_is_corrected_makes_another_store(
    plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = plan()
    monkeypatch.setitem(TEACHERS, "toy", TEACHERS["toy"].model_copy(update={"mean": (0.5, 0.5, 0.5)}))
    assert changed(before, plan()) == set(ALL)


def test_every_setting_is_classified() -> None:
    """A new setting is part of its stage's identity unless its class says that it cannot change a result."""
    config = load_preset("smoke")
    left_out = {
        name: set(stage.config(config).to_json()) - set(stage.config(config).identity())
        for name, stage in STAGES.items()
    }
    extracts = {"weights", "whitening_from", "max_bad_fraction", "run"}
    assert left_out == {
        "extract": extracts, "extract_eval": extracts,
        "distill": {"run", "store"}, "finetune": {"run", "student"}, "evaluate": {"run"}, "report": set(),
    }  # fmt: skip


def test_moving_the_data_or_the_work_folder_changes_nothing(plan: Callable[..., Plan], tmp_path: Path) -> None:
    before = plan()
    moved = tmp_path / "elsewhere" / "under another name"
    shutil.copytree(before.images.location, moved)
    for path in moved.rglob("*.png"):
        os.utime(path, (1, 1))
    assert changed(before, plan(data=moved, work="another")) == set()


def test_the_image_list_says_where_the_images_lie_now(plan: Callable[..., Plan], tmp_path: Path) -> None:
    """Moved with the same name and content: the list has the same name too, and must not keep the old place."""
    before = plan()
    moved = shutil.move(before.images.location, tmp_path / "elsewhere" / "images")
    after = plan(data=Path(moved))
    assert after.data_path == before.data_path
    assert load_index(after.data_path).location == str(tmp_path / "elsewhere" / "images")


def test_a_damaged_image_list_is_written_again(plan: Callable[..., Plan]) -> None:
    path = plan().data_path
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    plan()
    assert path.read_bytes() == whole


@pytest.mark.parametrize("part", ["train", "eval"])
def test_touching_the_content_of_an_image_changes_what_saw_it(plan: Callable[..., Plan], part: str) -> None:
    before = plan()
    key = before.images.split(part).keys[0]  # type: ignore[arg-type]
    Image.new("RGB", (50, 50)).save(Path(before.images.location) / key)
    expected = set(ALL) - {"extract_eval"} if part == "train" else FROM_FINETUNE | FROM_EVAL_STORE
    assert changed(before, plan()) == expected


def test_adding_renaming_and_removing_an_image_changes_everything_that_trains(plan: Callable[..., Plan]) -> None:
    before = plan()
    folder = Path(before.images.location) / "dark"
    shutil.copy(folder / "000.png", folder / "100.png")
    added = plan()
    (folder / "100.png").rename(folder / "101.png")
    renamed = plan()
    (folder / "101.png").unlink()
    assert set(prints(before)) == set(ALL)
    assert changed(before, plan()) == set(), "back to where it was"
    for first, second in ((before, added), (added, renamed)):
        assert {"finetune", "evaluate", "report"} <= changed(first, second)


def test_the_same_bytes_written_again_change_nothing(plan: Callable[..., Plan]) -> None:
    before = plan()
    path = Path(before.images.location) / "dark" / "003.png"
    path.write_bytes(path.read_bytes())
    os.utime(path, (1, 1))
    assert changed(before, plan()) == set()


def test_other_weights_under_the_same_path_change_everything(plan: Callable[..., Plan], tmp_path: Path) -> None:
    first, second = tmp_path / "first.bin", tmp_path / "second.bin"
    first.write_bytes(b"weights")
    second.write_bytes(b"weights")
    plain = plan(f"extract.weights={first}")
    assert changed(plan(), plain) == set(ALL)
    assert changed(plain, plan(f"extract.weights={second}")) == set(), "content counts, not the name"
    first.write_bytes(b"others")
    assert changed(plain, plan(f"extract.weights={first}")) == set(ALL)


def test_upstream_closure() -> None:
    config = load_preset("smoke")
    assert upstream(("extract",), config) == ["extract"]
    assert upstream(("distill",), config) == ["extract", "distill"]
    assert upstream(("finetune",), config) == ["extract", "distill", "finetune"]
    assert upstream(("evaluate",), config) == ["extract", "extract_eval", "distill", "evaluate"]
    assert upstream(("report",), config) == list(STAGES)
    elsewhere = config.model_copy(update={"distill": config.distill.model_copy(update={"store": "s3://b/store"})})
    assert upstream(("finetune",), elsewhere) == ["distill", "finetune"]
    for place, stage in enumerate(STAGES.values()):
        assert set(stage.needs) <= set(ALL[:place]), "every stage comes after what it needs"


def test_planning_makes_nothing_but_the_image_list(plan: Callable[..., Plan], tmp_path: Path) -> None:
    made = plan()
    files = {path.relative_to(tmp_path / "runs").parts[0] for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    assert files == {"data", "cache"}
    assert {stage.action for stage in made.stages.values()} == {"run"}


@pytest.mark.parametrize(
    ("config", "error", "said"),
    [
        ({}, ConfigError, "no data: give DATA="),
        ({"data.path": "/nowhere/at/all"}, InputError, "no such data: /nowhere/at/all"),
        ({"data.path": "images", "extract.teacher": "tou"}, ConfigError, "did you mean 'toy'"),
        ({"data.path": "images", "extract.weights": "/nowhere.pt"}, InputError, "no weights file /nowhere.pt"),
    ],
)
def test_a_plan_that_cannot_work_is_refused(
    make_images: Callable[..., Path], tmp_path: Path, config: dict[str, str], error: type[Exception], said: str
) -> None:
    if config.get("data.path") == "images":
        config = config | {"data.path": str(make_images())}
    settings: PipelineConfig = apply_overrides(load_preset("smoke"), list(config.items()))
    with pytest.raises(error) as caught:
        make_plan(settings, Workspace(tmp_path / "runs"), ALL)
    assert said in str(caught.value)
