"""Settings of the distillation stage. Defaults are the paper's 100-epoch CLIP ViT-B recipe (authors' code)."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from storage.errors import look_up
from storage.schema import Schema


class StudentConfig(Schema):
    """A BEiT-style ViT: no absolute positions, one relative-position bias shared by all blocks, LayerScale."""

    input_px: int = Field(default=224, ge=16)
    """Side of the student's input; it may differ from the teacher's as long as the token grids agree."""
    patch_px: int = Field(default=16, ge=2)
    width: int = Field(default=768, ge=16)
    depth: int = Field(default=12, ge=1)
    heads: int = Field(default=12, ge=1)
    mlp_ratio: float = Field(default=4.0, gt=0)
    layer_scale: float = Field(default=0.1, ge=0)
    """Initial value of LayerScale on both branches."""

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


STUDENTS: dict[str, StudentConfig] = {
    "vit-ti": StudentConfig(width=192, heads=3),
    "vit-s": StudentConfig(width=384, heads=6),
    "vit-b": StudentConfig(),
    "vit-l": StudentConfig(patch_px=14, width=1024, depth=24, heads=16),
    "toy": StudentConfig(input_px=32, patch_px=8, width=32, depth=2, heads=2),
}
"""Students by the name that the command line takes; ViT-L has CLIP's patch of 14."""


def find_student(name: str) -> StudentConfig:
    """Look a student up.

    Raises:
        ConfigError: no such row; offers the nearest names.
    """
    return look_up("student", name, STUDENTS)


class TrainRunConfig(Schema):
    """How to train. Nothing here can change what is learnt beyond rounding."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = Field(default=0, ge=0)
    """CPU threads of the model; 0 is one a core."""
    loaders: int = Field(default=2, ge=1)
    """Threads that decode images and read targets."""
    prefetch: int = Field(default=4, ge=1)
    """Batches made ahead; at least one for each loader."""
    image_cache_mb: int = Field(default=1024, ge=0)
    """Decoded images are kept in memory until they fill this; 0 keeps none."""
    checkpoint_seconds: float = Field(default=300.0, gt=0)

    @property
    def batches_ahead(self) -> int:
        """Each loader makes a whole batch, so with fewer of them some would only wait."""
        return max(self.prefetch, self.loaders)


class OptimConfig(Schema):
    """AdamW with per-step cosine and a warm-up prefix."""

    base_lr: float = Field(default=3e-4, gt=0)
    """For 512 images a step; scaled linearly with the batch."""
    min_lr: float = Field(default=2e-6, ge=0)
    """Floor of the cosine, scaled like `base_lr`."""
    warmup_epochs: float = Field(default=10.0, ge=0)
    weight_decay: float = Field(default=0.05, ge=0)
    clip_grad: float = Field(default=3.0, gt=0)


class DistillConfig(Schema):
    """A student from a store."""

    not_identity: ClassVar[frozenset[str]] = frozenset({"run", "store"})

    store: str | None = None
    """Train from this finished store, made or converted elsewhere, instead of extracting one: a path, or a URL such as
    `s3://bucket/store`."""
    student: StudentConfig = StudentConfig()
    epochs: int = Field(default=100, ge=1)
    """Passes over the images; epoch e sees one of the K stored views of each."""
    batch_size: int = Field(default=256, ge=1)
    optim: OptimConfig = OptimConfig()
    drop_path: float = Field(default=0.1, ge=0, lt=1)
    """Of the student; the teacher had none (the paper's asymmetric drop path)."""
    beta: float = Field(default=2.0, gt=0)
    """Where smooth L1 turns from quadratic to linear."""
    seed: int = 0
    run: TrainRunConfig = TrainRunConfig()
