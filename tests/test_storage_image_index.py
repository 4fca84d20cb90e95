"""The list of images: identity by content, and a division that is the same everywhere."""

import io
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from storage.errors import ConfigError, DamagedError, InputError
from storage.fingerprint import FINGERPRINT_CHARS, digest_bytes
from storage.image_index import (
    ImageIndex,
    ImageRow,
    build_index,
    hold_out,
    load_index,
    order_classes,
    require_labels,
    save_index,
)
from storage.image_source import ImageEntry

MakeImages = Callable[..., Path]
Build = Callable[..., ImageIndex]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    def index(root: Path, *, fraction: float = 0.2, seed: int = 0, cache: str = "cache") -> ImageIndex:
        return build_index(str(root), eval_fraction=fraction, seed=seed, cache_dir=tmp_path / cache)

    return index


def splits(index: ImageIndex) -> dict[str, str]:
    return {key: split for key, _, _, split in index.rows}


def entries(sizes: dict[str, int]) -> list[ImageEntry]:
    return sorted(ImageEntry(f"{name}/{n}.png", name, None, 1, 0) for name, size in sizes.items() for n in range(size))


# The division


@settings(max_examples=100)
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
    assert all(int(key[:2]) == label for key, label, _, _ in index.rows)


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
    assert {key: label for key, label, _, _ in index.rows}["a.png"] == -1
    with pytest.raises(ConfigError, match="probing needs labelled images"):
        require_labels(index.split("train"), "probing")
    with pytest.raises(ConfigError, match=r"found 1 class\(es\)"):
        require_labels(build(make_images("one", classes=("dark",))).split("train"), "probing")
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
    rows = [ImageRow("1.png", 0, digest_bytes(b"1"), "train"), ImageRow("2.png", 1, digest_bytes(b"2"), "train")]
    one = ImageIndex.of_rows("x", ("a", "b"), rows)
    other = ImageIndex.of_rows("y", ("a", "b"), [rows[0]._replace(label=1), rows[1]])
    assert one.fingerprint != other.fingerprint
    assert one.split("train").fingerprint == other.split("train").fingerprint  # the teacher sees no labels


def test_an_index_is_equal_to_its_file_and_damage_is_found(
    make_images: MakeImages, build: Build, tmp_path: Path
) -> None:
    index = build(make_images())
    path = tmp_path / "data.bin"
    save_index(path, index)
    assert load_index(path) == index
    data = bytearray(path.read_bytes())
    data[-FINGERPRINT_CHARS - 1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedError, match=r"data\.bin does not match its own digest.*delete it"):
        load_index(path)
