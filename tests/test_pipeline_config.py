"""Settings: typed overrides by name, errors that help, and JSON that gives back the same settings."""

import json
from typing import Any

import pytest

from distill.student_config import STUDENTS
from pipeline.config import PipelineConfig, apply_overrides, differences, parse_assignment
from pipeline.presets import PRESETS, load_preset
from storage.errors import ConfigError
from storage.views import CentreCrop

SMOKE = load_preset("smoke")


def changed(*texts: str) -> PipelineConfig:
    """The smoke settings after `--set` of each text."""
    return apply_overrides(SMOKE, [parse_assignment(text) for text in texts])


def look_up(config: PipelineConfig, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("distill.epochs=30", 30),
        ("distill.optim.base_lr=1e-3", 1e-3),
        ("distill.student.depth=5", 5),
        ("finetune.seeds=[0,1,2]", (0, 1, 2)),
        ('finetune.starts=["distilled"]', ("distilled",)),
        ("evaluate.penalties=[0.5]", (0.5,)),
        ("finetune.vertical_flip=true", True),
        ("extract.input_px=null", None),
        ("extract.run.executor=ray", "ray"),
        ("report.title=two words = one title", "two words = one title"),
        ('report.title="30"', "30"),
        (" data.eval_fraction = 0.5 ", 0.5),
        ("extract.sampler.min_scale=1", 1.0),
    ],
)
def test_overrides_are_typed(text: str, value: object) -> None:
    config = changed(text)
    name = text.partition("=")[0].strip()
    assert look_up(config, name) == value
    assert type(look_up(config, name)) is type(value)
    assert [line.split(": ")[0] for line in differences(SMOKE.to_json(), config.to_json())] in ([name], [])


def test_a_group_can_be_replaced_as_a_whole() -> None:
    student = STUDENTS["vit-s"]
    assert changed(f"distill.student={json.dumps(student.to_json())}").distill.student == student
    sampler = changed('extract.sampler={"kind": "centre_crop", "fraction": 0.5}').extract.sampler
    assert sampler == CentreCrop(fraction=0.5)


def test_later_overrides_win_and_the_original_stays() -> None:
    assert changed("distill.epochs=7", "distill.epochs=9").distill.epochs == 9
    assert SMOKE.distill.epochs == 4


def test_values_that_are_not_text_are_taken_as_they_are() -> None:
    """A folder may be called `2024` or `null`: what a program gives is not read as JSON."""
    for name in ("2024", "null", "[a]"):
        assert apply_overrides(SMOKE, [("data.path", name)]).data.path == name


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("distil.epochs=3", "did you mean distill?"),
        ("distill.epoch=3", "did you mean distill.epochs?"),
        ("distill.student.dept=3", "did you mean distill.student.depth?"),
        ("extract.run.worker=3", "did you mean extract.run.workers?"),
        ("extract.sampler.min_scal=3", "did you mean extract.sampler.min_scale?"),
        ("qqq=3", "known there: preset, data, extract, also, distill, finetune, evaluate, report"),
        ("data.zzzzzz=3", "known there: data.path, data.eval_fraction, data.split_seed"),
        ("distill.epochs.more=3", "distill.epochs is 4 and has no parts"),
        ("data.path.more=3", "data.path is null and has no parts"),
        (".epochs=3", "known there:"),
        ("distill.=3", "known there: distill.store"),
    ],
)
def test_an_unknown_name_offers_the_nearest_at_its_level(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        changed(text)
    assert said in str(caught.value)
    assert repr(text.partition("=")[0]) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("distill.epochs=many", "valid integer"),
        ("distill.epochs=2.5", "valid integer"),
        ("distill.epochs=0", "greater than or equal to 1"),
        ("distill.epochs=null", "valid integer"),
        ("distill.optim.base_lr=fast", "valid number"),
        ("distill.optim.base_lr=NaN", "finite number"),
        ("distill.optim.base_lr=Infinity", "finite number"),
        ("finetune.seeds=3", "valid tuple"),
        ("finetune.seeds=[]", "at least 1 item"),
        ('finetune.starts=["warm"]', "'scratch' or 'distilled'"),
        ("data.eval_fraction=1.0", "less than 1"),
        ("data.path=7", "valid string"),
        ("distill.student.input_px=33", "not a multiple of patch_px 8"),
        ("distill.student.heads=5", "not a multiple of heads 5"),
        ("extract.run.executor=slurm", "'ray', 'process' or 'inline'"),
        ("distill.student=vit-b", "instance of BeitStudent, found 'vit-b'"),
        ("extract.sampler.kind=spiral", "'random_resized_crop', 'centre_crop'"),
    ],
)
def test_a_wrong_value_is_refused_with_its_name_and_what_was_expected(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        changed(text)
    message = str(caught.value)
    group, _, _ = text.partition("=")[0].rpartition(".")
    assert said in message
    assert message.startswith(f"settings: {group}")


@pytest.mark.parametrize("text", ["distill.epochs", "=3", "", "distill.epochs:3"])
def test_an_assignment_needs_a_name_and_a_value(text: str) -> None:
    with pytest.raises(ConfigError, match=r"not of the form name=value, such as distill.epochs=30"):
        parse_assignment(text)


@pytest.mark.parametrize("name", PRESETS)
def test_settings_equal_their_round_trip_through_json(name: str) -> None:
    config = load_preset(name)
    assert PipelineConfig.model_validate(json.loads(json.dumps(config.to_json()))) == config
    assert PipelineConfig.model_validate_json(config.model_dump_json()) == config


def test_differences_name_the_leaves() -> None:
    after = changed("distill.epochs=5", "finetune.seeds=[0,1]", "data.path=/x")
    assert differences(SMOKE.to_json(), after.to_json()) == [
        'data.path: null -> "/x"', "distill.epochs: 4 -> 5", "finetune.seeds: [0] -> [0, 1]",
    ]  # fmt: skip
    assert differences({"a": 1}, {"b": 2}) == ["a: 1 -> null", "b: null -> 2"]
    assert differences(SMOKE.to_json(), SMOKE.to_json()) == []


def test_held_out_images_are_seen_once_in_the_view_of_the_evaluation() -> None:
    config = changed("extract.views=7", "finetune.eval_sampler.fraction=0.5", "extract.input_px=64")
    held_out = config.extract_eval
    assert (held_out.split, held_out.views, held_out.sampler) == ("eval", 1, CentreCrop(fraction=0.5))
    assert (held_out.teacher, held_out.input_px) == (config.extract.teacher, 64)
