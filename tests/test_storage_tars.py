"""Tars of images: patterns, labels, divisions; cut, damaged and hostile tars."""

import gzip
import io
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

import storage.image_tars
from storage.errors import BadImageError, DamagedError, InputError
from storage.image_index import ImageIndex, build_index
from storage.image_tars import split_member
from storage.images import open_images
from storage.tar_members import TarMembers, TarStat, load_members, save_members

Members = dict[str, bytes]


def add(archive: tarfile.TarFile, name: str, data: bytes = b"", **fields: Any) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    archive.addfile(info, io.BytesIO(data))


@pytest.fixture
def make_tar(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str = "0.tar", members: Members | None = None) -> Path:
        path = tmp_path / name
        with tarfile.open(path, "w") as archive:
            for member, data in (members or {f"{n}.png": b"%d" % n * 700 for n in range(4)}).items():
                add(archive, member, data)
        return path

    return make


def contents(location: str | Path) -> Members:
    source = open_images(str(location))
    return {entry.key: source.read_bytes(entry.key) for entry in source.list_images()}


def keys(location: str | Path) -> list[str]:
    return [entry.key for entry in open_images(str(location)).list_images()]


def test_tars_of_webdatasets_own_writer(tmp_path: Path) -> None:
    samples = {f"{n:04d}": bytes([n]) * (n * 100) for n in range(12)}
    with webdataset.TarWriter(str(tmp_path / "0.tar")) as writer:
        for key, data in samples.items():
            writer.write({"__key__": key, "jpg": data, "cls": int(key) % 3, "json": {"a": 1}, "txt": "words"})
    source = open_images(str(tmp_path / "0.tar"))
    entries = source.list_images()
    assert [(e.key, e.class_name) for e in entries] == [(f"{key}.jpg", str(int(key) % 3)) for key in samples]
    for entry, data in zip(entries, samples.values(), strict=True):
        assert source.read_bytes(entry.key) == data and entry.num_bytes == len(data)


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_of_tar_and_long_names(tmp_path: Path, kind: int) -> None:
    long = "a" * 60 + "/" + "b" * 90
    expected = {"cat/1.jpg": b"x" * 513, f"{long}.png": b"y" * 512, "é/ü.webp": b""}
    with tarfile.open(tmp_path / "0.tar", "w", format=kind) as archive:
        for name, data in expected.items():
            add(archive, name, data)
    assert contents(tmp_path) == expected


def test_labels_suffixes_and_members_that_are_no_images(make_tar: Callable[..., Path]) -> None:
    members = {
        "./x/a.JPG": b"A", "x/a.cls": b"7\n", "b.cls": b" dog ", "b.jpeg": b"B", "c.png": b"C", "c.cls": b"",
        "d.seg.png": b"D", "d.npy": b"N", "e": b"E", "f.cls.txt": b"cat", "f.gif": b"F", "g.bmp": b"G",
        "g.cls": b"9" * 5000,
    }  # fmt: skip
    entries = open_images(str(make_tar(members=members))).list_images()
    labels = {entry.key: entry.class_name for entry in entries}
    assert labels == {"x/a.jpg": "7", "b.jpeg": "dog", "c.png": None, "f.gif": "cat", "g.bmp": None}


@pytest.mark.parametrize("name", ["a.jpg", "a/b.c/d.seg.png", "/abs/x.y", "/abs.jpg", "../x.jpg", "a//b.PNG"])
def test_members_are_split_like_webdataset_does(name: str) -> None:
    from webdataset.tariterators import base_plus_ext

    stem, suffix = base_plus_ext(name)
    assert split_member(name) == (stem, suffix.lower())
    assert split_member(f"./{name}") == split_member(name)


def test_several_tars_patterns_and_ranges(make_tar: Callable[..., Path], tmp_path: Path) -> None:
    for n in range(4):
        make_tar(f"set-{n:03d}.tar", {f"{n}.png": b"%d" % n})
    make_tar("other.tar", {"z.png": b"z"})
    (tmp_path / "._set-000.tar").write_bytes(b"a finder's leftover")
    assert keys(tmp_path) == ["0.png", "1.png", "2.png", "3.png", "z.png"]
    assert keys(tmp_path / "set-*.tar") == ["0.png", "1.png", "2.png", "3.png"]
    assert keys(tmp_path / "set-{001..002}.tar") == ["1.png", "2.png"]
    assert keys(tmp_path / "{set-00[03],other}.tar") == ["0.png", "3.png", "z.png"]
    assert contents(tmp_path / "set-00?.tar") == {f"{n}.png": b"%d" % n for n in range(4)}
    with pytest.raises(InputError, match=r"no tar matches .*set-004\.tar"):
        open_images(str(tmp_path / "set-{000..009}.tar"))
    with pytest.raises(InputError, match=r"no tar matches .*val-\*\.tar"):
        open_images(str(tmp_path / "{set,val}-*.tar"))


