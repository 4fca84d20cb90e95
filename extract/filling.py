"""One store while it is filled: what is committed of it, and what is said of it at the end."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from extract.config import ExtractConfig
from extract.extraction import remove_extraction, write_extraction
from extract.jobs import FailedJob, Job
from extract.plan import PlannedStore
from extract.weights import WeightsSource
from extract.worker import Extracted
from storage.errors import InputError, QuarantineError
from storage.folder import create_store, finish_store, sweep
from storage.image_list import ImageList
from storage.receipts import committed_shards, read_receipt
from storage.records import ShardEntry, StorePlan


class Target(NamedTuple):
    """A store to fill: the settings that it is filled with, and its folder."""

    cfg: ExtractConfig
    root: Path


class Filling:
    """Begins a store, or accepts the one that is there; the caller holds its lock.

    Raises:
        ConfigError, DamagedError, DiskError: see `create_store`.
    """

    def __init__(self, cfg: ExtractConfig, root: Path, planned: PlannedStore, images: ImageList) -> None:
        self.cfg, self.root, self.plan, self.images = cfg, root, planned.plan, images
        self.agreement = planned.agreement
        create_store(root, planned.plan, images, planned.statistics)
        sweep(root, planned.plan)
        write_extraction(root, cfg, images)
        self.done = committed_shards(root, self.plan)
        self.found = frozenset(self.done)
        """Shards that earlier runs made."""

    def add(self, entry: ShardEntry) -> None:
        self.done[entry.index] = entry

    def look_again(self, index: int) -> ShardEntry | None:
        """Take up a shard that was committed although nobody said so: the job that made it failed at another store."""
        entry = read_receipt(self.root, self.plan, index)
        if entry is not None:
            self.add(entry)
        return entry

    def check_bad(self) -> int:
        """Count unusable images.

        Raises:
            InputError: more than `max_bad_fraction` allows.
        """
        bad = [bad for entry in self.done.values() for bad in entry.bad_images]
        allowed = max(1, int(self.cfg.max_bad_fraction * len(self.images)))
        if len(bad) > allowed:
            listed = "; ".join(f"{image.key}: {image.reason}" for image in bad[:5])
            raise InputError(
                f"{len(bad)} of {len(self.images)} images of {self.images.location} are unusable, {allowed} are "
                f"allowed ({listed}); mend or remove them, or raise extract.max_bad_fraction"
            )
        return len(bad)

    def finish(self, failed: Sequence[FailedJob], seconds: float, together_with: list[str]) -> dict[str, Any]:
        """Write the manifest.

        Args:
            failed: jobs that were given up, perhaps for another store's sake.
            seconds: of the whole pass.
            together_with: the teachers of the stores that were filled in the same pass.

        Returns:
            The stage's metrics.

        Raises:
            QuarantineError: shards of this store are missing.
        """
        plan = self.plan
        lost = [job for job in failed if job.job.shard not in self.done]
        if lost:
            raise QuarantineError(
                f"{len(lost)} of {plan.num_shards} shards of {self.root} were given up after "
                f"{self.cfg.run.max_attempts} attempts (first: shard {lost[0].job.shard}: {lost[0].reason}); all "
                "others are safe: give the same command again"
            )
        manifest = finish_store(self.root)
        remove_extraction(self.root)
        made = [entry for index, entry in self.done.items() if index not in self.found]
        return {
            "store_fingerprint": manifest.fingerprint,
            "teacher": self.cfg.teacher,
            "weights": None if self.cfg.weights is None else _place(self.cfg.weights),
            "images": plan.num_images,
            "views_per_image": plan.views_per_image,
            "records": manifest.num_records,
            "shards": plan.num_shards,
            "tokens": plan.features.num_tokens,
            "channels": plan.features.channels,
            "layout": plan.backend,
            "whitening": plan.whitening.kind,
            "encoding": plan.encoding.kind,
            "precision": plan.teacher["precision"],
            "against_float32": self.agreement.to_json() if self.agreement else None,
            "bytes": manifest.num_bytes,
            "bad_images": [bad.to_json() for bad in manifest.bad_images],
            "together_with": together_with,
            "extracted_views_per_second": (
                round(sum(entry.num_records for entry in made) / seconds, 2) if made else None
            ),
        }


def _place(weights: WeightsSource) -> str:
    """Where a file is found again from another folder."""
    return weights if weights == "random" else str(weights.expanduser().resolve())


def find_receipts(stores: Sequence[tuple[Path, StorePlan]], job: Job) -> Extracted | None:
    """What a worker would say of a job; None while a store does not have the shard."""
    entries = [read_receipt(root, plan, job.shard) for root, plan in stores]
    found = tuple(entry for entry in entries if entry is not None)
    return Extracted(found) if len(found) == len(stores) else None
