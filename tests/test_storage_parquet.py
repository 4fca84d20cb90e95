"""Parquet files of images: against pyarrow's own reader, and against a folder of the same images."""

import io
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import storage.parquet_footer
from storage.errors import BadImageError, InputError
from storage.image_index import ImageIndex, build_index
from storage.images import open_images
from storage.parquet_table import ImageTable
from tests.fixtures.parquet import MakeParquet, hub_table
from tests.fixtures.tars import contents


def listed(location: str | Path) -> dict[str, tuple[str | None, str | None]]:
    return {entry.key: (entry.class_name, entry.split) for entry in open_images(str(location)).list_images()}


@settings(max_examples=40)
@given(data=st.data())
def test_the_same_rows_as_pyarrows_own_reader(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Over row groups, compressions, pages, encodings and empty rows; keys come in the order of reading."""
    root = tmp_path_factory.mktemp("data")
    truth = {}
    for stem in data.draw(st.sets(st.sampled_from(["a", "a-b", "a.b", "a1", "B", "é"]), min_size=1)):
        images = data.draw(st.lists(st.one_of(st.none(), st.binary(max_size=90)), max_size=40))
        labels = [None if n % 7 == 3 else n % 3 - 1 for n in range(len(images))]
        table = hub_table(images, pa.array(labels, pa.int64()), ["cat", "dog"])
        pq.write_table(
            table, root / f"{stem}.parquet", row_group_size=data.draw(st.integers(1, 50)),
            data_page_size=data.draw(st.integers(1, 200)), use_dictionary=data.draw(st.booleans()),
            compression=data.draw(st.sampled_from(["none", "snappy", "zstd", "gzip", "brotli", "lz4"])),
            data_page_version=data.draw(st.sampled_from(["1.0", "2.0"])),
        )  # fmt: skip
        for row, found in enumerate(pq.read_table(root / f"{stem}.parquet").to_pylist()):
            label = {None: None, -1: None, 0: "cat", 1: "dog"}[found["label"]]
            truth[f"{stem}/{row:08d}"] = (found["image"]["bytes"], label)
    if not truth:
        with pytest.raises(InputError, match="no row in"):
            open_images(str(root)).list_images()
        return
    source = open_images(str(root))
    entries = source.list_images()
    assert [entry.key for entry in entries] == sorted(truth)
    for entry in entries:
        image, label = truth[entry.key]
        assert entry.class_name == label
        if image is None:
            with pytest.raises(BadImageError, match="the row holds no image"):
                source.read_bytes(entry.key)
        else:
            assert source.read_bytes(entry.key) == image


def test_the_same_images_as_a_folder_of_them(make_images: Callable[..., Path], make_parquet: MakeParquet) -> None:
    """Digests, labels, division and pixels; only the keys differ."""
    root = make_images()
    files = sorted(root.rglob("*.png"))
    table = hub_table(
        [file.read_bytes() for file in files], [int(file.parent.name == "light") for file in files], ["dark", "light"],
    )  # fmt: skip
    shards = make_parquet("data/all.parquet", table).parent
    cache = root.parent / "cache"
    plain, found = (build_index(str(place), eval_fraction=0, seed=0, cache_dir=cache) for place in (root, shards))
    assert found.images.digests == plain.images.digests and found.classes == plain.classes
    assert found.images.labels_fingerprint == plain.images.labels_fingerprint
    again = ImageIndex.from_file(cache, found.to_file()).images
    for position in range(len(files)):
        np.testing.assert_array_equal(again.read_image(position), plain.images.read_image(position))
    assert found.images.keys[3] == "all/00000003"


@pytest.mark.parametrize("rows", [3, 100])
def test_names_of_files_divide_and_the_folder_data_is_found(
    make_parquet: MakeParquet, tmp_path: Path, rows: int
) -> None:
    make_parquet("data/train-00000-of-00002.parquet", hub_table([b"a"], [0]), rows=rows)
    make_parquet("data/train-00001-of-00002.parquet", hub_table([b"b", b"c"], [1, 10]), rows=rows)
    assert {split for _, split in listed(tmp_path).values()} == {None}
    make_parquet("data/validation-00000-of-00001.parquet", hub_table([b"d"], [-1]), rows=rows)
    expected = {
        "train-00000-of-00002/00000000": ("0", "train"), "train-00001-of-00002/00000000": ("1", "train"),
        "train-00001-of-00002/00000001": ("10", "train"), "validation-00000-of-00001/00000000": (None, "eval"),
    }  # fmt: skip
    assert listed(tmp_path) == listed(tmp_path / "data") == listed(tmp_path / "data" / "*.parquet") == expected
    one = tmp_path / "data" / "train-{00001..00001}-of-00002.parquet"
    assert listed(one) == listed(one.with_name("train-00001-of-00002.parquet"))
    assert list(listed(one)) == ["train-00001-of-00002/00000000", "train-00001-of-00002/00000001"]
    with pytest.raises(InputError, match=r"no file matches .*test-\*\.parquet"):
        open_images(str(tmp_path / "data" / "test-*.parquet"))


BYTES = pa.array([b"1", b"2"], pa.binary())


@pytest.mark.parametrize(
    ("columns", "labels"),
    [
        ({"img": BYTES, "fine_label": [3, 4], "coarse_label": [0, 0]}, ["3", "4"]),
        ({"jpg": BYTES, "cls": ["cat", "dog"], "json": BYTES}, ["cat", "dog"]),
        ({"image": BYTES.cast(pa.large_binary()), "label": pa.array([1, 2], pa.uint8())}, ["1", "2"]),
        ({"bytes": BYTES, "label": pa.array(["a", "b"]).dictionary_encode()}, ["a", "b"]),
        ({"png": BYTES, "label": [0.5, 1.5]}, [None, None]),
        ({"x": pa.StructArray.from_arrays([BYTES], ["bytes"]), "image": BYTES}, [None, None]),
        ({"png": BYTES, "jpg": pa.array([b"x", b"y"])}, None),
    ],
)
def test_columns_are_found_by_type_and_name(
    make_parquet: MakeParquet, columns: dict[str, object], labels: list[str | None] | None
) -> None:
    path = make_parquet("0.parquet", pa.table(columns))
    if labels is None:  # jpg stands before png in the list of names
        assert contents(path) == {"0/00000000": b"x", "0/00000001": b"y"}
        return
    assert [label for label, _ in listed(path).values()] == labels
    assert contents(path) == {"0/00000000": b"1", "0/00000001": b"2"}


@pytest.mark.parametrize(
    "columns", [{"text": ["a", "b"], "label": [0, 1]}, {"blob": BYTES}, {"image": [[b"1"], [b"2"]]}]
)
def test_files_without_a_column_of_images_are_refused(make_parquet: MakeParquet, columns: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"0\.parquet has no one column of images; expected a struct .*; found"):
        open_images(str(make_parquet("0.parquet", pa.table(columns)))).list_images()


def test_files_that_do_not_belong_together_are_refused(make_parquet: MakeParquet, tmp_path: Path) -> None:
    make_parquet("a.parquet", hub_table([b"a"], [0], ["cat"]))
    make_parquet("b.parquet", hub_table([b"b"], [0], ["dog"]))
    with pytest.raises(InputError, match=r"a\.parquet and .*b\.parquet do not belong together: .*cat.* and .*dog"):
        open_images(str(tmp_path)).list_images()
    (tmp_path / "b.parquet").rename(tmp_path / "b.tar")
    with pytest.raises(InputError, match="holds tars and Parquet files; choose one kind"):
        open_images(str(tmp_path))


def test_a_label_without_a_name_is_refused(make_parquet: MakeParquet) -> None:
    with pytest.raises(InputError, match="holds the label 2, but names 2 classes"):
        listed(make_parquet("0.parquet", hub_table([b"a"], [2], ["cat", "dog"])))


def test_each_row_group_is_unpacked_once_by_many_threads(
    make_parquet: MakeParquet, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [b"%d" % n * 50 for n in range(600)]
    path = make_parquet("0.parquet", hub_table(images), rows=40)
    unpacked: list[int] = []
    read_images = ImageTable.read_images

    def counted(self: ImageTable, group: int) -> object:
        unpacked.append(group)
        return read_images(self, group)

    monkeypatch.setattr(ImageTable, "read_images", counted)
    source = open_images(str(path))
    barrier = threading.Barrier(8)

    def read(first: int) -> list[bytes]:
        barrier.wait()
        return [source.read_bytes(f"0/{row:08d}") for row in range(first, 600, 8)]

    with ThreadPoolExecutor(8) as pool:
        for first, found in enumerate(pool.map(read, range(8))):
            assert found == images[first::8]
    assert sorted(unpacked) == list(range(15))


def test_a_source_travels_to_another_process_as_its_files_alone(make_parquet: MakeParquet) -> None:
    source = open_images(str(make_parquet()))
    source.list_images()
    data = source.read_bytes("0/00000006")
    sent = pickle.dumps(source)
    assert len(sent) < 2000 and pickle.loads(sent).read_bytes("0/00000006") == data == b"6" * 700


def test_a_forked_child_reads_what_its_parent_was_reading(
    make_parquet: MakeParquet, fork: Callable[[Callable[[], object]], int]
) -> None:
    import os

    source = open_images(str(make_parquet()))
    source.read_bytes("0/00000000")
    with source._groups._mine.changed:  # a thread of the parent that does not exist in the child  # type: ignore
        pid = fork(lambda: source.read_bytes("0/00000006"))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_names_of_the_images_own_files_are_told(make_parquet: MakeParquet) -> None:
    table = hub_table([b"a", b"b", b"c"], names=["n01_7_n01.JPEG", None, "x/y.png"])
    entries = open_images(str(make_parquet("0.parquet", table))).list_images()
    assert [entry.name for entry in entries] == ["n01_7_n01.JPEG", "", "x/y.png"]


def test_digests_are_taken_again_when_the_file_changes(make_parquet: MakeParquet, tmp_path: Path) -> None:
    def png(grey: int) -> bytes:
        file = io.BytesIO()
        Image.new("L", (4, 4), grey).save(file, "PNG")
        return file.getvalue()

    def build() -> ImageIndex:
        return build_index(str(tmp_path / "d"), eval_fraction=0, seed=0, cache_dir=tmp_path / "cache")

    make_parquet("d/0.parquet", hub_table([png(1), png(2)]))
    first = build()
    assert build() == first
    make_parquet("d/0.parquet", hub_table([png(1), png(3)]))
    assert [a == b for a, b in zip(first.images.digests, build().images.digests, strict=True)] == [True, False]
    with pytest.raises(InputError, match="has changed since it was listed"):
        first.images.at(first.location).read_image(1)


def test_a_missing_library_is_named(make_parquet: MakeParquet, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    path = make_parquet()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError.__mro__[1], match=r"pip install 'decant-fd\[parquet\]'"):
        open_images(str(path)).list_images()


def test_a_footer_longer_than_the_first_read(make_parquet: MakeParquet) -> None:
    classes = [f"{n:020d}" for n in range(storage.parquet_footer._END_BYTES // 20)]
    path = make_parquet("0.parquet", hub_table([b"a"], [7], classes))
    assert listed(path) == {"0/00000000": (classes[7], None)} and contents(path) == {"0/00000000": b"a"}
