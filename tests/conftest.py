"""Fixtures: small image folders, stores that need no teacher, the smoke pipeline."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads would only wait for each other
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.pop("RAY_ADDRESS", None)  # never join somebody's cluster

import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from PIL import Image

from storage.fingerprint import digest_bytes
from storage.folder import create_store, finish_store
from storage.image_index import ImageIndex, ImageList, build_index, save_index
from storage.jpeg import ViewCodec, encode_view
from storage.memory import MemoryStore
from storage.records import BadImage, FeatureRecord, FeatureSpec, ImageKey, StoredViews, StorePlan
from storage.views import CentreCrop, RandomResizedCrop, Renderer
from storage.writer import ShardWriter

settings.register_profile("decant", deadline=None, suppress_health_check=[HealthCheck.too_slow])  # machines are busy
settings.load_profile("decant")

MakeImages = Callable[..., Path]


@pytest.fixture
def make_images(tmp_path: Path) -> MakeImages:
    """Make a folder of class folders with small random pictures; `dark` and `light` can be told apart."""

    def make(name: str = "images", *, classes: tuple[str, ...] = ("dark", "light"), per_class: int = 10) -> Path:
        return draw_images(tmp_path / name, classes, per_class)

    return make


def draw_images(root: Path, classes: tuple[str, ...] = ("dark", "light"), per_class: int = 10) -> Path:
    for number, class_name in enumerate(classes):
        (root / class_name).mkdir(parents=True)
        for image in range(per_class):
            generator = np.random.default_rng([number, image])
            height, width = generator.integers(40, 64, 2)
            pixels = generator.integers(0, 120, (height, width, 3)) + (number % 2) * 120
            Image.fromarray(pixels.astype(np.uint8)).save(root / class_name / f"{image:03d}.png")
    return root


@pytest.fixture
def make_index(make_images: MakeImages, tmp_path: Path) -> Callable[..., tuple[Path, ImageIndex]]:
    """Index a folder of pictures; gives the index file and the index."""

    def make(root: Path | None = None, *, eval_fraction: float = 0.2, **images: object) -> tuple[Path, ImageIndex]:
        index = build_index(
            str(root or make_images(**images)), eval_fraction=eval_fraction, seed=0, cache_dir=tmp_path / "cache"
        )
        path = tmp_path / "data.bin"
        save_index(path, index)
        return path, index

    return make


@pytest.fixture
def image_list() -> Callable[[int], ImageList]:
    """Names without files."""

    def make(count: int) -> ImageList:
        return ImageList(
            location="", classes=("a",), keys=tuple(f"a/{n:04d}.png" for n in range(count)), labels=(0,) * count,
            digests=tuple(digest_bytes(b"%d" % n) for n in range(count)),
        )  # fmt: skip

    return make


@pytest.fixture
def store_plan() -> Callable[..., StorePlan]:
    """A plan for a store of made-up tokens; `view_px` makes it keep rendered views of that size."""

    def make(images: ImageList, *, view_px: int | None = None, **changes: object) -> StorePlan:
        values = {
            "features": FeatureSpec(teacher="made-up", num_prefix_tokens=1, grid_hw=(2, 3), channels=8),
            "whitening": {"kind": "layer_norm", "eps": 1e-5},
            "sampler": CentreCrop().to_json(),
            "renderer": Renderer().describe(),
            "images_fingerprint": images.fingerprint,
            "teacher_fingerprint": "weights",
            "teacher": {},
            "num_images": len(images),
            "views_per_image": 2,
            "images_per_shard": 3,
        } | changes
        if view_px is not None:
            values["stored_views"] = StoredViews(px=view_px, codec=ViewCodec(px=view_px).describe())
        return StorePlan.model_validate(values)

    return make


def make_up_record(plan: StorePlan, key: str, view_index: int, seed: int = 0) -> FeatureRecord:
    """Random tokens, and pixels where the plan stores them, that belong to (key, view index)."""
    generator = np.random.default_rng([seed, view_index, *key.encode()])
    tokens = plan.features.num_tokens
    tokens_TC = generator.normal(size=plan.features.shape_TC).astype(np.float16)
    mean_T = generator.normal(size=tokens).astype(np.float32)
    std_T = generator.uniform(0.5, 2, tokens).astype(np.float32)
    if plan.token_subset is not None:
        kept = plan.token_subset.positions(key, view_index, tokens)
        tokens_TC, mean_T, std_T = tokens_TC[kept], mean_T[kept], std_T[kept]
    view = RandomResizedCrop().view(key, view_index, (50, 60))
    jpeg = None
    if plan.stored_views is not None:
        px = plan.stored_views.px
        jpeg = encode_view(generator.integers(0, 256, (px, px, 3)).astype(np.uint8), plan.stored_views.codec["quality"])
    return FeatureRecord(ImageKey(key), view_index, view, tokens_TC, mean_T, std_T, jpeg)


@pytest.fixture
def made_up_record() -> Callable[..., FeatureRecord]:
    """The record that belongs to (plan, key, view index, seed)."""
    return make_up_record


@pytest.fixture
def fill_shard() -> Callable[..., ShardWriter]:
    """A writer with all records of one shard, not committed."""

    def fill(
        root: Path, plan: StorePlan, images: ImageList, index: int, *, bad: tuple[str, ...] = (), seed: int = 0
    ) -> ShardWriter:
        writer = ShardWriter(root, plan, images, index)
        for key in writer.keys:
            if key in bad:
                writer.mark_bad(key, "made up to be bad")
                continue
            for view in range(plan.views_per_image):
                writer.append(make_up_record(plan, key, view, seed))
        return writer

    return fill


@pytest.fixture
def make_store(tmp_path: Path, image_list, store_plan, fill_shard):  # type: ignore[no-untyped-def]
    """A finished store of made-up tokens: (root, plan, images)."""

    def make(name: str = "store", *, num_images: int = 8, bad: tuple[int, ...] = (), **changes: object):  # type: ignore[no-untyped-def]
        root, images = tmp_path / name, image_list(num_images)
        plan = store_plan(images, **changes)
        create_store(root, plan, images)
        for index in range(plan.num_shards):
            fill_shard(root, plan, images, index, bad=tuple(images.keys[n] for n in bad)).commit()
        finish_store(root)
        return root, plan, images

    return make


@pytest.fixture
def make_memory_store(image_list, store_plan):  # type: ignore[no-untyped-def]
    """The same store in memory, whose plan says nothing of a layout."""

    def make(*, num_images: int = 8, bad: tuple[int, ...] = (), **changes: object) -> MemoryStore:
        images = image_list(num_images)
        plan = store_plan(images, **{**changes, "backend": "memory"})
        records = (
            make_up_record(plan, key, view)
            for number, key in enumerate(images.keys)
            if number not in bad
            for view in range(plan.views_per_image)
        )
        reasons = [BadImage(key=images.keys[number], reason="made up to be bad") for number in bad]
        return MemoryStore(plan, images, records, reasons)

    return make


@pytest.fixture
def toy_store(make_index, tmp_path: Path):  # type: ignore[no-untyped-def]
    """Extract a store with the toy teacher, in this process: (index file, store)."""

    def make(*, views: int = 2, **images: object) -> tuple[Path, Path]:
        from extract.config import ExecutionConfig, ExtractConfig
        from extract.run import run

        data, _ = make_index(**images)
        cfg = ExtractConfig(
            teacher="toy", views=views, records_per_shard=3 * views, run=ExecutionConfig(executor="inline")
        )
        run(cfg, {"data": data}, tmp_path / "store")
        return data, tmp_path / "store"

    return make


@pytest.fixture
def tree_bytes() -> Callable[[Path], dict[str, bytes]]:
    """Every file below a folder with its bytes, leaving out locks and states."""

    def read(root: Path) -> dict[str, bytes]:
        passed_over = {"LOCK", "result.json", "state.json"}
        return {
            str(path.relative_to(root)): path.read_bytes()
            for path in sorted(root.rglob("*"))
            if path.is_file() and path.name not in passed_over
        }

    return read


class Outcome(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    """Standard output, its white space collapsed: tables are padded and folded."""
    err: str


@pytest.fixture
def decant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """Run a command in this process, with `tmp_path` as the current folder."""
    from pipeline import cli, screen

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(screen.console, "width", 500)

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["decant", *map(str, arguments)])
        code = 0
        capsys.readouterr()
        try:
            cli.main()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, " ".join(captured.out.split()), captured.err)

    return run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Images and the work folder of a whole run on them. Not to be written to; see `copy_run`."""
    from pipeline import cli

    folder = tmp_path_factory.mktemp("finished")
    images, work = draw_images(folder / "images"), folder / "runs"
    arguments = ["run", "--preset", "smoke", "--data", str(images), "--work", str(work)]
    cli.cli.main(arguments, standalone_mode=False)
    return images, work


