"""Filling stores that others may be filling, too: which jobs are this driver's."""

import functools
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from extract.fill import fill
from extract.filling import Filling, find_settled
from extract.jobs import Job
from extract.watch import Watch
from extract.worker import Worker
from storage.claims import ShardClaims
from storage.records import StorePlan
from storage.stage import Progress, StopRequest


def fill_with_others(fillings: Sequence[Filling], progress: Progress, stop: StopRequest) -> Watch:
    """Fill stores in one pass until every shard is there or given up, whoever does it; returns what was seen.

    Raises what `fill` does.
    """
    roots = [filling.root.absolute() for filling in fillings]
    has_gpu = fillings[0].cfg.run.device != "cpu" and torch.cuda.is_available()
    busy_name = "GPU busy" if has_gpu else "teacher busy"
    with (
        Watch(progress, roots, busy_name=busy_name) as watch,
        SharedShards([(store.root, store.plan) for store in fillings]) as claims,
    ):
        fill(fillings, functools.partial(Worker, roots, fillings[0].cfg.run), watch, stop, claims)
    return watch


class SharedShards:
    """`Claims` on the shards of stores that are filled in one pass: a job is claimed in all of them or in none."""

    def __init__(self, stores: Sequence[tuple[Path, StorePlan]]) -> None:
        self.stores = stores
        self.claims = [ShardClaims(root) for root in sorted(root.resolve() for root, _ in stores)]
        """In the same order for every driver, so that two that want the same do not stay in each other's way."""

    def take(self, job: Job) -> bool:
        """False, too, for one that is settled already: nobody is to do it again."""
        taken: list[ShardClaims] = []
        for claims in self.claims:
            is_new = job.shard not in claims.held
            if not claims.take(job.shard):
                break
            if is_new:
                taken.append(claims)
        else:
            if find_settled(self.stores, job) is None:
                return True
        for claims in taken:
            claims.release(job.shard)
        return False

    def release(self, job: Job) -> None:
        """Let others have a job that is settled; one that is given up stays ours until the stores say so."""
        if find_settled(self.stores, job) is not None:
            for claims in self.claims:
                claims.release(job.shard)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for claims in self.claims:
            claims.close()
