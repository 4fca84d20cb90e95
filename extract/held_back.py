"""Keeps SIGTERM from processes that are to outlive it."""

import contextlib
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def sigterm_held_back() -> Iterator[None]:
    """What is started in the block never hears SIGTERM. Batch systems send it to the whole process group: without this,
    workers that are to end in peace would be gone with the process that keeps them.

    One that is sent to us meanwhile is heard when the block ends.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
