"""Batches made ahead by threads, in memory that is used again and again.

Reading into fresh memory for each batch costs more than the read itself: every page of it is a fault. So a ring owns a
few buffers of the caller's making (pinned, where the caller wants that), fills them ahead of the consumer, and fills
each again once the consumer has let go of it. Threads serve here, because `preadv` and the decoders release the
interpreter lock; nothing is shared with other processes, and no thread runs before the first batch is asked for.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from storage.errors import DecantError

Buffer = TypeVar("Buffer")
Batch = TypeVar("Batch")


def iter_filled(
    fill: Callable[[int, Buffer], Batch], make_buffer: Callable[[], Buffer], first: int, last: int, *, threads: int,
    depth: int, held: int = 1, hint: Callable[[int], None] | None = None, look_ahead: int = 1,
) -> Iterator[Batch]:  # fmt: skip
    """Yield `fill(step, buffer)` for the steps from `first` to `last - 1`, in order.

    Closing the iterator, or dropping it, ends the threads as soon as the fills that they are at are done.

    Args:
        fill: makes the batch of a step in a buffer; called from threads, for several steps at a time but never twice
            at a time with one buffer.
        make_buffer: called at most `depth` times in all, by the consumer's thread.
        depth: buffers; while the consumer works on a batch, `depth - held` others are ready or under way.
        held: how many of the newest batches stay valid, the one just yielded among them. Asking for another lets go of
            the oldest, and its buffer is filled again.
        hint: told of every step once, `look_ahead` steps before that is filled, from the threads that fill. Where it
            cannot find what it should announce, `fill` will say so in its turn.

    Raises:
        BaseException: what `fill` raised, in the place of its step; nothing comes after it.
        ValueError: fewer buffers than batches that are held, or a number that is not positive.
    """
    if min(threads, held, look_ahead, depth - held + 1) < 1:
        raise ValueError(f"a ring of {depth} buffers cannot have {threads=}, {held=}, {look_ahead=}")

    steps = iter(range(first, last))
    under_way: deque[tuple[Future[Batch], Buffer]] = deque()
    lent: deque[Buffer] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decant-ring")

    def make(step: int, buffer: Buffer) -> Batch:
        if hint is not None:
            for coming in range(first if step == first else step + look_ahead, step + look_ahead + 1):
                if coming < last:
                    with contextlib.suppress(OSError, DecantError):
                        hint(coming)
        return fill(step, buffer)

    def start(buffer: Buffer) -> None:
        for step in islice(steps, 1):
            under_way.append((pool.submit(make, step, buffer), buffer))

    try:
        for _ in range(min(depth, last - first)):
            start(make_buffer())
        while under_way:
            future, buffer = under_way.popleft()
            lent.append(buffer)
            yield future.result()
            if len(lent) == held:
                start(lent.popleft())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
