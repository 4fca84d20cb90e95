"""A store to another layout or encoding, without the teacher.

What a store holds can be copied, encoded less exactly, or thinned out; nothing can be made more exact again, so an int8
store becomes no fp16 store. Rendered views can be dropped, or rendered from the images where a store has none.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from storage.encodings import Encoding, Fields, fit_encoding, is_fitted
from storage.errors import BadImageError, ConfigError, InputError
from storage.folder import create_store, finish_store, sweep
from storage.image_list import ImageList
from storage.jpeg import ViewCodec, encode_view
from storage.lock import hold_lock
from storage.reader import FileReader
from storage.receipts import committed_shards
from storage.records import Backend, FeatureRecord, ImageKey, StoredViews, StoreManifest, StorePlan
from storage.stage import Progress, SilentProgress
from storage.store import FeatureReader
from storage.token_subset import TokenSubset
from storage.views import Renderer
from storage.writer import ShardWriter

FIT_RECORDS = 256
"""Records, spread over a store, that an encoding is fitted on."""
BATCH = 32


def plan_conversion(
    source: FeatureReader, *, backend: Backend, encoding: Encoding | None = None,
    token_subset: TokenSubset | None = None, keep_views: bool | None = None, view_px: int | None = None,
) -> StorePlan:  # fmt: skip
    """The plan of the store that a conversion makes.

    Args:
        encoding: None keeps the source's.
        keep_views: None keeps what the source has, and renders them for tars where it has none.
        view_px: side of views that are rendered because the source has none; None is the teacher's input size.

    Raises:
        ConfigError: it would take information that the source does not have.
    """
    plan = source.plan
    if encoding is None or (encoding.kind == plan.encoding.kind and not is_fitted(encoding)):
        encoding = plan.encoding
    if encoding != plan.encoding and not plan.encoding.is_exact:
        raise ConfigError(
            f"{source.location} is encoded as {plan.encoding.kind}, which cannot be made {encoding.kind} again; "
            "convert the fp16 store that it was made from, or extract one"
        )
    if token_subset is not None and plan.token_subset not in (None, token_subset):
        raise ConfigError(
            f"{source.location} keeps another subset of the tokens already; convert a store of all tokens"
        )
    views = plan.stored_views if keep_views is not False else None
    if views is None and (keep_views or (keep_views is None and backend == "wds")):
        px = view_px or plan.teacher["input_px"]
        views = StoredViews(px=px, codec=ViewCodec(px=px).describe(), seen_by_teacher=False)
    return plan.model_copy(
        update={
            "backend": backend,
            "encoding": encoding if encoding == plan.encoding else fit_encoding(encoding, _sample(source)),
            "token_subset": token_subset or plan.token_subset,
            "stored_views": views,
            "labels_fingerprint": source.images.labels_fingerprint if backend == "wds" else "",
        }
    )


def _sample(source: FeatureReader) -> NDArray[np.float16]:
    """Tokens of records spread evenly over a store."""
    views = source.plan.views_per_image
    usable = source.usable_images()
    images = usable[np.linspace(0, len(usable) - 1, min(FIT_RECORDS, len(usable))).astype(np.int64)]
    records = images * views + np.arange(len(images)) % views
    tokens_BTC = np.empty((len(records), *source.plan.shape_TC), np.float16)
    source.read_batch(records, tokens_BTC)
    return tokens_BTC


def convert_store(
    source: FeatureReader, root: Path, plan: StorePlan, *, images_location: str = "", progress: Progress | None = None
) -> StoreManifest:
    """Write `source` anew at `root` as `plan_conversion` says; goes on with what is there already.

    Args:
        images_location: where the images lie, for views that must be rendered.

    Raises:
        ConfigError: views must be rendered and it is not said from where; another store is at `root`.
        AssertionError: the source does not check what it reads, so that damage would get checksums of its own.
    """
    if isinstance(source, FileReader) and source.check == "never":
        raise AssertionError(f"{source.location} is converted unchecked; open it with check='once'")
    progress = progress or SilentProgress()
    renders = plan.stored_views is not None and source.plan.stored_views is None
    if renders and not images_location:
        raise ConfigError(f"{source.location} keeps no rendered views; say where its images are (--data, DATA=...)")
    images = source.images.at(images_location)
    _refuse_place(root, source)
    with hold_lock(root):
        create_store(root, plan, images, source.statistics)
        sweep(root, plan)
        done = committed_shards(root, plan)
        progress.start(plan.num_shards, "shards", done=len(done))
        for index in range(plan.num_shards):
            if index not in done:
                _convert_shard(source, root, plan, images, index)
                progress.advance(1)
        return finish_store(root)


def _refuse_place(root: Path, source: FeatureReader) -> None:
    """Take an empty folder, or one with the beginning of this conversion; nothing that holds something else."""
    inside = Path(source.location).resolve() if "://" not in source.location else None
    if inside is not None and root.resolve().is_relative_to(inside):
        raise ConfigError(f"{root} lies in the store that is converted; choose another folder")
    if root.exists() and not root.is_dir():
        raise ConfigError(f"{root} is a file; choose a folder")
    held = {path.name for path in root.iterdir()} - {"LOCK"} if root.exists() else set()
    if held and "plan.json" not in held:
        raise ConfigError(f"{root} holds other files ({sorted(held)[0]!r}); choose an empty folder")


def _convert_shard(source: FeatureReader, root: Path, plan: StorePlan, images: ImageList, index: int) -> None:
    writer = ShardWriter(root, plan, images, index)
    reasons = {bad.key: bad.reason for bad in source.manifest.bad_images}
    for key in writer.keys:
        if key in reasons:
            writer.mark_bad(key, reasons[key])
    for copied, fields in _iter_records(source, plan, index, reasons):
        jpeg = None
        if plan.stored_views is not None:
            jpeg = copied.jpeg or _render(images, plan, copied)
        record = copied._replace(jpeg=jpeg)
        if fields is None:
            writer.append(record)
        else:
            writer.append_encoded(record, fields)
    writer.commit()


def _iter_records(
    source: FeatureReader, plan: StorePlan, index: int, bad: dict[str, str]
) -> Iterator[tuple[FeatureRecord, Fields | None]]:
    """The records of a shard; with their encoded tokens where these are copied as they are, and then count alone."""
    views, keys = plan.views_per_image, source.images.keys
    numbers = [
        image * views + view for image in plan.images_of_shard(index) if keys[image] not in bad for view in range(views)
    ]
    is_copy = plan.encoding == source.plan.encoding  # token by token, so a subset of an encoded record is no loss
    for first in range(0, len(numbers), BATCH):
        records_B = np.array(numbers[first : first + BATCH], np.int64)
        encoded = source.new_batch(len(records_B))
        source.read_encoded(records_B, encoded)
        tokens_BTC = encoded["tokens"]
        if not is_copy:
            tokens_BTC = np.empty((len(records_B), *source.plan.shape_TC), np.float16)
            source.plan.encoding.decode(encoded, tokens_BTC)
        mean_BT, std_BT = source.token_statistics(records_B)
        jpegs = source.read_jpegs(records_B) if source.plan.stored_views else [None] * len(records_B)
        for row, (number, view) in enumerate(zip(records_B.tolist(), source.views(records_B), strict=True)):
            key = ImageKey(keys[number // views])
            kept: NDArray[np.int64] | slice = slice(None)
            if plan.token_subset is not None and source.plan.token_subset is None:
                kept = plan.token_subset.positions(key, number % views, plan.features.num_tokens)
            yield (
                FeatureRecord(
                    key, number % views, view, tokens_BTC[row][kept], mean_BT[row][kept], std_BT[row][kept], jpegs[row]
                ),
                {name: values[row][kept] for name, values in encoded.items()} if is_copy else None,
            )


def _render(images: ImageList, plan: StorePlan, record: FeatureRecord) -> bytes:
    """A view that the store does not have yet, from its image."""
    assert plan.stored_views is not None
    try:
        image_HWC = images.read_image(images.position(record.key))
    except BadImageError as error:
        raise InputError(
            f"image {record.key!r} of the store is not to be had from {images.location} ({error}); give the folder (or "
            "tars) that the store was made from"
        ) from error
    renderer = Renderer(kernel=plan.renderer["kernel"])
    pixels_HWC = renderer.render_view(image_HWC, record.view, plan.stored_views.px)
    return encode_view(pixels_HWC, plan.stored_views.codec["quality"])
