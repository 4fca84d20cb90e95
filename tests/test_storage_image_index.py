"""The list of images: identity by content, a division that is the same everywhere, digests that notice changes."""

import io
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import storage.image_index
from storage.errors import BadImageError, ConfigError, DamagedError, InputError
from storage.image_index import (
    ImageIndex,
    build_index,
    hold_out,
    load_index,
    order_classes,
    require_labels,
    save_index,
)
from storage.images import FolderImages, ImageEntry

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


def splits(index: ImageIndex) -> dict[str, str]:
    return {key: split for key, _, _, split in index.entries}


def entries(sizes: dict[str, int]) -> list[ImageEntry]:
    return sorted(ImageEntry(f"{name}/{n}.png", name, None, 1, 0) for name, size in sizes.items() for n in range(size))


# The division


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.dictionaries(st.text("abcdef", min_size=1, max_size=4), st.integers(2, 40), min_size=1, max_size=6),
    fraction=st.floats(0.001, 1),
    seed=st.integers(0, 99),
    shuffle=st.randoms(),
)
def test_each_class_gives_its_share_in_any_order_of_listing(
    sizes: dict[str, int], fraction: float, seed: int, shuffle: object
) -> None:
    listed = entries(sizes)
    held_out = dict(zip([e.key for e in listed], hold_out(listed, fraction, seed), strict=True))
    counts = Counter(key.split("/")[0] for key, split in held_out.items() if split == "eval")
    for name, size in sizes.items():
        assert 1 <= counts[name] <= size - 1
        assert counts[name] == min(size - 1, max(1, round(fraction * size)))
    again = list(listed)
    shuffle.shuffle(again)  # type: ignore[attr-defined]
    assert dict(zip([e.key for e in again], hold_out(again, fraction, seed), strict=True)) == held_out


def test_the_division_needs_only_the_keys_and_the_seed(make_images: MakeImages, build: Build) -> None:
    first = build(make_images("here", per_class=20))
    assert splits(build(make_images("there", per_class=20))) == splits(first)
    assert splits(build(Path(first.location), seed=1)) != splits(first)
    more = make_images("more", classes=("dark", "light", "new"), per_class=20)  # another class moves nobody
    assert {key: split for key, split in splits(build(more)).items() if not key.startswith("new")} == splits(first)
    assert "".join(split[0] for split in splits(first).values()) == "tttetteetttettttttttetettttttttteetttttt"


def test_a_growing_class_keeps_most_of_its_division() -> None:
    """A held-out image never becomes a training image because others were added."""
    few, many = entries({"a": 100}), entries({"a": 120})
    before = {e.key for e, split in zip(few, hold_out(few, 0.2, 0), strict=True) if split == "eval"}
    after = {e.key for e, split in zip(many, hold_out(many, 0.2, 0), strict=True) if split == "eval"}
    assert len(before & after) >= 15


def test_a_class_with_one_image_is_named(make_images: MakeImages, build: Build) -> None:
    root = make_images(per_class=4)
    (root / "lone").mkdir()
    shutil.copy(root / "dark" / "000.png", root / "lone" / "x.png")
    with pytest.raises(InputError, match=r"class 'lone' has one image \(lone/x\.png\).*eval_fraction=0"):
        build(root)
    index = build(root, fraction=0)
    assert set(splits(index).values()) == {"train"} and len(index.split("eval")) == 0
    assert index.split("eval").keys == ()


def test_a_data_sets_own_division_is_taken(make_images: MakeImages, build: Build, tmp_path: Path) -> None:
    root = tmp_path / "divided"
    make_images("divided/train", per_class=3)
    make_images("divided/val", per_class=1)
    index = build(root, fraction=0.5)
    assert {key.split("/")[0]: split for key, split in splits(index).items()} == {"train": "train", "val": "eval"}
    assert index.classes == ("dark", "light") and len(index.split("eval")) == 2


# Classes and labels


