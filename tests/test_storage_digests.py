"""Digests of images: taken once, taken again when a file changes, and what they find."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import storage.image_digests
from storage.columns import Keys
from storage.errors import BadImageError, DamagedError, InputError
from storage.fingerprint import digest_bytes
from storage.image_digests import UNREADABLE, take_digests
from storage.image_folder import FolderImages
from storage.image_index import ImageIndex, build_index
from storage.image_source import ImageEntry
from storage.stage import Progress, SilentProgress

MakeImages = Callable[..., Path]
Build = Callable[..., ImageIndex]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    def index(
        root: Path, *, fraction: float = 0.2, cache: str = "cache", progress: Progress | None = None
    ) -> ImageIndex:
        return build_index(str(root), eval_fraction=fraction, seed=0, cache_dir=tmp_path / cache, progress=progress)

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


# A long first pass


class Watcher(SilentProgress):
    """Remembers what it hears; may interrupt."""

    def __init__(self, stop_after: int = 10**9, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.began: list[tuple[int, str, int]] = []
        self.advanced: list[int] = []
        self.facts: list[str] = []
        self.stop_after, self.error = stop_after, error

    def start(self, total: int, unit: str, done: int = 0) -> None:
        self.began.append((total, unit, done))

    def advance(self, amount: int, **facts: object) -> None:
        self.advanced.append(amount)
        self.facts.append(str(facts["read"]))
        if sum(self.advanced) >= self.stop_after:
            raise self.error


def test_progress_counts_what_is_read_and_says_nothing_when_nothing_is(make_images: MakeImages, build: Build) -> None:
    root = make_images(per_class=100)
    first, second, third = Watcher(), Watcher(), Watcher()
    build(root, progress=first)
    assert first.began == [(200, "images", 0)] and sum(first.advanced) == 200 and len(first.advanced) == 4
    assert all(fact.endswith(" MB/s") for fact in first.facts)
    build(root, progress=second)
    assert second.began == [] and second.advanced == []
    for number in range(3):
        (root / "light" / f"{number:03d}.png").write_bytes(b"new %d" % number)
    build(root, progress=third)
    assert third.began == [(200, "images", 197)] and third.advanced == [3]


@pytest.mark.parametrize("error", [KeyboardInterrupt, DamagedError])
def test_an_interrupted_pass_goes_on_where_it_was(
    make_images: MakeImages, build: Build, reads: list[str], error: type[BaseException]
) -> None:
    root = make_images(per_class=160)
    with pytest.raises(error):
        build(root, progress=Watcher(stop_after=128, error=error))
    reads.clear()
    index = build(root)
    assert len(reads) <= 320 - 128 and len(set(reads)) == len(reads)
    assert build(root, cache="fresh") == index


def test_a_killed_pass_goes_on_where_it_was_saved(
    make_images: MakeImages, build: Build, reads: list[str], monkeypatch: pytest.MonkeyPatch, fork: Any
) -> None:
    root = make_images(per_class=160)
    monkeypatch.setattr(storage.image_digests, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(storage.image_digests, "SAVE_SHARE", float("inf"))

    class Killed(Watcher):
        def advance(self, amount: int, **facts: object) -> None:
            super().advance(amount, **facts)
            if sum(self.advanced) >= 256:
                os.kill(os.getpid(), signal.SIGKILL)

    pid = fork(lambda: build(root, progress=Killed()))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    index = build(root)
    assert len(reads) == 320 - 192
    assert build(root, cache="fresh") == index


def test_the_cache_is_not_written_all_the_time(
    make_images: MakeImages, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[Path] = []
    write = storage.image_digests.write_file
    monkeypatch.setattr(storage.image_digests, "write_file", lambda path, data: (saved.append(path), write(path, data)))
    root = make_images(per_class=160)
    build(root)
    assert len(saved) == 1
    build(root)
    assert len(saved) == 1


@pytest.mark.parametrize("stamp", [-1, 0, 2**63 + 5, 2**70])
def test_any_time_a_file_system_tells_is_taken(stamp: int, tmp_path: Path) -> None:
    class Odd:
        reads = 0

        def list_images(self) -> list[ImageEntry]:
            return [ImageEntry("a", None, None, 1, stamp, 2**64 - 1)]

        def read_bytes(self, key: str) -> bytes:
            self.reads += 1
            return b"a"

    source = Odd()
    for _ in range(2):
        found = take_digests(source, source.list_images(), Keys.encode(["a"]), tmp_path / "cache", SilentProgress())
        assert found == [digest_bytes(b"a")]
    assert source.reads == 1


def test_another_file_in_the_place_of_one_is_read_although_size_and_time_are_the_same(
    make_images: MakeImages, build: Build, reads: list[str]
) -> None:
    root = make_images(per_class=3)
    before = build(root)
    path, other = root / "dark" / "001.png", root / "other"
    other.write_bytes(path.read_bytes()[::-1])
    stat = path.stat()
    os.utime(other, ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    other.rename(path)
    reads.clear()
    assert build(root) != before and reads == ["dark/001.png"]


@settings(max_examples=40)
@given(steps=st.lists(st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 3), min_size=1), min_size=1))
def test_the_cache_never_changes_a_digest_and_reads_only_what_it_must(
    steps: list[dict[str, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Against a plain dictionary: files come, go and change from one call to the next."""
    path = tmp_path_factory.mktemp("cache") / "digests.bin"
    known: dict[str, int] = {}

    class Files:
        def __init__(self, contents: dict[str, int]) -> None:
            self.contents, self.reads = contents, set[str]()

        def list_images(self) -> list[ImageEntry]:
            return [ImageEntry(key, None, None, 1, content) for key, content in sorted(self.contents.items())]

        def read_bytes(self, key: str) -> bytes:
            self.reads.add(key)
            return b"%d" % self.contents[key]

    for contents in steps:
        source = Files(contents)
        entries = source.list_images()
        found = take_digests(source, entries, Keys.encode(sorted(contents)), path, SilentProgress())
        assert found == [digest_bytes(b"%d" % contents[key]) for key in sorted(contents)]
        assert source.reads == {key for key, content in contents.items() if known.get(key) != content}
        if source.reads:  # else the cache is left as it is
            known = dict(contents)
