"""What is said at the end of an extraction, in a few lines."""

from collections.abc import Iterator, Mapping
from typing import Any

from extract.timing import StageSeconds, find_bottleneck

_BAD_LISTED = 10


def summary_lines(summary: Mapping[str, Any], bad: Mapping[str, str], log: str) -> Iterator[str]:
    """Nothing where nothing was done.

    Args:
        summary: of `Watch`.
        bad: unusable images of this run, key to reason.
        log: where all of them are listed.
    """
    if summary["shards"]:
        yield (
            f"{summary['images']:,} images, {summary['records']:,} records, {summary['bytes'] / 1e6:,.1f} MB in "
            f"{summary['wall_seconds']:,.1f} s ({summary['images_per_second']:,.1f} images/s)"
        )
        yield from _time_line(summary)
    mishaps = [
        f"{summary[name]:,} {what}"
        for name, what in (
            ("done_again", "views were beyond the teacher's precision and done again in float32"),
            ("retries", "attempts failed and were repeated or given up"),
            ("workers_lost", "workers were lost and replaced"),
        )
        if summary.get(name)
    ]
    if mishaps:
        yield "; ".join(mishaps) + f"; see {log}"
    for shard, reason in list(summary["quarantined"].items())[:_BAD_LISTED]:
        yield f"given up: shard {shard}: {reason}"
    if bad:
        yield f"{len(bad):,} image{'s are' if len(bad) > 1 else ' is'} unusable and left out:"
        for key, reason in list(bad.items())[:_BAD_LISTED]:
            yield f"  {key}: {reason}"
        if len(bad) > _BAD_LISTED:
            yield f"  and {len(bad) - _BAD_LISTED:,} more, in {log}"


def _time_line(summary: Mapping[str, Any]) -> Iterator[str]:
    worker_seconds, spent = summary["worker_seconds"], summary["stage_seconds"]
    if not worker_seconds or not any(spent.values()):
        return
    shares = ", ".join(f"{part} {seconds / worker_seconds:.0%}" for part, seconds in spent.items() if part != "decode")
    yield (
        f"of the workers' {worker_seconds:,.0f} s: {shares}; decoding, in threads beside that, {spent['decode']:,.0f} s"
    )
    bottleneck = find_bottleneck(StageSeconds(**spent), worker_seconds)
    if bottleneck is not None:
        yield str(bottleneck)
