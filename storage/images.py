"""A data set by its path or URL: a folder of class folders, tars of images (WebDataset), or Parquet files of images."""

import re
from collections.abc import Sequence
from pathlib import Path

from storage.data_files import DataFile, LocalFile
from storage.errors import InputError
from storage.image_folder import FolderImages
from storage.image_parquet import ParquetImages
from storage.image_source import ImageSource
from storage.image_tars import TarImages

_KINDS = (".tar", ".parquet")
"""Of files that hold many images each."""


def open_images(location: str, cache_dir: Path | None = None) -> ImageSource:
    """Open a data set by its path or URL: a folder of class folders; a folder of tars or of Parquet files (which may
    lie in `data/`, as on Hugging Face's hub), one such file, or several by `{000..009}` and `*` in the last part.

    A folder (or the names of the files) may be divided into `train` and `val` (or `test`).

    Args:
        cache_dir: keeps what is known of tars, so that their headers are read once.

    Raises:
        InputError: nothing there that can be used.
    """
    if _is_url(location):
        return _open_url(place_of(location), cache_dir)
    return _open_path(location, _path_of(location), cache_dir)


def place_of(location: str) -> str:
    """The same place for every working folder: an absolute path, or a URL."""
    return location.rstrip("/") if _is_url(location) else str(_path_of(location).absolute())


def _is_url(location: str) -> bool:
    return "://" in location and not location.startswith("file://")


def _path_of(location: str) -> Path:
    return Path(location.removeprefix("file://")).expanduser()


def _open_path(location: str, path: Path, cache_dir: Path | None) -> ImageSource:
    if _is_pattern(path.name):
        return _open_files(location, [LocalFile(file) for file in _expand(path)], cache_dir)
    if path.is_file() and path.suffix in _KINDS:
        return _open_files(location, [LocalFile(path)], cache_dir)
    if path.is_dir():
        files = _files_in(path, _KINDS) or _files_in(path / "data", (".parquet",))
        return _open_files(location, files, cache_dir) if files else FolderImages(path)
    if path.exists():
        raise InputError(
            f"{location} is a file of another kind; give a folder of class folders, tars or Parquet files of images"
        )
    raise InputError(f"no such data: {location} (looked in {path.absolute()}); give DATA=<folder of class folders>")


def _open_url(url: str, cache_dir: Path | None) -> ImageSource:
    import braceexpand

    from storage.remote_data import RemoteFile, RemoteImages, list_folder, match_files, open_folder

    files = open_folder(url)
    folder, _, name = url.rpartition("/")
    if _is_pattern(name):
        return _open_files(url, match_files(open_folder(folder), list(braceexpand.braceexpand(name))), cache_dir)
    if name.endswith(_KINDS):
        return _open_files(url, [RemoteFile(open_folder(folder), name)], cache_dir)
    root = list_folder(files, "")
    found = [name for name in root.files if name.endswith(_KINDS)]
    if not found and "data" in root.folders:
        found = [f"data/{name}" for name in list_folder(files, "data").files if name.endswith(".parquet")]
    return _open_files(url, [RemoteFile(files, name) for name in found], cache_dir) if found else RemoteImages(files)


def _open_files(location: str, files: Sequence[DataFile], cache_dir: Path | None) -> ImageSource:
    """Files of one kind; a name that tells no kind is a tar's."""
    kinds = {file.name.endswith(".parquet") for file in files}
    if len(kinds) > 1:
        raise InputError(f"{location} holds tars and Parquet files; choose one kind, as in '<folder>/*.parquet'")
    return ParquetImages(files) if kinds == {True} else TarImages(files, cache_dir)


def _files_in(folder: Path, kinds: Sequence[str]) -> list[DataFile]:
    """Files of many images that lie in a folder itself."""
    found = (path for kind in kinds for path in folder.glob(f"*{kind}"))
    return [LocalFile(path) for path in sorted(found) if not path.name.startswith(".")]


def _is_pattern(name: str) -> bool:
    return re.search(r"\{.*\}|[*?]", name) is not None


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
