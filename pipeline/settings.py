"""Where the settings of a command come from: a preset, a teacher's recipe, the command before it; then its options."""

from typing import Any

from distill.student_config import find_student
from extract.resolve import identify_teacher
from pipeline.config import PipelineConfig, apply_overrides, parse_assignment
from pipeline.named_teachers import LEARNING, learning_alone, split_teachers, with_named, with_weights
from pipeline.presets import load_preset, preset_for_teacher
from pipeline.screen import console
from pipeline.workspace import Workspace, load_current
from storage.encodings import find_encoding
from storage.errors import ConfigError
from storage.whitening import find_whitening


def resolve_config(
    workspace: Workspace, *, command: str, preset: str | None, teacher: str | None, weights: str | None,
    data: str | None, views: int | None, layout: str | None, encoding: str | None, whitening: str | None,
    store: str | None, student: str | None, seeds: int | None, executor: str | None, assignments: tuple[str, ...],
    ray_address: str | None = None, online: bool | None = None, gpus: int | None = None, launcher: str | None = None,
    accumulate: int | None = None,
) -> PipelineConfig:  # fmt: skip
    """Settings of a command: a preset, or the recipe of a newly named teacher, or those of the command before it; then
    the options. Where several teachers are named, the first one counts.

    Raises:
        ConfigError: an unknown name, or a value of the wrong kind.
    """
    named = split_teachers(teacher, command)
    for name in named:
        identify_teacher(name)
    first = named[0] if named else None
    current = load_current(workspace)
    before = PipelineConfig.checked(current, f"{workspace.current_path} (delete it to begin anew)") if current else None
    if preset:
        config = load_preset(preset)
    elif before is not None and (first is None or first in before.teachers):
        config = before.led_by(first or before.extract.teacher)
        console.print(f"settings: those of the last command here ({workspace.current_path}, preset {config.preset})")
    else:
        config = preset_for_teacher(first or "clip-b")
    if before is not None and data is None:
        config = config.model_copy(update={"data": before.data})
    if ray_address is not None and executor is None:
        executor = "ray"
    changes: list[tuple[str, Any]] = [
        ("data.path", data),
        ("extract.teacher", first),
        ("extract.views", views),
        ("extract.layout", layout),
        ("extract.whitening", find_whitening(whitening).to_json() if whitening else None),
        ("extract.encoding", find_encoding(encoding).to_json() if encoding else None),
        ("distill.student", find_student(student).to_json() if student else None),
        ("finetune.seeds", list(range(seeds)) if seeds is not None else None),
        ("extract.run.executor", executor),
        ("extract.run.ray_address", ray_address),
        ("distill.run.ray_address", ray_address),
        ("distill.run.gpus", gpus),
        ("distill.run.launcher", launcher),
        ("distill.run.accumulate", accumulate),
    ]
    overrides = [(name, value) for name, value in changes if value is not None]
    config = with_named(apply_overrides(config, overrides), named, command)
    config = _with_sources(config, store, online, named=named if command == LEARNING else ())
    config = with_weights(config, weights, command)
    return apply_overrides(config, [parse_assignment(text) for text in assignments])


def _with_sources(
    config: PipelineConfig, store: str | None, online: bool | None, *, named: tuple[str, ...]
) -> PipelineConfig:
    """What a student learns from, after a command said it: finished stores, a teacher at work, or the stores of the
    teachers that it named. Each of them takes the place of what earlier commands said.

    Raises:
        ConfigError: no name beside a comma; stores and several teachers at once.
    """
    changes: dict[str, Any] = {}
    if store is not None:
        if len(named) > 1:
            raise ConfigError(
                f"STORE names what a student learns from, and so does TEACHER with several names ({', '.join(named)}); "
                "leave out the one or the other"
            )
        first, *others = split_stores(store)
        changes = {"store": first, "also": [{"store": other} for other in others], "online": False}
        config = learning_alone(config)
    elif online or named:
        changes = {"store": None} | ({"also": []} if named else {})
    if online is not None:
        changes["online"] = online
    return apply_overrides(config, [(f"distill.{name}", value) for name, value in changes.items()])


def split_stores(text: str) -> tuple[str, ...]:
    """The paths and URLs in the value of STORE.

    Raises:
        ConfigError: an empty or repeated one.
    """
    stores = tuple(part.strip() for part in text.split(","))
    if not all(stores):
        raise ConfigError(f"STORE is {text!r}: there is nothing beside a comma; write them as /a/store,/b/store")
    repeated = next((store for store in stores if stores.count(store) > 1), None)
    if repeated is not None:
        raise ConfigError(f"STORE names {repeated!r} twice; a student learns from each store once")
    return stores
