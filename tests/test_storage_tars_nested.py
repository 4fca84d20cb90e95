"""Tars of tars, as ImageNet's archives are: read where they lie, against tarfile's own unpacking."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from storage.errors import DamagedError, InputError
from storage.image_index import build_index
from storage.images import open_images
from tests.fixtures.tars import Members, add, contents

CLASSES: dict[str, Members] = {
    "n01440764": {"n01440764_10026.JPEG": b"a" * 700, "n01440764_10027.JPEG": b"b" * 512},
    "n01443537": {"n01443537_2.JPEG": b"c", "n01443537_10007.JPEG": b"d" * 5000},
    "n01484850": {},
}


def tar_of(members: Members) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members.items():
            add(archive, name, data)
    return buffer.getvalue()


def archive_members() -> Members:
    return {f"{name}.tar": tar_of(members) for name, members in CLASSES.items()}


def test_images_are_read_in_their_place(make_tar: Callable[..., Path]) -> None:
    path = make_tar("ILSVRC2012_img_train.tar", archive_members())
    expected = {}
    with tarfile.open(path) as outer:
        for member in outer:
            file = outer.extractfile(member)
            assert file is not None
            with tarfile.open(fileobj=file) as inner:
                for image in inner:
                    data = inner.extractfile(image)
                    assert data is not None
                    stem = image.name.removesuffix(".JPEG")
                    expected[f"{member.name.removesuffix('.tar')}/{stem}.jpeg"] = data.read()
    assert len(expected) == 4
    assert contents(path) == expected


def test_the_inner_tar_is_the_class(make_tar: Callable[..., Path]) -> None:
    entries = open_images(str(make_tar(members=archive_members()))).list_images()
    assert {entry.class_name for entry in entries} == {"n01440764", "n01443537"}
    assert all(entry.key.startswith(f"{entry.class_name}/") for entry in entries)


def test_labels_of_their_own_and_images_beside_tars(make_tar: Callable[..., Path]) -> None:
    inner = tar_of({"x.png": b"x", "x.cls": b"7", "y.png": b"y"})
    entries = open_images(str(make_tar(members={"set/one.tar": inner, "z.png": b"z"}))).list_images()
    labels = {entry.key: entry.class_name for entry in entries}
    assert labels == {"set/one/x.png": "7", "set/one/y.png": "set/one", "z.png": None}


def test_names_may_be_the_same_in_two_classes_but_not_in_one(make_tar: Callable[..., Path]) -> None:
    same = {"1.png": b"one"}
    assert contents(make_tar(members={"a.tar": tar_of(same), "b.tar": tar_of(same)})) == {
        "a/1.png": b"one", "b/1.png": b"one",
    }  # fmt: skip
    path = make_tar("1.tar", {"a.tar": tar_of({"1.png": b"x", "1.jpg": b"y"})})
    with pytest.raises(InputError, match=rf"'a/1' stands twice: in a\.tar in {path} and as 1\.jpg in a\.tar in"):
        open_images(str(path)).list_images()


def test_train_and_val_archives_side_by_side(make_tar: Callable[..., Path], tmp_path: Path) -> None:
    make_tar("ILSVRC2012_img_train.tar", archive_members())
    make_tar("ILSVRC2012_img_val.tar", {"ILSVRC2012_val_00000001.JPEG": b"v"})
    splits = {entry.key: entry.split for entry in open_images(str(tmp_path)).list_images()}
    assert splits["n01443537/n01443537_2.jpeg"] == "train"
    assert splits["ILSVRC2012_val_00000001.jpeg"] == "eval"


def test_only_one_level_is_read(make_tar: Callable[..., Path]) -> None:
    deep = tar_of({"deeper.tar": tar_of({"1.png": b"1"}), "2.png": b"2"})
    assert contents(make_tar(members={"a.tar": deep})) == {"a/2.png": b"2"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:600], r"a\.tar in .*0\.tar (is not a whole|has no end-of-archive mark)"),
        (lambda data: data[:1536], r"a\.tar in .*0\.tar has no end-of-archive mark"),
        (lambda data: b"\x1f\x8b" + data[2:], r"a\.tar in .*0\.tar is not a whole, uncompressed tar"),
        (lambda data: data + b"more", r"a\.tar in .*0\.tar goes on after its end-of-archive mark"),
        (lambda data: b"", r"a\.tar in .*0\.tar is not a whole, uncompressed tar"),
    ],
)
def test_a_damaged_inner_tar_is_named(
    damage: Callable[[bytes], bytes], message: str, make_tar: Callable[..., Path]
) -> None:
    path = make_tar(members={"a.tar": damage(tar_of({"1.png": b"1" * 513})), "b.tar": tar_of({"1.png": b"1"})})
    with pytest.raises(DamagedError, match=message):
        open_images(str(path)).list_images()


def test_the_cache_knows_where_they_lie(make_tar: Callable[..., Path], tmp_path: Path) -> None:
    path, cache = make_tar(members=archive_members()), tmp_path / "cache"
    first = build_index(str(path), eval_fraction=0, seed=0, cache_dir=cache)
    assert list(cache.glob("tars-*.bin"))
    again = open_images(str(path), cache)
    assert again.read_bytes("n01443537/n01443537_10007.jpeg") == b"d" * 5000
    assert first.images.keys[0] == "n01440764/n01440764_10026.jpeg"
