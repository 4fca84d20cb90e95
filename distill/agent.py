"""torchrun that ends with the command which started it, and its processes with it: python -m distill.agent, with
torchrun's own arguments."""

import os
import sys

from torch.distributed.run import main

from distill.parent import PARENT, end_with_parent

if __name__ == "__main__":
    end_with_parent()
    os.environ[PARENT] = str(os.getpid())
    main(sys.argv[1:])
