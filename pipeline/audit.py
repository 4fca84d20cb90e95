"""Audits: random records of stores, made again by their teachers."""

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline import provenance
from pipeline.repair import find_images, settings_of
from pipeline.workspace import Workspace, read_result
from storage.errors import ConfigError, DamagedError
from storage.image_index import load_index
from storage.image_list import ImageList
from storage.reader import open_store
from storage.records import StorePlan
from storage.stage import Progress


def audit_stores(
    workspace: Workspace, locations: list[Path], *, num_records: int, seed: int, progress: Progress
) -> None:
    """Audit finished stores, and say of each what was found.

    Raises:
        DamagedError: one does not hold what its teacher says.
        ConfigError: nothing tells how a store was made.
    """
    wrong = [root for root in locations if not _audit(workspace, root, num_records, seed, progress)]
    if wrong:
        raise DamagedError(
            f"{len(wrong)} of {len(locations)} stores do not hold what their teachers say, first {wrong[0]}; look at "
            "the versions above, run `make verify`, or extract it again with --force"
        )


def _audit(workspace: Workspace, root: Path, num_records: int, seed: int, progress: Progress) -> bool:
    store = open_store(root, check="always")
    cfg = settings_of(workspace, root, store.plan)
    audit = importlib.import_module("extract.final_audit").audit_as_made(
        store, root, cfg, num_records=num_records, seed=seed, images=_images(workspace, root, store.plan)
    )
    progress.say(f"{root}: {audit}")
    for line in version_changes(_recorded(root), provenance.machine()):
        progress.say(f"  {line}")
    return bool(audit.is_good)


def _images(workspace: Workspace, root: Path, plan: StorePlan) -> ImageList | None:
    """Those of the store, where they lie now; None where only the store's own views are left.

    Raises:
        ConfigError: neither is there.
    """
    try:
        index = load_index(find_images(workspace, root, plan))
    except (ConfigError, OSError):
        if plan.stored_views is None:
            raise
        return None
    train, held_out = index.split("train"), index.split("eval")
    return train if train.fingerprint == plan.images_fingerprint else held_out


def _recorded(root: Path) -> Mapping[str, Any]:
    result = read_result(root)
    return {} if result is None else result.machine


def version_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What differs between the machine that made a store and this one."""
    if not then:
        yield "nothing tells with which versions it was made (no result.json)"
        return
    before, after = then.get("libraries", {}), now.get("libraries", {})
    changes = [
        f"{name} {before.get(name)} then, {after.get(name)} now"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]
    changes += [
        f"{name} {then.get(name)} then, {now.get(name)} now"
        for name in ("python", "cpu")
        if then.get(name) != now.get(name)
    ]
    yield f"versions that differ: {'; '.join(changes)}" if changes else "made with the versions that are installed here"
