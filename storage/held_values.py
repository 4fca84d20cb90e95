"""Large values that several threads use: each is made once, and the newest are held as far as memory is allowed."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, NamedTuple, TypeVar

Value = TypeVar("Value")


class _Held(NamedTuple):
    value: Any
    num_bytes: int


class _State:
    """Of one process: a forked child has none of its parent's threads, which would make what is being made."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.changed = threading.Condition()
        self.held: OrderedDict[Hashable, _Held] = OrderedDict()
        """Oldest first."""
        self.under_way: dict[Hashable, int] = {}
        """Bytes of what a thread is making."""


class HeldValues(Generic[Value]):
    """Values by key. What is held and what is being made takes `limit_bytes` at most; a larger one stands alone."""

    def __init__(self, limit_bytes: int, size_of: Callable[[Value], int]) -> None:
        """`size_of`: the memory that a value really takes, in bytes."""
        self.limit_bytes, self._size_of, self._mine = limit_bytes, size_of, _State()

    def get(self, key: Hashable, num_bytes: int, make: Callable[[], Value]) -> Value:
        """The value of a key, made where it is not held. Threads that want the same one wait for the first of them; an
        error is that thread's, and the next one tries again.

        Args:
            num_bytes: memory that the value is expected to take.
        """
        state = self._state()
        with state.changed:
            while key not in state.held and (key in state.under_way or not self._has_room(state, num_bytes)):
                state.changed.wait()
            if key in state.held:
                state.held.move_to_end(key)
                value: Value = state.held[key].value
                return value
            state.under_way[key] = num_bytes
        made = None
        try:
            value = make()
            made = _Held(value, self._size_of(value))
            return value
        finally:
            with state.changed:
                del state.under_way[key]
                if made is not None:
                    state.held[key] = made
                    self._let_go(state, 0, keep=1)
                state.changed.notify_all()

    def _has_room(self, state: _State, num_bytes: int) -> bool:
        """Whether another value may be made; the oldest ones give way."""
        self._let_go(state, num_bytes, keep=0)
        return not state.under_way or sum(state.under_way.values()) + num_bytes <= self.limit_bytes

    def _let_go(self, state: _State, num_bytes: int, keep: int) -> None:
        taken = num_bytes + sum(state.under_way.values()) + sum(held.num_bytes for held in state.held.values())
        while len(state.held) > keep and taken > self.limit_bytes:
            taken -= state.held.popitem(last=False)[1].num_bytes

    def _state(self) -> _State:
        if self._mine.pid != os.getpid():
            self._mine = _State()
        return self._mine
