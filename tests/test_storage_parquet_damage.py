"""Parquet files that are cut, damaged or made to harm: refused by name, and no memory is taken for what they claim."""

import itertools
import resource
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import storage.image_parquet
import storage.parquet_footer
import storage.parquet_table
from storage.errors import BadImageError, DamagedError, DecantError, InputError
from storage.images import open_images
from storage.parquet_table import ImageTable, measure_pages
from tests.fixtures.parquet import MakeParquet, hub_table
from tests.fixtures.tars import contents


@pytest.mark.parametrize("kept", [0, 3, 4, 11, 12, 500, -1, -4, -9])
def test_a_cut_file_is_damaged(make_parquet: MakeParquet, kept: int) -> None:
    path = make_parquet()
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DamagedError, match=r"0\.parquet .*fetch or make it again"):
        contents(path)


def test_other_files_are_damaged(make_parquet: MakeParquet) -> None:
    path = make_parquet()
    for data in (b"<html>404</html>" * 100, b"PAR1" + b"\xff" * 100 + b"PAR1", b"PAR1" * 10):
        path.write_bytes(data)
        with pytest.raises(DamagedError, match=r"0\.parquet"):
            contents(path)


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_no_changed_byte_does_harm(make_parquet: MakeParquet, compression: str) -> None:
    """With checksums of pages, as some writers make them, no image is ever another one than was written."""
    table = hub_table([b"%d" % n * 60 for n in range(7)], [n % 2 for n in range(7)], ["cat", "dog"])
    path = make_parquet("0.parquet", table, compression=compression, write_page_checksum=True)
    whole, truth = path.read_bytes(), contents(path)
    footer = len(whole) - int.from_bytes(whole[-8:-4], "little") - 8
    found = set()
    for place, bit in itertools.product(range(4, len(whole), 5), (1, 64)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        try:
            now = contents(path)
        except (DecantError, BadImageError) as error:
            found.add(type(error).__name__)
            assert "0.parquet" in str(error) or isinstance(error, BadImageError)
        else:
            assert place >= footer or now == truth
    assert "DamagedError" in found


def test_a_file_that_becomes_shorter_meanwhile(make_parquet: MakeParquet) -> None:
    path = make_parquet()
    source = open_images(str(path))
    source.list_images()
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(DamagedError, match=r"0\.parquet"):
        source.read_bytes("0/00000006")
    path.unlink()
    with pytest.raises(InputError, match=r"0\.parquet cannot be read: No such file"):
        source.read_bytes("0/00000000")
    for key in ("0/00000007", "1/00000000", "0/7", "0/0000000a", "0/²0000000", "00000000", ""):
        with pytest.raises(BadImageError, match="no longer in"):
            source.read_bytes(key)


def test_an_image_larger_than_the_limit_is_a_bad_image(
    make_parquet: MakeParquet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage.image_parquet, "MAX_IMAGE_BYTES", 2**20 - 1)
    source = open_images(str(make_parquet("0.parquet", hub_table([bytes(2**20), b"b"]))))
    with pytest.raises(BadImageError, match="larger than 0 MiB"):
        source.read_bytes("0/00000000")
    assert source.read_bytes("0/00000001") == b"b"


# Bombs


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(storage.parquet_table, "MAX_CHUNK_BYTES", 2**24)
    return 2**24


def test_a_row_group_that_declares_too_much_is_not_unpacked(
    make_parquet: MakeParquet, small_limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_parquet("0.parquet", hub_table([bytes(2**25)]), compression="zstd", use_dictionary=False)
    assert path.stat().st_size < 100_000
    monkeypatch.setattr(ImageTable, "_unpack", lambda *_: pytest.fail("unpacked"))
    with pytest.raises(InputError, match=r"0\.parquet: column 'image.bytes' of row group 0 takes 34 MB or more"):
        open_images(str(path)).list_images()


def test_pages_are_measured_whatever_the_footer_says(
    make_parquet: MakeParquet, small_limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_parquet("0.parquet", hub_table([bytes(2**25)]), compression="zstd", use_dictionary=False)
    parse = storage.parquet_footer._chunk
    monkeypatch.setattr(storage.parquet_footer, "_chunk", lambda meta: parse(meta)._replace(unpacked_bytes=100))
    source = open_images(str(path))
    source.list_images()
    monkeypatch.setattr(ImageTable, "_unpack", lambda *_: pytest.fail("unpacked"))
    with pytest.raises(InputError, match=r"of row group 0 takes 34 MB or more, the limit is 17 MB"):
        source.read_bytes("0/00000000")


@pytest.mark.parametrize("encoding", ["dictionary", "DELTA_BYTE_ARRAY"])
def test_one_value_in_many_rows_is_not_unpacked_whole(
    make_parquet: MakeParquet, small_limit: int, encoding: str
) -> None:
    """A megabyte that stands in 4,000 rows would take four gigabytes."""
    options = {"use_dictionary": True, "dictionary_pagesize_limit": 2**22}
    if encoding != "dictionary":
        options = {"use_dictionary": False, "column_encoding": {"image.bytes": encoding}}  # type: ignore[dict-item]
    value = np.random.default_rng(0).bytes(2**20)
    path = make_parquet("0.parquet", hub_table([value] * 400), rows=400, compression="none", **options)
    assert path.stat().st_size < 2**23
    before = peak_bytes()
    with pytest.raises(InputError, match="of row group 0 takes"):
        open_images(str(path)).read_bytes("0/00000000")
    assert peak_bytes() - before < 2**27


def test_rows_are_not_believed(make_parquet: MakeParquet) -> None:
    path = make_parquet("0.parquet", pa.table({"image": pa.nulls(2_000_000, pa.binary())}), rows=2_000_000)
    assert path.stat().st_size < 100_000
    with pytest.raises(InputError, match=r"0\.parquet claims 2,000,000 images in [\d,]+ bytes"):
        open_images(str(path)).list_images()


@pytest.mark.timeout(20)
def test_pages_made_to_harm_end() -> None:
    for data in (b"\x19\xff" + b"\xff" * 9 + b"\x01", b"\x1c" * 10_000, b"\x15" + b"\xff" * 20, b"\x00", b"\x1b\x00"):
        with pytest.raises(ValueError):
            measure_pages(data)
    for seed in range(2000):
        data = np.random.default_rng(seed).bytes(200)
        try:
            measure_pages(data)
        except ValueError:
            continue


def test_pages_are_measured_as_the_library_does(make_parquet: MakeParquet) -> None:
    """The footer's sizes are those of all pages and their headers."""
    images = [np.random.default_rng(n).bytes(3000) for n in range(50)]
    path = make_parquet(
        "0.parquet",
        hub_table(images),
        rows=50,
        compression="none",
        use_dictionary=False,
        data_page_size=9000,
        write_batch_size=1,
    )
    found = pq.ParquetFile(path).metadata.row_group(0).column(0)
    start = found.dictionary_page_offset or found.data_page_offset
    data = path.read_bytes()[start : start + found.total_compressed_size]
    pages = measure_pages(data)
    num_pages = 17  # of three images
    assert 0 < found.total_uncompressed_size - pages.total_bytes < num_pages * 6100  # headers hold two images each
    assert sum(map(len, images)) < pages.total_bytes and 9000 < pages.largest_bytes < 9100
    with pytest.raises(ValueError, match="no page at"):
        measure_pages(data[:-1])


def test_names_that_are_no_text(make_parquet: MakeParquet) -> None:
    binary = pa.StructArray.from_arrays(
        [pa.array([b"a"], pa.binary()), pa.array([b"\xff\xfe"], pa.binary()).view(pa.string())], ["bytes", "path"]
    )
    with pytest.raises(DamagedError, match=r"0\.parquet is damaged: 'utf-8'"):
        open_images(str(make_parquet("0.parquet", pa.table({"image": binary})))).list_images()
    broken = hub_table([b"a"], [0], ["cat\\ud800"])
    broken = broken.replace_schema_metadata(
        {b"huggingface": broken.schema.metadata[b"huggingface"].replace(b"\\\\", b"\\")}
    )
    (entry,) = open_images(str(make_parquet("1.parquet", broken))).list_images()
    assert entry.class_name == "0"


def test_a_hidden_file_is_passed_over(make_parquet: MakeParquet, tmp_path: Path) -> None:
    expected = contents(make_parquet())
    (tmp_path / "._0.parquet").write_bytes(b"a finder's leftover")
    assert contents(tmp_path) == expected