def test_names_of_tars_divide_only_when_both_parts_are_there(make_tar: Callable[..., Path], tmp_path: Path) -> None:
    make_tar("net1k-train-00.tar", {"a.png": b"a"})
    assert {entry.split for entry in open_images(str(tmp_path)).list_images()} == {None}
    make_tar("net1k-validation-00.tar", {"b.png": b"b"})
    make_tar("net1k-extra.tar", {"c.png": b"c"})
    found = {entry.key: entry.split for entry in open_images(str(tmp_path)).list_images()}
    assert found == {"a.png": "train", "b.png": "eval", "c.png": None}


def test_listing_twice_is_the_same_and_reading_needs_no_listing(make_tar: Callable[..., Path]) -> None:
    path = make_tar()
    source = open_images(str(path))
    assert source.list_images() == source.list_images()
    assert open_images(str(path)).read_bytes("2.png") == b"2" * 700


def test_a_key_may_stand_only_once(make_tar: Callable[..., Path], tmp_path: Path) -> None:
    first = make_tar("0.tar", {"a.png": b"a", "b.png": b"b"})
    second = make_tar("1.tar", {"c.png": b"c", "a.jpg": b"other"})
    with pytest.raises(InputError, match=f"'a' stands twice: in {first} and as a.jpg in {second}"):
        open_images(str(tmp_path)).list_images()
    with tarfile.open(second, "w") as archive:
        for data in (b"1", b"2", b"3"):
            add(archive, "x.png", data)
    with pytest.raises(InputError, match=f"'x' stands twice: in {second} and as x.png in {second}"):
        open_images(str(second)).list_images()


# Damage. `make_tar` writes four members, each a header of 512 bytes and 1,024 bytes of payload; the end is at 6,144.


def damaged(path: Path, change: Callable[[bytearray], bytes | bytearray]) -> str:
    path.write_bytes(change(bytearray(path.read_bytes())))
    with pytest.raises(DamagedError, match=re.escape(str(path))) as error:
        open_images(str(path)).list_images()
    return str(error.value)


@pytest.mark.parametrize("cut", [0, 1, 511, 512, 1000, 1536, 1537, 1800, 3072, 3583, 4000, 6143, 6144, 6400, 6655])
def test_a_cut_tar_is_never_taken_for_a_shorter_one(make_tar: Callable[..., Path], cut: int) -> None:
    damaged(make_tar(), lambda data: data[:cut])


@pytest.mark.parametrize(("start", "size"), [(0, 512), (0, 1536), (1536, 512), (1536, 3072), (3072, 1024), (4608, 512)])
def test_zeros_inside_are_not_taken_for_the_end(make_tar: Callable[..., Path], start: int, size: int) -> None:
    def zero(data: bytearray) -> bytearray:
        data[start : start + size] = bytes(size)
        return data

    assert f"byte {start}" in damaged(make_tar(), zero)


@pytest.mark.parametrize("offset", [0, 100, 1536, 1536 + 124, 4608 + 148])
def test_a_changed_header_is_found(make_tar: Callable[..., Path], offset: int) -> None:
    def flip(data: bytearray) -> bytearray:
        data[offset] ^= 4
        return data

    damaged(make_tar(), flip)


def test_two_tars_in_one_file_compressed_tars_and_other_files_are_refused(make_tar: Callable[..., Path]) -> None:
    assert "goes on after" in damaged(make_tar(), lambda data: data + data)
    assert "not a whole, uncompressed tar" in damaged(make_tar(), gzip.compress)
    assert "not a whole, uncompressed tar" in damaged(make_tar(), lambda _: b"<html>404</html>" * 100)
    packed = make_tar().rename(make_tar().with_suffix(".tar.gz"))
    with pytest.raises(InputError, match="a file of another kind"):
        open_images(str(packed))
    empty = make_tar("e.tar", {"a.txt": b""})
    with pytest.raises(InputError, match=r"no image in 1 tar\(s\)"):
        open_images(str(empty)).list_images()


