"""An image that ends every worker: it is found, left out and listed, and the rest of its shard is extracted."""

import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extract import isolate, sharing
from extract.config import ExecutionConfig, ExtractConfig
from extract.isolate import find_culprit
from extract.jobs import ENDS_WORKERS, Job
from extract.run import run
from extract.worker import Extracted, Worker
from storage.errors import InputError, QuarantineError
from storage.folder import load_plan
from storage.reader import open_store
from storage.receipts import committed_shards
from tests.fixtures.jobs import take_number

RUN = ExecutionConfig(executor="process", workers=1, batch_size=4, device="cpu")
CFG = ExtractConfig(teacher="toy", views=2, records_per_shard=12, max_bad_fraction=0.2, run=RUN)
"""16 training images in 3 shards of 6."""
MakeIndex = Callable[..., tuple[Path, object]]
TreeBytes = Callable[[Path], dict[str, bytes]]


class PoisonedWorker(Worker):
    """Dies of some images; of one, only when it looks at the whole shard."""

    def __init__(self, deadly: tuple[str, ...], together: str, roots: list[Path], run: ExecutionConfig) -> None:
        super().__init__(roots, run)
        images, read = self.images, type(self.images).read_image
        read_before = set[str]()

        def read_image(position: int) -> object:
            key = images.keys[position]
            read_before.add(key)
            if key in deadly or (key == together and len(read_before) > 2):
                os._exit(139)
            return read(images, position)

        images.read_image = read_image  # type: ignore[method-assign, assignment]


def poison(monkeypatch: pytest.MonkeyPatch, *deadly: str, together: str = "") -> None:
    monkeypatch.setattr(sharing, "Worker", functools.partial(PoisonedWorker, deadly, together))


def keys_of(make_index: MakeIndex) -> tuple[Path, list[str]]:
    data, index = make_index()
    return data, list(index.split("train").keys)  # type: ignore[attr-defined]


def test_the_images_that_end_workers_are_left_out_and_the_rest_is_there(
    make_index: MakeIndex, monkeypatch: pytest.MonkeyPatch, tree_bytes: TreeBytes, tmp_path: Path
) -> None:
    """Two in one shard, one in another."""
    data, keys = keys_of(make_index)
    run(CFG, {"data": data}, tmp_path / "undisturbed")
    deadly = (keys[1], keys[4], keys[12])
    poison(monkeypatch, *deadly)
    metrics = run(CFG, {"data": data}, tmp_path / "store")
    assert [(bad["key"], bad["reason"]) for bad in metrics["bad_images"]] == [(key, ENDS_WORKERS) for key in deadly]
    whole, holed = open_store(tmp_path / "undisturbed"), open_store(tmp_path / "store")
    for key in keys:
        if key not in deadly:
            for view in range(2):
                assert (holed.read(key, view).tokens_TC == whole.read(key, view).tokens_TC).all()
    monkeypatch.undo()
    (tmp_path / "store" / "manifest.json").unlink()
    assert run(CFG, {"data": data}, tmp_path / "store", retry_failed=True)["bad_images"] == []
    assert tree_bytes(tmp_path / "store") == tree_bytes(tmp_path / "undisturbed")


def test_more_than_are_allowed_are_not_left_out(
    make_index: MakeIndex, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data, keys = keys_of(make_index)
    poison(monkeypatch, keys[1], keys[4])
    with pytest.raises((QuarantineError, InputError)):
        run(CFG.model_copy(update={"max_bad_fraction": 0.0}), {"data": data}, tmp_path / "store")
    assert sorted(committed_shards(tmp_path / "store", load_plan(tmp_path / "store"))) == [1, 2]


class UnluckyWorker(Worker):
    """Is killed from outside whenever it is at the second shard, so many times."""

    def __init__(self, folder: Path, times: int, roots: list[Path], run: ExecutionConfig) -> None:
        super().__init__(roots, run)
        self.folder, self.times = folder, times

    def __call__(self, job: Job) -> Extracted:
        if job.shard == 1 and job.probed is None and take_number(self.folder, "killed") <= self.times:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(job)


@pytest.mark.parametrize("times", [3, 99])
def test_a_shard_that_was_only_unlucky_is_carried_out_once_more(
    times: int, make_index: MakeIndex, monkeypatch: pytest.MonkeyPatch, tree_bytes: TreeBytes, tmp_path: Path
) -> None:
    """Lost to outside causes as often as a shard is tried, its images end no worker."""
    data, _ = keys_of(make_index)
    monkeypatch.setattr(sharing, "Worker", functools.partial(UnluckyWorker, tmp_path, times))
    if times == 3:
        run(CFG, {"data": data}, tmp_path / "store")
        monkeypatch.undo()
        run(CFG, {"data": data}, tmp_path / "undisturbed")
        assert tree_bytes(tmp_path / "store") == tree_bytes(tmp_path / "undisturbed")
        return
    with pytest.raises(QuarantineError, match=r"1 of 3 shards .* ended by SIGKILL"):
        run(CFG, {"data": data}, tmp_path / "store")
    assert len(list(tmp_path.glob("killed.*"))) == 2 * RUN.max_attempts


def test_a_shard_that_no_single_image_explains_is_given_up(
    make_index: MakeIndex, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data, keys = keys_of(make_index)
    poison(monkeypatch, together=keys[9])
    with pytest.raises(QuarantineError, match="ended with code 139; no image of it does that alone"):
        run(CFG, {"data": data}, tmp_path / "store")
    assert sorted(committed_shards(tmp_path / "store", load_plan(tmp_path / "store"))) == [0, 2]


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
def test_the_first_culprit_is_found_in_few_probes(case: tuple[int, set[int]]) -> None:
    num_images, deadly = case
    probes: list[tuple[int, int]] = []

    def survives(job: Job) -> bool:
        assert job.probed is not None
        probes.append(job.probed)
        return not deadly.intersection(range(*job.probed))

    assert find_culprit(Job(7), num_images, survives) == min(deadly, default=None)
    assert len(probes) <= num_images.bit_length() + 1 + isolate.SURE_AFTER
