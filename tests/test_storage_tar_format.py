"""The format is WebDataset's: `tar`, `tarfile` and webdataset, written by others, read what is written here."""

import io
import json
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import simplejpeg
import webdataset

from storage import tar_format
from storage.encodings import BitRound, Fp16, Int8, Zstd
from storage.files import LocalFiles
from storage.fingerprint import crc32c
from storage.folder import create_store, finish_store
from storage.image_list import ImageList
from storage.reader import open_store
from storage.records import StorePlan
from storage.shards import VIEW_FIELDS
from storage.token_subset import TokenSubset
from storage.writer import ShardWriter

INT8 = Int8(channel_scale=(0.5, 1, 1, 2, 1, 1, 0.25, 1))
KINDS: list[dict[str, Any]] = [
    {"encoding": Fp16()},
    {"encoding": Fp16(), "view_px": 16},
    {"encoding": INT8, "view_px": 24},
    {"encoding": Zstd()},
    {"encoding": BitRound(), "view_px": 16},
    {"encoding": INT8, "token_subset": TokenSubset(fraction=0.6)},
]
ALL_KINDS = pytest.mark.parametrize("changes", KINDS, ids=repr)


@pytest.fixture
def make_tars(make_store: Callable[..., Any]) -> Callable[..., tuple[Path, StorePlan, ImageList]]:
    def make(name: str = "tars", **changes: Any) -> tuple[Path, StorePlan, ImageList]:
        root, plan, images = make_store(name, backend="wds", **changes)
        return root, plan, images

    return make


def tars(root: Path) -> list[Path]:
    return sorted((root / "shards").glob("*.tar"))


def suffixes(plan: StorePlan) -> list[str]:
    """Of a record's members, in order."""
    optional = [
        ("jpg", plan.stored_views is not None),
        ("stats.npy", True),
        ("scale.npy", "token_scale" in plan.fields),
    ]
    return ["json", *(name for name, is_there in optional if is_there), tar_format.tokens_suffix(plan)]


def decode(plan: StorePlan, sample: dict[str, bytes]) -> dict[str, Any]:
    """What a stranger makes of a sample's bytes, with numpy and the codecs' own libraries."""
    found: dict[str, Any] = {"facts": json.loads(sample["json"]), "jpeg": sample.get("jpg")}
    for kind in ("stats.npy", "scale.npy", "tokens.npy"):
        if kind in sample:
            found[kind.removesuffix(".npy")] = np.load(io.BytesIO(sample[kind]), allow_pickle=False)
    if "tokens.zst" in sample:
        found["tokens"] = np.frombuffer(numcodecs.Zstd().decode(sample["tokens.zst"]), "<f2").reshape(plan.shape_TC)
    if "tokens.blosc" in sample:
        found["tokens"] = np.frombuffer(numcodecs.Blosc().decode(sample["tokens.blosc"]), "<f2").reshape(plan.shape_TC)
    return found


def check_sample(plan: StorePlan, images: ImageList, number: int, found: dict[str, Any], record: Any) -> None:
    position, view_index = divmod(number, plan.views_per_image)
    view = record.view
    facts = {
        "key": images.keys[position],
        "label": images.labels[position],
        "class": images.classes[images.labels[position]],
        "view_index": view_index,
        "view": {name: int(getattr(view, name)) for name in VIEW_FIELDS},
    }
    if plan.token_subset is not None:
        total = plan.features.num_tokens
        facts["token_positions"] = plan.token_subset.positions(record.key, view_index, total).tolist()
    assert found["facts"] == facts
    assert found["jpeg"] == record.jpeg
    if record.jpeg is not None:
        assert simplejpeg.decode_jpeg(record.jpeg).shape == (plan.stored_views.px, plan.stored_views.px, 3)
    expected = plan.encoding.encode(record.tokens_TC)
    assert found["tokens"].dtype == expected["tokens"].dtype
    np.testing.assert_array_equal(found["tokens"], expected["tokens"])
    np.testing.assert_array_equal(found["stats"], [record.token_mean_T, record.token_std_T])
    assert found["stats"].dtype == np.float32
    if "token_scale" in expected:
        np.testing.assert_array_equal(found["scale"], expected["token_scale"])


