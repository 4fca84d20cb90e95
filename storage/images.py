"""A data set by its path: a folder of class folders, tars of images (WebDataset), or Parquet files of images."""

import re
from collections.abc import Sequence
from pathlib import Path

from storage.data_files import LocalFile
from storage.errors import InputError
from storage.image_folder import FolderImages
from storage.image_parquet import ParquetImages
from storage.image_source import ImageSource
from storage.image_tars import TarImages

_KINDS = (".tar", ".parquet")
"""Of files that hold many images each."""


def open_images(location: str, cache_dir: Path | None = None) -> ImageSource:
    """Open a data set by its path: a folder of class folders; a folder of tars or of Parquet files (which may lie in
    `data/`, as on Hugging Face's hub), one such file, or several by `{000..009}` and `*` in the last part.

    A folder (or the names of the files) may be divided into `train` and `val` (or `test`).

    Args:
        cache_dir: keeps what is known of tars, so that their headers are read once.

    Raises:
        InputError: nothing there that can be used.
    """
    path = Path(location).expanduser()
    if re.search(r"\{.*\}|[*?]", path.name):
        return _open_files(location, _expand(path), cache_dir)
    if path.is_file() and path.suffix in _KINDS:
        return _open_files(location, [path], cache_dir)
    if path.is_dir():
        files = _files_in(path) or _files_in(path / "data", ".parquet")
        return _open_files(location, files, cache_dir) if files else FolderImages(path)
    if path.exists():
        raise InputError(
            f"{location} is a file of another kind; give a folder of class folders, tars or Parquet files of images"
        )
    raise InputError(f"no such data: {location} (looked in {path.absolute()}); give DATA=<folder of class folders>")


def _open_files(location: str, paths: Sequence[Path], cache_dir: Path | None) -> ImageSource:
    """Files of one kind; a name that tells no kind is a tar's."""
    kinds = {path.suffix == ".parquet" for path in paths}
    if len(kinds) > 1:
        raise InputError(f"{location} holds tars and Parquet files; choose one kind, as in '<folder>/*.parquet'")
    return ParquetImages([LocalFile(path) for path in paths]) if kinds == {True} else TarImages(list(paths), cache_dir)


def _files_in(folder: Path, *kinds: str) -> list[Path]:
    """Files of many images that lie in a folder itself."""
    found = (path for kind in kinds or _KINDS for path in folder.glob(f"*{kind}"))
    return sorted(path for path in found if not path.name.startswith("."))


def _expand(pattern: Path) -> list[Path]:
    """`{000..009}` and `*` in the last part of a path, the way WebDataset users write them."""
    import braceexpand

    files: set[Path] = set()
    for name in braceexpand.braceexpand(pattern.name):
        found = set(pattern.parent.glob(name))
        if not found:
            raise InputError(f"no file matches {pattern.parent / name}; check the folder and the range of numbers")
        files |= found
    return sorted(files)
