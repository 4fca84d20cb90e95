"""The order in which a worker process begins its jobs: the driver takes the first ones it sent for those at work."""

import contextlib
import threading
from collections.abc import Iterator


class Turns:
    """Lets so many jobs work at a time, in the order of their numbers, whatever threads bring them."""

    def __init__(self, at_a_time: int) -> None:
        self.at_a_time = at_a_time
        self._change = threading.Condition()
        self._num_begun = self._num_at_work = 0

    @contextlib.contextmanager
    def take(self, number: int) -> Iterator[None]:
        """Wait for a job's turn, and have it for the length of the block.

        Args:
            number: of the job, from 0, in the order in which they were sent.
        """
        with self._change:
            self._change.wait_for(lambda: self._num_begun == number and self._num_at_work < self.at_a_time)
            self._num_begun += 1
            self._num_at_work += 1
            self._change.notify_all()
        try:
            yield
        finally:
            with self._change:
                self._num_at_work -= 1
                self._change.notify_all()
