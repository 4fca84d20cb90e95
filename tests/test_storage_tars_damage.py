"""Tars of images that are cut, damaged or made to harm: refused, and nothing of them is done."""

import gzip
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import storage.image_tars
from storage.errors import BadImageError, DamagedError, InputError
from storage.images import open_images
from tests.fixtures.tars import add, contents

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
