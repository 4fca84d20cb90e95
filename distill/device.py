"""Where the student is trained, and in which precision."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from storage.errors import ConfigError, first_line

_ASKED_FOR = "use_deterministic_algorithms"
"""In all of torch's complaints that it has no repeatable algorithm."""


def choose_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one: on a machine with several, this process's own.

    Raises:
        ConfigError: `cuda` was asked for, and there is none.
    """
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise ConfigError(
            "run.device=cuda was asked for, but torch sees no GPU; use run.device=cpu, or check the driver"
        )
    if name == "cpu" or not has_gpu:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def check_gpus(name: str, processes: int) -> None:
    """Refuse more processes than this machine has GPUs, if it has any: two cannot share one, and NCCL says it darkly.

    Raises:
        ConfigError: says how many there are.
    """
    found = torch.cuda.device_count() if name != "cpu" else 0
    if 0 < found < processes:
        raise ConfigError(
            f"{processes} processes were asked for (GPUS, distill.run.gpus), each with a GPU of its own, but this "
            f"machine has {found}; set GPUS={found}, and ACCUMULATE above 1 where the memory does not suffice"
        )


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The type of matrix products; `auto` is bfloat16 on a GPU that has it, else float32."""
    if name != "auto":
        return torch.bfloat16 if name == "bfloat16" else torch.float32
    is_fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if is_fast else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Matrix products in `dtype`; sums, norms and losses stay in float32 (torch's autocast)."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


@contextlib.contextmanager
def repeatable(device: torch.device, *, wanted: bool) -> Iterator[None]:
    """For the length of the block, algorithms that give the same bits each time, where a GPU has others too. On a CPU
    all are repeatable for one number of threads.

    torch would also go on with a warning where it has none. But then it takes the other algorithm of attention, too, of
    which it has both.

    Raises:
        ConfigError: torch has no such algorithm for something that the block does.
    """
    if not wanted or device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS at its first product
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # nothing here reads what it did not write
    try:
        yield
    except RuntimeError as error:
        if _ASKED_FOR not in str(error):
            raise
        raise ConfigError(
            f"torch cannot do all of this so that it gives the same bits each time ({first_line(error)}); set "
            "distill.run.deterministic=false, and a resumed run ends a little different from an undisturbed one"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = fill
