"""The authors' released checkpoints as students of this project.

The file itself is read elsewhere. Tensors come in here, and a folder comes out that is like a distillation's.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from distill.authors import from_authors
from distill.export_folder import check_target
from distill.saved_student import FILE, save_student
from distill.student_config import StudentConfig
from storage.whitening import LayerNorm


def import_student(
    tensors: Mapping[str, Tensor], target: Path, facts: Mapping[str, str], *, force: bool = False
) -> StudentConfig:
    """Write the student in a checkpoint of the authors' as `target/student.safetensors`; returns its shape.

    Args:
        facts: where the tensors come from; they go into the file's header.

    Raises:
        InputError: the tensors are not of such a checkpoint.
        ConfigError: `target` holds something else.
    """
    check_target(target, frozenset({FILE}), FILE, force=force)
    cfg, state = from_authors(tensors)
    save_student(target, cfg, state, {"whitening": LayerNorm().model_dump_json(), **facts})
    return cfg
