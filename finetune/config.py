"""Settings of fine-tuning and evaluation. Defaults are the authors' recipe for a ViT-B distilled for 100 epochs."""

from typing import ClassVar, Literal

from pydantic import Field

from distill.config import OptimConfig, TrainRunConfig
from storage.schema import Schema
from storage.views import CentreCrop, RandomResizedCrop, Renderer

Start = Literal["scratch", "distilled"]


class FinetuneConfig(Schema):
    """Train the student with a classification head on the labels, from each start and with each seed."""

    not_identity: ClassVar[frozenset[str]] = frozenset({"run", "student"})

    student: str | None = None
    """Take the student of this folder, which `make import` or a run elsewhere wrote, instead of distilling one."""
    starts: tuple[Start, ...] = Field(default=("scratch", "distilled"), min_length=1)
    """`scratch`: random weights; `distilled`: the student of the distillation stage. The same recipe for both."""
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    epochs: int = Field(default=100, ge=1)
    batch_size: int = Field(default=256, ge=1)
    optim: OptimConfig = OptimConfig(
        base_lr=1.25e-3, warmup_lr=2.5e-7, min_lr=2.5e-7, warmup_epochs=20.0, clip_grad=5.0
    )  # fmt: skip
    layer_decay: float = Field(default=0.65, gt=0, le=1)
    """Each block's learning rate is this share of the next one's."""
    drop_path: float = Field(default=0.1, ge=0, lt=1)
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    sampler: RandomResizedCrop = RandomResizedCrop(min_scale=0.08)
    """The training crops; epoch e draws view e of each image."""
    vertical_flip: bool = False
    """Also flip upside down, with probability 1/2, where up and down mean nothing."""
    eval_sampler: CentreCrop = CentreCrop(fraction=0.875)
    renderer: Renderer = Renderer(kernel="bicubic")
    run: TrainRunConfig = TrainRunConfig()


class EvaluateConfig(Schema):
    """Probe frozen features, and compare student and teacher on images that neither distillation nor probe saw."""

    not_identity: ClassVar[frozenset[str]] = frozenset({"run"})

    penalties: tuple[float, ...] = Field(default=(1e-3, 1e-2, 1e-1), min_length=1)
    """L2 penalties of the linear probe; the best on a fifth of the training images is taken."""
    iterations: int = Field(default=200, ge=1)
    """Of L-BFGS."""
    pictures: int = Field(default=6, ge=0)
    """Evaluation images whose tokens are kept for the report."""
    seed: int = 0
    run: TrainRunConfig = TrainRunConfig()
