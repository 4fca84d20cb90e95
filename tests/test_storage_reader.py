"""Reading a store: by name, in batches, from threads; what is refused, and with which words."""

import os
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage.errors import DamagedError, InputError
from storage.fingerprint import digest_bytes
from storage.image_index import FILE_NAME, ImageList
from storage.reader import open_store
from storage.records import FORMAT_VERSION, StoreManifest
from storage.store import FeatureReader
from storage.zarr_format import token_shard_name

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def tmp_path(in_memory: Path) -> Path:
    return in_memory


def batch(reader: FeatureReader, records: Any) -> Any:
    records_B = np.asarray(records, np.int64)
    out_BTC = np.empty((len(records_B), *reader.plan.features.shape_TC), np.float16)
    reader.read_batch(records_B, out_BTC)
    return out_BTC


def test_reading_loads_no_heavy_library(make_store: Any) -> None:
    root, _, _ = make_store()
    code = (
        "import sys, pathlib; from storage.reader import open_store\n"
        f"reader = open_store(pathlib.Path({str(root)!r})); list(reader.iter_shard(0)); reader.images\n"
        "print([name for name in ('zarr', 'numcodecs', 'torch', 'timm', 'ray', 'webdataset') if name in sys.modules])"
    )
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "[]"


def test_a_store_may_be_moved_and_needs_no_lock(make_store: Any, tmp_path: Path) -> None:
    root, plan, images = make_store()
    before = batch(open_store(root), range(plan.num_records))
    root.rename(tmp_path / "moved")
    reader = open_store(tmp_path / "moved")
    np.testing.assert_array_equal(batch(reader, range(plan.num_records)), before)
    assert reader.images.keys == images.keys and not (tmp_path / "moved" / "LOCK").exists()


@pytest.mark.timeout(60)
def test_threads_reading_at_once_get_the_right_records(make_store: Any) -> None:
    root, plan, _ = make_store(num_images=40, images_per_shard=2)
    expected = batch(open_store(root), range(plan.num_records))
    for _ in range(5):
        reader, start = open_store(root), threading.Barrier(8)

        def work(seed: int, reader: FeatureReader = reader, start: threading.Barrier = start) -> None:
            generator = np.random.default_rng(seed)
            start.wait()
            for _ in range(10):
                records_B = generator.integers(0, plan.num_records, 16)
                np.testing.assert_array_equal(batch(reader, records_B), expected[records_B])
                assert len(reader.views(records_B)) == 16

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))


def test_a_buffer_is_filled_in_place(make_store: Any) -> None:
    root, plan, _ = make_store()
    reader = open_store(root)
    expected = batch(reader, [3, 3, 0])
    large_BTC = np.full((9, *plan.features.shape_TC), 7, np.float16)
    reader.read_batch(np.array([3, 3, 0]), large_BTC[2:5])
    np.testing.assert_array_equal(large_BTC[2:5], expected)
    assert (large_BTC[:2] == 7).all() and (large_BTC[5:] == 7).all()
    reader.read_batch(np.array([], np.int64), large_BTC[:0])


def test_buffers_that_do_not_fit_are_refused(make_store: Any) -> None:
    root, plan, _ = make_store()
    reader, (tokens, channels) = open_store(root), plan.features.shape_TC
    for out in (
        np.empty((2, tokens, channels), np.float32),
        np.empty((2, tokens, channels), np.int16),
        np.empty((2, tokens, channels + 1), np.float16),
        np.empty((1, tokens, channels), np.float16),
    ):
        with pytest.raises(AssertionError, match="buffer"):
            reader.read_batch(np.array([0, 1]), out)
    with pytest.raises(TypeError):
        reader.read_batch(np.array([0, 1]), np.empty((2, channels, tokens), np.float16).transpose(0, 2, 1))


def test_names_and_numbers_that_do_not_exist(make_store: Any) -> None:
    root, plan, images = make_store()
    reader = open_store(root)
    with pytest.raises(KeyError):
        reader.read("a/none.png", 0)
    for view_index in (-1, 2):
        with pytest.raises(KeyError, match="has 2 views an image"):
            reader.read(images.keys[0], view_index)
    for record in (-1, plan.num_records, plan.num_records + 1, 10**6):
        for read in (lambda r: batch(reader, r), lambda r: reader.views(np.array(r)), reader.token_statistics):
            with pytest.raises(IndexError, match=f"which has {plan.num_records}"):
                read(np.array([0, record]))


