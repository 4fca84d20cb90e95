"""The golden stores: small stores of format 2 that every later version must read, and what they hold.

    python -m tests.golden.make     write them anew; only for a new version of the format

Their tokens come from a formula in integers, so no library's random numbers are in them. The JPEGs are kept in
`views.npz`: another version of the encoder may give other bytes for the same pixels. What a store holds is worked out
here a second time and slowly, as docs/format.md tells it, not by the code that is tested.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.folder import create_store, finish_store
from storage.image_list import ImageList
from storage.records import FeatureRecord, FeatureSpec, ImageKey, StorePlan
from storage.views import View
from storage.writer import ShardWriter

FOLDER = Path(__file__).resolve().parent
KEYS = ("a/0.jpg", "a/dots.and/../ünï.png", "b/2.jpg")
BAD = KEYS[1]
IMAGES = ImageList(
    location="", classes=("a", "b"), keys=sorted(KEYS), labels=(0, 0, 1), digests=[f"{n:032x}" for n in (17, 0, 255)]
)
VIEWS, TOKENS, CHANNELS = 2, 7, 8
CHANNEL_SCALE = (0.5, 1.0, 0.75, 2.0, 1.25, 1.0, 0.015625, 3.0)
SUBSET = {"fraction": 0.5, "seed": 3}
SUBSET_POSITIONS = ([0, 4, 5, 6], [0, 3, 5, 6], [1, 2, 4, 5], [2, 3, 4, 5], [0, 3, 5, 6], [2, 3, 4, 6])
"""Of each record's kept tokens: what this seed and these keys give for ever."""
STORED_VIEWS = {
    "px": 16,
    "codec": {"kind": "jpeg", "px": 16, "quality": 95, "subsampling": "420", "library": "simplejpeg"},
    "seen_by_teacher": True,
}
MEAN_STD = {"kind": "mean_std", "eps": 1e-5, "num_tokens": 50, "statistics": "9cbff1379905a3d80119cb4d20fcb3a6"}
PCA = {"kind": "pca", "eps": 1e-5, "num_tokens": 500, "statistics": "3b9da74a77d4286f0a28dee995a72d98"}
"""Their statistics are powers of two and quarters, so no rounding is in them; the axes of `pca` are Hadamard's."""
STORES: dict[str, dict[str, Any]] = {
    "zarr_fp16": {"backend": "zarr", "encoding": {"kind": "fp16"}},
    "zarr_int8_views": {
        "backend": "zarr", "encoding": {"kind": "int8", "channel_scale": CHANNEL_SCALE}, "stored_views": STORED_VIEWS,
        "images_per_shard": 3,
    },
    "zarr_bit_round": {"backend": "zarr", "encoding": {"kind": "bit_round", "keep_bits": 4}},
    "zarr_zstd_subset": {"backend": "zarr", "encoding": {"kind": "zstd"}, "token_subset": SUBSET},
    "wds_fp16_views": {"backend": "wds", "encoding": {"kind": "fp16"}, "stored_views": STORED_VIEWS},
    "wds_int8_subset": {
        "backend": "wds", "encoding": {"kind": "int8", "channel_scale": CHANNEL_SCALE}, "token_subset": SUBSET,
    },
    "zarr_fp16_pca": {"backend": "zarr", "encoding": {"kind": "fp16"}, "whitening": PCA},
    "wds_fp16_mean_std": {
        "backend": "wds", "encoding": {"kind": "fp16"}, "stored_views": STORED_VIEWS, "whitening": MEAN_STD,
    },
    "wds_bit_round_lz4": {
        "backend": "wds", "encoding": {"kind": "bit_round", "keep_bits": 2, "compressor_name": "lz4", "level": 5},
    },
}  # fmt: skip
"""Three images, the second one bad, of two views each; two images a shard, so the last
shard is half full (views in Zarr are filled up to 64 kB a shard, so that store has one)."""


def plan_of(name: str) -> StorePlan:
    return StorePlan.model_validate(
        {
            "features": FeatureSpec(teacher="golden", num_prefix_tokens=1, grid_hw=(2, 3), channels=CHANNELS),
            "whitening": {"kind": "layer_norm", "eps": 1e-5},
            "sampler": {"kind": "centre_crop", "fraction": 0.875},
            "renderer": {"kernel": "bilinear", "library": "cykooz-resizer", "version": "4.0.1"},
            "images_fingerprint": IMAGES.fingerprint,
            "teacher_fingerprint": "0123456789abcdef0123456789abcdef",
            "teacher": {"input_px": 16},
            "num_images": len(KEYS),
            "views_per_image": VIEWS,
            "images_per_shard": 2,
        }
        | STORES[name]
    )


def numbers(count: int, start: int) -> NDArray[np.float64]:
    """Numbers in [-1, 1) that are the same for ever."""
    mixed = (np.arange(start, start + count, dtype=np.uint64) + np.uint64(1)) * np.uint64(2654435761) % np.uint64(2**32)
    return mixed.astype(np.float64) / 2**31 - 1


def statistics_of(plan: StorePlan) -> NDArray[np.float32]:
    """What a store's whitening has learnt: a mean, then deviations or axes."""
    mean_1C = np.arange(CHANNELS)[None] / 4 - 1
    deviations_C = 2.0 ** (3 - np.arange(CHANNELS))
    if plan.whitening.kind == "mean_std":
        return np.concatenate([mean_1C, deviations_C[None]]).astype(np.float32)
    if plan.whitening.kind == "pca":
        signs_CC = np.array([[(-1) ** (row & column).bit_count() for column in range(8)] for row in range(8)])
        return np.concatenate([mean_1C, signs_CC / 8 / deviations_C[:, None]]).astype(np.float32)
    return np.empty((0, 0), np.float32)


