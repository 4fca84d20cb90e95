"""Extraction of a ViT-S/16's tokens, from files to committed shards, against the bare forward pass of the batches."""

import itertools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from extract.backends import load_teacher
from extract.config import ExecutionConfig, ExtractConfig
from extract.extraction import write_extraction
from extract.jobs import Job
from extract.plan import build_plan
from extract.resolve import resolve_teacher
from extract.worker import Worker
from storage.decode import decode_image
from storage.folder import create_store
from storage.image_index import build_index, load_index
from storage.reader import open_store
from storage.views import RandomResizedCrop
from tests.bench.bench_pixels import HEIGHT, NUM_PHOTOGRAPHS, WIDTH, photographs
from tests.bench.results import Section
from tests.bench.timing import Contender, race, speed_rows, wall_seconds

BATCH, BATCHES_A_SHARD, ROUNDS, AIM = 16, 3, 4, 0.9
SHARD = BATCH * BATCHES_A_SHARD
LAYOUTS = {"zarr": "images to Zarr shards", "wds": "images to tars, with views as JPEG"}


def settings(layout: str = "zarr", **changes: object) -> ExtractConfig:
    """A ViT-S/16 with random weights, which costs what a trained one does."""
    return ExtractConfig(
        teacher="dino-s", weights="random", views=1, layout=layout, records_per_shard=SHARD,
        sampler=RandomResizedCrop(min_scale=0.08),
        run=ExecutionConfig(executor="inline", threads=cores(), batch_size=BATCH, device="cpu"),
    ).model_copy(update=changes)  # fmt: skip


def cores() -> int:
    return len(os.sched_getaffinity(0))


def measure(folder: Path) -> Section:
    """One section."""
    data = write_photographs(folder, SHARD * (ROUNDS + 1))
    torch.set_num_threads(cores())
    contenders = [Contender(f"bare forward pass of the same batches ({BATCH})", "limit", bare_forward())]
    contenders += [
        Contender(f"this store: {name}", "ours", next_shards(folder, data, layout), target=AIM)
        for layout, name in LAYOUTS.items()
    ]
    contenders.append(
        Contender("plain script: Pillow, torchvision, forward, one .npy an image", "peer", plain_script(folder))
    )
    seconds = race(contenders, rounds=ROUNDS, clock=wall_seconds)
    check_tokens(folder / "zarr", folder / "images")
    torch.set_num_threads(1)
    rows = speed_rows(contenders, seconds, gigabytes=SHARD, unit="images/s")
    method = (
        f"{SHARD} photographs of {WIDTH} x {HEIGHT} (95 kB), ViT-S/16 at 224 px in float32, batches of {BATCH}, "
        f"{cores()} threads: read, digest, decode, crop, forward, whiten, write, fsync, commit; wall seconds, best of "
        f"{ROUNDS} rounds that take turns. The plain script reads, decodes and crops in the process that runs the "
        "network, with torchvision's transforms, and neither syncs nor checks anything"
    )
    return Section("Extraction", method, rows)


def write_photographs(folder: Path, count: int) -> Path:
    """So many, links to the same few files, of one class; returns the index file."""
    place = folder / "images" / "all"
    place.mkdir(parents=True)
    files = photographs()
    for number in range(count):
        path = place / f"{number:05d}.jpg"
        if number < NUM_PHOTOGRAPHS:
            path.write_bytes(files[number])
        else:
            os.link(place / f"{number % NUM_PHOTOGRAPHS:05d}.jpg", path)
    data = folder / "images.bin"
    data.write_bytes(build_index(str(folder / "images"), eval_fraction=0, seed=0, cache_dir=folder).to_file())
    return data


def bare_forward() -> Callable[[], None]:
    """The network alone, on images that are ready."""
    teacher = load_teacher(resolve_teacher(settings()), weights="random", device="cpu")
    images_BCHW = torch.randn(BATCH, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    module = teacher.module

    @torch.inference_mode()
    def run() -> None:
        for _ in range(BATCHES_A_SHARD):
            module.forward_features(images_BCHW)  # type: ignore[operator]

    return run


def next_shards(folder: Path, data: Path, layout: str) -> Callable[[], None]:
    """Each call extracts and commits one more shard of a store."""
    cfg, root = settings(layout), folder / layout
    images = load_index(data).split("train")
    planned = build_plan(cfg, images, root)
    create_store(root, planned.plan, images, planned.statistics)
    write_extraction(root, cfg, images)
    worker, shards = Worker([root.absolute()], cfg.run), itertools.count()

    def run() -> None:
        [entry] = worker(Job(next(shards))).entries
        assert entry.num_records == SHARD

    return run


def check_tokens(root: Path, images_folder: Path) -> None:
    """The first record is what the teacher says of that view of that file."""
    record = next(iter(open_store(root, allow_unfinished=True).iter_shard(0)))
    image_HWC = decode_image((images_folder / record.key).read_bytes())
    pixels_HWC = settings().renderer.render_view(image_HWC, record.view, 224)
    teacher = load_teacher(resolve_teacher(settings()), weights="random", device="cpu")
    tokens_TC = teacher(torch.from_numpy(pixels_HWC)[None])[0]
    expected = torch.nn.functional.layer_norm(tokens_TC, tokens_TC.shape[-1:]).half().numpy()
    np.testing.assert_allclose(record.tokens_TC.astype(np.float32), expected.astype(np.float32), atol=4e-3)


def plain_script(folder: Path) -> Callable[[], None]:
    """What one writes first."""
    from PIL import Image
    from torchvision.transforms import v2

    spec = resolve_teacher(settings())
    module = load_teacher(spec, weights="random", device="cpu").module
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(224, scale=(0.08, 1)), v2.RandomHorizontalFlip(), v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True), v2.Normalize(spec.mean, spec.std),
        ]
    )  # fmt: skip
    paths = sorted((folder / "images" / "all").glob("*.jpg"))[:SHARD]
    (folder / "npy").mkdir()

    @torch.inference_mode()
    def run() -> None:
        for first in range(0, SHARD, BATCH):
            batch = paths[first : first + BATCH]
            images = torch.stack([transform(Image.open(path).convert("RGB")) for path in batch])
            tokens = module.forward_features(images)  # type: ignore[operator]
            white = torch.nn.functional.layer_norm(tokens, tokens.shape[-1:]).half().numpy()
            for path, tokens_TC in zip(batch, white, strict=True):
                np.save(folder / "npy" / f"{path.stem}.npy", tokens_TC)

    return run
