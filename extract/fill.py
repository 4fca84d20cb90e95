"""Fills stores: the jobs that are missing, carried out by workers, with what becomes of each."""

import functools
from collections.abc import Sequence

from extract.driver import Claims, drive
from extract.filling import Filling, find_settled
from extract.jobs import FailedJob, Job, MakeWork
from extract.pools import open_pool
from extract.watch import Watch
from extract.worker import Extracted
from storage.stage import StopRequest


def fill(
    stores: Sequence[Filling], make_worker: MakeWork[Extracted], watch: Watch, stop: StopRequest,
    claims: Claims | None = None,
) -> list[FailedJob]:  # fmt: skip
    """Extract what is missing in stores that are filled in one pass.

    Args:
        claims: which shards are ours, where other processes fill the same stores.

    Returns:
        The jobs that were given up.

    Raises:
        InputError: more unusable images than are allowed.
        Interrupted: a stop was asked for.
        DecantError: an error that another attempt cannot mend, or no worker stays alive.
    """
    plan, cfg = stores[0].plan, stores[0].cfg
    pending = [index for index in range(plan.num_shards) if any(store.lacks(index) for store in stores)]
    num_images = {index: len(plan.images_of_shard(index)) for index in pending}
    watch.begin(
        plan.num_images, plan.num_images - sum(num_images.values()), sum(len(store.done) for store in stores),
        plan.num_shards * len(stores), bad=max(store.check_bad() for store in stores),
    )  # fmt: skip
    if not pending:
        return []
    failed: list[FailedJob] = []
    find_committed = functools.partial(find_settled, [(store.root, store.plan) for store in stores])
    with open_pool(cfg.run, make_worker, len(pending), stop) as pool:
        for outcome in drive(
            pool, map(Job, pending), cfg.run, find_committed=find_committed, stop=stop, claims=claims, note=watch.note
        ):
            if isinstance(outcome, FailedJob):
                failed.append(outcome)
                watch.given_up(outcome)
                index = outcome.job.shard
                entries = [store.look_again(index) if index not in store.done else None for store in stores]
                for store in stores:
                    store.give_up(outcome)
                if claims is not None:  # only now: another driver would try it again
                    claims.release(outcome.job)
                if not any(entries):
                    continue
                seconds, is_ours = Extracted(()).seconds, True
            else:
                index, seconds, is_ours = outcome.entries[0].index, outcome.seconds, outcome.is_ours
                entries = [
                    entry if index not in store.done else None
                    for store, entry in zip(stores, outcome.entries, strict=True)
                ]
            for store, entry in zip(stores, entries, strict=True):
                if entry is not None:
                    store.add(entry)
            is_whole = all(index in store.done for store in stores)
            watch.shard(entries, seconds, num_images[index] if is_whole else 0, is_ours=is_ours)
            if any(entry is not None and entry.bad_images for entry in entries):
                for store in stores:
                    store.check_bad()
    return failed
