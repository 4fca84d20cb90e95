"""What a worker's error means: for the job, for the worker that it came from, and for the run."""

from storage.errors import BadTokensError, DecantError, OwnTeacherError
from storage.stage import Interrupted

_MEMORY = ("MemoryError", "OutOfMemory", "t allocate memory")
_BROKEN = ("CUDA error", "cuDNN error", "CUBLAS_STATUS", "NCCL error")


def raise_if_final(error: BaseException) -> None:
    """Raise what neither another attempt nor another shard can mend."""
    if isinstance(error, DecantError | Interrupted) and not isinstance(error, BadTokensError | OwnTeacherError):
        raise error from None


def is_memory(error: BaseException) -> bool:
    """Whether smaller batches may help."""
    return any(word in _text(error) for word in _MEMORY)


def breaks_worker(error: BaseException) -> bool:
    """Whether a process cannot use its GPU any more: after such an error every call fails, until the process ends."""
    return any(word in _text(error) for word in _BROKEN) and not is_memory(error)


def _text(error: BaseException) -> str:
    """Of several stores, or of a user's own teacher, the error stands in another one's text."""
    return f"{type(error).__name__}: {error}"
