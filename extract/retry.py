"""Forgets what was given up, so that it is tried again."""

from pathlib import Path

from extract.jobs import ENDS_WORKERS
from storage.folder import find_plan
from storage.quarantine import find_given_up, forget_given_up
from storage.receipts import committed_shards
from storage.records import BadImage, StorePlan
from storage.stage import Progress
from storage.verify import discard_shard

_CANNOT_BE_READ = "cannot be read: "
"""In the reason of an image whose bytes could not be had: the disk, the network, a permission."""


def forget_failures(root: Path, plan: StorePlan, progress: Progress) -> None:
    """Forget which shards were given up, and shards with holes that another attempt may fill. What is wrong with an
    image's bytes stays wrong. The caller holds the store's lock.

    Raises:
        DiskError: nothing can be written there.
    """
    if find_plan(root) is None:
        return
    num_given_up = sum(find_given_up(root, index) is not None for index in range(plan.num_shards))
    forget_given_up(root)
    holed = [
        index for index, entry in committed_shards(root, plan).items() if any(map(may_be_mended, entry.bad_images))
    ]
    for index in holed:
        discard_shard(root, index)
    if num_given_up or holed:
        progress.say(
            f"tried again: {num_given_up} shards that were given up, {len(holed)} with images that could not be read "
            "or ended a worker"
        )


def may_be_mended(bad: BadImage) -> bool:
    """Whether an image may be usable another time."""
    return bad.reason.startswith(ENDS_WORKERS) or _CANNOT_BE_READ in bad.reason
