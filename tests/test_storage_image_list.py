"""Image lists and indexes on disk and in memory, against plain rows."""

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.columns import Digests, Keys, encode_columns
from storage.errors import DamagedError
from storage.fingerprint import FINGERPRINT_CHARS, digest_bytes
from storage.image_index import ImageIndex, ImageList, ImageRow, load_index, save_index

PATH = Path("store/images.bin")
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
CLASSES = ("cat", "dog", "été")
ROW = st.builds(
    ImageRow, TEXT, st.integers(-1, 2), st.binary(min_size=16, max_size=16).map(bytes.hex),
    st.sampled_from(["train", "eval"]),
)  # fmt: skip
ROWS = st.lists(ROW, unique_by=lambda row: row.key).map(sorted)


def index_of(rows: list[ImageRow]) -> ImageIndex:
    return ImageIndex.of_rows("/data/é", CLASSES, rows)


def row(key: str, label: int = 0, split: str = "train") -> ImageRow:
    return ImageRow(key, label, digest_bytes(key.encode()), split)  # type: ignore[arg-type]


# Round trips


@given(ROWS)
def test_an_index_is_its_rows_before_and_after_a_file(rows: list[ImageRow]) -> None:
    index = index_of(rows)
    again = ImageIndex.from_file(PATH, index.to_file())
    assert list(index.rows) == list(again.rows) == rows
    assert again == index and again.to_file() == index.to_file() and again.fingerprint == index.fingerprint
    assert (again.location, again.classes, len(again)) == ("/data/é", CLASSES, len(rows))


@given(ROWS)
def test_splits_are_the_rows_that_say_so(rows: list[ImageRow]) -> None:
    index = index_of(rows)
    for split in ("train", "eval"):
        truth = [found for found in rows if found.split == split]
        images = index.split(split)  # type: ignore[arg-type]
        for found in (images, ImageList.from_file(PATH, images.to_file())):
            assert len(found) == len(truth) and found == images
            assert found.keys == [one.key for one in truth]
            assert list(found.labels) == found.labels_N.tolist() == [one.label for one in truth]
            assert found.digests == [one.digest for one in truth]
            assert found.fingerprint == images.fingerprint == index_of(truth).images.fingerprint
            assert [found.position(one.key) for one in truth] == list(range(len(truth)))
            for other in set(rows) - set(truth):
                with pytest.raises(KeyError):
                    found.position(other.key)


def test_a_list_elsewhere_is_the_same_list(tmp_path: Path) -> None:
    images = index_of([row("a"), row("b", -1)]).images
    moved = images.at("")
    assert moved.fingerprint == images.fingerprint and moved != images and moved.at(images.location) == images
    assert b"data" not in moved.to_file()
    path = tmp_path / "data.bin"
    save_index(path, index_of([row("a")]))
    assert load_index(path) == index_of([row("a")])


# Identity


@given(ROWS, st.data())
def test_two_lists_have_one_fingerprint_only_when_keys_and_contents_agree(rows: list[ImageRow], data: Any) -> None:
    others = data.draw(ROWS | st.just(rows))
    same = [(one.key, one.digest) for one in rows] == [(one.key, one.digest) for one in others]
    assert (index_of(rows).images.fingerprint == index_of(others).images.fingerprint) == same
    assert (index_of(rows).fingerprint == index_of(others).fingerprint) == (rows == others)


def test_boundaries_between_keys_count() -> None:
    digests = [bytes(16).hex()] * 2
    one, other = (
        ImageList(location="", classes=(), keys=keys, labels=(-1, -1), digests=digests)
        for keys in (("ab", "c"), ("a", "bc"))
    )
    assert one.fingerprint != other.fingerprint


def test_fingerprints_are_the_same_in_every_version() -> None:
    """Written out by hand; stores are found by them."""
    rows = [row("a/1.png"), row("b/é.png", 1, "eval"), row("c.png", -1)]
    index, keys = index_of(rows), [one.key.encode() for one in rows]
    lengths = b"".join(len(key).to_bytes(4, "little") for key in keys)
    parts = (lengths, b"".join(keys), bytes.fromhex("".join(one.digest for one in rows)))
    text = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    assert index.images.fingerprint == digest_bytes(text)
    assert index.fingerprint == "27cc8ff1eade1e56e16be0363c2b1fcd"


def test_columns_of_different_lengths_are_refused() -> None:
    with pytest.raises(AssertionError, match="1 keys, 2 labels, 0 digests"):
        ImageList(location="", classes=(), keys=["a"], labels=[0, 0], digests=[])
    with pytest.raises(AssertionError, match="1 images, 2 splits"):
        ImageIndex(index_of([row("a")]).images, np.zeros(2, np.bool_))


# Damage


