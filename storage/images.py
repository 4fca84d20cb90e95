"""A data set by its path: a folder of class folders, or tars of images (WebDataset)."""

import re
from pathlib import Path

from storage.errors import InputError
from storage.image_folder import FolderImages
from storage.image_source import ImageSource
from storage.image_tars import TarImages


def open_images(location: str, cache_dir: Path | None = None) -> ImageSource:
    """Open a data set by its path: a folder of class folders, a folder of tars, one tar, or `{000..009}.tar`.

    A folder (or the tars' names) may be divided into `train` and `val` (or `test`).

    Args:
        cache_dir: keeps what is known of tars, so that their headers are read once.

    Raises:
        InputError: nothing there that can be used.
    """
    path = Path(location).expanduser()
    if re.search(r"\{.*\}|[*?]", path.name):
        tars = _expand(path)
    elif path.is_file() and path.suffix == ".tar":
        tars = [path]
    elif path.is_dir():
        tars = sorted(tar for tar in path.glob("*.tar") if not tar.name.startswith("."))
    elif path.exists():
        raise InputError(f"{location} is a file of another kind; give a folder of class folders, or tars of images")
    else:
        raise InputError(f"no such data: {location} (looked in {path.absolute()}); give DATA=<folder of class folders>")
    return TarImages(tars, cache_dir) if tars else FolderImages(path)


def _expand(pattern: Path) -> list[Path]:
    """`{000..009}` and `*` in the last part of a path, the way WebDataset users write them."""
    import braceexpand

    tars: set[Path] = set()
    for name in braceexpand.braceexpand(pattern.name):
        found = set(pattern.parent.glob(name))
        if not found:
            raise InputError(f"no tar matches {pattern.parent / name}; check the folder and the range of numbers")
        tars |= found
    return sorted(tars)
