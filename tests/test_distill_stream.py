"""A batch holds the view that the teacher saw, beside what the store says about it."""

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from numpy.typing import NDArray
from PIL import Image

from distill.config import DistillConfig, DistillRunConfig
from distill.stream import HELD_BATCHES, DistillBatch, DistillStream, pinned_empty
from distill.student_config import BeitStudent
from extract.config import ExecutionConfig, ExtractConfig
from extract.run import run
from storage.errors import DamagedError, InputError
from storage.image_index import ImageIndex, load_index
from storage.reader import open_store
from storage.views import Renderer, View

ToyStore = Callable[..., tuple[Path, Path]]
VIEWS = 3
CFG = DistillConfig(
    student=BeitStudent(input_px=32, patch_px=8, width=32, depth=1, heads=2), epochs=2 * VIEWS, batch_size=5,
    run=DistillRunConfig(device="cpu", threads=1, loaders=2),
)  # fmt: skip


def open_stream(data: Path, store: Path, cfg: DistillConfig = CFG) -> DistillStream:
    return DistillStream([open_store(store)], load_index(data).location, cfg)


def all_batches(stream: DistillStream, start: int = 0) -> list[DistillBatch]:
    """Copies, since a stream uses its memory again."""
    return [
        batch._replace(
            images_BHWC=batch.images_BHWC.clone(),
            stores=tuple(
                part._replace(encoded={name: value.clone() for name, value in part.encoded.items()})
                for part in batch.stores
            ),
        )
        for batch in stream.batches(start)
    ]


def encoded(batch: DistillBatch) -> dict[str, torch.Tensor]:
    """What the only store of a batch says."""
    (part,) = batch.stores
    return part.encoded


def tokens(batch: DistillBatch) -> torch.Tensor:
    return encoded(batch)["tokens"]


def extract(data: Path, out: Path, **settings: object) -> Path:
    inline = ExecutionConfig(executor="inline", device="cpu")
    run(ExtractConfig.model_validate({"teacher": "toy", "views": VIEWS, "run": inline} | settings), {"data": data}, out)
    return out


def assert_equal(one: DistillBatch, other: DistillBatch) -> None:
    assert one.step == other.step
    assert one.keys == other.keys
    assert one.images_BHWC.equal(other.images_BHWC)
    assert encoded(one).keys() == encoded(other).keys()
    for name, part in encoded(one).items():
        assert part.numpy().tobytes() == encoded(other)[name].numpy().tobytes()