def test_number_classes_are_ordered_as_numbers(tmp_path: Path, build: Build) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for label in range(12):
            for n in range(2):
                for suffix, data in (("png", b"%d %d" % (label, n)), ("cls", b"%d" % label)):
                    info = tarfile.TarInfo(f"{label:02d}-{n}.{suffix}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    index = build(tmp_path / "0.tar")
    assert index.classes == tuple(map(str, range(12)))
    assert all(int(key[:2]) == label for key, label, _, _ in index.entries)


def test_order_of_classes() -> None:
    assert order_classes(["b", "10", "9", "b"]) == ("10", "9", "b")
    assert order_classes(["10", "9", "007", "7"]) == ("007", "7", "9", "10")
    assert order_classes(["²", "10"]) == ("10", "²")
    assert order_classes([]) == ()


def test_images_without_labels(make_images: MakeImages, build: Build) -> None:
    root = make_images(per_class=2)
    shutil.copy(root / "dark" / "000.png", root / "a.png")
    shutil.copy(root / "dark" / "001.png", root / "b.png")
    index = build(root)
    assert {key: label for key, label, _, _ in index.entries}["a.png"] == -1
    with pytest.raises(ConfigError, match="probing needs labelled images"):
        require_labels(index.split("train"), "probing")
    shutil.rmtree(root / "light")
    with pytest.raises(ConfigError, match=r"found 1 class\(es\)"):
        require_labels(build(root).split("train"), "probing")
    flat = build(root / "dark")
    with pytest.raises(ConfigError, match="found no labels"):
        require_labels(flat.split("train"), "probing")
    require_labels(build(make_images("labelled")).split("train"), "probing")


def test_a_name_that_is_no_text_is_refused(make_images: MakeImages, build: Build) -> None:
    root = make_images(per_class=2)
    (root / "dark" / "000.png").rename(os.fsdecode(os.fsencode(root / "dark") + b"/caf\xe9.png"))
    with pytest.raises(InputError, match=r"'dark/caf.*' in .*images is not valid UTF-8"):
        build(root)


# Identity


def test_identity_is_content_and_not_place(make_images: MakeImages, build: Build) -> None:
    index = build(make_images("here"))
    same = build(make_images("there"), cache="elsewhere")
    assert same.fingerprint == index.fingerprint and same.location != index.location
    assert same.split("train").fingerprint == index.split("train").fingerprint


def test_key_content_label_and_division_change_the_identity(make_images: MakeImages, build: Build) -> None:
    root = make_images()
    found = [build(root, fraction=0)]
    (root / "dark" / "003.png").rename(root / "dark" / "003x.png")
    found.append(build(root, fraction=0))
    Image.new("RGB", (9, 9)).save(root / "light" / "000.png")
    found.append(build(root, fraction=0))
    shutil.copytree(root / "dark", root / "darker")
    found.append(build(root, fraction=0))
    found.append(build(root, fraction=0.5))
    for fingerprints in ({index.fingerprint for index in found}, {index.split("train").fingerprint for index in found}):
        assert len(fingerprints) == len(found)


def test_labels_belong_to_the_identity_of_the_index_only() -> None:
    one = ImageIndex(
        location="x", classes=("a", "b"), entries=(("1.png", 0, "d1", "train"), ("2.png", 1, "d2", "train"))
    )
    other = ImageIndex(
        location="y", classes=("a", "b"), entries=(("1.png", 1, "d1", "train"), ("2.png", 1, "d2", "train"))
    )
    assert one.fingerprint != other.fingerprint
    assert one.split("train").fingerprint == other.split("train").fingerprint  # the teacher sees no labels


def test_an_index_is_equal_to_its_file_and_damage_is_found(
    make_images: MakeImages, build: Build, tmp_path: Path
) -> None:
    index = build(make_images())
    save_index(tmp_path / "data.json", index)
    assert load_index(tmp_path / "data.json") == index
    text = (tmp_path / "data.json").read_text()
    (tmp_path / "data.json").write_text(text.replace('"train"', '"eval"', 1))
    with pytest.raises(DamagedError, match=r"data\.json does not match its own digest.*delete it"):
        load_index(tmp_path / "data.json")


# Digests


def test_digests_are_taken_once(make_images: MakeImages, build: Build, reads: list[str]) -> None:
    root = make_images(per_class=5)
    index = build(root)
    assert sorted(reads) == [key for key, _, _, _ in index.entries]
    reads.clear()
    assert build(root) == index and reads == []


@pytest.mark.parametrize("change", ["content", "size", "time", "added", "removed"])
def test_digests_are_taken_again_when_a_file_changes(
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
    assert reads and (after == before) == (change == "time")
    assert build(root, cache="fresh") == after


@pytest.mark.parametrize("damage", ["flip", "empty", "older"])
def test_a_damaged_cache_is_not_believed(damage: str, make_images: MakeImages, build: Build, tmp_path: Path) -> None:
    index = build(root := make_images())
    (cache,) = (tmp_path / "cache").iterdir()
    digest = index.entries[0][2]
    text = cache.read_text()
    cache.write_text(
        {"flip": text.replace(digest, digest[::-1]), "empty": "", "older": '{"listing": "", "digests": []}'}[damage]
    )
    assert build(root) == index
    assert cache.read_text() == text


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
    make_images: MakeImages, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_images()
    good = (root / "dark" / "000.png").read_bytes()
    (root / "dark" / "000.png").write_bytes(b"<html>")
    (root / "dark" / "001.png").unlink()
    (root / "dark" / "001.png").symlink_to(root / "gone")
    images = build(root, fraction=0).split("train")
    assert images.digests[1].startswith("unreadable: ")
    for position, reason in ((0, "not an image"), (1, "No such file")):
        with pytest.raises(BadImageError, match=reason):
            images.read_image(position)
    (root / "gone").write_bytes(good)
    with pytest.raises(InputError, match="has changed"):
        images.read_image(1)
    monkeypatch.setattr(storage.image_index, "ThreadPoolExecutor", None)  # nothing is read for what is cached
    (root / "gone").unlink()
    assert build(root, fraction=0).split("train") == images
