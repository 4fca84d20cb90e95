"""How fast work goes now: amounts over the last minute, not since the start."""

import time
from collections import deque

WINDOW_SECONDS = 60.0
_FEWEST = 8
"""Amounts that are looked at however long ago they were: a shard may take minutes."""
_STEP_SECONDS = 1.0
"""Amounts nearer to each other than that are kept as one."""


class Pace:
    """Amounts a second, such as images or bytes. Begins when it is made, or when `begin` is called."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Forget everything: what came before was no work, such as the start of workers."""
        self.since = self.last = time.monotonic()
        self.amounts: deque[tuple[float, float]] = deque()
        """When, by the monotonic clock, and how much."""

    def add(self, amount: float) -> None:
        if not amount:
            return
        now = time.monotonic()
        if self.amounts and now - self.last < _STEP_SECONDS:
            when, before = self.amounts.pop()
            self.amounts.append((when, before + amount))
        else:
            self.amounts.append((now, amount))
            self.last = now
        while len(self.amounts) > _FEWEST and now - self.amounts[0][0] > WINDOW_SECONDS:
            self.since, _ = self.amounts.popleft()

    def per_second(self) -> float:
        """0 where nothing has been done yet. Sinks while nothing comes."""
        total = sum(amount for _, amount in self.amounts)
        return total / max(1e-9, time.monotonic() - self.since)

    def seconds_for(self, amount: float) -> float | None:
        """How long so much would take; None while nothing tells."""
        if amount <= 0:
            return 0.0
        rate = self.per_second()
        return amount / rate if rate > 0 else None