def test_a_tar_that_changes_later_gives_bad_images(make_tar: Callable[..., Path]) -> None:
    path = make_tar()
    source = open_images(str(path))
    source.list_images()
    path.write_bytes(path.read_bytes()[: 1536 + 600])
    with pytest.raises(BadImageError, match=r"0\.tar ends 612 bytes too early"):
        source.read_bytes("1.png")
    path.unlink()
    with pytest.raises(BadImageError, match=r"0\.tar cannot be read: No such file"):
        source.read_bytes("0.png")
    make_tar(members={"other.png": b""})
    with pytest.raises(BadImageError, match="no longer in the tars"):
        open_images(str(path)).read_bytes("0.png")


# Hostile tars


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["SENTINEL"],)


@pytest.mark.timeout(30)
def test_hostile_members_do_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    monkeypatch.setenv("SENTINEL", str(tmp_path / "sentinel"))
    monkeypatch.chdir(tmp_path)
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        add(archive, "../../escape.png", b"up")
        add(archive, "/absolute.png", b"root")
        add(archive, "line\nfeed.png", b"feed")
        add(archive, "link.png", type=tarfile.SYMTYPE, linkname=str(secret))
        add(archive, "hard.png", type=tarfile.LNKTYPE, linkname="../secret.png")
        add(archive, "device.png", type=tarfile.CHRTYPE, devmajor=1, devminor=5)
        add(archive, "pipe.png", type=tarfile.FIFOTYPE)
        add(archive, "folder.png", type=tarfile.DIRTYPE)
        add(archive, "sparse.png", bytes(512), type=tarfile.GNUTYPE_SPARSE)
        add(archive, "z.pyd", pickle.dumps(Bomb()))
        add(archive, "z.pkl", pickle.dumps(Bomb()))
        add(archive, "z.cls", pickle.dumps(Bomb()))
    before = sorted(tmp_path.parent.rglob("*"))
    assert contents(path) == {"../../escape.png": b"up", "/absolute.png": b"root", "line\nfeed.png": b"feed"}
    assert sorted(tmp_path.parent.rglob("*")) == before


def header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.timeout(30)
def test_claimed_sizes_are_not_believed(tmp_path: Path, make_tar: Callable[..., Path], monkeypatch: Any) -> None:
    for claimed in (2**50, -512, -1024):
        (tmp_path / "0.tar").write_bytes(header("a.png", 3) + bytes(512) + header("b.png", claimed) + bytes(10240))
        with pytest.raises(DamagedError):
            open_images(str(tmp_path / "0.tar")).list_images()
    monkeypatch.setattr(storage.image_tars, "MAX_IMAGE_BYTES", 699)
    with pytest.raises(BadImageError, match="larger than"):
        open_images(str(make_tar())).read_bytes("0.png")


