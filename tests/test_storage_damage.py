"""Every kind of damage to every file of a store, in both layouts: a read notices it before a wrong batch is handed out
or is right all the same, verifying names the file and the kind, and extracting again mends exactly that."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.layouts import LAYOUTS
from storage.verify import check_structure
from tests.fixtures.whole_store import SEALED, WholeStore


@pytest.fixture
def tmp_path(in_memory: Path) -> Path:
    return in_memory


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


def test_these_are_all_kinds_of_files(whole_store: WholeStore) -> None:
    found = {name.split("/")[0] for name in whole_store.tree}
    expected = {"receipts", "plan.json", "images.bin", "manifest.json"}
    if whole_store.plan.backend == "wds":
        expected |= {"shards", "dataset.json"}
    else:
        expected |= {"tokens", "token_mean", "token_std", "views", "zarr.json"}
        expected |= {"view_jpegs", "view_spans", "view_crc32c"} if whole_store.plan.stored_views else set()
        expected |= {"token_scale"} if whole_store.plan.encoding.kind == "int8" else set()
        expected |= {"token_positions"} if whole_store.plan.token_subset else set()
    assert found == expected


@pytest.mark.parametrize("damage", DAMAGE)
def test_every_damage_to_every_file(whole_store: WholeStore, damage: str) -> None:
    kind, change = DAMAGE[damage]
    for name in whole_store.tree:
        change(whole_store.root / name)
        if whole_store.changed():
            kinds = (kind, "damaged") if name.startswith(SEALED) and kind not in ("missing", "emptied") else (kind,)
            whole_store.assert_mended(whole_store.assert_noticed(kinds))
        whole_store.restore()


def test_flipped_bits(whole_store: WholeStore) -> None:
    @settings(max_examples=60)
    @given(
        name=st.sampled_from(sorted(whole_store.tree)),
        place=st.floats(0, 1, exclude_max=True),
        bits=st.integers(1, 255),
        length=st.integers(1, 3),
    )
    def check(name: str, place: float, bits: int, length: int) -> None:
        whole_store.restore()
        data = bytearray(whole_store.tree[name])
        start = int(place * len(data))
        for offset in range(start, min(start + length, len(data))):
            data[offset] ^= bits
        (whole_store.root / name).write_bytes(data)
        whole_store.assert_noticed(("damaged",) if name.startswith(SEALED) else ("changed",))

    check()


def test_a_flipped_bit_in_every_part_of_the_data(whole_store: WholeStore) -> None:
    """So that no kind of member, header or small array is missed by chance."""
    for name in (*whole_store.files_of(0), *whole_store.files_of(1)):
        whole = whole_store.tree[name]
        places = (
            range(130, len(whole), 512) if name.endswith(".tar") else range(5, len(whole), max(64, len(whole) // 25))
        )
        for offset in places:  # behind the header of each member's array
            (whole_store.root / name).write_bytes(whole[:offset] + bytes([whole[offset] ^ 16]) + whole[offset + 1 :])
            whole_store.assert_noticed(("changed",))
        whole_store.restore()


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
