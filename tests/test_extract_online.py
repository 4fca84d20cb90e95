"""A teacher in the training loop gives what a store with the same settings holds."""

import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from extract.config import ExecutionConfig, ExtractConfig
from extract.online import OnlineTeacher, open_live
from extract.run import run
from storage.decode import decode_image, read_size
from storage.errors import BadImageError, BadTokensError, ConfigError, InputError
from storage.image_index import ImageList, load_index
from storage.reader import open_store
from storage.store import FeatureReader
from storage.views import CentreCrop, RandomResizedCrop, Renderer
from storage.whitening import LayerNorm, MeanStd, NoWhitening, Pca, Whitening
from tests.fixtures.pictures import RGB, encoded, photograph

CFG = ExtractConfig(
    teacher="toy", views=3, records_per_shard=9,
    run=ExecutionConfig(executor="inline", batch_size=4, device="cpu", audit_records=0),
)  # fmt: skip
CPU = torch.device("cpu")
Pair = tuple[OnlineTeacher, FeatureReader]
MakePair = Callable[..., Pair]


@pytest.fixture
def pair(make_index: Callable[..., tuple[Path, object]], tmp_path: Path) -> MakePair:
    """A teacher at work, and the store that it makes, of 8 images."""
    data, _ = make_index(per_class=5)

    def make(**changes: Any) -> Pair:
        cfg = CFG.model_copy(update=changes)
        run(cfg, {"data": data}, tmp_path / "store")
        return open_live(cfg.to_json(), load_index(data).split("train"), CPU), open_store(tmp_path / "store")

    return make


def ask(live: OnlineTeacher, records_B: np.ndarray) -> Any:
    """What the teacher says of records, as the trainer asks it."""
    fields = live.reader.new_batch(len(records_B))
    live.reader.read_encoded(records_B, fields)
    return live({name: torch.from_numpy(array) for name, array in fields.items()})


@pytest.mark.parametrize("whitening", [LayerNorm(), MeanStd(), Pca(), NoWhitening()], ids=lambda w: w.kind)
def test_the_teacher_says_what_its_store_holds(pair: MakePair, whitening: Whitening) -> None:
    live, store = pair(whitening=whitening)
    assert live.reader.plan == store.plan, "what was learnt of the sample included"
    assert live.reader.manifest.fingerprint == store.manifest.fingerprint
    np.testing.assert_array_equal(live.reader.statistics, store.statistics)
    records_B = np.random.default_rng(0).permutation(store.plan.num_records)[:11]
    tokens_BTC, mean_BT, std_BT = ask(live, records_B)
    stored_BTC = np.empty((11, *store.plan.shape_TC), np.float16)
    store.read_batch(records_B, stored_BTC)
    assert tokens_BTC.dtype == torch.float16
    # batches of other sizes may round the last bit of the teacher's sums otherwise
    np.testing.assert_allclose(tokens_BTC.float(), stored_BTC.astype(np.float32), rtol=2**-10, atol=2e-4)
    for found, name in ((mean_BT, "token_mean"), (std_BT, "token_std")):
        np.testing.assert_allclose(found, store.rows(name, records_B), rtol=1e-5, atol=1e-5)


def test_a_teacher_without_prefix_tokens(pair: MakePair) -> None:
    live, store = pair(teacher="efficientnet-lite0", input_px=64, views=1)
    assert (live.reader.plan, store.plan.features.num_prefix_tokens) == (store.plan, 0)
    stored_BTC = np.empty((8, *store.plan.shape_TC), np.float16)
    store.read_batch(np.arange(8), stored_BTC)
    np.testing.assert_allclose(
        ask(live, np.arange(8)).tokens_BTC.float(), stored_BTC.astype(np.float32), rtol=2**-9, atol=2e-3
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"sampler": RandomResizedCrop(min_scale=0.08, seed=4)},
        {"sampler": CentreCrop(), "renderer": Renderer(kernel="bicubic")},
    ],
)
def test_views_are_those_of_the_store(pair: MakePair, changes: dict[str, Any]) -> None:
    live, store = pair(**changes)
    everything = np.arange(store.plan.num_records)
    np.testing.assert_array_equal(live.reader.usable_images(), store.usable_images())
    assert live.reader.images == store.images.at(live.reader.images.location, live.reader.images.cache_dir)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda record: live.reader.views(np.array([record]))[0], everything.tolist() * 3))
    assert found == store.views(everything) * 3
    assert live.reader.rows("views", everything[:0]).shape == (0, 5)


@pytest.mark.parametrize(
    "changes", [{"layout": "wds"}, {"keep_views": True, "view_quality": 60}, {"token_fraction": 0.5}]
)
def test_tokens_are_whole_and_pixels_plain_whatever_a_store_would_keep(pair: MakePair, changes: dict[str, Any]) -> None:
    live, store = pair(**changes)
    plan = live.reader.plan
    assert (plan.backend, plan.encoding.kind, plan.token_subset, plan.stored_views) == ("zarr", "fp16", None, None)
    assert plan.features == store.plan.features
    assert live.reader.views(np.arange(9)) == store.views(np.arange(9))
    assert ask(live, np.arange(2)).tokens_BTC.shape == (2, *plan.features.shape_TC)
    with pytest.raises(InputError, match="keeps no rendered views"):
        live.reader.read_jpegs(np.arange(2))