def test_holes_are_never_read_as_something(make_store: Any) -> None:
    root, _, images = make_store(bad=(1, 7))
    reader = open_store(root)
    assert reader.usable_images().tolist() == [0, 2, 3, 4, 5, 6]
    assert [bad.key for bad in reader.manifest.bad_images] == [images.keys[1], images.keys[7]]
    for record in (2, 3, 14, 15):
        for read in (
            lambda record=record: batch(reader, [0, record]),
            lambda record=record: reader.views(np.array([0, record])),
            lambda record=record: reader.read(images.keys[record // 2], record % 2),
        ):
            with pytest.raises(DamagedError, match=f"record {record} of .*store is a hole: its image was unusable"):
                read()
    assert len(list(reader.iter_shard(0))) == 4 and len(list(reader.iter_shard(2))) == 2


# What cannot be opened


def test_no_store_and_an_unfinished_one(make_store: Any, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match=r"holds no store \(no manifest\.json\)"):
            open_store(folder)
    root, _, _ = make_store()
    (root / "manifest.json").unlink()
    advice = "complete it with the command that began it, `make extract` or `make convert`"
    with pytest.raises(InputError, match=rf"store holds an unfinished store \(no manifest\.json\): {advice}"):
        open_store(root)


def test_a_newer_format_is_refused_by_name(make_store: Any) -> None:
    root, plan, _ = make_store()
    manifest = open_store(root).manifest
    newer = manifest.model_copy(update={"plan": plan.model_copy(update={"format_version": FORMAT_VERSION + 1})})
    (root / "manifest.json").write_bytes(newer.to_file())
    with pytest.raises(
        InputError,
        match=rf"manifest\.json has store format {FORMAT_VERSION + 1}, this .* up to {FORMAT_VERSION}; update",
    ):
        open_store(root)


class LaterManifest(StoreManifest):
    """With a field that this program does not know."""

    of_a_later_time: int = 1


def test_a_newer_format_may_hold_anything_else(make_store: Any) -> None:
    root, plan, _ = make_store()
    newer = plan.model_copy(update={"format_version": FORMAT_VERSION + 1})
    later = LaterManifest(plan=newer, metadata=(), receipts=(), num_records=0, num_bytes=0)
    (root / "manifest.json").write_bytes(later.to_file())
    with pytest.raises(InputError, match="update it"):
        open_store(root)


def test_a_format_from_before_the_first_release_is_refused_by_name(make_store: Any) -> None:
    root, plan, _ = make_store()
    manifest = open_store(root).manifest
    older = manifest.model_copy(update={"plan": plan.model_copy(update={"format_version": FORMAT_VERSION - 1})})
    (root / "manifest.json").write_bytes(older.to_file())
    with pytest.raises(InputError, match=rf"store format {FORMAT_VERSION - 1}, from before .*: extract it again"):
        open_store(root)


@pytest.mark.parametrize(
    "body",
    [b'{"plan": 1', b'{"plan": [1]', b'{"plan": {"format_version": "x"}', b'{"a', b"", b'{"plan": null', b"{" * 9,
     b'{"a":' * 100_000],
)  # fmt: skip
def test_a_whole_seal_on_nonsense_is_refused(make_store: Any, body: bytes) -> None:
    root, _, _ = make_store()
    seal = b',\n "digest": "' + digest_bytes(body).encode() + b'"\n}\n'
    for name in ("manifest.json", "plan.json"):
        (root / name).write_bytes(body + seal)
        with pytest.raises(DamagedError, match=f"{name} is not a valid Store"):
            open_store(root, allow_unfinished=True)
        (root / name).unlink()


@pytest.mark.parametrize("changes", [{"images_per_shard": 0}, {"views_per_image": 0}, {"num_images": -1}])
def test_a_plan_of_impossible_numbers_is_refused(make_store: Any, changes: Any) -> None:
    root, plan, _ = make_store()
    (root / "manifest.json").unlink()
    (root / "plan.json").write_bytes(plan.model_copy(update=changes).to_file())
    with pytest.raises(DamagedError, match=rf"plan\.json is not a valid StorePlan: {next(iter(changes))}"):
        open_store(root, allow_unfinished=True)


def test_a_manifest_of_too_few_shards_is_refused(make_store: Any) -> None:
    root, _, _ = make_store()
    manifest = open_store(root).manifest
    (root / "manifest.json").write_bytes(manifest.model_copy(update={"receipts": manifest.receipts[:2]}).to_file())
    with pytest.raises(DamagedError, match=r"manifest\.json names 2 receipts for 3 shards"):
        open_store(root)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"{}", b'{"plan": {"format_version": "x"}}', b"\xff\x00", b"null"])
