"""Every kind of damage to every file of a store is noticed, named, and mended by verifying and extracting again."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import zarr_format
from storage.errors import DecantError, InputError
from storage.fingerprint import digest_file
from storage.reader import open_store
from storage.records import FORMAT_VERSION, StorePlan
from storage.verify import STORE, discard_shard, iter_damage
from storage.writer import METADATA_FILES, committed_shards, create_store, finish_store, load_plan, sweep

Tree = dict[str, bytes]
BAD = 1
"""The image that is a hole."""


@pytest.fixture
def tmp_path(in_memory: Path) -> Path:
    return in_memory


class Store:
    """A finished store of two shards, and what reading it must give."""

    def __init__(self, root: Path, plan: StorePlan, tree: Tree, extract: Callable[[], None]) -> None:
        self.root, self.plan, self.tree, self.extract = root, plan, tree, extract
        self.truth = self.read()

    def read(self) -> list[Any]:
        """Everything that a reader gives, batch by batch and record by record."""
        reader = open_store(self.root)
        views = self.plan.views_per_image
        positions = reader.usable_images()
        records_B = (positions[:, None] * views + np.arange(views)).reshape(-1)
        out_BTC = np.empty((len(records_B), *self.plan.features.shape_TC), np.float16)
        reader.read_batch(records_B, out_BTC)
        records = [record for shard in range(self.plan.num_shards) for record in reader.iter_shard(shard)]
        bad = [(bad.key, bad.reason) for bad in reader.manifest.bad_images]
        tokens, statistics = out_BTC.tobytes(), [part.tobytes() for part in reader.token_statistics(records_B)]
        fields = [(*record[:3], *(part.tobytes() for part in record[3:])) for record in records]
        return [positions.tolist(), tokens, statistics, reader.views(records_B), fields, bad, reader.images]

    def restore(self) -> None:
        for name, data in self.tree.items():
            path = self.root / name
            if not path.exists() or path.read_bytes() != data:
                path.write_bytes(data)

    def assert_noticed_and_mended(self, name: str, change: Callable[[Path], object]) -> None:
        """Damage one file; reading it must fail by name or be right; verifying must find it; both must mend it."""
        path = self.root / name
        change(path)
        if path.exists() and path.read_bytes() == self.tree[name]:
            return
        is_named = False
        try:
            assert self.read() == self.truth, f"wrong data was read from a damaged {name}"
        except DecantError as error:
            is_named = name in str(error)
            assert is_named, f"{name}: {error}"
        problems = [problem for _, damage in iter_damage(self.root) for problem in damage]
        assert {problem.path for problem in problems} <= {path}, problems
        assert problems or (is_named and name == "manifest.json"), f"{name} was not noticed"
        for problem in problems:
            discard_shard(self.root, problem.shard)
        self.extract()
        assert {entry: (self.root / entry).read_bytes() for entry in self.tree} == self.tree
        assert not any(damage for _, damage in iter_damage(self.root))


@pytest.fixture
def store(
    make_store: Any, fill_shard: Any, tree_bytes: Callable[[Path], Tree], monkeypatch: pytest.MonkeyPatch
) -> Store:
    root, plan, images = make_store(num_images=5, bad=(BAD,))
    metadata = zarr_format.encode_metadata(plan)
    monkeypatch.setattr(zarr_format, "encode_metadata", lambda plan: dict(metadata))  # once is slow enough

    def extract() -> None:
        create_store(root, plan, images)
        sweep(root, plan)
        done = committed_shards(root, plan)
        for index in range(plan.num_shards):
            if index not in done:
                fill_shard(root, plan, images, index, bad=(images.keys[BAD],)).commit()
        finish_store(root)

    return Store(root, plan, tree_bytes(root), extract)


def resize(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(change(path.read_bytes()))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "deleted": Path.unlink,
    "emptied": resize(lambda data: b""),
    "cut in half": resize(lambda data: data[: len(data) // 2]),
    "cut by one byte": resize(lambda data: data[:-1]),
    "begun": resize(lambda data: data[:1]),
    "second half zero": resize(lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2)),
    "all zero": resize(lambda data: bytes(len(data))),
    "longer": resize(lambda data: data + b"\n"),
    "doubled": resize(lambda data: data + data),
    "other order": resize(lambda data: data[len(data) // 2 :] + data[: len(data) // 2]),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_every_damage_to_every_file(store: Store, kind: str) -> None:
    kinds = {name.split("/")[0] for name in store.tree}
    assert kinds == {
        "tokens", "token_mean", "token_std", "views", "receipts", "plan.json", "images.json", "manifest.json",
        "zarr.json",
    }  # fmt: skip
    for name in store.tree:
        store.assert_noticed_and_mended(name, DAMAGE[kind])
        store.restore()


def test_flipped_bits(store: Store) -> None:
    @settings(max_examples=400)
    @given(
        name=st.sampled_from(sorted(store.tree)),
        place=st.floats(0, 1, exclude_max=True),
        bits=st.integers(1, 255),
        length=st.integers(1, 3),
    )
    def check(name: str, place: float, bits: int, length: int) -> None:
        def flip(path: Path) -> None:
            data = bytearray(path.read_bytes())
            start = int(place * len(data))
            for offset in range(start, min(start + length, len(data))):
                data[offset] ^= bits
            path.write_bytes(data)

        store.restore()
        store.assert_noticed_and_mended(name, flip)

    check()


def test_every_byte_of_the_plan_and_a_receipt(store: Store) -> None:
    """Digits and letters that become others are still JSON."""
    for name, bits in (("plan.json", 1), ("plan.json", 8), ("receipts/00000.json", 1)):
        for offset in range(len(store.tree[name])):
            data = bytearray(store.tree[name])
            data[offset] ^= bits
            (store.root / name).write_bytes(data)
            found = [problem for _, damage in iter_damage(store.root) for problem in damage]
            assert [problem.path for problem in found] == [store.root / name], offset
        store.restore()


def test_files_of_another_shard_or_store_are_found(store: Store, make_store: Any) -> None:
    """Their checksums are right, so a reader cannot tell; their digests are not those of the receipt."""
    for name in sorted(store.tree):
        if name.endswith("json") or "/c/0/" not in name:
            continue
        other = store.root / name.replace("/c/0/", "/c/1/")
        shutil.copy(other, store.root / name)
        (_, damage), *_ = iter_damage(store.root)
        assert [problem.path for problem in damage] == [store.root / name]
        assert damage[0].found.startswith(
            (f"digest {digest_file(other)}, committed ", f"{other.stat().st_size:,} bytes")
        )
        store.restore()
    shutil.copy(store.root / "receipts/00001.json", store.root / "receipts/00000.json")
    (index, damage), *_ = iter_damage(store.root)
    assert index == 0 and damage[0].found == "not the receipt that belongs here"
    store.restore()
    other, _, _ = make_store("other", num_images=5)  # without the hole
    shutil.copy(other / "receipts/00000.json", store.root / "receipts")
    (index, damage), *_ = iter_damage(store.root)
    assert index == 0 and damage[0].found == "not the receipt that belongs here"


def test_several_damages_at_once_are_all_listed_and_mended(store: Store) -> None:
    names = ["tokens/c/0/0/0", "views/c/1/0", "images.json", "tokens/zarr.json", "plan.json"]
    for name in names:
        resize(lambda data: data[:-1] + b"?")(store.root / name)
    found = {index: [str(p.path.relative_to(store.root)) for p in damage] for index, damage in iter_damage(store.root)}
    assert {index: sorted(files) for index, files in found.items()} == {
        STORE: ["images.json", "plan.json", "tokens/zarr.json"],
        0: ["tokens/c/0/0/0"],
        1: ["views/c/1/0"],
    }
    for index in found:
        discard_shard(store.root, index)
    store.extract()
    assert store.read() == store.truth


def test_an_unfinished_store_and_no_store(store: Store, tmp_path: Path) -> None:
    (store.root / "manifest.json").unlink()
    (store.root / "receipts/00001.json").unlink()
    found = dict(iter_damage(store.root))
    assert found[0] == [] and found[1][0].found.startswith("missing: not extracted yet")
    shutil.copy(store.root / "receipts/00000.json", store.root / "receipts/00001.json")
    assert dict(iter_damage(store.root))[1][0].found == "not the receipt that belongs here"
    with pytest.raises(InputError, match=r"holds no store \(no plan\.json\)"):
        list(iter_damage(tmp_path))


def test_a_store_of_a_newer_program_is_not_called_damaged(store: Store) -> None:
    newer = load_plan(store.root).model_copy(update={"format_version": FORMAT_VERSION + 1})
    (store.root / "plan.json").write_bytes(newer.to_file())
    with pytest.raises(InputError, match="update it"):
        list(iter_damage(store.root))


def test_without_a_manifest_and_a_plan_nothing_is_guessed(store: Store) -> None:
    for name in METADATA_FILES:
        (store.root / name).write_text("")
    (store.root / "manifest.json").write_text("")
    ((index, damage),) = iter_damage(store.root)
    assert index == STORE and {problem.path.name for problem in damage} >= {"plan.json", "images.json", "manifest.json"}