@given(ROWS.filter(len), st.data())
def test_flipped_and_cut_files_are_damage(rows: list[ImageRow], data: Any) -> None:
    whole = index_of(rows).to_file()
    position, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
    flipped = bytearray(whole)
    flipped[position] ^= 1 << bit
    for damaged in (bytes(flipped), whole[:position], whole + whole[:position] + b"x"):
        with pytest.raises(DamagedError, match=r"images\.bin does not match its own digest.*delete it and give"):
            ImageIndex.from_file(PATH, damaged)
        with pytest.raises(DamagedError, match=r"images\.bin does not match its own digest.*make verify"):
            ImageList.from_file(PATH, damaged)


def test_a_list_is_no_index_and_an_index_no_list() -> None:
    index = index_of([row("a")])
    with pytest.raises(DamagedError, match="list of a whole data set"):
        ImageList.from_file(PATH, index.to_file())
    with pytest.raises(DamagedError, match="image list of a store"):
        ImageIndex.from_file(PATH, index.images.to_file())


HEADER = (
    b'{"format": "decant image list", "version": 1, "location": "", "cache_dir": "", "classes": ["c"], '
    b'"num_images": %d, "key_bytes": %d, "is_divided": %s}'
)
ONE = [np.array([1], "<u4"), np.frombuffer(b"a", "u1"), np.array([0], "<i4"), np.zeros(16, "u1"), np.zeros(1, "u1")]


def planted(header: bytes, **changes: Any) -> bytes:
    names = ("lengths", "keys", "labels", "digests", "split")
    return encode_columns(header, [changes.get(name, column) for name, column in zip(names, ONE, strict=True)])


@pytest.mark.parametrize(
    ("header", "changes", "found"),
    [
        (HEADER % (2**60, 1, b"true"), {}, "its header tells of"),
        (HEADER % (1, 2**60, b"true"), {}, "its header tells of"),
        (HEADER % (2**31, 2**31, b"false"), {}, "its header tells of"),
        (HEADER % (10**30, 1, b"true"), {}, "its header tells of"),
        (HEADER % (-1, 1, b"true"), {}, "greater than or equal to 0"),
        (HEADER % (0, 1, b"true"), {}, "its header tells of"),
        (HEADER % (1, 1, b"2"), {}, "is_divided"),
        ((HEADER % (1, 1, b"true")).replace(b'"version": 1', b'"version": 2'), {}, "version"),
        ((HEADER % (1, 1, b"true")).replace(b"image list", b"image lost"), {}, "format"),
        (b"[" * 100_000, {}, "JSON"),
        (b"", {}, "JSON"),
        (b"\xff\xfe", {}, "JSON"),
        (HEADER % (1, 1, b"true"), {"labels": np.array([1], "<i4")}, "labels from 1 to 1 of 1 classes"),
        (HEADER % (1, 1, b"true"), {"labels": np.array([-2], "<i4")}, "labels from -2 to -2 of 1 classes"),
        (HEADER % (1, 1, b"true"), {"split": np.array([2], "u1")}, "neither train nor eval"),
        (HEADER % (1, 1, b"true"), {"keys": np.array([255], "u1")}, "no text"),
        (HEADER % (1, 1, b"true"), {"lengths": np.array([2**32 - 1], "<u4")}, "keys of 4,294,967,295 bytes"),
    ],
)  # fmt: skip
def test_files_made_to_harm_are_damage_and_take_no_memory(header: bytes, changes: dict[str, Any], found: str) -> None:
    """Whoever makes such a file can seal it as well."""
    data = planted(header, **changes)
    tracemalloc.start()
    with pytest.raises(DamagedError, match=found):
        ImageIndex.from_file(PATH, data)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_the_planted_files_are_whole_but_for_what_is_planted() -> None:
    assert ImageIndex.from_file(PATH, planted(HEADER % (1, 1, b"true"))).images.keys == ("a",)


# Size


def test_a_list_takes_few_bytes_an_image_on_disk_and_in_memory() -> None:
    count = 50_000
    keys = [f"train/n{number // 1300:08d}/n{number // 1300:08d}_{number:07d}.JPEG" for number in range(count)]
    images = ImageList(
        location="", classes=("c",), keys=Keys.encode(keys), labels=np.zeros(count, np.int32),
        digests=Digests(np.zeros((count, 16), np.uint8)),
    )  # fmt: skip
    data = images.to_file()
    key_bytes = len(keys[0])
    assert len(data) < count * (key_bytes + 4 + 4 + 16) + 1000
    tracemalloc.start()
    loaded = ImageList.from_file(PATH, data)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert loaded == images
    assert kept < 9 * count, "only where each key starts, beside the file itself"
    assert peak < 9 * count + 8e6
    assert len(data) + FINGERPRINT_CHARS < 3_500_000