def test_what_is_no_manifest_is_refused_by_name(make_store: Any, text: bytes) -> None:
    root, _, _ = make_store()
    (root / "manifest.json").write_bytes(text)
    with pytest.raises(DamagedError, match=r"manifest\.json does not match its own digest.*`make verify`"):
        open_store(root)


def test_the_image_list_of_another_store_is_refused(make_store: Any) -> None:
    root, _, _ = make_store("one")
    other, _, _ = make_store("other", num_images=9)
    shutil.copy(other / FILE_NAME, root)
    with pytest.raises(DamagedError, match=r"one/images\.bin is not the image list of this store"):
        open_store(root).images  # noqa: B018


def test_the_same_images_with_other_labels_are_refused(make_store: Any) -> None:
    """Labels are no part of the images' fingerprint, but of the committed list."""
    root, _, images = make_store()
    others = ImageList(
        location="", classes=("a", "b"), keys=images.keys, labels=[1] * len(images), digests=images.digests
    )
    assert others.fingerprint == images.fingerprint
    (root / FILE_NAME).write_bytes(others.to_file())
    with pytest.raises(DamagedError, match=r"images\.bin is not the image list of this store"):
        open_store(root).images  # noqa: B018


# What happens to a store that is open


def test_files_that_go_or_change_while_a_store_is_open(make_store: Any) -> None:
    root, _, images = make_store()
    path = root / token_shard_name(0)
    readers = {check: open_store(root, check=check) for check in ("once", "always", "never")}
    expected = batch(readers["never"], range(6))
    for reader in readers.values():
        np.testing.assert_array_equal(batch(reader, range(1, 6)), expected[1:])
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])  # the same file: still open in the readers
    named = re.escape(str(path))
    for check in ("once", "always"):
        np.testing.assert_array_equal(batch(readers[check], range(1, 6)), expected[1:])
        with pytest.raises(DamagedError, match=f"record 0 in {named} is damaged.*`make verify`"):
            batch(readers[check], [5, 0])
    assert not np.array_equal(batch(readers["never"], [0]), expected[:1])
    reader = readers["always"]
    path.write_bytes(whole[:300])
    with pytest.raises(DamagedError, match=f"{named} ends before byte"):
        batch(reader, [5])
    path.write_bytes(whole)
    path.unlink()  # an open file stays whole until its readers let go
    np.testing.assert_array_equal(batch(reader, range(6)), expected)
    with pytest.raises(DamagedError, match=f"{named} is missing"):
        batch(open_store(root), [5])
    (root / "token_mean/c/1/0").unlink()
    with pytest.raises(DamagedError, match="token_mean/c/1/0 is missing"):
        reader.read(images.keys[3], 0)


def test_errors_leave_no_file_open(make_store: Any) -> None:
    root, _, _ = make_store(bad=(0,))
    reader = open_store(root)
    batch(reader, [2])
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    for _ in range(20):
        with pytest.raises(DamagedError):
            batch(reader, [2, 0])
    assert before in (0, len(os.listdir("/proc/self/fd")))


@pytest.mark.parametrize("part", [1, 7, 50])
def test_a_system_that_gives_a_part_at_a_time(make_store: Any, monkeypatch: pytest.MonkeyPatch, part: int) -> None:
    """As network file systems may: only a read of nothing is the end of a file."""
    root, plan, _ = make_store()
    records_B = np.arange(plan.num_records)
    whole_BTC, found_BTC = (np.empty((len(records_B), *plan.shape_TC), np.float16) for _ in range(2))
    open_store(root).read_batch(records_B, whole_BTC)
    preadv = os.preadv

    def short(descriptor: int, targets: Any, offset: int) -> int:
        places = [memoryview(target).cast("B") for target in targets]
        return preadv(descriptor, [next(place for place in places if len(place))[:part]], offset)

    monkeypatch.setattr(os, "preadv", short)
    open_store(root, check="always").read_batch(records_B, found_BTC)
    assert found_BTC.tobytes() == whole_BTC.tobytes()
    monkeypatch.setattr(os, "preadv", lambda descriptor, targets, offset: 0)
    with pytest.raises(DamagedError, match="ends before byte"):
        open_store(root).read_batch(records_B, found_BTC)
