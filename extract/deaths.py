"""When is there no use in starting another worker?"""

from storage.errors import DecantError

_MOST_DEATHS = 20
"""Times `max_attempts`, in a row: many more than a few shards that end workers take, far fewer than a whole store."""


class Deaths:
    """Counts workers that died at work, and those that never came up, apart: a few poisonous shards must not look like
    a broken machine."""

    def __init__(self, max_attempts: int) -> None:
        self.max_attempts = max_attempts
        self.in_a_row = self.failed_starts_in_a_row = 0

    def count(self, reason: str, *, was_up: bool, is_alone: bool, size: int) -> None:
        """
        Args:
            is_alone: whether no other worker is up.
            size: workers that there are to be.

        Raises:
            DecantError: there is no use in starting another one.
        """
        if was_up:
            self.in_a_row += 1
        else:
            self.failed_starts_in_a_row += 1
        is_hopeless = is_alone and self.failed_starts_in_a_row > 2 * self.max_attempts * size
        if is_hopeless or self.in_a_row > self.max_attempts * max(_MOST_DEATHS, 2 * size):
            raise DecantError(f"no worker survives; the last one: {reason}")
