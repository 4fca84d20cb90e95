"""A batch holds the view that the teacher saw, beside what the store says about it."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr
from PIL import Image

from distill.config import DistillConfig, StudentConfig, TrainRunConfig
from distill.stream import DistillBatch, DistillStream
from extract.config import ExecutionConfig, ExtractConfig
from extract.run import run
from storage.errors import DamagedError, InputError
from storage.image_index import ImageIndex, load_index
from storage.reader import open_store
from storage.views import Renderer, View

ToyStore = Callable[..., tuple[Path, Path]]
VIEWS = 3
CFG = DistillConfig(
    student=StudentConfig(input_px=32, patch_px=8, width=32, depth=1, heads=2), epochs=2 * VIEWS, batch_size=5,
    run=TrainRunConfig(device="cpu", threads=1, loaders=2),
)  # fmt: skip


def open_stream(data: Path, store: Path, cfg: DistillConfig = CFG) -> DistillStream:
    return DistillStream(open_store(store), load_index(data).location, cfg)


def assert_equal(one: DistillBatch, other: DistillBatch) -> None:
    assert one.step == other.step
    assert one.keys == other.keys
    assert one.images_BHWC.equal(other.images_BHWC)
    assert one.targets_BTC.numpy().tobytes() == other.targets_BTC.numpy().tobytes()


@pytest.mark.parametrize("student_px", [32, 64])
def test_images_and_targets_belong_to_one_view(student_px: int, toy_store: ToyStore) -> None:
    """The slow truth: views and tokens through zarr-python, pixels from the file. The student's size may be another."""
    data, store = toy_store(views=VIEWS)
    student = CFG.student.model_copy(update={"input_px": student_px, "patch_px": student_px // 4})
    stream = open_stream(data, store, CFG.model_copy(update={"student": student}))
    arrays, images = zarr.open_group(str(store), mode="r"), load_index(data).split("train")
    tokens_RTC, views_RF = np.asarray(arrays["tokens"][:]), np.asarray(arrays["views"][:])
    seen: Counter[int] = Counter()
    batches = list(stream.batches(0))
    assert [batch.step for batch in batches] == list(range(16 * CFG.epochs // CFG.batch_size))
    for batch in batches:
        assert batch.images_BHWC.shape == (5, student_px, student_px, 3)
        assert batch.targets_BTC.shape == (5, 17, 24)
        for key, pixels, target in zip(batch.keys, batch.images_BHWC, batch.targets_BTC, strict=True):
            first = images.keys.index(key) * VIEWS
            (record,) = (
                number for number in range(first, first + VIEWS) if np.array_equal(tokens_RTC[number], target.numpy())
            )
            top, left, height, width, flip = views_RF[record].tolist()
            view = View(top=top, left=left, height=height, width=width, flip=bool(flip))
            image = np.asarray(Image.open(Path(images.location) / key).convert("RGB"))
            np.testing.assert_array_equal(pixels.numpy(), Renderer().render_view(image, view, student_px))
            seen[record] += 1
    counts = [seen[record] for record in range(16 * VIEWS)]
    assert sum(counts) == 95, "one image of the last epoch does not fill a batch"
    assert set(counts) == {1, 2}, "twice the number of views as epochs: every record comes twice"


def test_threads_memory_and_the_first_step_change_nothing(toy_store: ToyStore) -> None:
    data, store = toy_store(views=VIEWS)
    plain = [open_stream(data, store).load(step) for step in range(19)]
    for loaders, prefetch, cache_mb, start in [(1, 1, 0, 0), (4, 9, 64, 0), (3, 2, 0, 7), (2, 4, 64, 18)]:
        run_cfg = TrainRunConfig(loaders=loaders, prefetch=prefetch, image_cache_mb=cache_mb)
        batches = list(open_stream(data, store, CFG.model_copy(update={"run": run_cfg})).batches(start))
        for one, other in zip(plain[start:], batches, strict=True):
            assert_equal(one, other)


def test_another_seed_is_another_order(toy_store: ToyStore) -> None:
    data, store = toy_store(views=VIEWS)
    one, other = (open_stream(data, store, CFG.model_copy(update={"seed": seed})).load(0) for seed in (0, 1))
    assert one.keys != other.keys


def test_bad_images_never_appear(
    make_images: Callable[..., Path], make_index: Callable[..., tuple[Path, ImageIndex]], tmp_path: Path
) -> None:
    images = make_images("images")
    bad = ["dark/003.png", "light/007.png"]
    for key in bad:
        (images / key).write_bytes(b"no picture")
    data, _ = make_index(images, eval_fraction=0)
    inline = ExecutionConfig(executor="inline", device="cpu")
    cfg = ExtractConfig(teacher="toy", views=2, records_per_shard=6, max_bad_fraction=0.2, run=inline)
    run(cfg, {"data": data}, tmp_path / "store")
    stream = open_stream(data, tmp_path / "store")
    assert len(stream.order) == 18
    seen = Counter(key for batch in stream.batches(0) for key in batch.keys)
    assert set(seen) == set(stream.keys) - set(bad)
    assert set(seen.values()) <= {CFG.epochs - 1, CFG.epochs}


def test_an_image_that_is_gone_or_changed_is_named(toy_store: ToyStore) -> None:
    data, store = toy_store(views=VIEWS)
    images = load_index(data).split("train")
    path = Path(images.location) / images.keys[3]
    whole = path.read_bytes()
    path.unlink()
    with pytest.raises(InputError, match=f"image '{images.keys[3]}' was readable when .* bring it back"):
        list(open_stream(data, store).batches(0))
    path.write_bytes(whole + b"x")
    with pytest.raises(InputError, match=f"image '{images.keys[3]}' of .* has changed"):
        list(open_stream(data, store).batches(0))
    path.write_bytes(whole)
    list(open_stream(data, store).batches(0))


def test_a_damaged_record_ends_the_stream(toy_store: ToyStore) -> None:
    data, store = toy_store(views=VIEWS)
    path = next((store / "tokens").rglob("c/2/0/0"))
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedError, match="does not match its checksum"):
        list(open_stream(data, store).batches(0))


def test_the_images_may_have_moved(toy_store: ToyStore, tmp_path: Path) -> None:
    data, store = toy_store(views=VIEWS)
    before = open_stream(data, store).load(4)
    moved = (tmp_path / "images").rename(tmp_path / "elsewhere")
    assert_equal(before, DistillStream(open_store(store), str(moved), CFG).load(4))
