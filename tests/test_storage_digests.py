"""Digests of images: taken once, taken again when a file changes, and what they find."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from storage.errors import BadImageError, InputError
from storage.image_digests import UNREADABLE
from storage.image_folder import FolderImages
from storage.image_index import ImageIndex, build_index

MakeImages = Callable[..., Path]
Build = Callable[..., ImageIndex]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    def index(root: Path, *, fraction: float = 0.2, seed: int = 0, cache: str = "cache") -> ImageIndex:
        return build_index(str(root), eval_fraction=fraction, seed=seed, cache_dir=tmp_path / cache)

    return index


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of all images that are read from now on."""
    found: list[str] = []
    read = FolderImages.read_bytes

    def counted(self: FolderImages, key: str) -> bytes:
        found.append(key)
        return read(self, key)

    monkeypatch.setattr(FolderImages, "read_bytes", counted)
    return found


def test_digests_are_taken_once(make_images: MakeImages, build: Build, reads: list[str]) -> None:
    root = make_images(per_class=5)
    index = build(root)
    assert sorted(reads) == list(index.images.keys)
    reads.clear()
    assert build(root) == index and reads == []


@pytest.mark.parametrize("change", ["content", "size", "time", "added", "removed"])
def test_only_a_file_that_changed_is_read_again(
    change: str, make_images: MakeImages, build: Build, reads: list[str]
) -> None:
    root = make_images(per_class=5)
    before = build(root)
    reads.clear()
    path = root / "dark" / "002.png"
    data, stamp = path.read_bytes(), path.stat().st_mtime_ns
    if change == "content":
        path.write_bytes(data[:-1] + b"!")
        os.utime(path, ns=(stamp + 1, stamp + 1))
    elif change == "size":
        path.write_bytes(data + b"!")
        os.utime(path, ns=(stamp, stamp))
    elif change == "time":
        os.utime(path, ns=(stamp, stamp - 10**9))
    elif change == "added":
        shutil.copy2(path, root / "dark" / "new.png")
    else:
        path.unlink()
    after = build(root)
    assert reads == {"added": ["dark/new.png"], "removed": []}.get(change, ["dark/002.png"])
    assert (after == before) == (change == "time")
    assert build(root, cache="fresh") == after


@pytest.mark.parametrize("damage", ["flip", "empty", "cut", "older"])
def test_a_damaged_cache_is_not_believed(damage: str, make_images: MakeImages, build: Build, tmp_path: Path) -> None:
    index = build(root := make_images())
    (cache,) = (tmp_path / "cache").iterdir()
    whole = cache.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    cache.write_bytes({"flip": flipped, "empty": b"", "cut": whole[:-1], "older": b'{"listing": ""}'}[damage])
    assert build(root) == index
    assert cache.read_bytes() == whole


def test_a_changed_image_is_found_when_it_is_read(make_images: MakeImages, build: Build) -> None:
    images = build(root := make_images(), fraction=0).split("train")
    picture = np.asarray(Image.open(root / images.keys[3]))
    np.testing.assert_array_equal(np.asarray(images.read_image(3)), picture)
    path = root / images.keys[3]
    stat = path.stat()
    Image.fromarray(picture[::-1]).save(path)
    os.utime(path, ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    with pytest.raises(InputError, match=rf"image '{images.keys[3]}' of .*images has changed"):
        images.read_image(3)
    path.unlink()
    with pytest.raises(BadImageError, match="No such file"):
        images.read_image(3)


def test_an_unreadable_image_is_listed_and_noticed_when_it_comes_back(
    make_images: MakeImages, build: Build, reads: list[str]
) -> None:
    root = make_images()
    good = (root / "dark" / "000.png").read_bytes()
    (root / "dark" / "000.png").write_bytes(b"<html>")
    (root / "dark" / "001.png").unlink()
    (root / "dark" / "001.png").symlink_to(root / "gone")
    images = build(root, fraction=0).split("train")
    assert images.digests[1] == UNREADABLE != images.digests[0]
    for position, reason in ((0, "not an image"), (1, "No such file")):
        with pytest.raises(BadImageError, match=reason):
            images.read_image(position)
    (root / "gone").write_bytes(good)
    with pytest.raises(InputError, match="has changed"):
        images.read_image(1)
    (root / "gone").unlink()
    reads.clear()
    assert build(root, fraction=0).split("train") == images and reads == ["dark/001.png"]
