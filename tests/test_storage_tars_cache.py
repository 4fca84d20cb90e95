"""The cache of where the members of tars lie: headers are read once, and again when something changed."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import storage.image_tars
from storage.data_files import LocalFile
from storage.errors import BadImageError
from storage.image_index import ImageIndex, build_index
from storage.images import open_images
from storage.tar_members import TarMembers, TarStat, load_members, save_members


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The tars whose headers are read from now on."""
    found: list[Path] = []
    scan = storage.image_tars._scan

    def counted(part: Any, *others: Any) -> Any:
        found.append(Path(part.name))
        return scan(part, *others)

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
    stats = [TarStat.of(LocalFile(Path(location)))]
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
