"""Images that are left out of training by name: which they are, what is said of them, and where that is recorded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import ConfigError, DamagedError
from storage.folder import create_store, finish_store
from storage.image_index import ImageIndex, ImageList, build_index
from storage.reader import open_store
from storage.skipped_images import SKIP_LISTS
from storage.stage import SilentProgress
from tests.fixtures.parquet import MakeParquet, hub_table

MakeImages = Callable[..., Path]


class Heard(SilentProgress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


def build(location: Path, cache: Path, *skip: str, fraction: float = 0.0) -> tuple[ImageIndex, list[str]]:
    heard = Heard()
    index = build_index(
        str(location), eval_fraction=fraction, seed=0, cache_dir=cache, skip=skip, progress=heard
    )  # fmt: skip
    return index, heard.lines


def test_the_papers_list_has_27_images() -> None:
    names = SKIP_LISTS["imagenet-27"]
    assert len(set(names)) == 27 and all(name[0] == "n" and name[9] == "_" and len(name) > 10 for name in names)


@given(skip=st.sets(st.sampled_from(["dark/000.png", "light/007", "003", "nothing", "dark", ".png"])))
def test_the_same_as_a_division_without_them(skip: set[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Against the index of all images; nobody moves from one part to the other."""
    from tests.fixtures.images import draw_images

    root = tmp_path_factory.getbasetemp() / "skipped-images"
    if not root.exists():
        draw_images(root)
    cache = root.parent / "cache"
    whole, silence = build(root, cache, fraction=0.3)
    index, lines = build(root, cache, *skip, fraction=0.3)
    keys = {"dark/000.png": {"dark/000.png"}, "003": {"dark/003.png", "light/003.png"}}
    named = set().union(*(keys.get(name, set()) for name in skip))
    truth = [row for row in whole.rows if row.key not in named or row.split == "eval"]
    assert list(index.rows) == truth and index.classes == whole.classes
    gone = tuple(sorted({row.key for row in whole.rows} - {row.key for row in truth}))
    assert index.split("train").skipped == gone and index.split("eval").skipped == ()
    assert silence == [] and len(lines) == bool(skip)
    if skip:
        found = len(skip & keys.keys())
        assert lines[0].startswith(
            f"data.skip leaves {len(gone)} images out of the train part; {found} of its {len(skip)}"
        )


@pytest.mark.parametrize(
    ("name", "skip", "is_skipped"),
    [
        ("n01678043/n01678043_6448.JPEG", "imagenet-27", True),
        ("n01678043/n01678043_6448.JPEG", "n01678043/n01678043_6448.JPEG", True),
        ("n01678043/n01678043_6448.JPEG", "n01678043_6448", True),
        ("n01678043/n01678043_6448.JPEG", "n01678043_644", False),
        ("n01678043/n01678043_64481.JPEG", "imagenet-27", False),
        ("n01678043/n01678043_6448.JPEG", "n01678043", False),
        ("n01678043_6448/1.JPEG", "imagenet-27", False),
        ("a/b.c.png", "b.c", True),
        ("a/b.c.png", "b", False),
    ],
)
def test_what_a_name_means(make_images: MakeImages, tmp_path: Path, name: str, skip: str, is_skipped: bool) -> None:
    root = make_images(per_class=1)
    (root / name).parent.mkdir()
    (root / "dark" / "000.png").rename(root / name)
    index, _ = build(root, tmp_path / "cache", skip)
    assert (name not in index.images.keys) == is_skipped == (index.images.skipped == (name,))


def test_names_inside_parquet_files_are_known(make_parquet: MakeParquet, tmp_path: Path) -> None:
    """Hugging Face's copy of ImageNet repeats the class behind the name."""
    names = ["n01678043_6448_n01678043.JPEG", "n01678043_6449_n01678043.JPEG", None]
    path = make_parquet("0.parquet", hub_table([b"a", b"b", b"c"], names=names))
    index, (line,) = build(path, tmp_path / "cache", "imagenet-27")
    assert index.images.skipped == ("0/00000000",) and list(index.images.keys) == ["0/00000001", "0/00000002"]
    assert line == (
        "data.skip leaves 1 images out of the train part; 1 of its 27 names are those of an image, not "
        "n01896844_997, n02368116_318, n02428089_710 and 23 more"
    )


def test_skipped_images_are_not_read(make_images: MakeImages, tmp_path: Path) -> None:
    root = make_images(per_class=2)
    (root / "dark" / "000.png").chmod(0)
    (root / "dark" / "000.png").write_bytes(b"")
    index, _ = build(root, tmp_path / "cache", "dark/000.png")
    assert len(index) == 3 and bytes(16).hex() not in index.images.digests


def test_they_are_recorded_in_lists_and_manifests_and_nowhere_else(
    make_images: MakeImages, tmp_path: Path, make_store: Any
) -> None:
    root, cache = make_images(per_class=3), tmp_path / "cache"
    plain, (index, _) = build(root, cache)[0], build(root, cache, "dark/001.png")
    assert b"skipped" not in plain.to_file() and b'"skipped":["dark/001.png"]' in index.to_file()
    again = ImageIndex.from_file(tmp_path, index.to_file())
    assert again == index and again.split("train").skipped == index.images.at("").skipped == ("dark/001.png",)
    truth = ImageList(
        location="", classes=plain.classes, keys=[key for key in plain.images.keys if key != "dark/001.png"],
        labels=[0, 0, 1, 1, 1], digests=[row.digest for row in plain.rows if row.key != "dark/001.png"],
    )  # fmt: skip
    assert index.images.fingerprint == truth.fingerprint, "a folder without them is the same data set"

    store, plan, images = make_store("store")
    manifest = json.loads((store / "manifest.json").read_bytes())
    assert "skipped_images" not in manifest and open_store(store).manifest.skipped_images == ()
    before = (store / "manifest.json").read_bytes()
    left_out = ImageList(
        location="", classes=images.classes, keys=images.keys, labels=images.labels_N, digests=images.digests,
        skipped=("x/1.png",),
    )  # fmt: skip
    create_store(store, plan, left_out)
    finish_store(store)
    assert open_store(store).manifest.skipped_images == open_store(store).images.skipped == ("x/1.png",)
    assert json.loads((store / "manifest.json").read_bytes())["skipped_images"] == ["x/1.png"]
    create_store(store, plan, images)
    finish_store(store)
    assert (store / "manifest.json").read_bytes() == before


def test_damage_to_the_record_is_found(make_images: MakeImages, tmp_path: Path) -> None:
    index, _ = build(make_images(per_class=2), tmp_path / "cache", "dark/001.png")
    with pytest.raises(DamagedError):
        ImageIndex.from_file(tmp_path, index.to_file().replace(b"001.png", b"000.png"))


@pytest.mark.parametrize("value", ["imagenet-27", ["imagenet-27"], ["a", "b"], []])
def test_settings_take_one_name_or_several(value: Any) -> None:
    from pipeline.config import DataConfig

    expected = (value,) if isinstance(value, str) else tuple(value)
    found = DataConfig.checked({"skip": value}, "settings")
    assert found.skip == expected and DataConfig.checked(found.to_json(), "settings") == found
    for wrong in ("", [""], [3], {"a": 1}):
        with pytest.raises(ConfigError, match="skip"):
            DataConfig.checked({"skip": wrong}, "settings")
