"""Folders of images: what is listed, under which key, class and split; and what is refused."""

import contextlib
import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import storage.image_folder
from storage.errors import BadImageError, InputError
from storage.image_source import IMAGE_SUFFIXES, ImageEntry
from storage.images import open_images

Tree = Callable[..., Path]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A folder with the named files; each holds its own name."""

    def make(*names: str) -> Path:
        root = tmp_path / "data"
        root.mkdir(exist_ok=True)
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(name.encode())
        return root

    return make


def listed(root: Path) -> list[tuple[str, str | None, str | None]]:
    return [(entry.key, entry.class_name, entry.split) for entry in open_images(str(root)).list_images()]


def test_class_folders_nested_folders_and_any_case_of_suffix(tree: Tree) -> None:
    root = tree("b/2.JPEG", "b/1.jpg", "a/deep/er/x.PnG", "a/y.tiff", "top.webp", "a/notes.txt", "a/list.csv", "a/z")
    assert listed(root) == [
        ("a/deep/er/x.PnG", "a", None),
        ("a/y.tiff", "a", None),
        ("b/1.jpg", "b", None),
        ("b/2.JPEG", "b", None),
        ("top.webp", None, None),
    ]


def test_what_is_listed_can_be_read(tree: Tree) -> None:
    source = open_images(str(tree("a/1.png", "a/b/2.png")))
    for entry in source.list_images():
        data = source.read_bytes(entry.key)
        assert data == entry.key.encode() and len(data) == entry.num_bytes


def test_hidden_files_and_folders_are_passed_over(tree: Tree) -> None:
    assert listed(tree("a/1.png", "a/._1.png", ".cache/2.png", "a/.thumbnails/3.png")) == [("a/1.png", "a", None)]


@pytest.mark.parametrize(("train", "held_out"), [("train", "val"), ("Training", "test"), ("train2017", "val2017")])
def test_a_divided_folder_keeps_its_division(tree: Tree, train: str, held_out: str) -> None:
    root = tree(f"{train}/cat/1.png", f"{held_out}/cat/1.png", f"{held_out}/dog/x/2.png", f"{train}/3.png")
    assert sorted(listed(root)) == sorted(
        [
            (f"{train}/3.png", None, "train"),
            (f"{train}/cat/1.png", "cat", "train"),
            (f"{held_out}/cat/1.png", "cat", "eval"),
            (f"{held_out}/dog/x/2.png", "dog", "eval"),
        ]
    )


@pytest.mark.parametrize("classes", [("train", "bus"), ("test", "rest"), ("bullet_train", "valley")])
def test_class_folders_with_such_names_are_no_division(tree: Tree, classes: tuple[str, str]) -> None:
    root = tree(*(f"{name}/1.png" for name in classes))
    assert {(class_name, split) for _, class_name, split in listed(root)} == {(name, None) for name in classes}


def test_links_to_files_and_folders_are_followed(tree: Tree, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "dog").mkdir(parents=True)
    (elsewhere / "dog" / "1.png").write_bytes(b"dog")
    root = tree("cat/1.png")
    (root / "dog").symlink_to(elsewhere / "dog")
    (root / "cat" / "2.png").symlink_to(elsewhere / "dog" / "1.png")
    assert [key for key, _, _ in listed(root)] == ["cat/1.png", "cat/2.png", "dog/1.png"]
    source = open_images(str(root))
    assert source.read_bytes("cat/2.png") == source.read_bytes("dog/1.png") == b"dog"


def test_links_in_a_circle_list_every_image_once(tree: Tree) -> None:
    root = tree("a/1.png", "a/b/2.png")
    (root / "a" / "up").symlink_to(root)
    (root / "a" / "b" / "self").symlink_to(root / "a" / "b")
    assert [key for key, _, _ in listed(root)] == ["a/1.png", "a/b/2.png"]


def test_a_link_to_nowhere_is_an_unusable_image_and_no_crash(tree: Tree) -> None:
    root = tree("a/1.png")
    (root / "a" / "2.png").symlink_to(root / "gone.png")
    source = open_images(str(root))
    assert [entry.key for entry in source.list_images()] == ["a/1.png", "a/2.png"]
    with pytest.raises(BadImageError, match="No such file"):
        source.read_bytes("a/2.png")


def test_a_link_that_leads_back_to_itself_is_an_unusable_image_and_stops_nothing(tree: Tree) -> None:
    root = tree("a/1.png")
    (root / "a" / "2.png").symlink_to(root / "a" / "2.png")
    (root / "a" / "b").symlink_to(root / "a" / "c")
    (root / "a" / "c").symlink_to(root / "a" / "b")
    (root / "d").symlink_to(root / "d")
    source = open_images(str(root))
    assert [entry.key for entry in source.list_images()] == ["a/1.png", "a/2.png"]
    with pytest.raises(BadImageError, match="cannot be read: Too many levels of symbolic links"):
        source.read_bytes("a/2.png")


@pytest.mark.timeout(20)
def test_an_image_that_has_become_a_pipe_is_not_waited_for(tree: Tree) -> None:
    root = tree("a/1.png")
    source = open_images(str(root))
    (root / "a" / "1.png").unlink()
    os.mkfifo(root / "a" / "1.png")
    with pytest.raises(BadImageError, match="cannot be read: it is a pipe or a device"):
        source.read_bytes("a/1.png")


@pytest.mark.timeout(20)
def test_pipes_and_devices_are_never_opened(tree: Tree) -> None:
    root = tree("a/1.png")
    os.mkfifo(root / "a" / "2.png")
    (root / "a" / "3.png").symlink_to("/dev/zero")
    (root / "a" / "4.png").mkdir()
    assert listed(root) == [("a/1.png", "a", None)]


def test_the_stamp_changes_with_the_file(tree: Tree) -> None:
    root = tree("a/1.png")

    def entry() -> ImageEntry:
        return open_images(str(root)).list_images()[0]

    before = entry()
    assert entry() == before
    os.utime(root / "a" / "1.png", ns=(1, before.stamp + 1))
    assert entry().stamp == before.stamp + 1 and entry().num_bytes == before.num_bytes


def test_empty_missing_and_other_kinds_of_places_are_refused(tree: Tree, tmp_path: Path) -> None:
    root = tree("a/readme.txt", "b/.hidden.png")
    with pytest.raises(InputError, match=r"no image in .*data; expected .*<class>/<image>.*\.jpg"):
        open_images(str(root)).list_images()
    with pytest.raises(InputError, match=r"no such data: .*missing"):
        open_images(str(tmp_path / "missing"))
    with pytest.raises(InputError, match="a file of another kind"):
        open_images(str(root / "a" / "readme.txt"))
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "one.png")
    with pytest.raises(InputError, match="a file of another kind"):
        open_images(str(tmp_path / "one.png"))


def test_files_that_vanish_grow_or_may_not_be_read_are_bad_images(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree("a/1.png", "a/22.png")
    source = open_images(str(root))
    monkeypatch.setattr(storage.image_folder, "MAX_IMAGE_BYTES", 7)
    assert source.read_bytes("a/1.png") == b"a/1.png"
    with pytest.raises(BadImageError, match="larger than"):
        source.read_bytes("a/22.png")
    (root / "a" / "1.png").unlink()
    with pytest.raises(BadImageError, match="No such file"):
        source.read_bytes("a/1.png")


def test_a_home_folder_is_understood(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree("a/1.png")
    monkeypatch.setenv("HOME", str(root.parent))
    assert open_images("~/data").list_images() == open_images(str(root)).list_images()


def test_links_from_two_folders_into_each_other_end(tree: Tree) -> None:
    root = tree("a/1.png", "b/2.png")
    (root / "a" / "to_b").symlink_to(root / "b")
    (root / "b" / "to_a").symlink_to(root / "a")
    assert [key for key, _, _ in listed(root)] == ["a/1.png", "a/to_b/2.png", "b/2.png", "b/to_a/1.png"]


def test_a_folder_that_cannot_be_listed_is_not_passed_over(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    source, scandir = open_images(str(tree("a/1.png", "b/2.png"))), os.scandir

    def refuse(path: str) -> object:
        if path.endswith("b"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=r"the folder .*data/b cannot be listed: Permission denied; make it readable"):
        source.list_images()


NAMES = st.sampled_from(["a", "b", ".hidden", "train", "val", "é", "1.png", "2.JPG", "x.txt", "y.gif"])


@settings(max_examples=60)
@given(paths=st.sets(st.lists(NAMES, min_size=1, max_size=4).map("/".join), min_size=1), is_slow=st.booleans())
def test_the_same_as_a_walk_one_by_one(
    paths: set[str], is_slow: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Against `Path.rglob`; also where several folders are listed at a time."""
    root = tmp_path_factory.mktemp("data")
    for path in sorted(paths, key=len, reverse=True):
        with contextlib.suppress(FileExistsError, NotADirectoryError, IsADirectoryError):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(path.encode())
    truth = {
        str(path.relative_to(root)): (path.stat().st_size, path.stat().st_mtime_ns, path.stat().st_ino)
        for path in root.rglob("*")
        if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage.image_folder, "_SLOW_SECONDS", -1.0 if is_slow else 1e9)
        patch.setattr(storage.image_folder, "_FOLDERS_AT_ONCE", 2)
        if not truth:
            with pytest.raises(InputError, match="no image in"):
                open_images(str(root)).list_images()
            return
        entries = open_images(str(root)).list_images()
    assert [entry.key for entry in entries] == sorted(truth)
    assert {entry.key: (entry.num_bytes, entry.stamp, entry.inode) for entry in entries} == truth


@pytest.mark.parametrize("is_slow", [True, False])
def test_several_folders_are_listed_at_a_time_only_where_files_answer_slowly(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, is_slow: bool
) -> None:
    source, scandir = open_images(str(tree("a/1.png", "b/2.png", "c/3.png"))), os.scandir
    threads, together = set[int](), threading.Barrier(3, timeout=10)

    def listed_together(path: str) -> object:
        threads.add(threading.get_ident())
        if is_slow and not path.endswith("data"):
            together.wait()
        return scandir(path)

    monkeypatch.setattr(os, "scandir", listed_together)
    monkeypatch.setattr(storage.image_folder, "_SLOW_SECONDS", -1.0 if is_slow else 1e9)
    assert len(source.list_images()) == 3
    assert len(threads) == (4 if is_slow else 1)
