"""Where a worker's time goes."""

from typing import NamedTuple


class StageSeconds(NamedTuple):
    """Seconds spent in each part of a shard's way, and in waiting for the part before."""

    decode: float = 0.0
    """Reading and rendering images, summed over threads; beside the others, not between them."""
    wait: float = 0.0
    """The teacher had no batch."""
    forward: float = 0.0
    """The teacher's forward pass and whitening."""
    encode: float = 0.0
    """Encoding tokens and copying them from the device."""
    write: float = 0.0
    """Packing, digests, writing and fsync."""

    def plus(self, other: "StageSeconds") -> "StageSeconds":
        return StageSeconds(*(here + there for here, there in zip(self, other, strict=True)))
