"""Putting an exported folder in its place: whole or not at all, and never over something else."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from storage.atomic import disk_errors, fsync_folder, make_folder, private_name, publish, remove_tree
from storage.errors import ConfigError


def check_target(target: Path, own_files: frozenset[str], record: str, *, force: bool) -> None:
    """Refuse a place that holds something else.

    Args:
        own_files: names of all files that an export may have.
        record: the one of them that every export has.

    Raises:
        ConfigError: says what is there.
    """
    if not target.exists() or force:
        if target.exists() and not target.is_dir():
            raise ConfigError(f"{target} is a file; choose another folder")
        return
    if not target.is_dir():
        raise ConfigError(f"{target} is a file; choose another folder")
    names = sorted(path.name for path in target.iterdir())
    others = [name for name in names if name not in own_files]
    if names and (record not in names or others):
        raise ConfigError(
            f"{target} holds {', '.join((others or names)[:3])}, which is no export of a student; choose another "
            "folder, or give FORCE=1 to write the files of the export beside what is there"
        )


@contextlib.contextmanager
def private_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target`, which is gone after the block unless it was published."""
    make_folder(target.parent)
    private = private_name(target)
    make_folder(private)
    try:
        yield private
    finally:
        remove_tree(private)


def publish_folder(private: Path, target: Path, own_files: frozenset[str]) -> None:
    """Give a finished folder its name. An earlier export there is replaced; other files in it stay."""
    for path in private.iterdir():
        _sync(path)
    fsync_folder(private)
    with disk_errors(target):
        kept = [path for path in target.iterdir() if path.name not in own_files] if target.exists() else []
        if kept:
            _publish_files(private, target, own_files)
            return
        aside = private_name(target)
        if target.exists():
            os.rename(target, aside)  # a kill between the two leaves no export: the same command makes it again
        _rename_to_nothing(private, target)
        fsync_folder(target.parent)
    remove_tree(aside)


def _rename_to_nothing(private: Path, target: Path) -> None:
    try:
        os.rename(private, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise ConfigError(
            f"another command wrote {target} in the meantime; look at it, then give yours again"
        ) from error


def _publish_files(private: Path, target: Path, own_files: frozenset[str]) -> None:
    """One after the other."""
    names = {path.name for path in private.iterdir()}
    for name in sorted(names):
        publish(private / name, target / name)
    for name in own_files - names:
        (target / name).unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