# The cache of where the members lie


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The tars whose headers are read from now on."""
    found: list[Path] = []
    scan = storage.image_tars._scan

    def counted(tar: Path, *others: Any) -> Any:
        found.append(tar)
        return scan(tar, *others)

    monkeypatch.setattr(storage.image_tars, "_scan", counted)
    return found


def test_headers_are_read_once(make_tar: Callable[..., Path], tmp_path: Path, scans: list[Path]) -> None:
    tars = [
        make_tar("train-0.tar", {"b.png": b"B", "b.cls": b"dog", "a/é.jpg": b"A" * 600}),
        make_tar("val-0.tar", {"c.png": b"", "c.cls": b"cat"}),
    ]
    plain, cache = open_images(str(tmp_path)), tmp_path / "cache"
    cache.mkdir()
    truth = plain.list_images()
    assert [(e.key, e.class_name, e.split) for e in truth] == [
        ("a/é.jpg", None, "train"), ("b.png", "dog", "train"), ("c.png", "cat", "eval"),
    ]  # fmt: skip
    scans.clear()
    for expected in (tars, []):
        source = open_images(str(tmp_path), cache)
        assert source.list_images() == truth and scans == expected
        assert [source.read_bytes(e.key) for e in truth] == [b"A" * 600, b"B", b""]
        scans.clear()
    reader = open_images(str(tmp_path), cache)
    assert reader.read_bytes("b.png") == b"B" and scans == []
    with pytest.raises(BadImageError, match="no longer in the tars"):
        reader.read_bytes("a.png")


@pytest.mark.parametrize("change", ["time", "size", "inode", "added", "removed"])
def test_headers_are_read_again_when_a_tar_changes(
    make_tar: Callable[..., Path], tmp_path: Path, scans: list[Path], change: str
) -> None:
    first, second, cache = make_tar("0.tar", {"a.png": b"A"}), make_tar("1.tar", {"b.png": b"B"}), tmp_path / "cache"
    cache.mkdir()
    open_images(str(tmp_path), cache).list_images()
    stat = first.stat()
    if change == "time":
        os.utime(first, ns=(0, stat.st_mtime_ns + 1))
    elif change == "size":
        first.write_bytes(first.read_bytes() + bytes(512))
        os.utime(first, ns=(0, stat.st_mtime_ns))
    elif change == "inode":
        make_tar("0.tmp", {"c.png": b"C"}).rename(first)
        os.utime(first, ns=(0, stat.st_mtime_ns))
    elif change == "added":
        make_tar("2.tar", {"d.png": b"D"})
    else:
        second.unlink()
    truth = open_images(str(tmp_path)).list_images()
    scans.clear()
    assert open_images(str(tmp_path), cache).list_images() == truth and len(scans) == len(list(tmp_path.glob("*.tar")))


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "folder"])
def test_a_damaged_or_unusable_cache_costs_a_scan_and_nothing_else(
    make_tar: Callable[..., Path], tmp_path: Path, scans: list[Path], damage: str
) -> None:
    location, cache = str(make_tar()), tmp_path / "cache"
    cache.mkdir()
    truth = open_images(location, cache).list_images()
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    if damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        path.write_bytes({"flip": flipped, "cut": whole[:-1], "empty": b""}[damage])
    scans.clear()
    source = open_images(location, cache)
    assert source.list_images() == truth and len(scans) == 1
    assert source.read_bytes("2.png") == b"2" * 700
    assert damage == "folder" or path.read_bytes() == whole


def test_a_cache_made_to_harm_is_not_used(make_tar: Callable[..., Path], tmp_path: Path, scans: list[Path]) -> None:
    location, cache = str(make_tar("0.tar", {"a.png": b"A", "a.cls": b"dog"})), tmp_path / "cache"
    cache.mkdir()
    truth = open_images(location, cache).list_images()
    (path,) = cache.iterdir()
    stats = [TarStat.of(Path(location))]
    known = load_members(path, stats)
    assert known is not None
    for column, value in ((0, 1), (0, -2), (1, 1)):
        columns = [np.array([value], old.dtype) if n == column else old for n, old in enumerate(known.columns)]
        save_members(path, TarMembers(stats, known.classes, known.keys, columns))
        scans.clear()
        assert open_images(location, cache).list_images() == truth and len(scans) == 1
    for column, value in ((2, 2**63 - 1), (3, 2**63)):
        columns = [np.array([value], old.dtype) if n == column else old for n, old in enumerate(known.columns)]
        save_members(path, TarMembers(stats, known.classes, known.keys, columns))
        with pytest.raises(BadImageError):
            open_images(location, cache).read_bytes("a.png")


def test_workers_find_the_cache_through_the_list(
    make_tar: Callable[..., Path], tmp_path: Path, scans: list[Path]
) -> None:
    index = build_index(str(make_tar()), eval_fraction=0, seed=0, cache_dir=tmp_path / "cache")
    images = ImageIndex.from_file(tmp_path, index.to_file()).split("train")
    scans.clear()
    assert images.source.read_bytes("2.png") == b"2" * 700 and scans == []
    assert str(tmp_path).encode() not in images.at("").to_file()
    assert images.at(images.location, images.cache_dir).source.read_bytes("2.png") == b"2" * 700 and scans == []
    elsewhere = images.at(images.location, str(tmp_path / "not" / "there"))
    assert elsewhere.source.read_bytes("2.png") == b"2" * 700 and len(scans) == 1
    assert not (tmp_path / "not").exists()


def test_names_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.tar"))
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        add(archive, os.fsdecode(b"caf\xe9.png"), b"x")
    with pytest.raises(InputError, match=r"'caf.*' in .* is not valid UTF-8"):
        build_index(str(tmp_path), eval_fraction=0, seed=0, cache_dir=tmp_path / "cache")