@ALL_KINDS
def test_tar_lists_the_members(make_tars: Callable[..., Any], changes: dict[str, Any]) -> None:
    """In the order of the records, all of a record together; those of bad images are left out."""
    root, plan, _ = make_tars(num_images=5, bad=(1,), **changes)
    numbers = [number for number in range(plan.num_records) if number // plan.views_per_image != 1]
    expected = [f"{number:09d}.{suffix}" for number in numbers for suffix in suffixes(plan)]
    by_tar = [subprocess.run(["tar", "tf", path], capture_output=True, text=True, check=True) for path in tars(root)]
    assert [name for listing in by_tar for name in listing.stdout.split()] == expected
    assert not any(listing.stderr for listing in by_tar)
    found = []
    for path in tars(root):
        with tarfile.open(path) as tar:
            found += tar.getnames()
            for member in tar:
                assert member.isreg() and (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
    assert found == expected


@ALL_KINDS
def test_webdataset_reads_what_is_written_here(
    make_tars: Callable[..., Any], made_up_record: Callable[..., Any], changes: dict[str, Any]
) -> None:
    root, plan, images = make_tars(num_images=5, bad=(1,), **changes)
    samples = list(webdataset.WebDataset([str(path) for path in tars(root)], shardshuffle=False, empty_check=False))
    assert len(samples) == 8
    for sample in samples:
        number = int(sample["__key__"])
        record = made_up_record(plan, images.keys[number // plan.views_per_image], number % plan.views_per_image)
        assert [name for name in sample if not name.startswith("__")] == suffixes(plan)
        check_sample(plan, images, number, decode(plan, sample), record)


def test_webdataset_decodes_by_itself(make_tars: Callable[..., Any], made_up_record: Callable[..., Any]) -> None:
    """`.decode()` knows all members of an fp16 store by their names."""
    root, plan, images = make_tars(num_images=1, view_px=16)
    dataset = webdataset.WebDataset([str(path) for path in tars(root)], shardshuffle=False, empty_check=False)
    for view_index, (pixels, tokens, stats, facts) in enumerate(
        dataset.decode("rgb8").to_tuple("jpg", "tokens.npy", "stats.npy", "json")
    ):
        record = made_up_record(plan, images.keys[0], view_index)
        assert pixels.shape == (16, 16, 3) and facts["view_index"] == view_index
        np.testing.assert_array_equal(tokens, record.tokens_TC)
        np.testing.assert_array_equal(stats[1], record.token_std_T)


@ALL_KINDS
def test_the_index_agrees_with_a_scan(make_tars: Callable[..., Any], changes: dict[str, Any]) -> None:
    """Every offset, length and checksum in it is what `tarfile` finds by walking through the headers."""
    root, plan, _ = make_tars(num_images=5, bad=(1,), **changes)
    for shard, path in enumerate(tars(root)):
        rows = np.load(root / tar_format.index_name(shard), allow_pickle=False)
        assert rows.shape == (plan.records_per_shard,)
        expected = np.full(plan.records_per_shard, tar_format.NO_RECORD, tar_format.INDEX_DTYPE)
        data = path.read_bytes()
        with tarfile.open(path) as tar:
            for member in tar:
                number, suffix = member.name.split(".", 1)
                row = expected[int(number) - shard * plan.records_per_shard]
                content = data[member.offset_data : member.offset_data + member.size]
                header = 0
                if suffix.endswith(".npy"):
                    header = 10 + int.from_bytes(content[8:10], "little")
                    assert header % 64 == 0, "values are aligned"
                kind = suffix.split(".", maxsplit=1)[0].replace("jpg", "jpeg")
                if kind == "json":
                    for name, value in json.loads(content)["view"].items():
                        row[name] = value
                    continue
                row[f"{kind}_offset"] = member.offset_data + header
                if kind in ("tokens", "jpeg"):
                    row[f"{kind}_bytes"] = member.size - header
                if kind != "tokens":  # whose checksum is in the receipt
                    row[f"{kind}_crc32c"] = crc32c(content[header:])
        np.testing.assert_array_equal(rows, expected)


@ALL_KINDS
def test_equal_records_give_equal_bytes(
    make_tars: Callable[..., Any], tree_bytes: Callable[[Path], dict[str, bytes]], changes: dict[str, Any]
) -> None:
    one, two = (make_tars(name, num_images=4, bad=(2,), **changes)[0] for name in ("one", "two"))
    assert tree_bytes(one) == tree_bytes(two)


KEYS = [
    "",
    ".",
    "../../etc/passwd",
    "/absolute",
    "a.b.c/d.e.jpg",
    "a\nb\0c",
    "b" * 300,
    "ünï/çødé 日本.png",
    "\U0001f600",
]


def test_keys_are_harmless(
    tmp_path: Path, store_plan: Callable[..., StorePlan], made_up_record: Callable[..., Any]
) -> None:
    """They are no member names, so they can lead nowhere and split nothing."""
    keys = sorted(KEYS)
    images = ImageList(
        location="", classes=("../c",), keys=keys, labels=[0] * len(keys), digests=["00" * 16] * len(keys)
    )
    plan = store_plan(images, backend="wds", views_per_image=1, images_per_shard=len(keys))
    root = tmp_path / "store"
    create_store(root, plan, images)
    writer = ShardWriter(root, plan, images, 0)
    for key in keys:
        writer.append(made_up_record(plan, key, 0))
    writer.commit()
    finish_store(root)
    samples = list(webdataset.WebDataset([str(path) for path in tars(root)], shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in samples] == [f"{number:09d}" for number in range(len(keys))]
    reader = open_store(root)
    for number, (key, sample) in enumerate(zip(keys, samples, strict=True)):
        check_sample(plan, images, number, decode(plan, sample), made_up_record(plan, key, 0))
        np.testing.assert_array_equal(reader.read(key, 0).tokens_TC, made_up_record(plan, key, 0).tokens_TC)


def test_the_dataset_tells_the_plan(make_tars: Callable[..., Any], tmp_path: Path) -> None:
    root, plan, _ = make_tars(encoding=INT8, token_subset=TokenSubset(fraction=0.5))
    assert json.loads((root / "dataset.json").read_bytes())["decant"] == plan.to_json()
    assert tar_format.find_plan(LocalFiles(root)) == plan
    assert tar_format.find_plan(LocalFiles(tmp_path)) is None
    for text in ("", "[]", "{}", '{"decant": {"format_version": 2}}', "\x00"):
        (tmp_path / "dataset.json").write_text(text)
        assert tar_format.find_plan(LocalFiles(tmp_path)) is None
