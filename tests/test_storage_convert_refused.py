"""What cannot be converted: nothing becomes more exact again, and neither other stores nor damage are carried over."""

from pathlib import Path
from typing import Any

import pytest

from storage.convert import convert_store, plan_conversion
from storage.encodings import BitRound, Encoding, Fp16, Int8, Zstd
from storage.errors import ConfigError, DamagedError, InputError
from storage.reader import open_store
from storage.token_subset import TokenSubset
from tests.fixtures.any_store import INT8, SUBSET

SHAPE: dict[str, Any] = {"num_images": 8, "bad": (1, 6), "view_px": 8}


@pytest.fixture
def tmp_path(in_memory: Path) -> Path:
    return in_memory


@pytest.mark.parametrize(
    ("source", "wanted"),
    [(INT8, Fp16()), (INT8, Zstd()), (INT8, BitRound()), (BitRound(), Fp16()), (BitRound(), INT8),
     (BitRound(keep_bits=4), BitRound(keep_bits=5)), (INT8, Int8(channel_scale=(1.0,) * 8))],
    ids=str,
)  # fmt: skip
def test_nothing_becomes_more_exact_again(make_store: Any, source: Encoding, wanted: Encoding) -> None:
    root, _, _ = make_store(encoding=source, **SHAPE)
    expected = rf"store is encoded as {source.kind}, which cannot be made {wanted.kind} again"
    with pytest.raises(ConfigError, match=expected):
        plan_conversion(open_store(root), backend="wds", encoding=wanted)


def test_int8_by_name_keeps_the_scales_it_has(make_store: Any) -> None:
    root, plan, _ = make_store(encoding=INT8, **SHAPE)
    assert plan_conversion(open_store(root), backend="zarr", encoding=Int8()) == plan


def test_another_part_of_the_tokens_is_refused(make_store: Any) -> None:
    root, _, _ = make_store(token_subset=SUBSET, **SHAPE)
    for other in (TokenSubset(fraction=0.2, seed=3), TokenSubset(fraction=0.4, seed=4)):
        with pytest.raises(ConfigError, match="keeps another subset of the tokens already"):
            plan_conversion(open_store(root), backend="zarr", token_subset=other)


def test_another_store_is_not_written_over(make_store: Any, tree_bytes: Any, tmp_path: Path) -> None:
    root, _, _ = make_store(**SHAPE)
    other, _, _ = make_store("other", num_images=3)
    before = tree_bytes(other)
    source = open_store(root)
    for target, said in ((other, "holds another store"), (root, "lies in the store that is converted")):
        with pytest.raises(ConfigError, match=said):
            convert_store(source, target, plan_conversion(source, backend="wds"))
    assert tree_bytes(other) == before


def test_damage_is_not_carried_over(make_store: Any, tmp_path: Path) -> None:
    """A copy would get checksums of its own, and be wrong for ever."""
    root, _, _ = make_store(**SHAPE)
    names = ["tokens/c/1/0/0", "token_std/c/1/0", "view_jpegs/c/1", "views/c/1/0"]
    for number, name in enumerate(names):
        whole = (root / name).read_bytes()
        (root / name).write_bytes(whole[:9] + bytes([whole[9] ^ 4]) + whole[10:])
        source = open_store(root)
        with pytest.raises(DamagedError, match=name):
            convert_store(source, tmp_path / f"{number}", plan_conversion(source, backend="wds"))
        assert not (tmp_path / f"{number}" / "receipts" / "00001.json").exists()
        (root / name).write_bytes(whole)
    unchecked = open_store(root, check="never")
    with pytest.raises(AssertionError, match="check='once'"):
        convert_store(unchecked, tmp_path / "unchecked", plan_conversion(unchecked, backend="wds"))


def test_a_folder_with_other_things_is_left_alone(make_store: Any, tree_bytes: Any, tmp_path: Path) -> None:
    root, _, _ = make_store(**SHAPE)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "cat.jpg").write_bytes(b"a picture")
    file = tmp_path / "file"
    file.write_bytes(b"")
    source = open_store(root)
    plan = plan_conversion(source, backend="wds", keep_views=False)
    for target, said in (
        (pictures, r"holds other files \('cat\.jpg'\); choose an empty folder"),
        (root / "inside", "lies in the store that is converted"),
        (file, "is a file; choose a folder"),
    ):
        before = tree_bytes(tmp_path)
        with pytest.raises(ConfigError, match=said):
            convert_store(source, target, plan)
        assert tree_bytes(tmp_path) == before


def test_images_of_another_folder_are_told(make_store: Any, make_images: Any, tmp_path: Path) -> None:
    root, _, _ = make_store(num_images=3)
    source = open_store(root)
    plan = plan_conversion(source, backend="wds", view_px=8)
    with pytest.raises(InputError, match=r"is not to be had from .*; give the folder"):
        convert_store(source, tmp_path / "tars", plan, images_location=str(make_images()))
