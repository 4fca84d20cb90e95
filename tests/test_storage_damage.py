"""Every kind of damage to every file of a store, in both layouts: a read notices it before a wrong batch is handed out
or is right all the same, verifying names the file and the kind, and extracting again mends exactly that."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.encodings import Int8, Zstd
from storage.errors import ConfigError, DecantError, InputError
from storage.folder import create_store, finish_store, load_plan, sweep
from storage.layouts import LAYOUTS
from storage.reader import Check, open_store
from storage.receipts import committed_shards
from storage.records import FORMAT_VERSION, ShardEntry, StorePlan
from storage.token_subset import TokenSubset
from storage.verify import (
    STORE,
    Damage,
    check_structure,
    discard_shard,
    iter_damage,
    iter_data_damage,
    sample_shards,
)

Tree = dict[str, bytes]
BAD = 1
"""The image that is a hole."""
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "packed": {"encoding": Zstd(), "view_px": 8},
    "full": {"encoding": Int8(channel_scale=(1.0,) * 8), "token_subset": TokenSubset(fraction=0.6), "view_px": 8},
}
SEALED = ("plan.json", "images.bin", "manifest.json", "receipts")
"""These end with their own digest."""


@pytest.fixture
def tmp_path(in_memory: Path) -> Path:
    return in_memory


def everything(root: Path, check: Check = "once") -> list[Any]:
    """All that a reader gives, batch by batch and record by record."""
    reader = open_store(root, check=check)
    views = reader.plan.views_per_image
    positions = reader.usable_images()
    records_B = (positions[:, None] * views + np.arange(views)).reshape(-1)
    out_BTC = np.empty((len(records_B), *reader.plan.shape_TC), np.float16)
    reader.read_batch(records_B, out_BTC)
    records = [record for shard in range(reader.plan.num_shards) for record in reader.iter_shard(shard)]
    bad = [(bad.key, bad.reason) for bad in reader.manifest.bad_images]
    tokens, statistics = out_BTC.tobytes(), [part.tobytes() for part in reader.token_statistics(records_B)]
    fields = [(*record[:3], *(part.tobytes() for part in record[3:6]), record.jpeg) for record in records]
    jpegs = reader.read_jpegs(records_B) if reader.plan.stored_views else []
    return [positions.tolist(), tokens, statistics, reader.views(records_B), fields, bad, jpegs, reader.images]


class Store:
    """A finished store of two shards, and what reading it must give."""

    def __init__(self, root: Path, plan: StorePlan, tree: Tree, extract: Callable[[], None]) -> None:
        self.root, self.plan, self.tree, self.extract = root, plan, tree, extract
        self.truth = everything(root)

    def restore(self) -> None:
        for name, data in self.tree.items():
            path = self.root / name
            if not path.exists() or path.read_bytes() != data:
                path.write_bytes(data)

    def changed(self) -> set[str]:
        """The files that are not as they were."""
        return {n for n, d in self.tree.items() if not (self.root / n).exists() or (self.root / n).read_bytes() != d}

    def files_of(self, shard: int) -> list[str]:
        entry = ShardEntry.from_file(Path(), self.tree[f"receipts/{shard:05d}.json"])
        return [file.name for file in entry.files]

    def problems(self) -> list[Damage]:
        return [problem for _, damage in iter_damage(self.root) for problem in damage]

    def assert_noticed(self, kinds: tuple[str, ...], *, named: set[str] | None = None) -> list[Damage]:
        """Reading fails by the name of a damaged file, or is right; verifying finds exactly what was changed."""
        changed = self.changed()
        for check in ("once", "always"):
            try:
                assert everything(self.root, check) == self.truth, f"wrong data was read from a damaged {changed}"
            except DecantError as error:
                assert any(name in str(error) for name in changed), f"{changed}: {error}"
        problems = self.problems()
        assert {problem.name for problem in problems} == (changed if named is None else named), problems
        for problem in problems:
            owner = [shard for shard in range(2) if problem.name in self.files_of(shard)]
            if problem.name.startswith("receipts"):
                owner = [int(problem.name[-10:-5])]
            assert [problem.shard] == (owner or [STORE]), problem
            assert problem.found.startswith(kinds), problem
        return problems

    def assert_mended(self, problems: list[Damage]) -> None:
        """Forget what is damaged and extract: the bytes of the undamaged store."""
        for problem in problems:
            discard_shard(self.root, problem.shard)
        self.extract()
        assert not self.changed() and not self.problems()


@pytest.fixture(
    params=[(backend, variant) for backend in LAYOUTS for variant in VARIANTS], ids=lambda p: f"{p[0]}-{p[1]}"
)
def store(
    request: pytest.FixtureRequest, make_store: Any, fill_shard: Any, tree_bytes: Callable[[Path], Tree],
    monkeypatch: pytest.MonkeyPatch,
) -> Store:  # fmt: skip
    backend, variant = request.param
    root, plan, images = make_store(num_images=6, bad=(BAD,), backend=backend, **VARIANTS[variant])
    layout = LAYOUTS[backend]
    metadata = layout.metadata(plan)
    monkeypatch.setitem(LAYOUTS, backend, layout._replace(metadata=lambda plan: dict(metadata)))  # slow for Zarr

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


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "deleted": ("missing", Path.unlink),
    "emptied": ("emptied", resize(lambda data: b"")),
    "cut in half": ("cut short", resize(lambda data: data[: len(data) // 2])),
    "cut by one byte": ("cut short", resize(lambda data: data[:-1])),
    "begun": ("cut short", resize(lambda data: data[:1])),
    "second half zero": ("changed", resize(lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2))),
    "all zero": ("changed", resize(lambda data: bytes(len(data)))),
    "longer": ("too long", resize(lambda data: data + b"\n")),
    "doubled": ("too long", resize(lambda data: data + data)),
    "other order": ("changed", resize(lambda data: data[len(data) // 2 :] + data[: len(data) // 2])),
}


def test_these_are_all_kinds_of_files(store: Store) -> None:
    found = {name.split("/")[0] for name in store.tree}
    expected = {"receipts", "plan.json", "images.bin", "manifest.json"}
    if store.plan.backend == "wds":
        expected |= {"shards", "dataset.json"}
    else:
        expected |= {"tokens", "token_mean", "token_std", "views", "zarr.json"}
        expected |= {"view_jpegs", "view_spans", "view_crc32c"} if store.plan.stored_views else set()
        expected |= {"token_scale"} if store.plan.encoding.kind == "int8" else set()
        expected |= {"token_positions"} if store.plan.token_subset else set()
    assert found == expected


@pytest.mark.parametrize("damage", DAMAGE)
def test_every_damage_to_every_file(store: Store, damage: str) -> None:
    kind, change = DAMAGE[damage]
    for name in store.tree:
        change(store.root / name)
        if store.changed():
            kinds = (kind, "damaged") if name.startswith(SEALED) and kind not in ("missing", "emptied") else (kind,)
            store.assert_mended(store.assert_noticed(kinds))
        store.restore()


def test_flipped_bits(store: Store) -> None:
    @settings(max_examples=100)
    @given(
        name=st.sampled_from(sorted(store.tree)),
        place=st.floats(0, 1, exclude_max=True),
        bits=st.integers(1, 255),
        length=st.integers(1, 3),
    )
    def check(name: str, place: float, bits: int, length: int) -> None:
        store.restore()
        data = bytearray(store.tree[name])
        start = int(place * len(data))
        for offset in range(start, min(start + length, len(data))):
            data[offset] ^= bits
        (store.root / name).write_bytes(data)
        store.assert_noticed(("damaged",) if name.startswith(SEALED) else ("changed",))

    check()


def test_a_flipped_bit_in_every_part_of_the_data(store: Store) -> None:
    """So that no kind of member, header or small array is missed by chance."""
    for name in (*store.files_of(0), *store.files_of(1)):
        whole = store.tree[name]
        for offset in range(5, len(whole), max(100, len(whole) // 70)):
            (store.root / name).write_bytes(whole[:offset] + bytes([whole[offset] ^ 16]) + whole[offset + 1 :])
            store.assert_noticed(("changed",))
        store.restore()


@pytest.mark.parametrize("backend", LAYOUTS)
def test_every_byte_of_the_plan_and_a_receipt(backend: str, make_store: Any) -> None:
    """Digits and letters that become others are still JSON."""
    root, _, _ = make_store(num_images=6, backend=backend)
    for name, bits in (("plan.json", 1), ("plan.json", 8), ("receipts/00000.json", 1)):
        whole = (root / name).read_bytes()
        for offset in range(len(whole)):
            (root / name).write_bytes(whole[:offset] + bytes([whole[offset] ^ bits]) + whole[offset + 1 :])
            found = check_structure(root).damage
            assert [(problem.name, problem.found[:7]) for problem in found] == [(name, "damaged")], offset
        (root / name).write_bytes(whole)


# ---- the right bytes in the wrong place ------------------------------------------------------------------------------


def copy(root: Path, one: str, other: str) -> None:
    shutil.copy(root / one, root / other)


def exchange(root: Path, one: str, other: str) -> None:
    first, second = (root / one).read_bytes(), (root / other).read_bytes()
    (root / one).write_bytes(second)
    (root / other).write_bytes(first)


def test_single_files_of_another_shard(store: Store) -> None:
    for one, other in zip(store.files_of(0), store.files_of(1), strict=True):
        for place in (
            lambda a, b: shutil.copy(store.root / b, store.root / a),
            lambda a, b: exchange(store.root, a, b),
        ):
            for names in ((one, other), (other, one)):
                place(*names)
                if store.changed():
                    store.assert_mended(store.assert_noticed(("swapped: holds the bytes of shard",)))
                store.restore()


@pytest.mark.parametrize("with_receipts", [False, True])
@pytest.mark.parametrize("is_copy", [False, True])
def test_all_files_of_another_shard(store: Store, with_receipts: bool, is_copy: bool) -> None:
    receipts = ["receipts/00000.json", "receipts/00001.json"]
    pairs = [*zip(store.files_of(0), store.files_of(1), strict=True), *([receipts] if with_receipts else [])]
    for one, other in pairs:
        if is_copy:
            copy(store.root, one, other)
        else:
            exchange(store.root, one, other)
    if with_receipts:  # those tell all: what they say of the files is not asked any more
        problems = store.assert_noticed(("swapped: the receipt of",), named=store.changed().intersection(receipts))
    else:
        problems = store.assert_noticed(("swapped: holds the bytes of shard",))
    assert {problem.shard for problem in problems} == ({1} if is_copy else {0, 1})
    store.assert_mended(problems)


def test_files_of_another_store_of_the_same_plan(store: Store, fill_shard: Any, tmp_path: Path) -> None:
    """As of a second run whose teacher gave other numbers: only digests can tell."""
    other = tmp_path / "other"
    shutil.copytree(store.root, other)
    images = open_store(other).images
    (other / "manifest.json").unlink()
    for shard in range(2):
        discard_shard(other, shard)
        fill_shard(other, store.plan, images, shard, bad=(images.keys[BAD],), seed=1).commit()
    finish_store(other)
    names = [name for name in store.files_of(0) if (other / name).read_bytes() != store.tree[name]]
    assert names
    for taken in (*([name] for name in names), names):
        for name in taken:
            shutil.copy(other / name, store.root / name)
        store.assert_mended(store.assert_noticed(("changed", "cut short", "too long")))
        store.restore()
    for name in (*names, "receipts/00000.json"):
        shutil.copy(other / name, store.root / name)
    problems = store.assert_noticed(
        ("swapped: not the receipt that the manifest names",), named={"receipts/00000.json"}
    )
    store.assert_mended(problems)
    shutil.copy(other / "manifest.json", store.root)
    with pytest.raises(DecantError, match=r"receipts/00000\.json is not the committed receipt"):
        everything(store.root)
    assert {problem.shard for problem in store.problems()} == {0, 1}


def test_metadata_of_another_store(store: Store, make_store: Any) -> None:
    other, _, _ = make_store("other", num_images=7, backend=store.plan.backend, teacher_fingerprint="others")
    kinds = ("swapped", "too long", "cut short", "changed")
    for name in ("manifest.json", "images.bin", *LAYOUTS[store.plan.backend].metadata(store.plan)):
        if (other / name).exists():
            shutil.copy(other / name, store.root / name)
        if store.changed():
            store.assert_mended(store.assert_noticed(kinds))
    shutil.copy(other / "plan.json", store.root)
    (problem,) = store.assert_noticed(kinds)
    discard_shard(store.root, problem.shard)
    with pytest.raises(ConfigError, match="holds another store"):  # which of both is meant, nobody can tell any more
        store.extract()


def test_a_receipt_that_was_sealed_again(store: Store) -> None:
    """Whole and of this shard, but not the committed one."""
    name = "receipts/00001.json"
    entry = ShardEntry.from_file(Path(name), store.tree[name])
    for changes in ({"num_records": 1}, {"record_crc32c": "00" * 24}, {"files": ()}, {"bad_images": ()}):
        (store.root / name).write_bytes(entry.model_copy(update=changes).to_file())
        if store.changed():
            store.assert_mended(store.assert_noticed(("swapped: not the receipt that the manifest names",)))


def test_a_copy_of_a_shard_under_a_new_number_is_not_looked_at(store: Store) -> None:
    """Nothing asks for it: no number of a record leads there."""
    for name in (*store.files_of(1), "receipts/00001.json"):
        second = store.root / name.replace("/c/1", "/c/2").replace("00001", "00002")
        second.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(store.root / name, second)
    assert everything(store.root) == store.truth and not store.problems()
    store.extract()
    assert not store.changed()


def test_a_second_writer_that_died_between_its_files(store: Store, fill_shard: Any, tmp_path: Path) -> None:
    """It had other bytes, and had put some of them over those of a finished shard."""
    other = tmp_path / "other"
    images = open_store(store.root).images
    create_store(other, store.plan, images)
    fill_shard(other, store.plan, images, 1, seed=1).commit()
    for count in range(1, len(store.files_of(1)) + 1):
        for name in store.files_of(1)[:count]:
            shutil.copy(other / name, store.root / name)
        if store.changed():
            store.assert_mended(store.assert_noticed(("changed", "cut short", "too long")))
        store.restore()


# ---- several at once, and what is no damage --------------------------------------------------------------------------


def test_several_damages_at_once_are_all_listed_and_mended(store: Store) -> None:
    by_shard = {STORE: {"images.bin", "plan.json"}, 0: {store.files_of(0)[0]}, 1: {store.files_of(1)[-1]}}
    for name in set().union(*by_shard.values()):
        resize(lambda data: data[:-1] + bytes([data[-1] ^ 1]))(store.root / name)
    found = {index: {problem.name for problem in damage} for index, damage in iter_damage(store.root)}
    assert found == by_shard
    for index in found:
        discard_shard(store.root, index)
    store.extract()
    assert everything(store.root) == store.truth


def test_an_unfinished_store_and_no_store(store: Store, tmp_path: Path) -> None:
    (store.root / "manifest.json").unlink()
    (damage,) = store.problems()
    assert (damage.shard, damage.name) == (STORE, "manifest.json") and damage.found.startswith("missing: all shards")
    (store.root / "receipts/00001.json").unlink()
    found = dict(iter_damage(store.root))
    assert found[0] == [] and found[1][0].found.startswith("missing: not extracted yet")
    shutil.copy(store.root / "receipts/00000.json", store.root / "receipts/00001.json")
    assert dict(iter_damage(store.root))[1][0].found == "swapped: the receipt of shard 0"
    with pytest.raises(InputError, match=r"holds no store \(no plan\.json\)"):
        list(iter_damage(tmp_path))


def test_the_images_of_an_unfinished_store(store: Store, make_store: Any) -> None:
    """There is no manifest yet to hold their digest; the plan has their fingerprint."""
    other, _, _ = make_store("other", num_images=7)
    discard_shard(store.root, 1)
    shutil.copy(other / "images.bin", store.root)
    assert Damage(STORE, "images.bin", "swapped: the images of another store") in store.problems()
    with pytest.raises(DecantError, match="is not the image list of this store"):
        open_store(store.root, allow_unfinished=True).images  # noqa: B018


def test_a_store_of_a_newer_program_is_not_called_damaged(store: Store) -> None:
    newer = load_plan(store.root).model_copy(update={"format_version": FORMAT_VERSION + 1})
    (store.root / "plan.json").write_bytes(newer.to_file())
    with pytest.raises(InputError, match="update it"):
        list(iter_damage(store.root))


def test_without_a_manifest_and_a_plan_nothing_is_guessed(store: Store) -> None:
    for name in ("plan.json", "images.bin", "manifest.json", *LAYOUTS[store.plan.backend].metadata(store.plan)):
        (store.root / name).write_text("")
    ((index, damage),) = iter_damage(store.root)
    assert index == STORE and {problem.name for problem in damage} == {"plan.json", "images.bin", "manifest.json"}


def test_a_sample_of_the_shards(make_store: Any) -> None:
    root, plan, _ = make_store(num_images=30)
    names = [f"tokens/c/{shard}/0/0" for shard in range(plan.num_shards)]
    for name in names:
        resize(lambda data: bytes([data[0] ^ 1]) + data[1:])(root / name)
    structure = check_structure(root)
    assert not structure.damage and sorted(structure.shards) == list(range(10))
    for fraction, count in ((0, 0), (0.01, 1), (0.1, 1), (0.25, 3), (0.5, 5), (1, 10)):
        chosen = sample_shards(structure.shards, fraction, seed=3)
        assert len(chosen) == count == len(set(chosen)) and chosen == sorted(chosen)
        found = dict(iter_data_damage(structure, chosen))
        assert found.pop(STORE) == []
        assert {index: [damage.name for damage in damages] for index, damages in found.items()} == {
            index: [names[index]] for index in chosen
        }
    draws = {tuple(sample_shards(range(10), 0.3, seed)) for seed in range(20)}
    assert len(draws) > 10 and sample_shards(range(10), 0.3, 5) == sample_shards(range(10), 0.3, 5)


# ---- reading without checks ------------------------------------------------------------------------------------------

NOTICED, HARMLESS, ONLY_VERIFY = "noticed by the read", "the read is right", "only verify sees it"
UNCHECKED: dict[str, dict[str, str]] = {
    "zarr": {
        "flipped tokens": ONLY_VERIFY, "swapped tokens": ONLY_VERIFY, "zeroed tokens": ONLY_VERIFY,
        "flipped index": NOTICED, "cut tokens": NOTICED, "missing tokens": NOTICED, "longer tokens": NOTICED,
        "flipped statistics": NOTICED, "flipped view": NOTICED, "flipped jpeg": NOTICED, "flipped jpeg index": HARMLESS,
        "flipped receipt": NOTICED, "flipped manifest": NOTICED, "flipped images": NOTICED, "flipped plan": HARMLESS,
        "flipped metadata": HARMLESS,
    },
    "wds": {
        "flipped tokens": ONLY_VERIFY, "zeroed tokens": ONLY_VERIFY, "swapped tokens": NOTICED,
        "flipped index": NOTICED, "cut tokens": NOTICED, "missing tokens": NOTICED, "longer tokens": HARMLESS,
        "flipped statistics": NOTICED, "flipped view": NOTICED, "flipped jpeg": NOTICED, "flipped header": HARMLESS,
        "flipped receipt": NOTICED, "flipped manifest": NOTICED, "flipped images": NOTICED, "flipped plan": HARMLESS,
        "flipped metadata": HARMLESS,
    },
}  # fmt: skip
"""What check="never" gives up: the tokens' own bytes. All else is still compared with the receipts."""


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def unchecked_damage(store: Store) -> dict[str, Callable[[], object]]:
    """How each damage of the table is done."""
    root, record = store.root, open_store(store.root).read("a/0003.png", 0)  # type: ignore[arg-type]
    is_tar = store.plan.backend == "wds"
    tokens, other = ("shards/00001.tar", "shards/00000.tar") if is_tar else ("tokens/c/1/0/0", "tokens/c/0/0/0")
    whole, jpeg = store.tree[tokens], record.jpeg or b""
    place, size = whole.index(record.tokens_TC.tobytes()), record.tokens_TC.nbytes
    statistics, views, jpegs = (
        (tokens, "shards/00001.index.npy", tokens) if is_tar else ("token_mean/c/1/0", "views/c/1/0", "view_jpegs/c/1")
    )
    mean_place = store.tree[statistics].index(record.token_mean_T.tobytes())
    return {
        "flipped tokens": lambda: flip(root / tokens, place + 5),
        "zeroed tokens": lambda: (root / tokens).write_bytes(whole[:place] + bytes(size) + whole[place + size :]),
        "swapped tokens": lambda: shutil.copy(root / other, root / tokens),
        "cut tokens": lambda: (root / tokens).write_bytes(whole[: place + 9]),
        "longer tokens": lambda: (root / tokens).write_bytes(whole + bytes(512)),
        "missing tokens": (root / tokens).unlink,
        "flipped index": lambda: flip(root / ("shards/00001.index.npy" if is_tar else tokens), -9),
        "flipped statistics": lambda: flip(root / statistics, mean_place),
        "flipped view": lambda: flip(root / views, -7),
        "flipped jpeg": lambda: flip(root / jpegs, store.tree[jpegs].index(jpeg) + len(jpeg) // 2),
        "flipped jpeg index": lambda: flip(root / "view_jpegs/c/1", -2),
        "flipped header": lambda: flip(root / tokens, 0),
        "flipped receipt": lambda: flip(root / "receipts/00001.json", 99),
        "flipped manifest": lambda: flip(root / "manifest.json", 99),
        "flipped images": lambda: flip(root / "images.bin", 99),
        "flipped plan": lambda: flip(root / "plan.json", 99),
        "flipped metadata": lambda: flip(root / ("dataset.json" if is_tar else "tokens/zarr.json"), 50),
    }


@pytest.mark.parametrize("backend", UNCHECKED)
def test_what_a_reader_misses_that_checks_nothing(
    backend: str, make_store: Any, tree_bytes: Callable[[Path], Tree]
) -> None:
    root, plan, _ = make_store(num_images=6, backend=backend, view_px=8)
    store = Store(root, plan, tree_bytes(root), lambda: None)
    damage, found = unchecked_damage(store), {}
    for name in UNCHECKED[backend]:
        damage[name]()
        try:
            found[name] = HARMLESS if everything(root, "never") == store.truth else ONLY_VERIFY
        except DecantError:
            found[name] = NOTICED
        if name in ("swapped tokens", "longer tokens"):
            assert store.problems()
        else:
            store.assert_noticed(("changed", "damaged", "cut short", "missing"))
        store.restore()
    assert found == UNCHECKED[backend]
