"""How many views go through a teacher at a time, where nobody has said it."""

import torch

from extract.free_memory import free_memory_bytes
from extract.teacher import Teacher

_MOST = {"cpu": 32, "cuda": 512}
"""More gains nothing: a CPU's caches are full long before, a GPU is busy."""
_SHARE = 0.7
"""Of the free memory, so that a neighbour may grow."""
_LIVE_COPIES = 24
"""Estimate of how many float32 arrays as large as a layer's tokens live at once on a CPU: queries, keys, values, the
MLP's hidden layer, and what the allocator has not given back."""
_HEAD_CHANNELS, _ATTENTION_COPIES = 64, 2
"""Of a layer whose attention is written out, scores and biases; it outweighs all else from about 3,000 tokens on."""


def choose_batch_size(teacher: Teacher, wanted: int = 0, sharers: int = 1) -> int:
    """`wanted`, or as many views as the free memory holds well: measured on a GPU, estimated on a CPU.

    A power of two, so that machines of one kind choose alike.

    Args:
        sharers: processes on this machine that choose at the same moment; each has a GPU of its own.
    """
    if wanted:
        return wanted
    most = _MOST[teacher.device.type]
    if teacher.device.type == "cpu":
        return fitting(free_memory_bytes() // sharers, _estimated_view_bytes(teacher), most)
    view_bytes = _measured_view_bytes(teacher)
    torch.cuda.empty_cache()  # memory that is only kept for later is free
    return fitting(torch.cuda.mem_get_info(teacher.device)[0], view_bytes, min(most, teacher.most_views))


def fitting(free_bytes: int, view_bytes: int, most: int) -> int:
    """The largest power of two that fits into the free memory, 1 at least, `most` at most."""
    room = min(most, int(free_bytes * _SHARE) // max(1, view_bytes))
    return 1 << max(0, room.bit_length() - 1)


def _estimated_view_bytes(teacher: Teacher) -> int:
    """A network's widest layer holds about as many values as its image or its tokens; those of a hierarchical network's
    first stage, whose grid is the finest, are more than its last one's."""
    spec, (tokens, channels) = teacher.spec, teacher.features.shape_TC
    values = [tokens * channels, 3 * spec.input_px**2]
    if spec.stage_channels:
        first_px = spec.patch_px / 2 ** (spec.block % len(spec.stage_channels))
        values.append(int((spec.input_px / first_px) ** 2) * spec.stage_channels[0])
    attention_bytes = 4 * _ATTENTION_COPIES * tokens**2 * -(-channels // _HEAD_CHANNELS)
    return max(4 * _LIVE_COPIES * max(values), attention_bytes)


def _measured_view_bytes(teacher: Teacher) -> int:
    """What each further view adds to the peak of a forward pass."""
    px, peaks = teacher.spec.input_px, []
    for count in (1, 5):
        torch.cuda.reset_peak_memory_stats(teacher.device)
        teacher(torch.zeros(count, px, px, 3, dtype=torch.uint8))
        peaks.append(torch.cuda.max_memory_allocated(teacher.device))
    return max(1, (peaks[1] - peaks[0]) // 4)
