"""The format is Zarr's: zarr-python and tensorstore, written by others, read what is written here and the other way
round."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import tensorstore
import zarr
from numpy.typing import NDArray

from storage import zarr_format
from storage.encodings import BitRound, Fp16, Int8, Zstd
from storage.errors import DamagedError
from storage.files import LocalFiles
from storage.fingerprint import crc32c
from storage.folder import create_store, finish_store, load_plan
from storage.reader import open_store
from storage.receipts import parse_receipt, receipt_name
from storage.records import FileEntry, ShardEntry, StoreManifest, StorePlan
from storage.token_subset import TokenSubset
from storage.zarr_metadata import MEANINGS, small_arrays

SHAPES: list[tuple[int, tuple[int, ...], dict[str, Any]]] = [
    (8, (), {}),
    (9, (0, 4, 8), {}),
    (4, (1, 2, 3), {"views_per_image": 1, "images_per_shard": 2}),
    (5, (), {"views_per_image": 3, "images_per_shard": 7}),
    (1, (), {"images_per_shard": 1}),
    (2, (0, 1), {"images_per_shard": 4}),
]
INT8 = Int8(channel_scale=(0.5, 1, 1, 2, 1, 1, 0.25, 1))
KINDS: list[dict[str, Any]] = [
    {"encoding": INT8},
    {"encoding": Zstd()},
    {"encoding": BitRound()},
    {"encoding": BitRound(keep_bits=3, compressor_name="lz4", level=5)},
    {"encoding": Fp16(), "view_px": 16},
    {"encoding": INT8, "view_px": 40, "token_subset": TokenSubset(fraction=0.6)},
    {"encoding": Zstd(level=7), "token_subset": TokenSubset(fraction=0.3, seed=4)},
]
STORES = pytest.mark.parametrize(
    ("num_images", "bad", "changes"), [*SHAPES, *((5, (1,), changes) for changes in KINDS)], ids=repr
)


def array_names(plan: StorePlan) -> list[str]:
    return ["tokens", *small_arrays(plan), *(["view_jpegs"] if plan.stored_views else [])]


def by_zarr(root: Path, plan: StorePlan) -> dict[str, NDArray[Any]]:
    group = zarr.open_group(str(root), mode="r")
    return {name: np.asarray(group[name][:]) for name in array_names(plan)}


def by_tensorstore(root: Path, plan: StorePlan) -> dict[str, NDArray[Any]]:
    def read(name: str) -> NDArray[Any]:
        place = {"driver": "file", "path": str(root / name)}
        return np.asarray(tensorstore.open({"driver": "zarr3", "kvstore": place}, read=True).result().read().result())

    return {name: read(name) for name in array_names(plan)}


@pytest.mark.parametrize("read_all", [by_zarr, by_tensorstore])
@STORES
def test_others_read_what_is_written_here(
    make_store: Callable[..., Any], made_up_record: Callable[..., Any], read_all: Callable[..., Any],
    num_images: int, bad: tuple[int, ...], changes: dict[str, Any],
) -> None:  # fmt: skip
    root, plan, images = make_store(num_images=num_images, bad=bad, **changes)
    found = read_all(root, plan)
    stored = plan.fields
    assert (
        found["tokens"].shape == (plan.num_records, *plan.shape_TC) and found["tokens"].dtype == stored["tokens"].dtype
    )
    for number in range(plan.num_records):
        image, view_index = divmod(number, plan.views_per_image)
        row = {name: values[number] for name, values in found.items() if name != "view_jpegs"}
        if image in bad:
            for name, values in row.items():
                assert np.isnan(values).all() if values.dtype.kind == "f" else not values.any(), name
            continue
        record = made_up_record(plan, images.keys[image], view_index)
        expected = plan.encoding.encode(record.tokens_TC) | {
            "token_mean": record.token_mean_T,
            "token_std": record.token_std_T,
            "views": np.array([record.view.top, record.view.left, record.view.height, record.view.width,
                               record.view.flip], np.int32),
        }  # fmt: skip
        if plan.token_subset is not None:
            total = plan.features.num_tokens
            expected["token_positions"] = plan.token_subset.positions(record.key, view_index, total).astype(np.int32)
        if record.jpeg is not None:
            start, stop = row.pop("view_spans")
            assert found["view_jpegs"][start:stop].tobytes() == record.jpeg
            assert row.pop("view_crc32c") == crc32c(record.jpeg)
        assert row.keys() == expected.keys()
        for name, values in expected.items():
            assert row[name].dtype == values.dtype, name
            np.testing.assert_array_equal(row[name], values)


@STORES
def test_what_zarr_writes_is_read_here(
    make_store: Callable[..., Any], tmp_path: Path, num_images: int, bad: tuple[int, ...], changes: dict[str, Any]
) -> None:
    root, plan, images = make_store(num_images=num_images, bad=bad, **changes)
    copy = tmp_path / "written by zarr"
    create_store(copy, plan, images)
    group = zarr.open_group(str(copy), mode="r+")
    for name, values in by_zarr(root, plan).items():
        group[name][:] = values  # a chunk of fill values zarr, too, leaves out
    written = {path.relative_to(copy).as_posix() for path in copy.rglob("c/*") if path.is_file()}
    written |= {path.relative_to(copy).as_posix() for path in copy.rglob("c/*/*") if path.is_file()}
    for name in written:  # all but `tokens`: equal with their padding
        assert (copy / name).read_bytes() == (root / name).read_bytes(), name
    commit_foreign(root, copy, plan)
    ours, theirs = open_store(root), open_store(copy, check="always")
    for shard in range(plan.num_shards):
        for mine, other in zip(ours.iter_shard(shard), theirs.iter_shard(shard), strict=True):
            assert mine[:3] == other[:3] and mine.jpeg == other.jpeg
            for one, two in zip(mine[3:6], other[3:6], strict=True):
                np.testing.assert_array_equal(one, two)
    for position in bad:
        with pytest.raises(DamagedError, match=r"is a hole|is missing"):  # a file of holes only, zarr leaves out
            theirs.read(images.keys[position], 0)


def commit_foreign(root: Path, copy: Path, plan: StorePlan) -> None:
    """Receipts and a manifest for shards that zarr wrote; each record's checksum is the one that zarr put behind it."""
    for index in range(plan.num_shards):
        name = receipt_name(index)
        entry = parse_receipt(LocalFiles(root), load_plan(root), index, (root / name).read_bytes())
        files = [file.name for file in entry.files if (copy / file.name).exists()]
        checksums = np.zeros(plan.records_per_shard, "<u4")
        if (copy / f"tokens/c/{index}/0/0").exists():
            data = (copy / f"tokens/c/{index}/0/0").read_bytes()
            spans = np.frombuffer(data[-16 * plan.records_per_shard - 4 : -4], "<u8").reshape(-1, 2)
            for slot, (offset, length) in enumerate(spans.tolist()):
                if offset != 2**64 - 1:
                    checksums[slot] = int.from_bytes(data[offset + length - 4 : offset + length], "little")
        changed = {
            "files": tuple(FileEntry.describe(name, [(copy / name).read_bytes()]) for name in files),
            "record_crc32c": checksums.tobytes().hex(),
        }
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_bytes(ShardEntry.model_validate(entry.to_json() | changed).to_file())
    finish_store(copy)