def test_pixels_that_the_student_sees_too_are_not_rendered_twice(
    pair: MakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    live, _ = pair()
    records_B = np.array([5, 2])
    fields = live.reader.new_batch(2)
    assert {name: (array.shape, array.dtype) for name, array in fields.items()} == {
        "pixels": ((2, 32, 32, 3), np.uint8)
    }
    live.reader.read_encoded(records_B, fields)
    apart = live({"pixels": torch.from_numpy(fields["pixels"])})
    live.reader.shares_pixels = True
    monkeypatch.setattr(ImageList, "read_image", lambda *_: pytest.fail("read"))
    nothing = live.reader.new_batch(2)
    assert nothing == {}
    live.reader.read_encoded(records_B, nothing)
    shared = live({"pixels": torch.from_numpy(fields["pixels"])})
    assert all(torch.equal(one, other) for one, other in zip(apart, shared, strict=True))


def test_the_students_precision_and_gradients_do_not_reach_the_teacher(pair: MakePair) -> None:
    live, _ = pair(whitening=MeanStd())
    plain = ask(live, np.arange(4)).tokens_BTC
    with torch.autocast("cpu", torch.bfloat16):
        within = ask(live, np.arange(4)).tokens_BTC
    assert torch.equal(plain, within)
    assert not plain.requires_grad
    assert not plain.is_inference()
    student = torch.zeros_like(plain, dtype=torch.float32, requires_grad=True)
    F.smooth_l1_loss(student, plain.float()).backward()
    assert student.grad is not None and bool(student.grad.any())
    assert not live.teacher.module.training
    assert not any(parameter.requires_grad for parameter in live.teacher.module.parameters())


def test_the_reader_travels_without_its_teacher(pair: MakePair) -> None:
    live, _ = pair()
    copy = pickle.loads(pickle.dumps(live.reader))
    assert copy.views(np.arange(4)) == live.reader.views(np.arange(4))


def test_a_whitening_is_borrowed(pair: MakePair, tmp_path: Path) -> None:
    own, store = pair(whitening=Pca(), fit_views=16)
    tmp_path.joinpath("store").rename(tmp_path / "lender")
    settings = CFG.model_copy(update={"whitening": Pca(), "whitening_from": str(tmp_path / "lender")})
    live = open_live(settings.to_json(), own.reader.images, CPU)
    assert live.reader.plan.whitening == store.plan.whitening
    other = settings.model_copy(update={"whitening": MeanStd()})
    with pytest.raises(ConfigError, match="give WHITENING=pca"):
        open_live(other.to_json(), own.reader.images, CPU)


# ---- what cannot be used ---------------------------------------------------------------------------------------------


def test_an_image_that_cannot_be_used_stops_the_run_and_is_named(
    make_index: Callable[..., tuple[Path, Any]], make_images: Callable[..., Path]
) -> None:
    root = make_images(per_class=4)
    (root / "dark" / "000.png").write_bytes(b"no picture")
    whole = encoded(photograph(40, 50), "PNG")
    (root / "dark" / "001.png").write_bytes(whole[: len(whole) // 2])
    _, index = make_index(root, eval_fraction=0.0)
    live = open_live(CFG.to_json(), index.split("train"), CPU)
    assert len(live.reader.usable_images()) == 8
    for ask_for in (live.reader.views, lambda records: ask(live, records)):
        with pytest.raises(InputError, match=r"'dark/000\.png' of .* cannot be used \(not an image of a known kind\)"):
            ask_for(np.array([1]))
    with pytest.raises(InputError, match=r"leave it out: --set 'data\.skip=\[\"dark/001\.png\"\]'"):
        ask(live, np.array([3]))
    (root / "light" / "000.png").write_bytes(whole)
    with pytest.raises(InputError, match="has changed since it was listed"):
        ask(live, np.array([12]))
    for records in ([-1], [24]):
        with pytest.raises(IndexError):
            live.reader.views(np.array(records))


def test_values_that_are_not_finite_are_refused(pair: MakePair, monkeypatch: pytest.MonkeyPatch) -> None:
    live, _ = pair()
    broken = torch.full((2, *live.reader.plan.features.shape_TC), 1.0)
    broken[1, 3, 0] = torch.nan
    monkeypatch.setattr(type(live.teacher), "__call__", lambda *_: broken)
    with pytest.raises(BadTokensError, match=r"NaN, .* for 1 of 2 images of a batch \(number 1 of the batch\).*'toy'"):
        ask(live, np.arange(2))


def test_no_images_and_settings_of_another_kind_are_refused(
    make_index: Callable[..., tuple[Path, Any]],
) -> None:
    _, index = make_index(per_class=2, eval_fraction=0.0)
    with pytest.raises(InputError, match="no image to train on"):
        open_live(CFG.to_json(), index.split("eval"), CPU)
    with pytest.raises(ConfigError, match=r"extract: views"):
        open_live(CFG.to_json() | {"views": 0}, index.split("train"), CPU)


# ---- the size in a header --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "image", "options"),
    [
        ("JPEG", RGB, {}),
        ("JPEG", RGB.convert("CMYK"), {}),
        ("JPEG", RGB.convert("L"), {"progressive": True}),
        ("JPEG", RGB, {"exif": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"}),
        ("PNG", RGB.convert("1"), {}),
        ("PNG", Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30)), {}),
        ("WEBP", RGB, {}),
        ("GIF", RGB, {}),
        ("BMP", RGB, {}),
        ("TIFF", RGB, {}),
        ("PPM", RGB, {}),
    ],
)
def test_a_header_tells_the_size_of_the_decoded_pixels(kind: str, image: Image.Image, options: dict[str, Any]) -> None:
    data = encoded(image, kind, **options)
    assert read_size(data) == decode_image(data).shape[:2]


def test_headers_are_not_believed_without_limit() -> None:
    huge = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(huge, "PNG")
    for data, said in ((huge.getvalue(), "limit"), (b"no", "not an image"), (b"\xff\xd8\xff\xe0", "not an image")):
        with pytest.raises(BadImageError, match=said):
            read_size(data)
