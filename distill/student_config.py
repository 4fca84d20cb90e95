"""Which network a student is. Imports no deep-learning library."""

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, JsonValue, Tag, model_validator

from storage.errors import look_up
from storage.schema import Schema

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

    @property
    def label(self) -> str:
        """As it can be part of a folder's name."""
        return self.model


def _kind(values: Any) -> str:
    """Students that were saved before there were others are BEiTs."""
    found = values.get("kind", "beit") if isinstance(values, dict) else getattr(values, "kind", "beit")
    return str(found)


StudentConfig = BeitStudent | TimmStudent
AnyStudent = Annotated[Annotated[BeitStudent, Tag("beit")] | Annotated[TimmStudent, Tag("timm")], Discriminator(_kind)]

STUDENTS: dict[str, StudentConfig] = {
    "vit-ti": BeitStudent(width=192, heads=3),
    "vit-s": BeitStudent(width=384, heads=6),
    "vit-b": BeitStudent(),
    "vit-l": BeitStudent(patch_px=14, width=1024, depth=24, heads=16),
    "toy": BeitStudent(input_px=32, patch_px=8, width=32, depth=2, heads=2),
}
"""Students by the name that the command line takes; ViT-L has CLIP's patch of 14."""


def find_student(name: str) -> StudentConfig:
    """A row of `STUDENTS`, or `timm:NAME`.

    Raises:
        ConfigError: no such row; offers the nearest names.
    """
    if name.startswith("timm:"):
        return TimmStudent(model=name.removeprefix("timm:"))
    return look_up("student", name, STUDENTS)
