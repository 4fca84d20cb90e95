"""The names in TEACHER and WEIGHTS: one teacher or several, and what later commands take over from earlier ones."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import OtherTeacher, PipelineConfig
from pipeline.presets import load_preset
from pipeline.settings import resolve_config
from pipeline.stages import STAGES
from pipeline.workspace import Workspace
from storage.atomic import write_json
from storage.errors import ConfigError

Decant = Callable[..., Any]
pytestmark = pytest.mark.usefixtures("toy_large")
NOTHING: dict[str, Any] = {"assignments": ()}


@pytest.fixture
def resolve(tmp_path: Path, decant: Decant) -> Callable[..., PipelineConfig]:
    """Settings of a command with some options, after those of another one."""
    from inspect import signature

    names = [name for name in signature(resolve_config).parameters if name not in ("workspace", "command")]

    def run(command: str, before: PipelineConfig | None = None, **options: Any) -> PipelineConfig:
        workspace = Workspace(tmp_path / "settings")
        shutil.rmtree(workspace.root, ignore_errors=True)
        if before is not None:
            write_json(workspace.current_path, before.to_json())
        return resolve_config(workspace, command=command, **(dict.fromkeys(names) | NOTHING | options))

    return run


def test_names_and_weights_stand_in_the_same_order(resolve: Callable[..., PipelineConfig]) -> None:
    config = resolve("extract", preset="smoke", teacher="toy, toy-large ,mae-b", weights="a.pth,random,hub")
    assert config.teachers == {"toy": Path("a.pth"), "toy-large": "random", "mae-b": None}
    assert config.distill == load_preset("smoke").distill
    assert resolve("run", config).teachers == config.teachers, "a command without names goes on"
    assert resolve("extract", config, weights=",,").teachers == dict.fromkeys(config.teachers)
    assert PipelineConfig.checked(json.loads(json.dumps(config.to_json())), "here") == config


def test_the_first_name_decides_the_recipe(resolve: Callable[..., PipelineConfig]) -> None:
    config = resolve("extract", teacher="dino-b,clip-b")
    assert config.preset == "dino-b-300ep"
    assert [other.name for other in config.also] == ["clip-b"]
    assert config.led_by("clip-b").extract == config.extract.model_copy(update={"teacher": "clip-b"})


def test_naming_one_of_them_keeps_the_settings(resolve: Callable[..., PipelineConfig]) -> None:
    before = resolve("extract", teacher="clip-l,dino-b", weights="l.pth,b.pth", views=3)
    for command in ("distill", "finetune", "evaluate", "report"):
        config = resolve(command, before, teacher="dino-b")
        assert config.extract == before.extract.model_copy(update={"teacher": "dino-b", "weights": Path("b.pth")})
        assert config.also == (OtherTeacher(name="clip-l", weights=Path("l.pth")),)
        assert config.distill == before.distill
        assert resolve(command, config, teacher="clip-l") == before
    assert resolve("extract", before, teacher="dino-b").also == (), "to extract one is to extract that one"
    swapped = resolve("extract", before, teacher="dino-b,clip-l")
    assert list(swapped.teachers.items()) == [("dino-b", Path("b.pth")), ("clip-l", Path("l.pth"))]
    assert resolve("distill", before, teacher="mae-b").also == (), "a teacher that is new begins anew"


@pytest.mark.parametrize(
    ("command", "options", "said"),
    [
        ("finetune", {"teacher": "toy,toy-large"}, "`finetune` works with one teacher, found 2 (toy, toy-large)"),
        ("demo", {"teacher": "toy,toy-large"}, "`extract`, `plan`, `run` and `distill` take several"),
        ("distill", {"teacher": "toy,toy-large", "store": "/a"}, "leave out the one or the other"),
        ("distill", {"store": "/a,,/b"}, "there is nothing beside a comma"),
        ("distill", {"store": "/a,/b,/a"}, "STORE names '/a' twice"),
        ("extract", {"teacher": "toy,,toy-large"}, "there is no name beside a comma"),
        ("extract", {"teacher": "toy,"}, "there is no name beside a comma"),
        ("extract", {"teacher": "toy,toy"}, "TEACHER names 'toy' twice"),
        ("extract", {"teacher": "toy,tou"}, "unknown teacher 'tou'; did you mean 'toy'"),
        (
            "extract",
            {"teacher": "toy,toy-large", "weights": "a.pth"},
            "WEIGHTS has 1 entries (a.pth) for 2 teachers (toy, toy-large)",
        ),
        ("distill", {"teacher": "toy", "weights": "a,b"}, "WEIGHTS has 2 entries (a,b) for 1 teachers (toy)"),
    ],
)
def test_names_that_cannot_be_meant_are_refused(
    resolve: Callable[..., PipelineConfig], command: str, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(command, **options)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("timm:vit_base_patch16_224.dino", "timm-vit_base_patch16_224.dino"),
        ("open_clip:ViT-B-16/openai", "open_clip-ViT-B-16-openai"),
        ("../my teachers/mine.py:large", "my-teachers-mine.py-large"),
    ],
)
def test_any_name_makes_a_folder_beside_the_others(name: str, folder: str, tmp_path: Path) -> None:
    path = Workspace(tmp_path).stage_dir(STAGES["extract"], name, "0123456789abcdef")
    assert path == tmp_path / "stores" / f"{folder}-0123456789"