def record_of(number: int, jpegs: list[bytes]) -> FeatureRecord:
    """Record `number` with all its tokens."""
    image, view = divmod(number, VIEWS)
    values = numbers(TOKENS * (CHANNELS + 2), 1000 * number)
    tokens_TC = (4 * values[: TOKENS * CHANNELS]).astype(np.float16).reshape(TOKENS, CHANNELS)
    tokens_TC[0, :4] = 0, -0.0, 2.0**-24, 27.5  # signs, the smallest number, an outlier
    tokens_TC[1] = 0
    mean_T, std_T = values[TOKENS * CHANNELS :].astype(np.float32).reshape(2, TOKENS)
    crop = View(top=number, left=2 * number, height=20 + number, width=30, flip=bool(number % 2))
    return FeatureRecord(ImageKey(KEYS[image]), view, crop, tokens_TC, mean_T, std_T + 1.5, jpegs[number])


def whitened_record(number: int, jpegs: list[bytes], plan: StorePlan) -> FeatureRecord:
    """The same as a plan's whitening leaves it: only `layer_norm` has a mean and a deviation of its own for a token."""
    record = record_of(number, jpegs)
    if plan.whitening.kind == "layer_norm":
        return record
    zeros_T = np.zeros(TOKENS, np.float32)
    return record._replace(token_mean_T=zeros_T, token_std_T=zeros_T + 1)


def load_jpegs() -> list[bytes]:
    with np.load(FOLDER / "views.npz") as found:
        return [found[f"view{number}"].tobytes() for number in range(len(KEYS) * VIEWS)]


def write_store(root: Path, name: str) -> None:
    plan, jpegs = plan_of(name), load_jpegs()
    create_store(root, plan, IMAGES, statistics_of(plan))
    for index in range(plan.num_shards):
        writer = ShardWriter(root, plan, IMAGES, index)
        for key in writer.keys:
            if key == BAD:
                writer.mark_bad(key, "made up to be bad")
                continue
            for view in range(VIEWS):
                number = KEYS.index(key) * VIEWS + view
                record, kept = whitened_record(number, jpegs, plan), kept_tokens(number, plan)
                writer.append(
                    record._replace(
                        tokens_TC=record.tokens_TC[kept], token_mean_T=record.token_mean_T[kept],
                        token_std_T=record.token_std_T[kept], jpeg=record.jpeg if plan.stored_views else None,
                    )
                )  # fmt: skip
        writer.commit()
    finish_store(root)
    remove_empty(root)


def remove_empty(root: Path) -> None:
    """Folders that version control would not keep."""
    for path in sorted(root.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


# What the stores hold, by the words of docs/format.md


def kept_tokens(number: int, plan: StorePlan) -> list[int]:
    return SUBSET_POSITIONS[number] if plan.token_subset else list(range(TOKENS))


def expected_tokens(tokens_TC: NDArray[np.float16], plan: StorePlan) -> dict[str, NDArray[Any]]:
    """`tokens` and `token_scale` as stored, and `decoded` as read; one number at a time."""
    kind = plan.encoding.kind
    if kind in ("fp16", "zstd"):
        return {"tokens": tokens_TC, "decoded": tokens_TC}
    if kind == "bit_round":
        dropped = 10 - plan.encoding.keep_bits
        rounded = [round_bits(int(bits), dropped) for bits in tokens_TC.view(np.uint16).ravel()]
        tokens_TC = np.array(rounded, np.uint16).view(np.float16).reshape(tokens_TC.shape)
        return {"tokens": tokens_TC, "decoded": tokens_TC}
    stored, scales = np.zeros(tokens_TC.shape, np.int8), np.zeros(len(tokens_TC), np.float16)
    decoded = np.zeros(tokens_TC.shape, np.float16)
    for t, token_C in enumerate(tokens_TC.astype(np.float32)):
        scaled_C = token_C / np.array(CHANNEL_SCALE, np.float32)
        largest = np.abs(scaled_C).max() / np.float32(127)
        scale = np.float16(largest)
        scales[t] = np.nextafter(scale, np.float16(np.inf)) if scale < largest else scale
        for c, value in enumerate(scaled_C):
            stored[t, c] = round(float(value / np.float32(scales[t]))) if scales[t] else 0
            decoded[t, c] = np.float32(stored[t, c]) * np.float32(scales[t]) * np.float32(CHANNEL_SCALE[c])
    return {"tokens": stored, "token_scale": scales, "decoded": decoded}


def round_bits(bits: int, dropped: int) -> int:
    """Round the magnitude of a float16 to nearest, ties to even, in its last `dropped` bits."""
    low = bits & ((1 << dropped) - 1)
    bits -= low
    half = 1 << (dropped - 1)
    is_up = low > half or (low == half and bits >> dropped & 1)
    return bits + (1 << dropped) if is_up else bits


def main() -> None:
    if not (FOLDER / "views.npz").exists():
        from storage.jpeg import encode_view

        pixels = [np.add.outer(np.arange(16) * 9, np.arange(16) * 5)[..., None] + [n, 2 * n, 90] for n in range(6)]
        views = {f"view{n}": np.frombuffer(encode_view(p.astype(np.uint8)), np.uint8) for n, p in enumerate(pixels)}
        np.savez(FOLDER / "views.npz", **views)
    for name in STORES:
        shutil.rmtree(FOLDER / name, ignore_errors=True)
        write_store(FOLDER / name, name)


if __name__ == "__main__":
    main()
