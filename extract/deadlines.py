"""When a job is taken for hung."""

from collections import deque

_LEAST_DEADLINE_SECONDS, _DEADLINE_FACTOR = 600.0, 5.0
"""A job is hung when it takes longer than this, and than so many times the 99th of 100 jobs; twice as long at each
further attempt."""
_FIRST_DEADLINE_SECONDS = 3600.0
"""While nothing tells yet how long a job takes."""


class Deadlines:
    def __init__(self, fixed_seconds: float = 0.0) -> None:
        """
        Args:
            fixed_seconds: the limit; 0 learns it from the jobs that were done.
        """
        self.fixed_seconds = fixed_seconds
        self.seconds: deque[float] = deque(maxlen=1000)
        """Of the last jobs."""
        self.usual_seconds = _FIRST_DEADLINE_SECONDS
        """The limit that they make; asked for much more often than a job is done."""

    def add(self, seconds: float) -> None:
        """A job was done in so many."""
        self.seconds.append(seconds)
        slow = sorted(self.seconds)[int(0.99 * len(self.seconds))]
        self.usual_seconds = max(_LEAST_DEADLINE_SECONDS, _DEADLINE_FACTOR * slow)

    def limit_seconds(self, failures: int = 0) -> float:
        """For a job that has failed so often."""
        if self.fixed_seconds:
            return self.fixed_seconds
        return float(self.usual_seconds * 2**failures)
