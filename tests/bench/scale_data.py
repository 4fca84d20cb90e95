"""Very many tiny images, in a folder of class folders and in one tar. Parts of them are smaller data sets."""

import tarfile
from pathlib import Path

import numpy as np

CLASS_IMAGES = 1000
PX = 16
_COMMENT = b"\xff\xfe\x00\x0a"
"""Marker and length of a JPEG's comment, which eight digits follow."""
_END_OF_TAR = bytes(1024)


def images(count: int) -> list[bytes]:
    """JPEGs of a few hundred bytes, one as the other but for a comment: contents, and so digests, differ."""
    import simplejpeg

    pixels_HWC = np.random.default_rng(0).integers(0, 256, (PX, PX, 3), np.uint8)
    jpeg = simplejpeg.encode_jpeg(pixels_HWC, quality=30, colorsubsampling="420")
    return [jpeg[:2] + _COMMENT + b"%08d" % number + jpeg[2:] for number in range(count)]


def make_folders(root: Path, counts: list[int]) -> dict[int, Path]:
    """For each count, of whole classes, a folder of so many images. Files are written once: class folders are shared by
    links."""
    files, places = images(max(counts)), {}
    for number, data in enumerate(files):
        folder = root / "classes" / f"{number // CLASS_IMAGES:04d}"
        if number % CLASS_IMAGES == 0:
            folder.mkdir(parents=True)
        with open(f"{folder}/{number:08d}.jpg", "wb", buffering=0) as file:
            file.write(data)
    for count in counts:
        place = places[count] = root / f"folder-{count}"
        place.mkdir()
        for number in range(count // CLASS_IMAGES):
            (place / f"{number:04d}").symlink_to(root / "classes" / f"{number:04d}")
    return places


def make_tars(root: Path, counts: list[int]) -> dict[int, Path]:
    """For each count a tar of so many images: the first members of the largest one, since all are of one size."""
    members = []
    for number, data in enumerate(images(max(counts))):
        info = tarfile.TarInfo(f"{number:08d}.jpg")
        info.size = len(data)
        members.append(info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512))
    places = {}
    for count in counts:
        place = places[count] = root / f"tar-{count}" / "images.tar"
        place.parent.mkdir(parents=True)
        with open(place, "wb") as file:
            file.writelines(members[:count])
            file.write(_END_OF_TAR)
    return places
