"""The teacher that settings ask for: its row, at the input size and the tap that they name."""

from extract.config import ExtractConfig
from extract.spec import TeacherSpec
from extract.teachers import find_teacher


def resolve_teacher(cfg: ExtractConfig) -> TeacherSpec:
    """What is known of the teacher without its weights.

    Raises:
        ConfigError: no such teacher, or no such tap of it.
    """
    return find_teacher(cfg.teacher).at(input_px=cfg.input_px, tap=cfg.tap, block=cfg.block)
