"""Is there a place for the stores? Asked before a teacher is loaded, which may take minutes."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from extract.config import ExtractConfig
from extract.filling import Target
from extract.resolve import needed_view_bytes
from storage.atomic import private_name, write_private
from storage.errors import DiskError
from storage.folder import find_plan, needed_bytes
from storage.receipts import without_receipt


def check_place(targets: Sequence[Target], num_images: int) -> None:
    """Whether the folders can be written, and hold what is missing of all stores together.

    Raises:
        DiskError: they cannot, or do not; says how much there is.
    """
    needed: dict[int, int] = {}
    for cfg, root in targets:
        check_writable(root)
        disk = root.stat().st_dev
        needed[disk] = needed.get(disk, 0) + _missing_bytes(cfg, root, num_images)
        free = shutil.disk_usage(root).free
        if needed[disk] > free:
            what = f"the {len(targets)} stores need" if len(targets) > 1 else "the store needs"
            raise DiskError(
                f"{what} {needed[disk] / 1e6:,.3f} MB and more at {root.parent}, where {free / 1e6:,.3f} MB are free; "
                "choose another folder, fewer teachers at a time, or smaller stores (fewer VIEWS, ENCODING=int8)"
            )


def check_writable(folder: Path) -> None:
    """
    Raises:
        DiskError: no file can be written there.
    """
    private = private_name(folder / "probe")
    try:
        write_private(private, b"")
    finally:
        private.unlink(missing_ok=True)


def _missing_bytes(cfg: ExtractConfig, root: Path, num_images: int) -> int:
    """About as much as is still to be written of a store."""
    plan = find_plan(root)
    if plan is not None:
        return needed_bytes(plan) * len(without_receipt(root, plan)) // max(1, plan.num_shards)
    return num_images * cfg.views * needed_view_bytes(cfg)
