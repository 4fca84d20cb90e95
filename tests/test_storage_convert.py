"""Conversion: there and back without a changed byte, and less exactly or thinner where that is asked for."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import storage.convert
import storage.folder
from storage.convert import convert_store, plan_conversion
from storage.encodings import BitRound, Encoding, Fp16, Int8, Zstd
from storage.errors import ConfigError, DecantError
from storage.folder import create_store, finish_store
from storage.image_list import ImageList
from storage.jpeg import ViewCodec, decode_view
from storage.reader import open_store
from storage.records import FeatureRecord, FeatureSpec, ImageKey, StoredViews, StorePlan
from storage.store import FeatureReader
from storage.token_subset import TokenSubset
from storage.verify import iter_damage
from storage.views import CentreCrop, Renderer
from storage.whitening import LayerNorm
from storage.writer import ShardWriter
from tests.fixtures.any_store import INT8, SUBSET

SHAPE: dict[str, Any] = {"num_images": 8, "bad": (1, 6), "view_px": 8}


@pytest.fixture
def tmp_path(in_memory: Path) -> Path:
    return in_memory


@pytest.fixture
def convert(tmp_path: Path) -> Callable[..., FeatureReader]:
    """Convert a store as asked and open the result."""

    def run(source: FeatureReader, name: str, *, images_location: str = "", **options: Any) -> FeatureReader:
        plan = plan_conversion(source, **options)
        manifest = convert_store(source, tmp_path / name, plan, images_location=images_location)
        reader = open_store(tmp_path / name)
        assert reader.manifest == manifest and reader.plan == plan
        assert not any(damage for _, damage in iter_damage(tmp_path / name))
        return reader

    return run


def all_tokens(reader: FeatureReader) -> Any:
    images, views = reader.usable_images(), reader.plan.views_per_image
    records_B = (images[:, None] * views + np.arange(views)).reshape(-1)
    out_BTC = np.empty((len(records_B), *reader.plan.shape_TC), np.float16)
    reader.read_batch(records_B, out_BTC)
    return out_BTC


def records(reader: FeatureReader) -> list[Any]:
    """Everything of every record, but for its tokens."""
    found = [record for shard in range(reader.plan.num_shards) for record in reader.iter_shard(shard)]
    return [(*r[:3], r.token_mean_T.tobytes(), r.token_std_T.tobytes(), r.jpeg) for r in found]


# ---- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", [Fp16(), INT8, BitRound(), Zstd()], ids=lambda encoding: encoding.kind)
@pytest.mark.parametrize("subset", [None, SUBSET], ids=["all", "part"])
@pytest.mark.parametrize(("first", "second"), [("zarr", "wds"), ("wds", "zarr")])
def test_there_and_back_changes_no_byte(
    make_store: Any, convert: Any, tree_bytes: Any, tmp_path: Path, image_list: Any,
    encoding: Encoding, subset: TokenSubset | None, first: str, second: str,
) -> None:  # fmt: skip
    labels = image_list(8).labels_fingerprint if first == "wds" else ""
    root, _, images = make_store(
        backend=first, encoding=encoding, token_subset=subset, labels_fingerprint=labels, **SHAPE
    )
    source = open_store(root)
    there = convert(source, "there", backend=second)
    assert there.plan.backend == second and there.plan.encoding == encoding and there.images == images
    np.testing.assert_array_equal(all_tokens(there), all_tokens(source))
    assert records(there) == records(source)
    assert [tuple(bad) for bad in there.manifest.bad_images] == [tuple(bad) for bad in source.manifest.bad_images]
    convert(there, "back", backend=first)
    assert tree_bytes(tmp_path / "back") == tree_bytes(root)


def test_labels_decide_the_identity_of_tars_alone(make_store: Any, convert: Any) -> None:
    root, _, images = make_store(**SHAPE)
    source = open_store(root)
    there = plan_conversion(source, backend="wds")
    assert there.labels_fingerprint == images.labels_fingerprint != ""
    assert plan_conversion(source, backend="zarr") == source.plan and not source.plan.labels_fingerprint
    others = ImageList(location="", classes=("b",), keys=images.keys, labels=images.labels_N, digests=images.digests)
    assert others.labels_fingerprint != images.labels_fingerprint


# ---- less exactly, and thinner ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", [Int8(), INT8, BitRound(keep_bits=4), Zstd(level=2)], ids=str)
@pytest.mark.parametrize("backend", ["zarr", "wds"])
def test_another_encoding_keeps_its_bound(make_store: Any, convert: Any, encoding: Encoding, backend: str) -> None:
    root, _, _ = make_store(**SHAPE)
    source = open_store(root)
    found = convert(source, "there", backend=backend, encoding=encoding)
    used = found.plan.encoding
    assert used.kind == encoding.kind and records(found) == records(source)
    for before_TC, after_TC in zip(all_tokens(source), all_tokens(found), strict=True):
        expected = np.empty_like(before_TC)
        used.decode(used.encode(before_TC), expected)
        np.testing.assert_array_equal(after_TC, expected)
        bound_TC = used.error_bound(before_TC, used.encode(before_TC))
        assert (np.abs(after_TC.astype(np.float64) - before_TC) <= bound_TC).all()


def test_int8_is_fitted_on_a_sample_of_the_usable_records(
    make_store: Any, convert: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, _, _ = make_store(**SHAPE)
    source = open_store(root)
    tokens_RTC = all_tokens(source)
    fitted = plan_conversion(source, backend="zarr", encoding=Int8()).encoding
    assert isinstance(fitted, Int8)
    sample = tokens_RTC[[2 * image + image % 2 for image in range(6)]]  # of each usable image one view, in turn
    np.testing.assert_allclose(fitted.channel_scale, sample.reshape(-1, 8).astype(np.float32).std(axis=0), rtol=1e-6)
    monkeypatch.setattr(storage.convert, "FIT_RECORDS", 3)
    few = plan_conversion(source, backend="zarr", encoding=Int8()).encoding
    assert isinstance(few, Int8) and few != fitted and len(few.channel_scale) == 8


@pytest.mark.parametrize("encoding", [Fp16(), INT8, BitRound(), Zstd()], ids=lambda encoding: encoding.kind)
def test_a_part_of_the_tokens_is_what_extraction_would_have_kept(
    make_store: Any, convert: Any, tree_bytes: Any, tmp_path: Path, encoding: Encoding
) -> None:
    """Byte for byte, also from int8, which is not decoded for it."""
    root, _, _ = make_store(encoding=encoding, **SHAPE)
    thin, _, _ = make_store("thin", encoding=encoding, token_subset=SUBSET, **SHAPE)
    source = open_store(root)
    found = convert(source, "there", backend="zarr", token_subset=SUBSET)
    assert tree_bytes(tmp_path / "there") == tree_bytes(thin)
    again = convert(found, "again", backend="zarr", token_subset=SUBSET)
    assert again.plan == found.plan and tree_bytes(tmp_path / "again") == tree_bytes(thin)


def test_views_are_dropped_when_asked(make_store: Any, convert: Any, tree_bytes: Any, tmp_path: Path) -> None:
    root, _, _ = make_store(**SHAPE)
    bare, _, _ = make_store("bare", **{**SHAPE, "view_px": None})
    source = open_store(root)
    found = convert(source, "there", backend="zarr", keep_views=False)
    assert found.plan.stored_views is None
    np.testing.assert_array_equal(all_tokens(found), all_tokens(open_store(bare)))
    convert(source, "tars", backend="wds", keep_views=False)


# ---- views from the images -------------------------------------------------------------------------------------------


@pytest.fixture
def of_pictures(make_index: Any, tmp_path: Path) -> tuple[FeatureReader, Any]:
    """A store without views over real pictures, and their index."""
    _, index = make_index(per_class=3, eval_fraction=0.0)
    images = index.images.at("")
    plan = StorePlan(
        features=FeatureSpec(teacher="made-up", num_prefix_tokens=0, grid_hw=(2, 2), channels=8), whitening=LayerNorm(),
        sampler=CentreCrop().to_json(), renderer=Renderer().describe(), images_fingerprint=images.fingerprint,
        teacher_fingerprint="w", teacher={"input_px": 32}, num_images=6, views_per_image=1, images_per_shard=4,
    )  # fmt: skip
    root = tmp_path / "plain"
    create_store(root, plan, images)
    for shard in range(plan.num_shards):
        writer = ShardWriter(root, plan, images, shard)
        for key in writer.keys:
            height, width = index.images.read_image(images.position(key)).shape[:2]
            zeros = np.zeros((4, 8), np.float16), np.zeros(4, np.float32), np.ones(4, np.float32)
            writer.append(FeatureRecord(ImageKey(key), 0, CentreCrop().view(key, 0, (height, width)), *zeros))
        writer.commit()
    finish_store(root)
    return open_store(root), index


def test_missing_views_are_rendered_from_the_images(of_pictures: Any, convert: Any) -> None:
    source, index = of_pictures
    found = convert(source, "tars", backend="wds", images_location=index.location)
    codec = ViewCodec(px=32).describe()
    assert found.plan.stored_views == StoredViews(px=32, codec=codec, seen_by_teacher=False)
    jpegs = found.read_jpegs(np.arange(6))
    for number, jpeg in enumerate(jpegs):
        pixels = np.empty((32, 32, 3), np.uint8)
        decode_view(jpeg, 32, pixels)
        view = source.views(np.array([number]))[0]
        expected = Renderer().render_view(index.images.read_image(number), view, 32)
        assert np.abs(pixels.astype(int) - expected).mean() < 30  # noise of single pixels suffers most from 4:2:0
        assert abs(pixels.mean() - expected.mean()) < 4
    smaller = convert(source, "small", backend="zarr", keep_views=True, view_px=16, images_location=index.location)
    assert smaller.plan.stored_views.px == 16


def test_views_without_images_are_refused(of_pictures: Any, convert: Any, tmp_path: Path) -> None:
    source, index = of_pictures
    with pytest.raises(ConfigError, match=r"plain keeps no rendered views; .* images are \(--data, DATA=\.\.\.\)"):
        convert(source, "tars", backend="wds")
    assert not (tmp_path / "tars").exists()
    path = Path(index.location) / index.images.keys[4]
    shutil.copy(Path(index.location) / index.images.keys[0], path)
    with pytest.raises(DecantError, match="has changed since it was listed"):
        convert(source, "tars", backend="wds", images_location=index.location)
    assert not (tmp_path / "tars" / "manifest.json").exists()


# ---- interrupted -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["zarr", "wds"])
def test_a_killed_conversion_goes_on(
    make_store: Any, convert: Any, tree_bytes: Any, tmp_path: Path, fork: Any, backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    root, _, _ = make_store(**SHAPE)
    source = open_store(root)
    convert(source, "undisturbed", backend=backend, encoding=Zstd())
    plan = plan_conversion(source, backend=backend, encoding=Zstd())
    there = tmp_path / "there"
    create_store(there, plan, source.images)  # the child must not wait for zarr's thread, which is not forked with it
    layout = storage.folder.LAYOUTS[backend]
    metadata = layout.metadata(plan)
    monkeypatch.setitem(storage.folder.LAYOUTS, backend, layout._replace(metadata=lambda plan: dict(metadata)))

    def work() -> None:
        commit = ShardWriter.commit

        def killed(writer: ShardWriter) -> Any:
            if writer.index == 1:
                (there / "attempts" / "00001.left").mkdir(parents=True)
                os._exit(137)
            return commit(writer)

        ShardWriter.commit = killed  # type: ignore[method-assign, assignment]
        convert_store(source, there, plan)

    assert os.waitstatus_to_exitcode(os.waitpid(fork(work), 0)[1]) == 137
    assert sorted(path.name for path in (there / "receipts").iterdir()) == ["00000.json"]
    first = (there / "receipts" / "00000.json").stat().st_mtime_ns
    steps: list[tuple[int, int]] = []

    class Watched(storage.convert.SilentProgress):
        def start(self, total: int, unit: str, done: int = 0) -> None:
            steps.append((total, done))

    convert_store(source, there, plan, progress=Watched())
    assert steps == [(3, 1)] and (there / "receipts" / "00000.json").stat().st_mtime_ns == first
    assert tree_bytes(there) == tree_bytes(tmp_path / "undisturbed")