@pytest.fixture
def copy_run(finished_run: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """A finished run of one's own: (images, work folder)."""
    images, work = tmp_path / "images", tmp_path / "runs"
    for source, target in zip(finished_run, (images, work), strict=True):
        shutil.copytree(source, target)
    current = work / "current.json"
    current.write_text(current.read_text().replace(str(finished_run[0]), str(images)))
    return images, work


@pytest.fixture
def fork() -> Callable[[Callable[[], object]], int]:
    """Run a function in a process of its own, which exits with 0 when it returns; gives the process id to wait for."""

    def start(work: Callable[[], object]) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # about threads: those of pytest only wait
            pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    return start


@pytest.fixture
def begin_store(tmp_path: Path, image_list, store_plan):  # type: ignore[no-untyped-def]
    """A store without shards: (root, plan, images)."""

    def make(name: str = "store", *, num_images: int = 8, **changes: object):  # type: ignore[no-untyped-def]
        root, images = tmp_path / name, image_list(num_images)
        plan = store_plan(images, **changes)
        create_store(root, plan, images)
        return root, plan, images

    return make


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A folder in memory, where the system has that: for tests that write and remove thousands of files."""
    memory = Path("/dev/shm")
    place = memory if os.access(memory, os.W_OK | os.X_OK) else None
    with tempfile.TemporaryDirectory(dir=place, prefix="decant-test-") as folder:
        yield Path(folder)
