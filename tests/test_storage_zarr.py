"""The format is Zarr's: zarr-python, slow and written by others, reads what is written here and the other way round."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from storage import zarr_format
from storage.errors import DamagedError
from storage.reader import FeatureReader, open_store
from storage.records import StoreManifest
from storage.writer import create_store

SHAPES = pytest.mark.parametrize(
    ("num_images", "bad", "changes"),
    [
        (8, (), {}),
        (9, (0, 4, 8), {}),
        (4, (1, 2, 3), {"views_per_image": 1, "images_per_shard": 2}),
        (5, (), {"views_per_image": 3, "images_per_shard": 7}),
        (1, (), {"images_per_shard": 1}),
        (2, (0, 1), {"images_per_shard": 4}),
    ],
)


def arrays(root: Path) -> dict[str, NDArray[Any]]:
    group = zarr.open_group(str(root), mode="r")
    found: dict[str, NDArray[Any]] = {name: np.asarray(group[name][:]) for name in zarr_format.ARRAYS}
    return found


@SHAPES
def test_zarr_reads_what_is_written_here(
    make_store: Callable[..., Any], num_images: int, bad: tuple[int, ...], changes: dict[str, int]
) -> None:
    root, plan, images = make_store(num_images=num_images, bad=bad, **changes)
    found, reader = arrays(root), open_store(root)
    assert found["tokens"].shape == (plan.num_records, *plan.features.shape_TC) and found["tokens"].dtype == np.float16
    for position, key in enumerate(images.keys):
        for view_index in range(plan.views_per_image):
            row = {name: values[position * plan.views_per_image + view_index] for name, values in found.items()}
            if position in bad:
                assert all(np.isnan(row[name]).all() for name in ("tokens", "token_mean", "token_std"))
                assert not row["views"].any()
                continue
            record = reader.read(key, view_index)
            for ours, theirs in (
                (record.tokens_TC, row["tokens"]),
                (record.token_mean_T, row["token_mean"]),
                (record.token_std_T, row["token_std"]),
            ):
                assert ours.dtype == theirs.dtype
                np.testing.assert_array_equal(ours, theirs)
            view = record.view
            assert row["views"].tolist() == [view.top, view.left, view.height, view.width, view.flip]


@SHAPES
def test_what_zarr_writes_is_read_here(
    make_store: Callable[..., Any], tmp_path: Path, num_images: int, bad: tuple[int, ...], changes: dict[str, int]
) -> None:
    root, plan, images = make_store(num_images=num_images, bad=bad, **changes)
    copy = tmp_path / "written by zarr"
    create_store(copy, plan, images)
    group = zarr.open_group(str(copy), mode="r+")
    for name, values in arrays(root).items():
        group[name][:] = values  # NaN is the fill value: zarr, too, leaves such chunks out
    for path in [path for path in copy.rglob("c/*/0") if path.is_file()]:  # all but `tokens`: equal with their padding
        assert path.read_bytes() == (root / path.relative_to(copy)).read_bytes()
    ours, theirs = open_store(root), FeatureReader(copy, open_store(root).manifest)
    for shard in range(plan.num_shards):
        for mine, other in zip(ours.iter_shard(shard), theirs.iter_shard(shard), strict=True):
            assert mine[:3] == other[:3]
            for one, two in zip(mine[3:], other[3:], strict=True):
                np.testing.assert_array_equal(one, two)
    for position in bad:
        with pytest.raises(DamagedError, match=r"is a hole|is missing"):  # a file of holes only, zarr leaves out
            theirs.read(images.keys[position], 0)


def test_the_group_tells_the_plan(make_store: Callable[..., Any], tmp_path: Path) -> None:
    root, plan, _ = make_store()
    group = zarr.open_group(str(root), mode="r")
    assert group.attrs["decant"] == plan.to_json()
    assert zarr_format.read_plan(root) == plan
    assert zarr_format.read_plan(tmp_path / "nowhere") is None
    for text in ("", "[]", "{}", '{"attributes": {"decant": {"format_version": 1}}}', "\x00"):
        (tmp_path / "zarr.json").write_text(text)
        assert zarr_format.read_plan(tmp_path) is None


def test_metadata_is_what_zarr_would_write(make_store: Callable[..., Any], tmp_path: Path) -> None:
    """The files equal those that zarr-python itself puts into a folder."""
    root, plan, _ = make_store()
    group = zarr.create_group(str(tmp_path / "own"), attributes={"decant": plan.to_json()})
    for name in zarr_format.ARRAYS:
        array = zarr.open_array(str(root / name), mode="r")
        group.create_array(
            name, shape=array.shape, chunks=array.chunks, shards=array.shards, dtype=array.dtype,
            compressors=array.compressors, filters=None, fill_value=array.fill_value,
        )  # fmt: skip
    written = zarr_format.encode_metadata(plan)
    assert set(written) == {"zarr.json", *(f"{name}/zarr.json" for name in zarr_format.ARRAYS)}
    for name, data in written.items():
        assert json.loads(data) == json.loads((tmp_path / "own" / name).read_bytes())


def test_every_chunk_and_index_has_a_checksum(make_store: Callable[..., Any]) -> None:
    root, _, _ = make_store()
    for name in zarr_format.ARRAYS:
        codecs = json.loads((root / name / "zarr.json").read_bytes())["codecs"]
        if name == "tokens":
            assert codecs[0]["configuration"]["index_codecs"][-1] == {"name": "crc32c"}
            codecs = codecs[0]["configuration"]["codecs"]
        assert [codec["name"] for codec in codecs] == ["bytes", "crc32c"]


# The pieces


def slow_crc32c(data: bytes) -> int:
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
    ],
)
def test_known_checksums(data: bytes, value: int) -> None:
    """The last three stand in RFC 3720, appendix B.4."""
    assert zarr_format.crc32c(data) == value.to_bytes(4, "little")
    assert zarr_format.crc32c(memoryview(data)) == value.to_bytes(4, "little")


@given(st.binary(max_size=200))
def test_checksums_equal_their_definition(data: bytes) -> None:
    assert int.from_bytes(zarr_format.crc32c(data), "little") == slow_crc32c(data)


@settings(max_examples=60)
@given(hnp.arrays(st.sampled_from(["<f2", "<f4", "<i4", "<u8"]), hnp.array_shapes(max_dims=3, max_side=5)))
def test_chunks_come_back(values: NDArray[Any]) -> None:
    data = zarr_format.encode_chunk(values)
    found = zarr_format.decode_chunk(Path("x"), data, values.dtype.str, values.shape)
    np.testing.assert_array_equal(found, values)
    assert zarr_format.encode_chunk(np.asfortranarray(values)) == data


@settings(max_examples=60)
@given(present=st.lists(st.booleans(), min_size=1, max_size=12), spare=st.integers(0, 3))
def test_a_shards_index_finds_every_record(present: list[bool], spare: int) -> None:
    tokens_RTC = np.random.default_rng(0).normal(size=(len(present), 2, 3)).astype(np.float16)
    capacity = len(present) + spare
    data = b"".join(zarr_format.encode_token_shard(tokens_RTC, np.array(present), capacity))
    tail = data[-zarr_format.index_bytes(capacity) :]
    offsets = zarr_format.decode_shard_index(Path("x"), tail, capacity, 12)
    assert len(offsets) == capacity and (offsets[len(present) :] == -1).all()
    for is_present, offset, expected in zip(present, offsets, tokens_RTC, strict=False):
        assert (offset >= 0) == is_present
        if is_present:
            found = zarr_format.decode_chunk(Path("x"), data[offset : offset + 16], "<f2", (2, 3))
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("entries", "what"),
    [
        ([[0, 15]], "an impossible index"),
        ([[0, 2**64 - 1]], "an impossible index"),
        ([[2**64 - 1, 16]], "an impossible index"),
        ([[0, 16], [16, 16]], "has 36 bytes, expected 20"),
    ],
)
def test_an_index_of_another_writer_is_refused(entries: list[list[int]], what: str) -> None:
    tail = zarr_format.encode_chunk(np.array(entries, "<u8"))
    with pytest.raises(DamagedError, match=f"some/file.*{what}"):
        zarr_format.decode_shard_index(Path("some/file"), tail, 1, 12)


def test_an_index_with_a_flipped_bit_is_refused() -> None:
    tail = zarr_format.encode_chunk(np.array([[0, 16], [16, 16]], "<u8"))
    for offset in range(len(tail)):
        damaged = bytearray(tail)
        damaged[offset] ^= 1
        with pytest.raises(DamagedError, match="does not match its checksum"):
            zarr_format.decode_shard_index(Path("x"), bytes(damaged), 2, 12)


def test_the_metadata_of_a_store_survives_its_manifest(make_store: Callable[..., Any]) -> None:
    root, _, _ = make_store()
    manifest = StoreManifest.from_file(root / "manifest.json", (root / "manifest.json").read_bytes())
    assert {file.name: file.num_bytes for file in manifest.metadata} == {
        name: (root / name).stat().st_size
        for name in ("plan.json", "images.json", "zarr.json", *(f"{array}/zarr.json" for array in zarr_format.ARRAYS))
    }
