"""Which image ends every worker that looks at it? Found by looking at ever smaller parts of its shard."""

from collections.abc import Callable

from extract.jobs import Job

Survives = Callable[[Job], bool]
"""Whether a worker lives through a probe."""

SURE_AFTER = 2
"""Times that an image must end a worker when it is looked at alone."""


def find_culprit(job: Job, num_images: int, survives: Survives) -> int | None:
    """The first image of a shard that ends a worker all by itself; None where none does.

    Of the shard's beginnings, the shortest that ends a worker ends with that image: it is found by halving, in about
    log2(num_images) probes. Then the image is looked at alone.

    Args:
        job: that ends its workers, also when all its images are only looked at; those that it excludes are not.

    Returns:
        Its place among the shard's images.
    """

    def beginning_survives(length: int) -> bool:
        return survives(job._replace(probed=(0, length)))

    low, high = 0, num_images  # the first `low` images are harmless, the first `high` are not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if beginning_survives(middle) else (low, middle)
    alone = job._replace(probed=(high - 1, high))
    return None if any(survives(alone) for _ in range(SURE_AFTER)) else high - 1
