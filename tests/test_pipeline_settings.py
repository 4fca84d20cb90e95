"""Where the settings of a command come from: a preset, a teacher's recipe, the command before it, and options."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.student_config import STUDENTS
from pipeline.cli import COMMANDS
from pipeline.config import PipelineConfig, apply_overrides
from pipeline.presets import load_preset
from pipeline.settings import resolve_config
from pipeline.stages import STAGES
from pipeline.workspace import Workspace
from storage.atomic import write_json
from storage.encodings import Int8
from storage.errors import ConfigError, DamagedError
from storage.whitening import Pca

NOTHING: dict[str, Any] = dict.fromkeys(
    (
        "preset",
        "teacher",
        "weights",
        "data",
        "views",
        "layout",
        "encoding",
        "whitening",
        "store",
        "student",
        "seeds",
        "executor",
    )
) | {"assignments": ()}
Resolve = Callable[..., PipelineConfig]


@pytest.fixture
def resolve(tmp_path: Path) -> Resolve:
    """Settings of a command with some options, in a work folder with or without settings of an earlier command."""

    def run(before: PipelineConfig | None = None, command: str = "run", **options: Any) -> PipelineConfig:
        workspace = Workspace(tmp_path / "runs")
        shutil.rmtree(workspace.root, ignore_errors=True)
        if before is not None:
            write_json(workspace.current_path, before.to_json())
        return resolve_config(workspace, command=command, **(NOTHING | options))

    return run


EARLIER = apply_overrides(
    load_preset("smoke"), [("data.path", "/earlier"), ("data.eval_fraction", 0.5), ("distill.epochs", 9)]
)


def test_commands_follow_each_other_without_options(
    decant: Any, make_images: Callable[..., Path], tmp_path: Path
) -> None:
    """As `make extract TEACHER=toy DATA=...`, `make distill`, `make finetune`, ... do."""
    work = ("--work", tmp_path / "runs")
    assert decant("extract", "--teacher", "toy", "--data", make_images(), *work).code == 0
    for command in ("distill", "finetune", "evaluate", "report"):
        outcome = decant(command, *work)
        assert outcome.code == 0, outcome.err
        assert f"settings: those of the last command here ({tmp_path}/runs/current.json, preset smoke)" in outcome.out
        assert f"data: {tmp_path}/images: 16 images to train on, 4 held out, 2 classes" in outcome.out
    assert decant("plan", *work).out.count(" skip ") == len(STAGES)
    assert (tmp_path / "runs" / "report.html").exists()


def test_options_of_one_command_hold_for_the_next(decant: Any, copy_run: tuple[Path, Path]) -> None:
    _, work = copy_run
    decant("distill", "--work", work, "--set", "distill.epochs=1", "--seeds", "2")
    current = json.loads((work / "current.json").read_bytes())
    assert (current["distill"]["epochs"], current["finetune"]["seeds"]) == (1, [0, 1])
    planned = decant("plan", "--work", work, "--views", "5")
    assert "finetune run finetune.seeds: [0] -> [0, 1]; distill changed" in planned.out
    assert "extract run extract.views: 2 -> 5" in planned.out
    assert json.loads((work / "current.json").read_bytes()) == current, "a plan changes nothing"


def test_a_command_that_is_refused_leaves_the_settings(decant: Any, copy_run: tuple[Path, Path]) -> None:
    _, work = copy_run
    before = (work / "current.json").read_bytes()
    for options in (("--set", "distill.epochs=x"), ("--data", "/nowhere"), ("--teacher", "tou"), ("--views", "0")):
        assert decant("run", "--work", work, *options).code == 2
    assert (work / "current.json").read_bytes() == before


def test_nothing_named_is_clip_b(resolve: Resolve) -> None:
    assert resolve(data="/d").preset == "clip-b-300ep"


def test_the_settings_before_hold(resolve: Resolve) -> None:
    assert resolve(EARLIER) == EARLIER
    assert resolve(EARLIER, teacher="toy") == EARLIER, "naming the same teacher again changes nothing"


def test_a_newly_named_teacher_brings_its_recipe_and_keeps_the_data(resolve: Resolve) -> None:
    config = resolve(EARLIER, teacher="dino-b")
    assert config.data == EARLIER.data, "with its split: teachers are compared on the same images"
    assert config.model_copy(update={"data": load_preset("smoke").data}) == load_preset("dino-b-300ep")


def test_a_preset_brings_everything_but_the_data(resolve: Resolve) -> None:
    assert resolve(EARLIER, preset="demo").data == EARLIER.data
    assert resolve(EARLIER, preset="smoke").distill.epochs == load_preset("smoke").distill.epochs
    assert resolve(EARLIER, preset="smoke", data="/new").data.path == "/new"


def test_every_option_is_a_setting(resolve: Resolve) -> None:
    config = resolve(
        preset="smoke", teacher="mae-b", weights="w.pt", data="2024", views=3, student="vit-s", seeds=4,
        executor="ray", layout="wds", encoding="int8", whitening="pca", store="s3://b/x",
        assignments=("distill.epochs=11", "extract.views=6"),
    )  # fmt: skip
    assert (config.extract.teacher, config.extract.weights, config.data.path) == ("mae-b", Path("w.pt"), "2024")
    assert (config.distill.student, config.finetune.seeds) == (STUDENTS["vit-s"], (0, 1, 2, 3))
    assert (config.extract.run.executor, config.distill.epochs) == ("ray", 11)
    assert config.extract.views == 6, "--set comes last"
    assert (config.extract.whitening, config.extract_eval.whitening) == (Pca(), Pca())
    assert (config.extract.layout, config.extract.encoding, config.distill.store) == ("wds", Int8(), "s3://b/x")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"teacher": "dino"}, "unknown teacher 'dino'; did you mean 'dino-s' or 'dino-b'"),
        ({"student": "vit-x"}, "unknown student 'vit-x'; did you mean 'vit-"),
        ({"preset": "demmo"}, "unknown preset 'demmo'; did you mean 'demo'"),
        ({"encoding": "int4"}, "unknown encoding 'int4'; did you mean 'int8'?"),
        ({"whitening": "meanstd"}, "unknown whitening 'meanstd'; did you mean 'mean_std'?"),
        ({"seeds": 0}, "finetune.seeds: Tuple should have at least 1 item"),
        ({"views": 0}, "extract.views: Input should be greater than or equal to 1, found 0"),
        ({"assignments": ("distill.epochs",)}, "is not of the form name=value"),
    ],
)
def test_wrong_options_are_refused(resolve: Resolve, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(**options)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ('{"preset": "smo', DamagedError, "is not readable as JSON"),
        ('{"preset": "smoke", "colour": 1}', ConfigError, "delete it to begin anew"),
    ],
)
def test_settings_that_cannot_be_read_say_what_to_do(
    tmp_path: Path, text: str, error: type[Exception], said: str
) -> None:
    (tmp_path / "current.json").write_text(text)
    with pytest.raises(error) as caught:
        resolve_config(Workspace(tmp_path), command="run", **NOTHING)
    assert str(tmp_path / "current.json") in str(caught.value)
    assert said in str(caught.value)
    assert "delete it" in str(caught.value)


def test_every_stage_belongs_to_a_command() -> None:
    assert set(COMMANDS["run"].stages) == set(STAGES)
    for name, stage in STAGES.items():
        assert name in COMMANDS[stage.command].stages
        assert set(COMMANDS[stage.command].again) <= set(COMMANDS[stage.command].stages)
