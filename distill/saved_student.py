"""A student that a run or an import has left in a folder, as a network."""

from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from distill.checkpoint import load_facts, load_weights, save_weights
from distill.student import build_student
from distill.student_config import BeitStudent, StudentConfig, read_student
from storage.errors import DamagedError, InputError

FILE = "student.safetensors"


class SavedStudent(NamedTuple):
    """A student and where it comes from."""

    cfg: StudentConfig
    network: nn.Module
    """In evaluation mode, on the CPU."""
    facts: dict[str, str]
    """What the file says of itself, but for its shape: the store that it learnt from, for one."""


def load_student(folder: Path) -> SavedStudent:
    """The student of a folder such as `runs/students/<run>`.

    Raises:
        InputError: there is none.
        DamagedError: its file cannot be read, or its tensors are not those of its shape.
        ConfigError: this timm does not build it.
    """
    path = find_student_file(folder)
    facts = load_facts(path)
    cfg = _shape(path, facts)
    _refuse_huge(path, cfg)
    network: Any = build_student(cfg, drop_path=0.0)
    try:
        network.load_state_dict(load_weights(path))
    except RuntimeError as error:
        raise DamagedError(
            f"{path} does not hold the tensors of its own student ({' '.join(str(error).split())[:300]}); make it "
            "again with FORCE=1, or use the timm that it was made with"
        ) from error
    return SavedStudent(cfg, network.eval(), _without_shape(facts))


def load_student_facts(folder: Path) -> dict[str, str]:
    """The facts alone; raises the same errors about the file."""
    return _without_shape(load_facts(find_student_file(folder)))


def _without_shape(facts: dict[str, str]) -> dict[str, str]:
    return {name: text for name, text in facts.items() if name != "student"}


def _refuse_huge(path: Path, cfg: StudentConfig) -> None:
    """Before a network is made: a header can ask for one that no memory holds."""
    if isinstance(cfg, BeitStudent) and cfg.depth * 4 * cfg.width**2 > path.stat().st_size:
        raise DamagedError(
            f"{path} has {path.stat().st_size:,} bytes, too few for the student that it describes ({cfg.label}); make "
            "it again with FORCE=1"
        )


def find_student_file(folder: Path) -> Path:
    """
    Raises:
        InputError: no student in this folder.
    """
    path = folder / FILE
    if not path.is_file():
        found = "is a file" if folder.is_file() else f"has no {FILE}" if folder.is_dir() else "does not exist"
        raise InputError(
            f"{folder} {found}, expected the folder of a finished distillation or of an import, such as "
            "runs/students/<run>; `make status` lists them"
        )
    return path


def _shape(path: Path, facts: dict[str, str]) -> StudentConfig:
    if "student" not in facts:
        raise InputError(
            f"{path} says nothing of a student's shape, so this program did not write it; `make import` reads the "
            "authors' checkpoints"
        )
    return read_student(path, facts["student"].encode())


def save_student(folder: Path, cfg: StudentConfig, tensors: dict[str, Any], facts: dict[str, str]) -> Path:
    """Write a student as distillation does; returns the file."""
    path = folder / FILE
    save_weights(path, tensors, {"student": cfg.model_dump_json()} | facts)
    return path
