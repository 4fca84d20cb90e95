"""Tars of images: formats, names, labels, patterns and divisions."""

import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset

from storage.errors import InputError
from storage.image_index import build_index
from storage.image_tars import split_member
from storage.images import open_images
from tests.fixtures.tars import add, contents


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
    with pytest.raises(InputError, match=r"no file matches .*set-004\.tar"):
        open_images(str(tmp_path / "set-{000..009}.tar"))
    with pytest.raises(InputError, match=r"no file matches .*val-\*\.tar"):
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


def test_names_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.tar"))
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        add(archive, os.fsdecode(b"caf\xe9.png"), b"x")
    with pytest.raises(InputError, match=r"'caf.*' in .* is not valid UTF-8"):
        build_index(str(tmp_path), eval_fraction=0, seed=0, cache_dir=tmp_path / "cache")
