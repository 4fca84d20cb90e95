"""The pieces of the Zarr layout: checksums, chunks, indexes. What no writer of ours makes is refused, and cheaply."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from storage import zarr_format
from storage.encodings import Zstd
from storage.errors import DamagedError
from storage.files import LocalFiles
from storage.fingerprint import crc32c, crc32c_bytes
from storage.folder import finish_store, load_plan
from storage.reader import open_store
from storage.receipts import parse_receipt, receipt_name
from storage.records import FileEntry, StorePlan
from storage.shards import PackedRecord, ShardContent


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
    assert crc32c(data) == crc32c(memoryview(data)) == value
    assert crc32c_bytes(data) == crc32c_bytes(memoryview(data)) == value.to_bytes(4, "little")


@given(st.binary(max_size=200))
def test_checksums_equal_their_definition(data: bytes) -> None:
    assert int.from_bytes(crc32c_bytes(data), "little") == slow_crc32c(data)


@settings(max_examples=60)
@given(hnp.arrays(st.sampled_from(["<f2", "<f4", "<i4", "<u8"]), hnp.array_shapes(max_dims=3, max_side=5)))
def test_chunks_come_back(values: NDArray[Any]) -> None:
    data = b"".join(zarr_format.encode_chunk(values))
    found = zarr_format.decode_chunk("x", data, values.dtype.str, values.shape)
    np.testing.assert_array_equal(found, values)
    assert b"".join(zarr_format.encode_chunk(np.asfortranarray(values))) == data


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(present=st.lists(st.booleans(), min_size=1, max_size=12), spare=st.integers(0, 3))
def test_a_shards_index_finds_every_record(
    image_list: Callable[..., Any], store_plan: Callable[..., StorePlan], made_up_record: Callable[..., Any],
    present: list[bool], spare: int,
) -> None:  # fmt: skip
    images = image_list(len(present))
    plan = store_plan(images, images_per_shard=len(present) + spare, views_per_image=1)
    made_up = [made_up_record(plan, key, 0) for key in images.keys]
    stored = [record.tokens_TC.tobytes() for record in made_up]
    records = [
        PackedRecord(record.key, 0, 0, np.zeros(5, np.int32), data, crc32c(data),
                     {"token_mean": record.token_mean_T, "token_std": record.token_std_T}, None)
        if is_present else None
        for record, data, is_present in zip(made_up, stored, present, strict=True)
    ]  # fmt: skip
    file = b"".join(zarr_format.pack(plan, ShardContent(0, records, ()))["tokens/c/0/0/0"])
    tail = file[-16 * plan.records_per_shard - 4 :]
    offsets, lengths = zarr_format.decode_token_index("x", tail, plan, len(file))
    assert len(offsets) == plan.records_per_shard and (offsets[len(present) :] == -1).all()
    for is_present, offset, length, record in zip(present, offsets, lengths, made_up, strict=False):
        assert (offset >= 0) == is_present
        if is_present:
            found = zarr_format.decode_chunk("x", file[offset : offset + length + 4], "<f2", plan.shape_TC)
            np.testing.assert_array_equal(found, record.tokens_TC)


@pytest.mark.parametrize(
    ("entries", "what"),
    [
        ([[0, 115]], "an impossible index"),
        ([[0, 117]], "an impossible index"),
        ([[0, 2**64 - 1]], "an impossible index"),
        ([[2**64 - 1, 116]], "an impossible index"),
        ([[1, 116]], "an impossible index"),
        ([[2**64 - 2, 116]], "an impossible index"),
        ([[0, 116], [116, 116]], "has 36 bytes, expected 20"),
    ],
)
def test_an_index_of_another_writer_is_refused(
    image_list: Callable[..., Any], store_plan: Callable[..., StorePlan], entries: list[list[int]], what: str
) -> None:
    plan = store_plan(image_list(1), images_per_shard=1, views_per_image=1)
    assert plan.record_bytes == 112
    zarr_format.decode_token_index("x", b"".join(zarr_format.encode_chunk(np.array([[0, 116]], "<u8"))), plan, 116)
    tail = b"".join(zarr_format.encode_chunk(np.array(entries, "<u8")))
    with pytest.raises(DamagedError, match=f"some/file.*{what}"):
        zarr_format.decode_token_index("some/file", tail, plan, 116)


@pytest.mark.parametrize("length", [0, 4, 2**20, 2**31, 2**63])
def test_an_index_cannot_ask_for_memory(
    image_list: Callable[..., Any], store_plan: Callable[..., StorePlan], length: int
) -> None:
    """Compressed records have no fixed size; a record of a gigabyte in a file that long is refused all the same."""
    plan = store_plan(image_list(1), images_per_shard=1, views_per_image=1, encoding=Zstd())
    zarr_format.decode_token_index("x", b"".join(zarr_format.encode_chunk(np.array([[0, 90]], "<u8"))), plan, 2**40)
    tail = b"".join(zarr_format.encode_chunk(np.array([[0, length]], "<u8")))
    with pytest.raises(DamagedError, match="an impossible index"):
        zarr_format.decode_token_index("x", tail, plan, 2**40)


def test_an_index_with_a_flipped_bit_is_refused(
    image_list: Callable[..., Any], store_plan: Callable[..., StorePlan]
) -> None:
    plan = store_plan(image_list(2), images_per_shard=2, views_per_image=1)
    tail = b"".join(zarr_format.encode_chunk(np.array([[0, 116], [116, 116]], "<u8")))
    for offset in range(len(tail)):
        damaged = bytearray(tail)
        damaged[offset] ^= 1
        with pytest.raises(DamagedError, match="does not match its checksum"):
            zarr_format.decode_token_index("x", bytes(damaged), plan, 1000)


@pytest.mark.parametrize(
    "change",
    [
        lambda spans: spans.__setitem__((0, 1), 2**62),
        lambda spans: spans.__setitem__((0, 0), -1),
        lambda spans: spans.__setitem__((1, 0), 2**40),
        lambda spans: spans.__setitem__((1, 1), spans[1, 0]),
        lambda spans: spans.__setitem__((1, 1), -(2**63)),
        lambda spans: spans.__setitem__((5, 1), spans[5, 0] + 40_000),
        lambda spans: spans.__setitem__(5, (70_000, 70_600)),  # behind the file's end
    ],
)
def test_spans_that_lead_out_of_their_file_are_refused(
    make_store: Callable[..., Any], change: Callable[[NDArray[np.int64]], None]
) -> None:
    """Even where every digest above them says that they were committed."""
    root, plan, _ = make_store(num_images=3, view_px=16)
    name = "view_spans/c/0/0"
    spans = zarr_format.decode_chunk(name, (root / name).read_bytes(), "<i8", (plan.records_per_shard, 2)).copy()
    change(spans)
    forge(root, name, b"".join(zarr_format.encode_chunk(spans)))
    with pytest.raises(DamagedError, match="lead out of it"):
        open_store(root).read_jpegs(np.arange(2))


def test_a_small_chunk_of_another_size_is_refused(make_store: Callable[..., Any]) -> None:
    root, _, _ = make_store(num_images=3)
    forge(root, "token_mean/c/0/0", (root / "token_mean/c/0/0").read_bytes()[:40])
    with pytest.raises(DamagedError, match="is no chunk of"):
        open_store(root).token_statistics(np.arange(2))


def forge(root: Path, name: str, data: bytes) -> None:
    """Put a file into shard 0, and make receipt and manifest agree."""
    (root / name).write_bytes(data)
    receipt = root / receipt_name(0)
    entry = parse_receipt(LocalFiles(root), load_plan(root), 0, receipt.read_bytes())
    files = tuple(FileEntry.describe(name, [data]) if file.name == name else file for file in entry.files)
    receipt.write_bytes(entry.model_copy(update={"files": files}).to_file())
    finish_store(root)
