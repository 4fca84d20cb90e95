"""What a reader misses that checks nothing: a table of damages, and who notices them."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storage.errors import DecantError
from storage.reader import open_store
from tests.fixtures.stores import everything
from tests.fixtures.whole_store import Tree, WholeStore, flip


@pytest.fixture
def tmp_path(in_memory: Path) -> Path:
    return in_memory


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


def unchecked_damage(whole_store: WholeStore) -> dict[str, Callable[[], object]]:
    """How each damage of the table is done."""
    root, record = whole_store.root, open_store(whole_store.root).read("a/0003.png", 0)  # type: ignore[arg-type]
    is_tar = whole_store.plan.backend == "wds"
    tokens, other = ("shards/00001.tar", "shards/00000.tar") if is_tar else ("tokens/c/1/0/0", "tokens/c/0/0/0")
    whole, jpeg = whole_store.tree[tokens], record.jpeg or b""
    place, size = whole.index(record.tokens_TC.tobytes()), record.tokens_TC.nbytes
    statistics, views, jpegs = (
        (tokens, "shards/00001.index.npy", tokens) if is_tar else ("token_mean/c/1/0", "views/c/1/0", "view_jpegs/c/1")
    )
    mean_place = whole_store.tree[statistics].index(record.token_mean_T.tobytes())
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
        "flipped jpeg": lambda: flip(root / jpegs, whole_store.tree[jpegs].index(jpeg) + len(jpeg) // 2),
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
    whole_store = WholeStore(root, plan, tree_bytes(root), lambda: None)
    damage, found = unchecked_damage(whole_store), {}
    for name in UNCHECKED[backend]:
        damage[name]()
        try:
            found[name] = HARMLESS if everything(open_store(root, check="never")) == whole_store.truth else ONLY_VERIFY
        except DecantError:
            found[name] = NOTICED
        if name in ("swapped tokens", "longer tokens"):
            assert whole_store.problems()
        else:
            whole_store.assert_noticed(("changed", "damaged", "cut short", "missing"))
        whole_store.restore()
    assert found == UNCHECKED[backend]
