"""A lock that a forked child finds open."""

import os
import threading


class ProcessLock:
    """A mutex between the threads of one process. A thread of the parent that holds it while the process forks does not
    exist in the child, which would wait for it for ever: there it is a new lock."""

    def __init__(self) -> None:
        self._pid, self._lock = os.getpid(), threading.Lock()

    def __enter__(self) -> None:
        if self._pid != os.getpid():
            self._pid, self._lock = os.getpid(), threading.Lock()
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()
