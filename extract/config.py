"""Settings of the extraction stage."""

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator

from extract.spec import Precision, Tap
from storage.encodings import AnyEncoding, Fp16
from storage.schema import Schema
from storage.token_subset import TokenSubset
from storage.views import CentreCrop, RandomResizedCrop, Renderer
from storage.whitening import AnyWhitening, LayerNorm


class ExecutionConfig(Schema):
    """How to work. Nothing here can change what is in a store beyond the last bit of rounding."""

    executor: Literal["ray", "process", "inline"] = "ray"
    """`ray`: actors on a local Ray that is started and stopped here, or on `ray_address`; `process`: processes of this
    machine; `inline`: in this process."""
    workers: int = Field(default=0, ge=0)
    """Processes that run a teacher; 0 is one a GPU, or one a CPU core (at most 8)."""
    gpus_per_worker: float = Field(default=1.0, gt=0)
    """Below 1, several workers share a GPU: for small teachers. Above 1, a whole number: a teacher over several."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of a worker."""
    render_threads: int = Field(default=0, ge=0)
    """Threads of a worker that read and render images; 0: one beside a CPU, a GPU's share of the cores beside a GPU."""
    batch_size: int = Field(default=0, ge=0)
    """Views in one forward pass; 0: as many as the free memory holds well."""
    compile: bool = False
    """Let torch.compile make the teacher's forward pass: minutes at the start, then faster on a GPU."""
    channels_last: bool = True
    """Memory format of images and convolutions."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    ray_address: str | None = None
    """Join this cluster instead of starting a local Ray."""
    max_attempts: int = Field(default=3, ge=1)
    """Times that a shard is tried before it is given up."""
    job_seconds: float = Field(default=0.0, ge=0)
    """A shard that takes longer is taken for hung, and its worker ended; 0: ten minutes, or five times what the slowest
    take, and an hour while that is not known."""
    recycle_after: int = Field(default=1000, ge=0)
    """Shards after which a worker's process is replaced by a new one, so that leaks stay small; 0 for never."""

    @field_validator("gpus_per_worker")
    @classmethod
    def _whole_above_one(cls, value: float) -> float:
        if value > 1 and value != int(value):
            raise ValueError("above 1 it is a whole number of GPUs")
        return value

    audit_records: int = Field(default=8, ge=0)
    """Random records that are made again at the end, and compared with what is stored; 0 for none."""

    def cpu_workers(self, cores: int) -> int:
        """Workers on so many cores, where there is no GPU."""
        return self.workers or max(1, min(8, cores // self.threads))


def sharers_of_a_gpu(run: ExecutionConfig) -> int:
    """Workers that fit onto one GPU; a third of one is 0.33, or 0.333."""
    return max(1, int(1 / run.gpus_per_worker + 1e-9))


class ExtractConfig(Schema):
    """Which teacher looks at which views."""

    not_identity: ClassVar[frozenset[str]] = frozenset({"weights", "whitening_from", "max_bad_fraction", "run"})

    teacher: str = "clip-b"
    """A name of `make teachers`, `timm:NAME`, `open_clip:NAME/TAG`, or a file: `FILE.py`, `FILE.py:function`."""
    weights: Literal["random"] | Path | None = None
    """A local weights file instead of the teacher's own source, or `random`: for what a teacher costs."""
    input_px: int | None = Field(default=None, ge=16)
    """Side of the teacher's input; None is the teacher's own."""
    tap: Tap | None = None
    """Which tokens: `final_norm`, `block` (without the norm) or `projected` (CLIP); None is the teacher's own."""
    block: int | None = None
    """An earlier block (of hierarchical networks: stage), counted from 0, or from the end if negative."""
    precision: Literal["auto", Precision] = "auto"
    """Of the teacher's matrix products; `auto`: float16 on a GPU, float32 on a CPU. Whitening is always in float32."""
    split: Literal["train", "eval"] = "train"
    views: int = Field(default=4, ge=1)
    """Stored views an image."""
    sampler: RandomResizedCrop | CentreCrop = Field(default=RandomResizedCrop(), discriminator="kind")
    renderer: Renderer = Renderer()
    layout: Literal["zarr", "wds"] = "zarr"
    """`zarr`: arrays of tokens, images are read from their source; `wds`: tars that hold the rendered views too."""
    whitening: AnyWhitening = LayerNorm()
    """What makes teachers of different magnitude comparable targets: layer_norm (the paper's, token by token), mean_std
    and pca (fitted on `fit_views`), or none."""
    whitening_from: str | None = None
    """A finished store, a path or URL, whose fitted whitening is taken instead of a fit: tokens of stores can be
    compared only where they were whitened alike."""
    encoding: AnyEncoding = Fp16()
    """How tokens are stored: fp16 exactly, int8 in half the bytes, bit_round and zstd for archives."""
    token_fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of each view's tokens that is kept, drawn at random; below 1 for stores of very many views."""
    keep_views: bool = False
    """Keep the rendered views as JPEG, which the teacher then looks at; tars always do. They are several times cheaper
    to read than the images."""
    view_quality: int = Field(default=95, ge=50, le=100)
    """Of these JPEGs."""
    fit_views: int = Field(default=256, ge=1)
    """Views that whitening (mean_std, pca) and the int8 encoding's channel scales are fitted on."""
    records_per_shard: int = Field(default=512, ge=1)
    """Views in one shard, the unit of work and of commit; rounded down to whole images."""
    max_bad_fraction: float = Field(default=0.001, ge=0, le=1)
    """Share of images that may be unusable before the run stops; one is always forgiven."""
    run: ExecutionConfig = ExecutionConfig()

    @property
    def keeps_views(self) -> bool:
        return self.keep_views or self.layout == "wds"

    @property
    def token_subset(self) -> TokenSubset | None:
        """Drawn with the seed of the views."""
        seed = self.sampler.seed if isinstance(self.sampler, RandomResizedCrop) else 0
        return TokenSubset.of(self.token_fraction, seed)

    @property
    def images_per_shard(self) -> int:
        return max(1, self.records_per_shard // self.views)

    def stored_exactly(self) -> Self:
        """The same teacher on the same views, in the plainest store: every token as float16, and no pixels."""
        plain = {"layout": "zarr", "encoding": Fp16(), "token_fraction": 1.0, "keep_views": False}
        return self.model_copy(update=plain)
