"""What a worker needs to know of an unfinished store, beside its plan and its list of images: which settings fill it
and where weights and images lie. A file in the store's folder, until the store is finished.

A worker on another machine is made from the store's path and the code alone. Paths are absolute: every machine must see
the same files there. Nothing secret is in it: what opens a server's doors stays in the environment.
"""

import os
from pathlib import Path
from typing import ClassVar, Literal

from extract.config import ExecutionConfig, ExtractConfig
from extract.resolve import names_code
from storage.atomic import read_regular, write_file
from storage.errors import DamagedError, InputError
from storage.image_index import FILE_NAME as IMAGES_FILE
from storage.image_list import ImageList
from storage.schema import Sealed

FILE_NAME = "extraction.json"
_MOST_BYTES = 2**20
_DECIDES_ROUNDING = ("batch_size", "compile", "channels_last")
"""How to work where it can change a last digit: alike in all workers of a store."""


class Extraction(Sealed):
    """How a store is being filled."""

    remedy: ClassVar[str] = "give the command that fills the store again: it writes the file anew"

    version: Literal[1] = 1
    settings: ExtractConfig
    """Of the command that fills it, with absolute paths."""
    images_location: str
    cache_dir: str
    """What is known of the tars there; empty for nothing."""

    def settings_for(self, run: ExecutionConfig) -> ExtractConfig:
        """The settings of a worker that is to work as `run` says, with the same batches as all others."""
        alike = {name: getattr(self.settings.run, name) for name in _DECIDES_ROUNDING}
        return self.settings.model_copy(update={"run": run.model_copy(update=alike)})

    def load_images(self, root: Path) -> ImageList:
        """The store's images, as they can be read.

        Raises:
            DamagedError: the store's list of them is not what was written.
        """
        path = root / IMAGES_FILE
        return ImageList.from_file(path, read_regular(path)).at(self.images_location, self.cache_dir)


def write_extraction(root: Path, cfg: ExtractConfig, images: ImageList) -> None:
    """Say how the store in `root` is being filled."""
    extraction = Extraction(
        settings=with_absolute_paths(cfg), images_location=images.location, cache_dir=images.cache_dir
    )
    write_file(root / FILE_NAME, extraction.to_file())


def load_extraction(root: Path) -> Extraction:
    """How the store in `root` is being filled.

    Raises:
        InputError: nothing tells; the store is finished, or was not begun.
        DamagedError: the file is not what was written.
    """
    path = root / FILE_NAME
    try:
        data = read_regular(path, _MOST_BYTES + 1)
    except FileNotFoundError:
        what = "is finished" if (root / "manifest.json").exists() else "is not one that is being filled"
        raise InputError(f"there is no {path}: the store {what}; give the command that fills it") from None
    if len(data) > _MOST_BYTES:
        raise DamagedError(f"{path} has more than {_MOST_BYTES:,} bytes; {Extraction.remedy}")
    return Extraction.from_file(path, data)


def remove_extraction(root: Path) -> None:
    (root / FILE_NAME).unlink(missing_ok=True)


def with_absolute_paths(cfg: ExtractConfig) -> ExtractConfig:
    """The same settings, meant from any folder."""
    weights = cfg.weights if cfg.weights in (None, "random") else Path(cfg.weights).expanduser().absolute()
    return cfg.model_copy(update={"weights": weights, "teacher": absolute_teacher(cfg.teacher)})


def absolute_teacher(name: str) -> str:
    """A teacher's name; of one that a Python file makes, with the file's whole path."""
    return str(Path(os.path.normpath(Path(name).expanduser().absolute()))) if names_code(name) else name
