"""One contract, three stores: readers are shared by threads and processes, and opened in every way."""

import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage.errors import InputError
from storage.reader import open_store
from storage.store import FeatureReader
from tests.fixtures.any_store import ENCODINGS, Made, assert_equal


@pytest.fixture
def tmp_path(in_memory: Path) -> Path:
    return in_memory


# ---- threads and processes -------------------------------------------------------------------------------------------


def answers(reader: FeatureReader, records: Iterable[int]) -> tuple[bytes, bytes]:
    """In a process of its own."""
    records_B = np.array(list(records))
    out_BTC = np.empty((len(records_B), *reader.plan.shape_TC), np.float16)
    reader.read_batch(records_B, out_BTC)
    return out_BTC.tobytes(), reader.token_statistics(records_B)[0].tobytes()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_reader_travels_to_other_processes(plain: Made, method: str) -> None:
    records = list(plain.truth)
    expected = answers(plain.reader, records)  # so that files are open and indexes parsed
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(answers, (plain.reader, records)) == expected


def test_a_forked_child_goes_on_with_the_reader_of_its_parent(plain: Made, fork: Any) -> None:
    expected = answers(plain.reader, plain.truth)
    children = [fork(lambda: check_answers(plain, expected)) for _ in range(3)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert answers(plain.reader, plain.truth) == expected


def check_answers(made: Made, expected: tuple[bytes, bytes]) -> None:
    for _ in range(20):
        assert answers(made.reader, made.truth) == expected


def test_a_pickled_reader_is_small_and_equal(plain: Made) -> None:
    data = pickle.dumps(plain.reader)
    assert answers(pickle.loads(data), plain.truth) == answers(plain.reader, plain.truth)
    assert plain.plan.backend == "memory" or len(data) < 8192


@pytest.mark.timeout(60)
def test_eight_threads_share_a_reader(plain: Made) -> None:
    numbers = list(plain.truth)
    for _ in range(3):
        reader, start = plain.open(), threading.Barrier(8)
        shared = plain._replace(reader=reader)

        def work(seed: int, shared: Made = shared, start: threading.Barrier = start) -> None:
            generator = np.random.default_rng(seed)
            start.wait()
            for _ in range(20):
                records = generator.choice(numbers, 9).tolist()
                np.testing.assert_array_equal(shared.read(records), plain.tokens(records))
                assert shared.reader.read_jpegs(np.array(records)) == [plain.truth[n].jpeg for n in records]
                assert shared.reader.views(np.array(records)) == [plain.truth[n].view for n in records]

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))


def test_two_readers_at_once(plain: Made) -> None:
    one, other = plain, plain._replace(reader=plain.open())
    for number in plain.truth:
        np.testing.assert_array_equal(one.read([number]), other.read([number]))
    for record, same in zip(one.reader.iter_shard(0), other.reader.iter_shard(0), strict=True):
        assert_equal(record, same, same.tokens_TC)


# ---- how a store on disk is opened -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["zarr", "wds"])
@pytest.mark.parametrize("check", ["once", "always", "never"])
def test_checks_change_no_answer(make: Callable[..., Made], backend: str, check: str) -> None:
    made = make(backend, encoding=ENCODINGS["zstd"])
    checked = made._replace(reader=made.open(check=check))
    for _ in range(2):
        np.testing.assert_array_equal(checked.read(made.truth), made.tokens(made.truth))


@pytest.mark.parametrize("backend", ["zarr", "wds"])
def test_an_unfinished_store_is_opened_when_asked_for(begin_store: Any, fill_shard: Any, backend: str) -> None:
    root, plan, images = begin_store(backend=backend, view_px=8)
    for shard in (0, 2):
        fill_shard(root, plan, images, shard, bad=(images.keys[1],)).commit()
    with pytest.raises(InputError, match="holds an unfinished store"):
        open_store(root)
    reader = open_store(root, allow_unfinished=True)
    assert reader.usable_images().tolist() == [0, 2, 6, 7] and reader.images == images
    assert len(list(reader.iter_shard(0))) == len(list(reader.iter_shard(2))) == 4
    assert reader.manifest.num_records == 8 and not reader.manifest.receipts[1]
    for read in (reader.views, reader.read_jpegs, reader.token_statistics):
        with pytest.raises(InputError, match=r"shard 1 of .* is not extracted yet; run `make extract`"):
            read(np.array([0, 6]))


def test_a_child_forked_beside_a_reading_thread_reads(make_store: Any, fork: Any) -> None:
    """The thread holds a lock at that moment; in the child there is no thread that would give it back."""
    root, _, _ = make_store(num_images=6, images_per_shard=2)
    reader = open_store(root)
    records_B = np.arange(reader.plan.num_records)
    truth = reader.new_batch(len(records_B))
    reader.read_encoded(records_B, truth)

    def read() -> None:
        found = reader.new_batch(len(records_B))
        reader.read_encoded(records_B, found)
        reader.views(records_B)
        assert found["tokens"].tobytes() == truth["tokens"].tobytes()

    locks = [reader.files._lock, reader._small_files._lock]
    with locks[0], locks[1]:
        child = fork(read)
    assert os.waitpid(child, 0)[1] == 0
