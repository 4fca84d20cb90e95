"""A process that ends with the one which started it, however that one ends."""

import ctypes
import os
import signal
import sys

PARENT = "DECANT_PARENT"
"""The variable that tells a process who started it."""
_SET_PARENT_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of Linux's prctl."""


def end_with_parent() -> None:
    """Be killed when the process ends that `PARENT` names; without that variable nothing is done. It is not asked to
    end: whoever gives the same command again shall find the newest checkpoint, and nobody who still writes there."""
    parent = os.environ.pop(PARENT, None)
    if parent is None:
        return
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != int(parent):  # it ended before that
        sys.exit(1)
