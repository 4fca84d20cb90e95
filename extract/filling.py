"""One store while it is filled: what is committed of it, what was given up, and what is said of it at the end."""

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from extract.config import ExecutionConfig, ExtractConfig
from extract.extraction import load_extraction, remove_extraction, write_extraction
from extract.jobs import FailedJob, Job
from extract.plan import PlannedStore
from extract.precision import Agreement
from extract.retry import may_be_mended
from extract.weights import WeightsSource
from extract.worker import Extracted
from storage.errors import InputError, QuarantineError
from storage.folder import create_store, finish_store, load_plan, sweep
from storage.image_list import ImageList
from storage.quarantine import GivenUp, find_given_up, record_given_up
from storage.receipts import committed_shards, read_receipt
from storage.records import BadImage, ShardEntry, StorePlan


class Target(NamedTuple):
    """A store to fill: the settings that it is filled with, and its folder."""

    cfg: ExtractConfig
    root: Path


class Filling:
    def __init__(
        self, cfg: ExtractConfig, root: Path, plan: StorePlan, images: ImageList, agreement: Agreement | None = None
    ) -> None:
        self.cfg, self.root, self.plan, self.images, self.agreement = cfg, root, plan, images, agreement
        self.done = committed_shards(root, plan)
        self.found = frozenset(self.done)
        """Shards that earlier runs made."""
        missing = (index for index in range(plan.num_shards) if index not in self.done)
        known = ((index, find_given_up(root, index)) for index in missing)
        self.given_up: dict[int, GivenUp] = {index: given_up for index, given_up in known if given_up is not None}
        """Shards that are not there, and why."""

    @classmethod
    def begin(cls, cfg: ExtractConfig, root: Path, planned: PlannedStore, images: ImageList) -> Self:
        """Begin a store, or accept the one that is there; the caller holds its lock.

        Raises:
            ConfigError, DamagedError, DiskError: see `create_store`.
        """
        create_store(root, planned.plan, images, planned.statistics)
        sweep(root, planned.plan)
        write_extraction(root, cfg, images)
        return cls(cfg, root, planned.plan, images, planned.agreement)

    @classmethod
    def begun(cls, root: Path, run: ExecutionConfig) -> Self:
        """A store that another command has begun, from its folder alone.

        Args:
            run: how this process is to work.

        Raises:
            InputError: it is not being filled.
            DamagedError: what its folder says is not what was written.
        """
        extraction = load_extraction(root)
        return cls(extraction.settings_for(run), root, load_plan(root), extraction.load_images(root))

    def lacks(self, index: int) -> bool:
        """Whether a shard is neither there nor given up."""
        return index not in self.done and index not in self.given_up

    def add(self, entry: ShardEntry) -> None:
        self.done[entry.index] = entry
        self.given_up.pop(entry.index, None)

    def look_again(self, index: int) -> ShardEntry | None:
        """A shard that was committed although nobody said so: the job that made it failed at another store."""
        return read_receipt(self.root, self.plan, index)

    def give_up(self, failed: FailedJob) -> None:
        """Say so in the store's folder, where other processes look, too; nothing where the shard is there."""
        index = failed.job.shard
        if self.look_again(index) is not None:
            return
        known = find_given_up(self.root, index)
        if known is None:
            known = GivenUp(
                shard=index, reason=failed.reason, attempts=self.cfg.run.max_attempts, is_deadly=failed.is_deadly,
                host=socket.gethostname(), when=GivenUp.now(),
            )  # fmt: skip
            record_given_up(self.root, known)
        self.given_up[index] = known

    def knows_given_up(self, index: int) -> bool:
        """Whether a shard was given up, here or by another process."""
        return index not in self.done and find_given_up(self.root, index) is not None

    @property
    def bad_images(self) -> list[BadImage]:
        return [bad for entry in self.done.values() for bad in entry.bad_images]

    @property
    def most_bad(self) -> int:
        """Images that may be unusable."""
        return max(1, int(self.cfg.max_bad_fraction * len(self.images)))

    def check_bad(self) -> int:
        """Count unusable images.

        Raises:
            InputError: more than `max_bad_fraction` allows.
        """
        bad, allowed = self.bad_images, self.most_bad
        if len(bad) > allowed:
            listed = "; ".join(f"{image.key}: {image.reason}" for image in bad[:5])
            mended = sum(map(may_be_mended, bad))
            again = f", and try {mended} of them again with --retry-failed (RETRY_FAILED=1)" if mended else ""
            raise InputError(
                f"{len(bad)} of {len(self.images)} images of {self.images.location} are unusable, {allowed} are "
                f"allowed ({listed}); mend or remove them{again}, or raise extract.max_bad_fraction"
            )
        return len(bad)

    def check_whole(self) -> None:
        """
        Raises:
            QuarantineError: shards were given up; says which, and why.
        """
        if not self.given_up:
            return
        first = self.given_up[min(self.given_up)]
        listed = ", ".join(map(str, sorted(self.given_up)[:10])) + (", ..." if len(self.given_up) > 10 else "")
        raise QuarantineError(
            f"{len(self.given_up)} of {self.plan.num_shards} shards of {self.root} were given up ({listed}; shard "
            f"{first.shard} after {first.attempts} attempts, {first.when} UTC: {first.reason}); all others are safe, "
            "and these are tried again with --retry-failed (RETRY_FAILED=1)"
        )

    def finish(self, seconds: float, together_with: list[str]) -> dict[str, Any]:
        """Write the manifest of a store that is whole.

        Args:
            seconds: of the whole pass.
            together_with: the teachers of the stores that were filled in the same pass.

        Returns:
            The stage's metrics.
        """
        plan = self.plan
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


def find_settled(stores: Sequence[tuple[Path, StorePlan]], job: Job) -> Extracted | FailedJob | None:
    """What has become of a job, whoever was at it: what a worker would say of it where every store has the shard, why
    it was given up where some lack it for good; None while it is still to be done."""
    entries = [read_receipt(root, plan, job.shard) for root, plan in stores]
    found = tuple(entry for entry in entries if entry is not None)
    if len(found) == len(stores):
        return Extracted(found, is_ours=False)
    lacking = [root for (root, _), entry in zip(stores, entries, strict=True) if entry is None]
    reasons = [find_given_up(root, job.shard) for root in lacking]
    known = [reason for reason in reasons if reason is not None]
    if len(known) < len(lacking):
        return None
    return FailedJob(job, known[0].reason, known[0].is_deadly)
