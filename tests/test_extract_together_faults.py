"""A pass over several stores that is stopped, killed or fails in one: the same command ends with the same bytes."""

import functools
import itertools
import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from extract.extraction import write_extraction
from extract.jobs import Job
from extract.run import run, run_together
from extract.teacher import Teacher
from extract.worker import Extracted, Worker
from storage.errors import InputError, QuarantineError
from storage.folder import load_plan
from storage.image_index import load_index
from storage.receipts import committed_shards, receipt_path
from storage.records import ShardEntry
from storage.stage import Interrupted, SilentProgress
from storage.verify import iter_damage
from storage.writer import ShardWriter
from tests.fixtures.together import ALONE, RUN, Files, MakeIndex, TreeBytes, read_all, targets

Fork = Callable[[Callable[[], object]], int]


# ---- going on --------------------------------------------------------------------------------------------------------


def test_only_what_a_store_lacks_is_made(
    alone: tuple[Path, Files], decoded: Counter[int], tree_bytes: TreeBytes, tmp_path: Path
) -> None:
    """One store is there, one lacks a shard, two are new; then all are there."""
    data, files = alone
    together = tmp_path / "together"
    run(ALONE["plain"], {"data": data}, together / "plain")
    run(ALONE["tars"], {"data": data}, together / "tars")
    receipt_path(together / "tars", 2).unlink()
    before = {path: path.stat().st_mtime_ns for path in (together / "plain").rglob("*") if path.is_file()}
    decoded.clear()
    run_together(targets(together, ["plain", "tars"]), {"data": data})
    assert decoded == Counter(range(6, 9)), "the images of shard 2"
    for path, stamp in before.items():
        assert path.name in ("manifest.json", "LOCK") or path.stat().st_mtime_ns == stamp
    metrics = run_together(targets(together), {"data": data})[0]
    assert isinstance(metrics, dict)
    assert metrics["extracted_views_per_second"] is None
    assert read_all(tree_bytes, together) == files


def test_a_worker_skips_what_another_committed(
    alone: tuple[Path, Files], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A worker that died after one store's commit: the job's next attempt makes the others' shard alone."""
    data, _ = alone
    roots = [tmp_path / "alone" / name for name in ALONE]
    for root, cfg in zip(roots, ALONE.values(), strict=True):
        write_extraction(root, cfg, load_index(data).split("train"))
    receipt_path(roots[1], 4).unlink()
    sides: set[int] = set()
    speak = Teacher.__call__

    def note(self: Teacher, pixels: torch.Tensor) -> torch.Tensor:
        sides.add(pixels.shape[1])
        return speak(self, pixels)

    monkeypatch.setattr(Teacher, "__call__", note)
    entries = Worker(roots, RUN)(Job(4)).entries
    assert sides == {48}
    assert [entry.store for entry in entries] == [load_plan(root).fingerprint for root in roots]


class AfterShards(SilentProgress):
    """Asks for a stop after some shards."""

    def __init__(self, count: int) -> None:
        self.left, self.said = count, list[str]()

    def advance(self, amount: int, **facts: object) -> None:
        self.said.append(f"{amount} {facts['shards']}")
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGTERM)


def test_an_interrupted_pass_goes_on_where_it_stopped(
    alone: tuple[Path, Files], decoded: Counter[int], tree_bytes: TreeBytes, tmp_path: Path
) -> None:
    data, files = alone
    stop, names = AfterShards(2), ["tars", "plain"]
    decoded.clear()
    with pytest.raises(Interrupted):
        run_together(targets(tmp_path, names), {"data": data}, stop)
    assert stop.said == ["3 2/12", "3 4/12"], "images count once, shards of all stores"
    run_together(targets(tmp_path, names), {"data": data})
    assert decoded == Counter(range(16))
    assert read_all(tree_bytes, tmp_path, names) == {name: files[name] for name in names}