@pytest.mark.parametrize(("encoding", "fill"), [(Fp16(), "nan"), (Zstd(), "nan"), (BitRound(), "nan"), (INT8, "0")])
def test_missing_chunks_read_as_the_fill_value(begin_store: Callable[..., Any], encoding: Any, fill: str) -> None:
    root, plan, _ = begin_store(encoding=encoding)
    for read_all in (by_zarr, by_tensorstore):
        for name, values in read_all(root, plan).items():
            expected = np.full(1, fill if name == "tokens" else "nan" if values.dtype.kind == "f" else "0")
            np.testing.assert_array_equal(values, np.broadcast_to(expected.astype(values.dtype), values.shape))


def test_a_view_is_a_slice(make_store: Callable[..., Any]) -> None:
    """Three shards of views; others can decode them, and what lies between is zeros that take no room."""
    root, plan, _ = make_store(view_px=40)
    group, reader = zarr.open_group(str(root), mode="r"), open_store(root)
    spans = np.asarray(group["view_spans"][:])
    for number, (start, stop) in enumerate(spans.tolist()):
        jpeg = np.asarray(group["view_jpegs"][start:stop]).tobytes()
        assert [jpeg] == reader.read_jpegs(np.array([number]))
        assert simplejpeg.decode_jpeg(jpeg).shape == (40, 40, 3)
    shards, capacity = plan.num_shards, group["view_jpegs"].shards[0]
    assert np.array_equal(spans[:: plan.records_per_shard, 0], capacity * np.arange(shards))
    assert not np.asarray(group["view_jpegs"][spans[0:6].max() : capacity]).any()
    on_disk = sum(path.stat().st_size for path in (root / "view_jpegs" / "c").iterdir())
    assert on_disk < np.diff(spans).sum() + shards * (zarr_format.JPEG_CHUNK_BYTES + 16 * capacity / 65536 + 20)