@pytest.mark.parametrize("student_px", [32, 64])
def test_images_and_targets_belong_to_one_view(student_px: int, toy_store: ToyStore) -> None:
    """The slow truth: views and tokens through zarr-python, pixels from the file. The student's size may be another."""
    data, store = toy_store(views=VIEWS)
    student = CFG.student.model_copy(update={"input_px": student_px, "patch_px": student_px // 4})
    stream = open_stream(data, store, CFG.model_copy(update={"student": student}))
    arrays, images = zarr.open_group(str(store), mode="r"), load_index(data).split("train")
    tokens_RTC, views_RF = np.asarray(arrays["tokens"][:]), np.asarray(arrays["views"][:])
    seen: Counter[int] = Counter()
    batches = all_batches(stream)
    assert [batch.step for batch in batches] == list(range(16 * CFG.epochs // CFG.batch_size))
    for batch in batches:
        assert batch.images_BHWC.shape == (5, student_px, student_px, 3)
        assert tokens(batch).shape == (5, 17, 24)
        for key, pixels, target in zip(batch.keys, batch.images_BHWC, tokens(batch), strict=True):
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
        run_cfg = DistillRunConfig(loaders=loaders, prefetch=prefetch, image_cache_mb=cache_mb)
        batches = all_batches(open_stream(data, store, CFG.model_copy(update={"run": run_cfg})), start)
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
    store = extract(data, tmp_path / "store", views=2, records_per_shard=6, max_bad_fraction=0.2)
    stream = open_stream(data, store)
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
    with pytest.raises(DamagedError, match=r"record .* is damaged"):
        list(open_stream(data, store).batches(0))


def test_the_images_may_have_moved(toy_store: ToyStore, tmp_path: Path) -> None:
    data, store = toy_store(views=VIEWS)
    before = open_stream(data, store).load(4)
    moved = (tmp_path / "images").rename(tmp_path / "elsewhere")
    assert_equal(before, DistillStream([open_store(store)], str(moved), CFG).load(4))


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loaders", "ahead"), [(3, 4), (6, 6)])
def test_memory_is_used_again_and_a_batch_stays_valid_for_two_steps(
    loaders: int, ahead: int, toy_store: ToyStore
) -> None:
    data, store = toy_store(views=VIEWS)
    cfg = CFG.model_copy(update={"run": DistillRunConfig(device="cpu", loaders=loaders, prefetch=4)})
    stream = open_stream(data, store, cfg)
    addresses: set[tuple[int, ...]] = set()
    before: DistillBatch | None = None
    for batch in stream.batches(0):
        addresses.add((batch.images_BHWC.data_ptr(), tokens(batch).data_ptr()))
        for held in filter(None, (before, batch)):
            assert_equal(held, stream.load(held.step))
        before = batch
    assert len(addresses) == HELD_BATCHES + ahead, "every loader has a batch to make"


def test_memory_for_a_gpu_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    empty, asked = torch.empty, []

    def without_a_gpu(*size: int, pin_memory: bool, **options: Any) -> torch.Tensor:
        asked.append(pin_memory)
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", without_a_gpu)
    array = pinned_empty((3, 5, 7), "<f2")
    assert (array.shape, array.dtype.name, asked) == ((3, 5, 7), "float16", [True])
    assert array.flags.c_contiguous
    assert array.flags.writeable


def test_the_disk_is_told_of_all_records_before_they_are_read(
    toy_store: ToyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a resume in the middle of a pool; and once the first pools are over, block by block."""
    monkeypatch.setattr("distill.order.POOL_IMAGES", 6)
    monkeypatch.setattr("distill.stream.POOL_IMAGES", 6)
    data, store = toy_store(views=VIEWS)
    one_thread = DistillRunConfig(device="cpu", loaders=1)
    stream = open_stream(data, store, CFG.model_copy(update={"run": one_thread, "batch_size": 2}))
    events: list[tuple[str, list[int]]] = []
    read_encoded = stream.readers[0].read_encoded

    def read(records_B: NDArray[np.int64], out: Mapping[str, NDArray[Any]]) -> None:
        events.append(("read", records_B.tolist()))
        read_encoded(records_B, out)

    monkeypatch.setattr(stream.readers[0], "hint", lambda records_B, views: events.append(("hint", records_B.tolist())))
    monkeypatch.setattr(stream.readers[0], "read_encoded", read)
    start = 5
    for _ in stream.batches(start):
        pass
    hinted: Counter[int] = Counter()
    num_read = 0
    for what, records in events:
        for record in records:
            hinted[record] += 1 if what == "hint" else -1
            assert hinted[record] >= 0
        num_read += what == "read"
    assert num_read == stream.num_steps - start
    num_hints = len([what for what, _ in events if what == "hint"])
    assert num_hints == num_read + 6 - 3, "twelve images at once; none that nobody reads"


# ---- stores of other kinds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"layout": "wds"}, {"layout": "zarr", "keep_views": True}])
def test_stored_views_are_taken_instead_of_the_images(
    settings: dict[str, object], make_index: Callable[..., tuple[Path, ImageIndex]], tmp_path: Path
) -> None:
    data, index = make_index()
    store = extract(data, tmp_path / "store", **settings)
    images = index.split("train")
    rendered = open_stream(data, extract(data, tmp_path / "other"))
    stream = DistillStream([open_store(store)], str(tmp_path / "nowhere"), CFG)
    for step in range(10):
        one, other = stream.load(step), rendered.load(step)
        assert one.keys == other.keys, "whatever a store holds, its order is the same"
        error = np.abs(one.images_BHWC.numpy().astype(int) - other.images_BHWC.numpy())
        assert 0 < error.mean() < 20, "the same view, through JPEG: random pixels suffer most"
    larger = CFG.model_copy(update={"student": CFG.student.model_copy(update={"input_px": 64, "patch_px": 16})})
    batch = open_stream(data, store, larger).load(0)
    assert batch.images_BHWC.shape == (5, 64, 64, 3), "of another size: rendered from the images"
    assert len(images) == 16


def test_a_stored_view_that_is_no_picture_is_damage(
    make_index: Callable[..., tuple[Path, ImageIndex]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, _ = make_index()
    stream = open_stream(data, extract(data, tmp_path / "store", keep_views=True))
    monkeypatch.setattr(stream.readers[0], "read_jpegs", lambda records_B: [b"no picture"] * len(records_B))
    with pytest.raises(DamagedError, match=r"the view of record .* is not a whole JPEG"):
        stream.load(0)


def test_int8_tokens_travel_undecoded(make_index: Callable[..., tuple[Path, ImageIndex]], tmp_path: Path) -> None:
    data, _ = make_index()
    plain = open_stream(data, extract(data, tmp_path / "plain"))
    stream = open_stream(data, extract(data, tmp_path / "int8", encoding={"kind": "int8"}))
    batch = stream.load(3)
    assert {name: part.dtype for name, part in encoded(batch).items()} == {
        "tokens": torch.int8,
        "token_scale": torch.float16,
    }
    decoded_BTC = np.empty((5, 17, 24), np.float16)
    stream.readers[0].plan.encoding.decode({name: part.numpy() for name, part in encoded(batch).items()}, decoded_BTC)
    np.testing.assert_allclose(decoded_BTC, tokens(plain.load(3)).numpy(), atol=0.05)


def test_a_subset_of_tokens_comes_with_its_positions(
    make_index: Callable[..., tuple[Path, ImageIndex]], tmp_path: Path
) -> None:
    data, _ = make_index()
    plain = open_stream(data, extract(data, tmp_path / "plain"))
    assert plain.load(0).stores[0].positions_BS is None
    stream = open_stream(data, extract(data, tmp_path / "few", token_fraction=0.3))
    batch, whole_BTC = stream.load(3), tokens(plain.load(3))
    assert batch.stores[0].positions_BS is not None
    for tokens_TC, all_TC, positions_T in zip(tokens(batch), whole_BTC, batch.stores[0].positions_BS, strict=True):
        assert tokens_TC.equal(all_TC[positions_T])
    assert len({tuple(row) for row in batch.stores[0].positions_BS.tolist()}) > 1