def test_a_killed_pass_goes_on_and_is_the_same(
    make_index: MakeIndex, fork: Fork, tree_bytes: TreeBytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at the n-th file that is given its final name, in whichever store that is."""
    data, _ = make_index(per_class=4)
    names = ["plain", "tars"]
    run_together(targets(tmp_path / "undisturbed", names), {"data": data})
    files = read_all(tree_bytes, tmp_path / "undisturbed", names)

    def die_at(name_number: int) -> None:
        given = itertools.count(1)
        for function in ("replace", "link"):
            give_name = getattr(os, function)

            def give(source: Path, target: Path, give_name: Callable[[Path, Path], None] = give_name) -> None:
                if next(given) == name_number:
                    os.kill(os.getpid(), signal.SIGKILL)
                give_name(source, target)

            monkeypatch.setattr(os, function, give)
        run_together(targets(tmp_path / f"killed-{name_number}", names), {"data": data})

    kills = 0
    for at in itertools.count(2, 5):
        _, status = os.waitpid(fork(functools.partial(die_at, at)), 0)
        folder = tmp_path / f"killed-{at}"
        kills += os.WIFSIGNALED(status)
        run_together(targets(folder, names), {"data": data})
        assert read_all(tree_bytes, folder, names) == files
        assert all(not damage for name in names for _, damage in iter_damage(folder / name))
        if not os.WIFSIGNALED(status):
            break
    assert kills >= 4


# ---- one that fails --------------------------------------------------------------------------------------------------


@pytest.fixture
def fail_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Exception | float], None]:
    """Let the teacher of 48 px fail in some batch: raise an error, or give a value."""
    speak = Teacher.__call__
    calls = itertools.count(1)

    def arm(batch: int, failure: Exception | float) -> None:
        def call(self: Teacher, pixels: torch.Tensor) -> torch.Tensor:
            tokens = speak(self, pixels).clone()
            if pixels.shape[1] == 48 and next(calls) >= batch:
                if isinstance(failure, Exception):
                    raise failure
                tokens[0, 1, 2] = failure
            return tokens

        monkeypatch.setattr(Teacher, "__call__", call)

    return arm


def test_a_teacher_that_gives_nan_leaves_the_other_stores_whole_shards(
    alone: tuple[Path, Files], fail_at: Callable[[int, Exception | float], None], tree_bytes: TreeBytes, tmp_path: Path
) -> None:
    data, files = alone
    plain = ALONE["large"].model_copy(update={"encoding": ALONE["plain"].encoding})
    stores = [(plain, tmp_path / "large"), (ALONE["tars"], tmp_path / "tars")]
    fail_at(4, float("nan"))  # two batches a shard: the second one of the second shard
    failed, metrics = run_together(stores, {"data": data})
    assert isinstance(failed, QuarantineError)
    assert "teacher 'toy': the teacher gave NaN, infinity" in str(failed)
    assert list(committed_shards(tmp_path / "large", load_plan(tmp_path / "large"))) == [0]
    assert isinstance(metrics, dict)
    assert tree_bytes(tmp_path / "tars") == files["tars"]


def test_a_teacher_that_fails_is_given_up_and_the_other_store_is_finished(
    alone: tuple[Path, Files], fail_at: Callable[[int, Exception | float], None], tree_bytes: TreeBytes, tmp_path: Path
) -> None:
    data, files = alone
    plain = ALONE["large"].model_copy(update={"encoding": ALONE["plain"].encoding})
    stores = [(plain, tmp_path / "large"), (ALONE["tars"], tmp_path / "tars")]
    fail_at(9, ValueError("out of something"))
    progress = AfterShards(100)
    failed, metrics = run_together(stores, {"data": data}, progress)
    assert isinstance(failed, QuarantineError)
    assert progress.said[-3:] == ["3 8/12", "0 9/12", "0 10/12"], "what the other store has of a given-up shard"
    assert "2 of 6 shards of" in str(failed)
    assert "were given up (4, 5; shard 4 after 3 attempts" in str(failed)
    assert "RuntimeError: teacher 'toy': ValueError: out of something" in str(failed)
    assert isinstance(metrics, dict)
    assert metrics["shards"] == 6
    assert tree_bytes(tmp_path / "tars") == files["tars"]
    assert not (tmp_path / "large" / "manifest.json").exists()


def test_an_error_keeps_what_to_do_about_it(
    alone: tuple[Path, Files], fail_at: Callable[[int, Exception | float], None], tmp_path: Path
) -> None:
    failure = InputError("no room")
    failure.then = "decant make-room"
    stores = targets(tmp_path, ["tars", "large"])
    run_together(stores, {"data": alone[0]})
    receipt_path(tmp_path / "large", 2).unlink()
    receipt_path(tmp_path / "tars", 2).unlink()
    fail_at(1, failure)
    with pytest.raises(InputError, match=r"^teacher 'toy': no room$") as caught:
        run_together(stores, {"data": alone[0]})
    assert caught.value.then == "decant make-room"


def test_unusable_images_count_in_shards_that_another_store_gave_up(
    make_images: Callable[..., Path], make_index: MakeIndex, fail_at: Callable[[int, Exception | float], None],
    tmp_path: Path,
) -> None:  # fmt: skip
    images = make_images("images")
    for name in ("001", "002"):
        (images / "dark" / f"{name}.png").write_bytes(b"no picture")
    data, _ = make_index(images, eval_fraction=0)
    plain = ALONE["large"].model_copy(update={"encoding": ALONE["plain"].encoding})
    fail_at(1, ValueError("out of something"))
    with pytest.raises(InputError, match=r"2 of 20 images of .* are unusable, 1 are allowed"):
        run_together([(plain, tmp_path / "large"), (ALONE["tars"], tmp_path / "tars")], {"data": data})


def test_unusable_images_are_holes_in_every_store(
    make_images: Callable[..., Path], make_index: MakeIndex, tree_bytes: TreeBytes, tmp_path: Path
) -> None:
    images = make_images("images")
    (images / "dark" / "003.png").write_bytes(b"no picture")
    data, _ = make_index(images, eval_fraction=0)
    names = ["plain", "tars"]
    outcomes = run_together(targets(tmp_path / "together", names), {"data": data})
    for name, metrics in zip(names, outcomes, strict=True):
        assert isinstance(metrics, dict)
        assert [bad["key"] for bad in metrics["bad_images"]] == ["dark/003.png"]
        run(ALONE[name], {"data": data}, tmp_path / "alone" / name)
    assert read_all(tree_bytes, tmp_path / "together", names) == read_all(tree_bytes, tmp_path / "alone", names)


# ---- processes -------------------------------------------------------------------------------------------------------


class DyingWorker(Worker):
    """Is killed once, when the first store has its shard 2 and the second one has not."""

    def __call__(self, job: Job) -> Extracted:
        died = self.stores[0].root.parent / "died"
        commit = ShardWriter.commit

        def commit_and_die(writer: ShardWriter) -> ShardEntry:
            entry = commit(writer)
            if job.shard == 2 and not died.exists():
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return entry

        ShardWriter.commit = commit_and_die  # type: ignore[method-assign]
        try:
            return super().__call__(job)
        finally:
            ShardWriter.commit = commit  # type: ignore[method-assign]


def test_workers_that_die_between_two_stores_make_the_same_bytes(
    alone: tuple[Path, Files], tree_bytes: TreeBytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, files = alone
    names = ["plain", "tars"]
    apart = {"executor": "process", "workers": 2}
    stores = [
        (cfg.model_copy(update={"run": cfg.run.model_copy(update=apart)}), root)
        for cfg, root in targets(tmp_path / "apart", names)
    ]
    monkeypatch.setattr("extract.sharing.Worker", DyingWorker)
    outcomes = run_together(stores, {"data": data})
    committed, died = receipt_path(tmp_path / "apart" / "plain", 2), tmp_path / "apart" / "died"
    assert committed.stat().st_mtime_ns <= died.stat().st_mtime_ns, "the next attempt makes the other store's alone"
    assert [isinstance(metrics, dict) for metrics in outcomes] == [True, True]
    assert read_all(tree_bytes, tmp_path / "apart", names) == {name: files[name] for name in names}
