"""Helps a command that is filling a store, from the store's folder alone; on this machine or on another one.

Whoever holds the store's lock begins and finishes it. Those that join claim shards beside the holder; where that is
gone, one of them takes its place.
"""

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from extract.config import ExecutionConfig
from extract.extraction import FILE_NAME, absolute_teacher, load_extraction
from extract.filling import Filling
from extract.final_audit import audit_filling
from extract.preflight import check_writable
from extract.resolve import names_code
from extract.sharing import fill_with_others
from storage.errors import ConfigError, InputError, StoreBusyError
from storage.folder import sweep
from storage.lock import hold_lock, is_held
from storage.stage import Progress, SilentProgress, StopRequest, stop_on_signals

PATIENCE_SECONDS = 2.0
"""A lock that was let go is left alone for so long: its command may be about to take it again, or to say that it is
done."""
_POLL_SECONDS = 0.5


def join_store(
    root: Path, run: ExecutionConfig, progress: Progress | None = None, *, teacher: str | None = None
) -> dict[str, Any]:
    """Help to fill the store in `root` until it is finished; finish it, where nobody else does.

    Args:
        run: how this process is to work; how large its batches are is said by the store.
        teacher: a Python file that makes the store's teacher, named by the user, who thereby has it run.

    Returns:
        What this process did (`Watch.summary`); nothing where the store was finished already.

    Raises:
        InputError: no store is being filled there.
        ConfigError: the store's teacher is a Python file that the user has not named.
        QuarantineError: it is not whole, since shards were given up.
    """
    progress, root, did = progress or SilentProgress(), root.absolute(), dict[str, Any]()
    if not root.is_dir():
        raise InputError(f"no folder {root}; give that of a store that is being filled")
    check_writable(root)
    while not _is_finished(root):
        if not _is_abandoned(root):
            did = help_others([root], run, progress, teachers=[teacher])
            continue
        with contextlib.suppress(StoreBusyError), hold_lock(root):
            if _is_finished(root):  # a moment ago
                return did
            return _go_on(root, run, teacher, progress)
    return did


def help_others(
    roots: Sequence[Path], run: ExecutionConfig, progress: Progress, *, teachers: Sequence[str | None]
) -> dict[str, Any]:
    """Fill stores beside the command that holds them, until it does so no longer: they are finished, or it is gone.

    Args:
        roots: of stores that are filled in one pass.
        teachers: as in `join_store`, for each store.

    Returns:
        What this process did; nothing where there was nothing left to do.

    Raises what `join_store` does.
    """
    did = dict[str, Any]()
    has_helped = False
    progress.say(f"joining the command that is filling {', '.join(root.name for root in roots)}")
    with stop_on_signals() as stop:
        while any(is_held(root) and not _is_finished(root) for root in roots):
            stop.check()
            if not has_helped and all((root / FILE_NAME).exists() for root in roots):
                has_helped = True
                did = _help(roots, run, teachers, progress, stop)
            else:  # the holder loads its teacher still, or writes its manifest
                time.sleep(_POLL_SECONDS)
    return did


def _help(
    roots: Sequence[Path], run: ExecutionConfig, teachers: Sequence[str | None], progress: Progress, stop: StopRequest
) -> dict[str, Any]:
    try:
        for root, teacher in zip(roots, teachers, strict=True):
            _check_code(root, teacher)
        fillings = [Filling.begun(root, run) for root in roots]
        return fill_with_others(fillings, progress, stop).summary()
    except InputError:
        if any(map(_is_finished, roots)):  # a moment ago, perhaps while a worker here was loaded
            return {}
        raise


def _go_on(root: Path, run: ExecutionConfig, teacher: str | None, progress: Progress) -> dict[str, Any]:
    """In the place of a holder that is gone."""
    _check_code(root, teacher)
    filling = Filling.begun(root, run)
    sweep(root, filling.plan)
    with stop_on_signals() as stop:
        watch = fill_with_others([filling], progress, stop)
        stop.check()
    filling.check_whole()
    audit_filling(filling, progress)
    filling.finish(time.monotonic() - watch.began, [])
    return watch.summary()


def _is_abandoned(root: Path) -> bool:
    """Whether nobody fills a store, and not for a moment only."""
    if is_held(root):
        return False
    time.sleep(PATIENCE_SECONDS)
    return not is_held(root)


def _is_finished(root: Path) -> bool:
    return (root / "manifest.json").exists()


def _check_code(root: Path, teacher: str | None) -> None:
    """A store's folder may come from anybody; what it says is data, but a teacher's Python file would be run.

    Raises:
        ConfigError: the user has not named that file.
    """
    wanted = load_extraction(root).settings.teacher
    if names_code(wanted) and (teacher is None or absolute_teacher(teacher) != wanted):
        raise ConfigError(
            f"the teacher of {root} is made by the Python file {wanted}, which joining would run; look at it, and name "
            f"it yourself if that is to be: TEACHER={wanted}"
        )
