"""Settings of the distillation stage. Defaults are the paper's 100-epoch CLIP ViT-B recipe (authors' code)."""

from typing import Any, ClassVar, Literal

from pydantic import Field

from distill.student_config import AnyStudent, BeitStudent
from storage.schema import Schema

Tracker = Literal["tensorboard", "wandb", "trackio"]


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


class DistillRunConfig(TrainRunConfig):
    """How to distil: in which precision, on how many devices, and what is told to whom. A network with BatchNorm learns
    a little otherwise in other parts: it normalises each by itself."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products (torch's autocast); `auto`: bfloat16 on a GPU that has it, else float32."""
    compile: bool | None = None
    """Let torch.compile make the training step: minutes at the start, then faster; None: on a GPU."""
    deterministic: bool = True
    """Ask torch for algorithms that give the same bits each time, so that a resumed run ends as an undisturbed one; an
    error where it has none."""
    gpus: int = Field(default=1, ge=1)
    """Processes on this machine, one a GPU (or, without GPUs, on the CPU)."""
    launcher: Literal["torchrun", "ray"] = "torchrun"
    """Who starts these processes, if there are several."""
    ray_address: str | None = None
    """With `ray`: the cluster to join instead of starting a local Ray; `gpus` are then of the whole cluster."""
    nodes: int = Field(default=1, ge=1)
    """With `torchrun`: machines, each with `gpus` processes."""
    rendezvous: str | None = None
    """With `nodes`: HOST:PORT of the first machine."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """`ddp`: each device holds the whole student; `fsdp`: parameters, gradients and optimiser are spread over them."""
    accumulate: int = Field(default=1, ge=1)
    """Parts that a device's share of a batch is computed in, one after the other: less memory, the same step."""
    checkpoint_activations: bool = False
    """Compute the blocks' activations again in the backward pass instead of keeping them."""
    trackers: tuple[Tracker, ...] = ("tensorboard",)
    """Where curves are shown, beside metrics.jsonl."""

    @property
    def processes(self) -> int:
        """In all."""
        return self.gpus * (self.nodes if self.launcher == "torchrun" else 1)


class OptimConfig(Schema):
    """AdamW with per-step cosine and a warm-up prefix."""

    base_lr: float = Field(default=3e-4, gt=0)
    """For 512 images a step; scaled linearly with the batch."""
    warmup_lr: float = Field(default=5e-7, ge=0)
    """Where the warm-up begins, scaled like `base_lr`."""
    min_lr: float = Field(default=5e-6, ge=0)
    """Floor of the cosine, scaled like `base_lr`."""
    warmup_epochs: float = Field(default=10.0, ge=0)
    weight_decay: float = Field(default=0.05, ge=0)
    clip_grad: float = Field(default=3.0, gt=0)


class OtherStore(Schema):
    """A further teacher's store with the same views of the same images; the student gets a projector for it."""

    store: str
    """A path, or a URL."""
    weight: float = Field(default=1.0, gt=0)
    """Of its loss; the first store's is 1, and the sum is divided by the sum of all."""


class DistillConfig(Schema):
    """A student from a store."""

    not_identity: ClassVar[frozenset[str]] = frozenset({"run", "store"})

    store: str | None = None
    """Train from this finished store, made or converted elsewhere, instead of extracting one: a path, or a URL such as
    `s3://bucket/store`."""
    also: tuple[OtherStore, ...] = ()
    """Further teachers' stores to learn from at the same time."""
    online: bool = False
    """No store: run the teacher in every step, on the views that a store would hold. The control for what a store
    costs and saves."""
    student: AnyStudent = BeitStudent()
    grid: Literal["same", "resample"] = "same"
    """What to do about a student whose token grid is not the teacher's: refuse it, or resample its predictions."""
    target: Literal["map", "cls", "pooled"] = "map"
    """What is learnt: every token of the map (the paper's), the CLS token alone, or the mean of the map's tokens."""
    whiten: bool = True
    """False: the targets are the teacher's own tokens, the whitening of the store undone."""
    loss: Literal["smooth_l1", "cosine", "mse"] = "smooth_l1"
    beta: float = Field(default=2.0, gt=0)
    """Where smooth L1 turns from quadratic to linear."""
    cls_weight: float = Field(default=1.0, ge=0)
    """Weight of the CLS token's loss; that of each other token is 1 (the paper's code: the same for all)."""
    epochs: int = Field(default=100, ge=1)
    """Passes over the images; epoch e sees one of the K stored views of each."""
    batch_size: int = Field(default=256, ge=1)
    """Images a step, over all devices."""
    optim: OptimConfig = OptimConfig()
    drop_path: float = Field(default=0.1, ge=0, lt=1)
    """Of the student; the teacher had none (the paper's asymmetric drop path)."""
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    """Above 0, the weights that are saved are a running mean over the steps with this decay (the paper: none)."""
    seed: int = 0
    run: DistillRunConfig = DistillRunConfig()

    def identity(self) -> dict[str, Any]:
        """Other stores are known by their content, not by where they lie."""
        return super().identity() | {"also": [other.weight for other in self.also]}
