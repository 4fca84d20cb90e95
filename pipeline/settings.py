"""Where the settings of a command come from: a preset, a teacher's recipe, the command before it; then its options."""

from typing import Any

from distill.student_config import find_student
from extract.resolve import identify_teacher
from pipeline.config import PipelineConfig, apply_overrides, parse_assignment
from pipeline.named_teachers import SEVERAL, split_teachers, with_others, with_weights
from pipeline.presets import load_preset, preset_for_teacher
from pipeline.screen import console
from pipeline.workspace import Workspace, load_current
from storage.encodings import find_encoding
from storage.whitening import find_whitening


def resolve_config(
    workspace: Workspace, *, command: str, preset: str | None, teacher: str | None, weights: str | None,
    data: str | None, views: int | None, layout: str | None, encoding: str | None, whitening: str | None,
    store: str | None, student: str | None, seeds: int | None, executor: str | None, assignments: tuple[str, ...],
    ray_address: str | None = None,
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
        ("distill.store", store),
        ("distill.student", find_student(student).to_json() if student else None),
        ("finetune.seeds", list(range(seeds)) if seeds is not None else None),
        ("extract.run.executor", executor),
        ("extract.run.ray_address", ray_address),
    ]
    overrides = [(name, value) for name, value in changes if value is not None]
    config = apply_overrides(config, overrides)
    if named and command in SEVERAL:
        config = with_others(config, named)
    config = with_weights(config, weights, command)
    return apply_overrides(config, [parse_assignment(text) for text in assignments])
