"""torchrun that ends with the command which started it: python -m distill.agent, with torchrun's own arguments."""

import ctypes
import os
import signal
import sys

from torch.distributed.run import main

_SET_PARENT_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of Linux's prctl."""


def end_with_parent(parent: int) -> None:
    """Get SIGTERM when the parent ends, however it does; torchrun passes it on to its processes."""
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before that
        sys.exit(1)


if __name__ == "__main__":
    if "DECANT_PARENT" in os.environ:
        end_with_parent(int(os.environ.pop("DECANT_PARENT")))
    main(sys.argv[1:])
