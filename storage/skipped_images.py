"""Images that are left out of training although they lie in the data set: by name, or by a list that has one."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from storage.image_source import IMAGE_SUFFIXES, ImageEntry
from storage.stage import Progress

SKIP_LISTS = {
    "imagenet-27": (
        "n01678043_6448", "n01896844_997", "n02368116_318", "n02428089_710", "n02487347_1956", "n02597972_5463",
        "n03957420_30695", "n03957420_33553", "n03957420_8296", "n04135315_8814", "n04135315_9318", "n04257684_9033",
        "n04427559_2974", "n06470073_47249", "n07930062_4147", "n09224725_3995", "n09359803_8155", "n09620794_5529",
        "n09789566_3522", "n09894445_7463", "n10175248_583", "n10316360_4246", "n10368624_12550", "n10585217_8484",
        "n10721819_1131", "n12353203_3849", "n12630763_8018",
    ),
}  # fmt: skip
"""`imagenet-27`: what the paper's code leaves out of ImageNet where it reads plain folders."""


def find_skipped(
    entries: Sequence[ImageEntry], is_eval_N: NDArray[np.bool_], skip: Sequence[str], progress: Progress
) -> NDArray[np.bool_]:
    """Which images are left out: those of the train part that `skip` names, or that are in a list that it names.

    Args:
        progress: hears how many of the names are those of an image.
    """
    wanted = frozenset(image for name in skip for image in SKIP_LISTS.get(name, (name,)))
    is_skipped_N = np.zeros(len(entries), np.bool_)
    if not wanted:
        return is_skipped_N
    found = set[str]()
    for position, entry in enumerate(entries):
        if named := wanted.intersection(_names_of(entry)):
            found |= named
            is_skipped_N[position] = not is_eval_N[position]
    progress.say(
        f"data.skip leaves {is_skipped_N.sum():,} images out of the train part; {len(found):,} of its {len(wanted):,} "
        f"names are those of an image{_missing(wanted - found)}"
    )
    return is_skipped_N


def _missing(names: frozenset[str]) -> str:
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return f", not {', '.join(sorted(names)[:3])}{more}" if names else ""


def _names_of(entry: ImageEntry) -> Iterator[str]:
    """What an image can be named by: its key, the last part of that, and the same of its own file's name. Suffixes do
    not matter, nor does the class that Hugging Face's copy of ImageNet repeats behind `n01440764_10026`."""
    yield entry.key
    for path in (entry.key, entry.name):
        file = path.rpartition("/")[2]
        stem, _, suffix = file.rpartition(".")
        stem = stem if f".{suffix.lower()}" in IMAGE_SUFFIXES else file
        yield stem
        yield stem.removesuffix("_" + stem.partition("_")[0])
