"""A store's folder: begun, swept, finished. Its shards are the business of writer.py.

plan.json          frozen; two plans never share a folder
whitening.npy      what a fitted whitening learnt
images.bin         ordered keys, labels, digests
zarr.json, tokens/ ... or dataset.json, shards/: see zarr_format.py and tar_format.py
receipts/00017.json
attempts/          private, see attempts.py; swept when extraction starts
claims/            which shards are whose, see claims.py; until the store is finished
quarantine/        shards that were given up, see quarantine.py
manifest.json      last
"""

import shutil
from pathlib import Path

from storage.atomic import make_folder, read_regular, remove_file, write_file
from storage.attempts import sweep_attempts
from storage.claims import remove_claims
from storage.encodings import Encoding
from storage.errors import ConfigError, DamagedError, DiskError
from storage.files import LocalFiles
from storage.fingerprint import digest_bytes
from storage.image_index import FILE_NAME as IMAGES_FILE
from storage.image_list import ImageList
from storage.layouts import LAYOUTS
from storage.quarantine import forget_given_up
from storage.receipts import committed_shards, receipt_path
from storage.records import Backend, FeatureSpec, FileEntry, StoreManifest, StorePlan, refuse_other
from storage.token_subset import TokenSubset
from storage.whitening import NO_STATISTICS, Statistics, load_statistics, statistics_files


def create_store(root: Path, plan: StorePlan, images: ImageList, statistics: Statistics = NO_STATISTICS) -> None:
    """Make an unfilled store, or accept the one that is there when it has the same plan; what is damaged or missing of
    its metadata is written again.

    Args:
        statistics: what a fitted whitening learnt.

    Raises:
        ConfigError: the folder holds a store of another plan; names the first differences.
        DamagedError: the folder holds shards of a plan that nothing tells any more.
        DiskError: not enough room for the whole store.
    """
    if images.fingerprint != plan.images_fingerprint:
        raise AssertionError("the plan was made for other images")
    make_folder(root)
    found = find_plan(root)
    if found is None:
        _check_room(root, plan)
    elif found != plan:
        raise ConfigError(f"{root} holds another store: {found.differences(plan)}; choose another folder")
    for name, data in encode_metadata(plan, images, statistics).items():
        path = root / name
        if not path.exists() or read_regular(path) != data:
            write_file(path, data)


def encode_metadata(plan: StorePlan, images: ImageList, statistics: Statistics = NO_STATISTICS) -> dict[str, bytes]:
    """The files of a store that belong to no shard, without the manifest; the plan, which makes it a store, last."""
    files = LAYOUTS[plan.backend].metadata(plan) | {IMAGES_FILE: images.at("").to_file()}
    return files | statistics_files(plan.whitening, statistics) | {"plan.json": plan.to_file()}


def needed_bytes(plan: StorePlan) -> int:
    """Upper bound of what a store takes on disk, but for its rendered views, of which it is a good guess."""
    px = plan.stored_views.px if plan.stored_views else None
    a_record = needed_record_bytes(plan.features, plan.backend, plan.encoding, plan.token_subset, px)
    channels = plan.features.channels
    return plan.num_records * a_record + 4 * channels * plan.whitening.num_rows(channels)


def needed_record_bytes(
    features: FeatureSpec, backend: Backend, encoding: Encoding, subset: TokenSubset | None, view_px: int | None
) -> int:
    """The same for one record; `view_px` is the side of its rendered view, where that is kept."""
    tokens = features.num_tokens if subset is None else subset.num_kept(features.num_tokens)
    fields = encoding.fields((tokens, features.channels))
    per_token = 8 + (6 if subset else 0)
    members = 3 + ("token_scale" in fields) + (view_px is not None)
    framing = 1024 * members + 512 if backend == "wds" else 96  # a tar's headers and the fill of its blocks
    view = view_px**2 // 2 if view_px else 0
    return sum(field.num_bytes for field in fields.values()) + per_token * tokens + framing + view


def _check_room(root: Path, plan: StorePlan) -> None:
    needed, free = needed_bytes(plan), shutil.disk_usage(root).free
    if needed > free:
        raise DiskError(
            f"the store needs {needed / 1e6:,.3f} MB at {root}, where {free / 1e6:,.3f} MB are free; choose another "
            "folder, or a smaller store (fewer VIEWS, ENCODING=int8)"
        )


def load_plan(root: Path) -> StorePlan:
    path = root / "plan.json"
    text = read_regular(path)
    refuse_other(path, text)
    return StorePlan.from_file(path, text)


def find_plan(root: Path) -> StorePlan | None:
    """The plan of the store in a folder, from plan.json or, where that is damaged, from its copy; None for no store.

    Raises:
        DamagedError: there are shards, but nothing tells of what.
    """
    try:
        return load_plan(root)
    except (FileNotFoundError, DamagedError):
        files = LocalFiles(root)
        plan = next(filter(None, (layout.find_plan(files) for layout in LAYOUTS.values())), None)
    if plan is None and any((root / "receipts").glob("*.json")):
        raise DamagedError(
            f"{root} holds shards, but plan.json and its copy are both damaged or gone, so nothing tells of what; "
            "delete the folder and give the command again"
        )
    return plan


def sweep(root: Path, plan: StorePlan) -> None:
    """Remove what interrupted writers left, and receipts whose files are gone. Only while holding the store's lock;
    others may be committing shards meanwhile, and lose nothing."""
    sweep_attempts(root)
    receipts = {path.name for path in (root / "receipts").glob("*.json")}  # before they are read: new ones are whole
    committed = committed_shards(root, plan)
    for name in receipts - {receipt_path(root, index).name for index in committed}:
        remove_file(root / "receipts" / name)
    if len(committed) < plan.num_shards:
        remove_file(root / "manifest.json")
    for pattern in (".*.partial", "*/.*.partial"):
        for private in root.glob(pattern):
            private.unlink(missing_ok=True)


def finish_store(root: Path) -> StoreManifest:
    """Write the manifest: from now on the folder is a store.

    Raises:
        DamagedError: shards are missing, or the metadata is not what `create_store` wrote.
    """
    plan = load_plan(root)
    shards = committed_shards(root, plan)
    missing = [index for index in range(plan.num_shards) if index not in shards]
    if missing:
        raise DamagedError(f"{len(missing)} of {plan.num_shards} shards of {root} are missing, first {missing[0]}")
    images = ImageList.from_file(root / IMAGES_FILE, read_regular(root / IMAGES_FILE))
    described = LAYOUTS[plan.backend].metadata(plan)
    for name, data in described.items():  # once the manifest holds their digests, nothing would notice
        if read_regular(root / name) != data:
            raise DamagedError(f"{root / name} has changed since the store was begun; give the command again")
    learnt = statistics_files(plan.whitening, load_statistics(LocalFiles(root), plan.whitening, plan.features.channels))
    names = [IMAGES_FILE, "plan.json", *described, *learnt]
    manifest = StoreManifest(
        plan=plan,
        metadata=tuple(FileEntry.describe(name, [read_regular(root / name)]) for name in sorted(names)),
        receipts=tuple(digest_bytes(read_regular(receipt_path(root, index))) for index in range(plan.num_shards)),
        num_records=sum(entry.num_records for entry in shards.values()),
        num_bytes=sum(entry.num_bytes for entry in shards.values()),
        bad_images=tuple(bad for index in range(plan.num_shards) for bad in shards[index].bad_images),
        skipped_images=images.skipped,
    )
    write_file(root / "manifest.json", manifest.to_file())
    remove_claims(root)
    forget_given_up(root)
    sweep_attempts(root)
    return manifest
