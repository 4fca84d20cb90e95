"""The teacher that settings ask for: its row, at the input size and the tap that they name."""

import functools
import importlib
import os
from typing import Any

from extract.config import ExtractConfig
from extract.spec import TeacherSpec
from extract.teachers import TEACHERS
from storage.errors import ConfigError, did_you_mean
from storage.folder import needed_record_bytes

OF_A_LIBRARY = {"timm:": "extract.timm_teachers", "open_clip:": "extract.open_clip_teachers"}
"""What the names of a library's own models begin with, and the module that describes them."""
MOVED = ("input_px", "tap", "block")
"""Settings that change a row."""
HOW_TO_NAME_OTHERS = "timm:NAME, open_clip:NAME/TAG or FILE.py"


def names_code(teacher: str) -> bool:
    """Whether a teacher is made by a Python file, which is run."""
    return teacher.endswith(".py") or ".py:" in teacher


def identify_teacher(name: str) -> TeacherSpec:
    """A teacher by its name in the table, by a library's name of it (`timm:NAME`, `open_clip:NAME/TAG`), or by the
    Python file that makes it (`FILE.py`, `FILE.py:function`). Only the latter two import a deep-learning library.

    Raises:
        ConfigError: no such teacher; offers the nearest names.
        InputError: no such file.
    """
    if name in TEACHERS:
        return TEACHERS[name]
    for prefix, module in OF_A_LIBRARY.items():
        if name.startswith(prefix):
            return _described_by_library(module, name.removeprefix(prefix))
    if names_code(name):
        spec: TeacherSpec = importlib.import_module("extract.file_teachers").describe(name)
        return spec
    hint = did_you_mean(name, TEACHERS) or "`make teachers` lists those that have a row;"
    raise ConfigError(f"unknown teacher {name!r}; {hint} Others are named as {HOW_TO_NAME_OTHERS}")


@functools.cache
def _described_by_library(module: str, name: str) -> TeacherSpec:
    spec: TeacherSpec = importlib.import_module(module).describe(name)
    return spec


def resolve_teacher(cfg: ExtractConfig) -> TeacherSpec:
    """What is known of the teacher without its weights.

    Raises:
        ConfigError: no such teacher, or no such tap of it.
    """
    return identify_teacher(cfg.teacher).at(input_px=cfg.input_px, tap=cfg.tap, block=cfg.block)


def needed_view_bytes(cfg: ExtractConfig) -> int:
    """What a view takes in a store of these settings, see `needed_record_bytes`. Raises what `resolve_teacher` does."""
    spec = resolve_teacher(cfg)
    view_px = spec.input_px if cfg.keeps_views else None
    return needed_record_bytes(spec.feature_spec(), cfg.layout, cfg.encoding, cfg.token_subset, view_px)


def resolve_settings(cfg: ExtractConfig) -> ExtractConfig:
    """The same settings, worded alike by whoever asks for the same tokens: a teacher's name in full, and None for what
    its own row says anyway.

    Raises what `resolve_teacher` does.
    """
    own, spec = identify_teacher(cfg.teacher), resolve_teacher(cfg)
    found: dict[str, Any] = {name: getattr(spec, name) for name in MOVED}
    changes = {name: None if value == getattr(own, name) else value for name, value in found.items()}
    name = os.path.normpath(cfg.teacher) if own.code_digest else own.name
    return cfg.model_copy(update=changes | {"teacher": name})


def settings_identity(cfg: ExtractConfig) -> dict[str, Any]:
    """What decides a store beside images and weights: `identity` with all that is known of the teacher for its name."""
    others = {name: value for name, value in cfg.identity().items() if name not in MOVED}
    return others | {"teacher": resolve_teacher(cfg).identity()}
