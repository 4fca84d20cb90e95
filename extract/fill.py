"""Fills stores: the jobs that are missing, carried out by workers, with what becomes of each."""

import functools
from collections.abc import Iterable, Sequence

from extract.deadlines import Deadlines
from extract.driver import drive
from extract.filling import Filling, find_settled
from extract.isolate import find_culprit
from extract.jobs import Claims, FailedJob, Job, MakeWork, Pool
from extract.pools import open_pool
from extract.timing import StageSeconds
from extract.watch import DONE_AGAIN, Watch
from extract.worker import Extracted
from storage.errors import DecantError
from storage.records import ShardEntry
from storage.stage import StopRequest


def fill(
    stores: Sequence[Filling], make_worker: MakeWork[Extracted], watch: Watch, stop: StopRequest, claims: Claims
) -> None:
    """Extract what is missing in stores that are filled in one pass. A shard that ends its workers is looked at again
    when all others are done: the image that does it is left out.

    Args:
        claims: which shards are ours, where other processes fill the same stores.

    Raises:
        InputError: more unusable images than are allowed.
        Interrupted: a stop was asked for.
        DecantError: an error that another attempt cannot mend, or no worker stays alive.
    """
    plan, run = stores[0].plan, stores[0].cfg.run
    pending = [index for index in range(plan.num_shards) if any(store.lacks(index) for store in stores)]
    images_done = plan.num_images - sum(len(plan.images_of_shard(index)) for index in pending)
    watch.begin(
        plan.num_images, images_done, sum(len(store.done) for store in stores), plan.num_shards * len(stores),
        bad=max(store.check_bad() for store in stores),
    )  # fmt: skip
    if not pending:
        return
    with open_pool(run, make_worker, len(pending), stop) as pool:
        filler = _Filler(stores, pool, watch, stop, claims)
        deadly = [failed for failed in filler.carry_out(map(Job, pending)) if not filler.settle(failed)]
        for failed in deadly:
            filler.isolate(failed)


_HOPELESS = 10
"""Shards that are given up in a row before it is taken for a matter of all."""


class _Filler:
    """The bookkeeping of one pass."""

    def __init__(self, stores: Sequence[Filling], pool: Pool, watch: Watch, stop: StopRequest, claims: Claims) -> None:
        self.stores, self.pool, self.watch, self.stop, self.claims = stores, pool, watch, stop, claims
        self.plan, self.run = stores[0].plan, stores[0].cfg.run
        self.given_up_in_a_row = 0
        self.deadlines = Deadlines(self.run.job_seconds)

    def carry_out(self, jobs: Iterable[Job]) -> Iterable[FailedJob]:
        """Have jobs done, and take up what was committed; yields those that failed."""
        find_committed = functools.partial(find_settled, [(store.root, store.plan) for store in self.stores])
        for outcome in drive(
            self.pool, jobs, self.run, find_committed=find_committed, stop=self.stop, claims=self.claims,
            deadlines=self.deadlines, note=self.watch.note,
        ):  # fmt: skip
            if isinstance(outcome, FailedJob):
                yield outcome
            else:
                if outcome.num_done_again:
                    self.watch.note(DONE_AGAIN, shard=outcome.entries[0].index, views=outcome.num_done_again)
                self._take_up(outcome.entries[0].index, outcome.entries, outcome.seconds, is_ours=outcome.is_ours)

    def settle(self, failed: FailedJob) -> bool:
        """Give a shard up; False for one whose image that ends workers can be looked for."""
        shard = failed.job.shard
        known_elsewhere = any(store.knows_given_up(shard) for store in self.stores)
        if failed.is_deadly and self.pool.can_kill and not known_elsewhere:
            return False
        self.watch.given_up(failed)
        self.given_up_in_a_row += 1
        found = [None if shard in store.done else store.look_again(shard) for store in self.stores]
        for store in self.stores:
            store.give_up(failed)
        self.claims.release(failed.job)  # only now: another driver would try it again
        if any(found):
            self._take_up(shard, found, StageSeconds())
        if self.given_up_in_a_row >= _HOPELESS:
            raise DecantError(
                f"{self.given_up_in_a_row} shards were given up in a row, the last one: {failed.reason}; this is no "
                "matter of a few images: mend that, then try again with --retry-failed (RETRY_FAILED=1)"
            )
        return True

    def isolate(self, failed: FailedJob) -> None:
        """Leave out the images of a shard that end workers, one after the other, and extract the rest. A shard whose
        images do not do that was lost to something else, and is carried out once more."""
        positions = self.plan.images_of_shard(failed.job.shard)
        keys = [self.stores[0].images.keys[position] for position in positions]
        job = Job(failed.job.shard)
        most = min(store.most_bad for store in self.stores)
        is_last = False
        while len(job.excluded) < most and not is_last:
            self.watch.note("isolating", shard=job.shard, images=len(keys), reason=failed.reason)
            if self._survives(job._replace(probed=(0, len(keys)))):
                self.watch.note("survived", shard=job.shard)
                is_last = True
            else:
                culprit = find_culprit(job, len(keys), self._survives)
                if culprit is None:
                    failed = failed._replace(reason=f"{failed.reason}; no image of it does that alone")
                    break
                self.watch.note("isolated", shard=job.shard, key=keys[culprit])
                job = job._replace(excluded=(*job.excluded, keys[culprit]))
            again = list(self.carry_out([job]))
            if not again:
                return
            [failed] = again
            is_last = is_last or not failed.is_deadly
        self.settle(failed._replace(is_deadly=False))

    def _survives(self, probe: Job) -> bool:
        once = self.run.model_copy(update={"max_attempts": 1})
        outcomes = drive(
            self.pool, [probe], once, find_committed=lambda job: None, stop=self.stop, deadlines=self.deadlines
        )
        return not any(isinstance(outcome, FailedJob) and outcome.is_deadly for outcome in outcomes)

    def _take_up(
        self, shard: int, entries: Sequence[ShardEntry | None], seconds: StageSeconds, *, is_ours: bool = True
    ) -> None:
        self.given_up_in_a_row = 0
        new = [None if shard in store.done else entry for store, entry in zip(self.stores, entries, strict=True)]
        for store, entry in zip(self.stores, new, strict=True):
            if entry is not None:
                store.add(entry)
        is_whole = all(shard in store.done for store in self.stores)
        num_images = len(self.plan.images_of_shard(shard)) if is_whole else 0
        self.watch.shard(new, seconds, num_images, is_ours=is_ours)
        if any(entry is not None and entry.bad_images for entry in new):
            for store in self.stores:
                store.check_bad()
