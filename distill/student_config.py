"""Which network a student is. Imports no deep-learning library."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, JsonValue, Tag, TypeAdapter, ValidationError, model_validator

from storage.errors import DamagedError, look_up
from storage.schema import Schema, first_problem

Positions = Literal["shared", "per_block", "absolute"]


class BeitStudent(Schema):
    """A BEiT-style ViT with LayerScale, the paper's student for ViT teachers; its size is free."""

    kind: Literal["beit"] = "beit"
    input_px: int = Field(default=224, ge=16)
    """Side of the student's input; it may differ from the teacher's as long as the token grids agree."""
    patch_px: int = Field(default=16, ge=2)
    width: int = Field(default=768, ge=16)
    depth: int = Field(default=12, ge=1)
    heads: int = Field(default=12, ge=1)
    mlp_ratio: float = Field(default=4.0, gt=0)
    layer_scale: float = Field(default=0.1, ge=0)
    """Initial value of LayerScale on both branches."""
    positions: Positions = "shared"
    """Where tokens learn where they are: one relative-position bias shared by all blocks (the paper's), one a block, or
    an absolute embedding (paper, ablation of position encodings)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.input_px % self.patch_px:
            raise ValueError(f"input_px {self.input_px} is not a multiple of patch_px {self.patch_px}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self

    @property
    def grid_hw(self) -> tuple[int, int]:
        side = self.input_px // self.patch_px
        return side, side

    @property
    def label(self) -> str:
        """As it can be part of a folder's name."""
        return f"w{self.width}-d{self.depth}"


class TimmStudent(Schema):
    """Any network of timm, from random weights, whose last feature map is a grid of tokens."""

    kind: Literal["timm"] = "timm"
    model: str
    """timm's name, such as `swinv2_base_window8_256`."""
    input_px: int = Field(default=224, ge=16)
    arguments: dict[str, JsonValue] = Field(default_factory=dict)
    """Further arguments of `timm.create_model`, such as `window_size`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        taken = sorted(_NOT_FREE & self.arguments.keys())
        if taken:
            raise ValueError(f"arguments.{taken[0]} is not free: {_NOT_FREE_BECAUSE}")
        return self

    @property
    def label(self) -> str:
        """As it can be part of a folder's name."""
        return self.model


_NOT_FREE = frozenset(
    {"img_size", "drop_path_rate", "num_classes", "global_pool", "pretrained", "pretrained_cfg",
     "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
)  # fmt: skip
_NOT_FREE_BECAUSE = (
    "sizes are set by input_px, drop path by distill.drop_path, and a student begins with random weights and no head"
)


def _kind(values: Any) -> str:
    """Students that were saved before there were others are BEiTs."""
    found = values.get("kind", "beit") if isinstance(values, dict) else getattr(values, "kind", "beit")
    return str(found)


StudentConfig = BeitStudent | TimmStudent
AnyStudent = Annotated[Annotated[BeitStudent, Tag("beit")] | Annotated[TimmStudent, Tag("timm")], Discriminator(_kind)]

_ANY_STUDENT: TypeAdapter[StudentConfig] = TypeAdapter(AnyStudent)
_SWINV2_B = TimmStudent(model="swinv2_base_window8_256", arguments={"window_size": 14})
_SWINV2_G = TimmStudent(model="swinv2_cr_giant_224", arguments={"depths": [2, 2, 42, 4]})

STUDENTS: dict[str, StudentConfig] = {
    "vit-ti": BeitStudent(width=192, heads=3),
    "vit-s": BeitStudent(width=384, heads=6),
    "vit-b": BeitStudent(),
    "vit-l": BeitStudent(patch_px=14, width=1024, depth=24, heads=16),
    "swinv2-b": _SWINV2_B,
    "swinv2-g": _SWINV2_G,
    "toy": BeitStudent(input_px=32, patch_px=8, width=32, depth=2, heads=2),
}
"""Students by the name that the command line takes.

`vit-l` has CLIP's patch of 14. `swinv2-b` is the authors' student for EsViT: windows of 14, which is 7 in the last
stage, a 7x7 map of 1024 values at 224 px. `swinv2-g` has the widths, depths, heads and the extra norm behind every
sixth block of the 3-billion-parameter model (arXiv 2111.09883), whose code was not published; but it is timm's network,
whose position MLP is smaller and not bounded, and whose windows are 7 at 224 px.
"""


def read_student(path: Path | str, text: bytes) -> StudentConfig:
    """Parse what was saved beside a student's weights.

    Raises:
        DamagedError: it is not what was written.
    """
    try:
        student: StudentConfig = _ANY_STUDENT.validate_json(text)
    except ValidationError as error:
        raise DamagedError(f"{path} does not say which student it holds: {first_problem(error)}") from error
    return student


def find_student(name: str) -> StudentConfig:
    """A row of `STUDENTS`, or `timm:NAME`.

    Raises:
        ConfigError: no such row; offers the nearest names.
    """
    if name.startswith("timm:"):
        return TimmStudent(model=name.removeprefix("timm:"))
    return look_up("student", name, STUDENTS)