def test_the_group_tells_the_plan(make_store: Callable[..., Any], tmp_path: Path) -> None:
    root, plan, _ = make_store(encoding=INT8, view_px=16, token_subset=TokenSubset(fraction=0.5))
    group = zarr.open_group(str(root), mode="r")
    assert group.attrs["decant"] == plan.to_json()
    assert zarr_format.find_plan(LocalFiles(root)) == plan
    assert zarr_format.find_plan(LocalFiles(tmp_path / "nowhere")) is None
    for text in ("", "[]", "{}", '{"attributes": {"decant": {"format_version": 2}}}', "\x00"):
        (tmp_path / "zarr.json").write_text(text)
        assert zarr_format.find_plan(LocalFiles(tmp_path)) is None


@STORES
def test_metadata_is_what_zarr_would_write(
    begin_store: Callable[..., Any], tmp_path: Path, num_images: int, bad: tuple[int, ...], changes: dict[str, Any]
) -> None:
    """The files equal those that zarr-python itself puts into a folder."""
    root, plan, _ = begin_store(num_images=num_images, **changes)
    group = zarr.create_group(str(tmp_path / "own"), attributes={"decant": plan.to_json()})
    for name in array_names(plan):
        array = zarr.open_array(str(root / name), mode="r")
        group.create_array(
            name, shape=array.shape, chunks=array.chunks, shards=array.shards, dtype=array.dtype,
            compressors=array.compressors, filters=None, fill_value=array.fill_value,
            dimension_names=array.metadata.dimension_names, attributes=array.attrs.asdict(),
        )  # fmt: skip
    written = zarr_format.encode_metadata(plan)
    assert set(written) == {"zarr.json", *(f"{name}/zarr.json" for name in array_names(plan))}
    for name, data in written.items():
        theirs = json.loads((tmp_path / "own" / name).read_bytes())
        assert theirs.pop("consolidated_metadata", None) is None  # which early versions write
        assert json.loads(data) == theirs


def test_axes_have_names_and_arrays_a_meaning(begin_store: Callable[..., Any]) -> None:
    root, plan, _ = begin_store(encoding=INT8, view_px=16, token_subset=TokenSubset(fraction=0.5))
    assert set(MEANINGS) == set(array_names(plan))
    lengths: dict[str, int] = {}
    for name in array_names(plan):
        array = zarr.open_array(str(root / name), mode="r")
        assert len(array.attrs["description"]) > 10
        for axis, length in zip(array.metadata.dimension_names, array.shape, strict=True):
            assert lengths.setdefault(axis, length) == length, f"{axis} of {name}: libraries join arrays by these names"
    assert (lengths["record"], lengths["token"]) == (plan.num_records, plan.num_kept_tokens)


def test_every_chunk_and_index_has_a_checksum(make_store: Callable[..., Any]) -> None:
    """But for the chunks of `view_jpegs`, whose checksums are those of the JPEGs: theirs would lie inside these."""
    for changes in ({}, *KINDS):
        root, plan, _ = make_store(f"store {changes}", num_images=1, **changes)
        for name in array_names(plan):
            codecs = json.loads((root / name / "zarr.json").read_bytes())["codecs"]
            if name in ("tokens", "view_jpegs"):
                assert codecs[0]["configuration"]["index_codecs"][-1] == {"name": "crc32c"}
                codecs = codecs[0]["configuration"]["codecs"]
            assert (codecs[-1]["name"] == "crc32c") == (name != "view_jpegs")


def test_the_metadata_of_a_store_survives_its_manifest(make_store: Callable[..., Any]) -> None:
    root, plan, _ = make_store(view_px=16)
    manifest = StoreManifest.from_file(root / "manifest.json", (root / "manifest.json").read_bytes())
    assert {file.name: file.num_bytes for file in manifest.metadata} == {
        name: (root / name).stat().st_size
        for name in ("plan.json", "images.bin", "zarr.json", *(f"{array}/zarr.json" for array in array_names(plan)))
    }
