"""Several stores filled in one pass over the images: each has the bytes that it would have alone, whatever happens."""

import functools
import itertools
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import extract.render
import extract.worker
from extract.config import ExecutionConfig, ExtractConfig
from extract.run import run, run_together
from extract.teacher import Teacher
from extract.worker import Target, Worker
from storage.encodings import Int8
from storage.errors import ConfigError, DecantError, DiskError, QuarantineError, StoreBusyError
from storage.folder import load_plan
from storage.image_list import ImageList
from storage.lock import hold_lock
from storage.receipts import committed_shards, receipt_path
from storage.records import ShardEntry
from storage.stage import Interrupted, SilentProgress
from storage.verify import iter_damage
from storage.views import CentreCrop, Renderer
from storage.writer import ShardWriter

RUN = ExecutionConfig(executor="inline", batch_size=4, device="cpu")
ALONE = {
    "plain": ExtractConfig(teacher="toy", views=2, records_per_shard=6, run=RUN),
    "large": ExtractConfig(
        teacher="toy", views=2, records_per_shard=6, input_px=48, encoding=Int8(),
        run=RUN.model_copy(update={"batch_size": 5}),
    ),
    "tars": ExtractConfig(
        teacher="toy", views=2, records_per_shard=6, layout="wds", token_fraction=0.5,
        run=RUN.model_copy(update={"batch_size": 3}),
    ),
    "kept": ExtractConfig(teacher="toy", views=2, records_per_shard=6, keep_views=True, view_quality=60, run=RUN),
}  # fmt: skip
"""Stores that differ in whatever they may: 16 training images in 6 shards each."""
MakeIndex = Callable[..., tuple[Path, object]]
TreeBytes = Callable[[Path], dict[str, bytes]]
Files = dict[str, dict[str, bytes]]
Fork = Callable[[Callable[[], object]], int]


@pytest.fixture
def alone(make_index: MakeIndex, tmp_path: Path, tree_bytes: TreeBytes) -> tuple[Path, Files]:
    """An index file, and each store's files when it is extracted alone."""
    data, _ = make_index()
    for name, cfg in ALONE.items():
        run(cfg, {"data": data}, tmp_path / "alone" / name)
    return data, {name: tree_bytes(tmp_path / "alone" / name) for name in ALONE}


def targets(folder: Path, names: Sequence[str] = tuple(ALONE)) -> list[tuple[ExtractConfig, Path]]:
    return [(ALONE[name], folder / name) for name in names]


def read_all(tree_bytes: TreeBytes, folder: Path, names: Sequence[str] = tuple(ALONE)) -> Files:
    return {name: tree_bytes(folder / name) for name in names}


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each image is read and decoded from here on."""
    counts: Counter[int] = Counter()
    read_image = ImageList.read_image

    def note(self: ImageList, position: int) -> Any:
        counts[position] += 1
        return read_image(self, position)

    monkeypatch.setattr(ImageList, "read_image", note)
    return counts


# ---- the same bytes for less work ------------------------------------------------------------------------------------


def test_stores_have_the_bytes_that_they_have_alone(
    alone: tuple[Path, Files], tree_bytes: TreeBytes, tmp_path: Path
) -> None:
    data, files = alone
    outcomes = run_together(targets(tmp_path / "together"), {"data": data})
    assert read_all(tree_bytes, tmp_path / "together") == files
    for name, metrics in zip(ALONE, outcomes, strict=True):
        assert isinstance(metrics, dict)
        again = run(ALONE[name], {"data": data}, tmp_path / "together" / name)
        passing = ("together_with", "extracted_views_per_second")
        assert {key: value for key, value in metrics.items() if key not in passing} == {
            key: value for key, value in again.items() if key not in passing
        }
        assert (metrics["together_with"], again["together_with"]) == (["toy"] * 3, [])
        assert metrics["extracted_views_per_second"] > 0


def test_an_image_is_decoded_once_and_rendered_once_a_size(
    make_index: MakeIndex, decoded: Counter[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rendered: Counter[int] = Counter()
    encoded: Counter[int] = Counter()
    render_view, encode_view = Renderer.render_view, extract.render.encode_view

    def note_size(self: Renderer, image: Any, view: Any, px: int) -> Any:
        rendered[px] += 1
        return render_view(self, image, view, px)

    def note_quality(pixels: Any, quality: int) -> bytes:
        encoded[quality] += 1
        return encode_view(pixels, quality)

    monkeypatch.setattr(Renderer, "render_view", note_size)
    monkeypatch.setattr(extract.render, "encode_view", note_quality)
    data, _ = make_index()
    stores = [target for target in targets(tmp_path) if target[0].encoding.kind == "fp16"]  # a fit looks at views, too
    run_together(
        [*stores, (ALONE["tars"].model_copy(update={"token_fraction": 0.3}), tmp_path / "more")], {"data": data}
    )
    assert decoded == Counter(range(16))
    assert (rendered, encoded) == (Counter({32: 32}), Counter({95: 32, 60: 32}))


def test_shards_side_by_side_make_the_same_bytes(
    alone: tuple[Path, Files], monkeypatch: pytest.MonkeyPatch, tree_bytes: TreeBytes, tmp_path: Path
) -> None:
    """As on a GPU: one shard's forward pass while others are rendered and committed."""
    data, files = alone
    monkeypatch.setitem(extract.worker._SHARDS_AT_A_TIME, "cpu", 3)
    at_work: list[int] = []
    most = 0
    commit, speak = ShardWriter.commit, Teacher.__call__

    def note_forward(self: Teacher, pixels: torch.Tensor) -> torch.Tensor:
        at_work.append(1)
        assert len(at_work) == 1, "one forward pass at a time"
        time.sleep(0.002)
        tokens = speak(self, pixels)
        at_work.pop()
        return tokens

    def note_commit(self: ShardWriter) -> ShardEntry:
        nonlocal most
        most = max(most, len(threading.enumerate()))
        return commit(self)

    monkeypatch.setattr(Teacher, "__call__", note_forward)
    monkeypatch.setattr(ShardWriter, "commit", note_commit)
    run_together(targets(tmp_path / "together"), {"data": data})
    assert read_all(tree_bytes, tmp_path / "together") == files
    assert most >= 4


def test_what_is_rendered_ahead_is_bounded(
    make_index: MakeIndex, decoded: Counter[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A shard may hold thousands of images; two batches of the largest size are rendered before they are needed."""
    data, _ = make_index(per_class=40)
    lead: list[int] = []
    speak = Teacher.__call__

    def note(self: Teacher, pixels: torch.Tensor) -> torch.Tensor:
        seen.append(len(pixels))
        lead.append(2 * sum(decoded.values()) - sum(seen))
        return speak(self, pixels)

    seen: list[int] = []
    monkeypatch.setattr(Teacher, "__call__", note)
    run(ALONE["plain"].model_copy(update={"records_per_shard": 1000}), {"data": data}, tmp_path / "store")
    assert sum(seen) == 2 * 64
    assert max(lead) <= 3 * 4


def test_settings_in_which_stores_must_agree_are_named(make_index: MakeIndex, tmp_path: Path) -> None:
    data, _ = make_index()
    for name, value in (
        ("split", "eval"), ("views", 3), ("sampler", CentreCrop()), ("renderer", Renderer(kernel="bicubic")),
        ("records_per_shard", 8),
    ):  # fmt: skip
        other = ALONE["plain"].model_copy(update={name: value})
        with pytest.raises(ConfigError, match=rf"but extract\.{name} is .* for 'toy' and .* for 'toy'"):
            run_together([(ALONE["plain"], tmp_path / "one"), (other, tmp_path / "other")], {"data": data})
    with pytest.raises(ConfigError, match=r"two of the stores .* are the same"):
        run_together(
            [(ALONE["plain"], tmp_path / "one"), (ALONE["plain"], tmp_path / "x" / ".." / "one")], {"data": data}
        )
    assert not (tmp_path / "one").exists()


def test_stores_that_fit_one_by_one_but_not_together_are_refused(
    make_index: MakeIndex, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data, _ = make_index()
    usage = type("Usage", (), {"free": 45_000})  # the stores need 31 kB each
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    stores = [(ALONE["plain"], tmp_path / "one"), (ALONE["plain"], tmp_path / "other")]
    with pytest.raises(DiskError, match=r"the 2 stores need 0\.0\d\d MB .* 0\.045 MB are free"):
        run_together(stores, {"data": data})
    for cfg, root in stores:
        run(cfg, {"data": data}, root)


def test_a_store_that_is_being_written_refuses_all(
    make_index: MakeIndex, tree_bytes: TreeBytes, tmp_path: Path
) -> None:
    data, _ = make_index()
    busy = tmp_path / "tars"
    with hold_lock(busy), pytest.raises(StoreBusyError, match=f"{busy} is being written by process {os.getpid()}"):
        run_together(targets(tmp_path), {"data": data})
    assert not any(tree_bytes(tmp_path / name) for name in ("plain", "large", "tars") if (tmp_path / name).exists())
    run_together(targets(tmp_path, ["plain", "tars"]), {"data": data})


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
    stores = [Target(cfg, tmp_path / "alone" / name) for name, cfg in ALONE.items()]
    receipt_path(stores[1].root, 4).unlink()
    sides: set[int] = set()
    speak = Teacher.__call__

    def note(self: Teacher, pixels: torch.Tensor) -> torch.Tensor:
        sides.add(pixels.shape[1])
        return speak(self, pixels)

    monkeypatch.setattr(Teacher, "__call__", note)
    entries = Worker(stores, data)(4)
    assert sides == {48}
    assert [entry.store for entry in entries] == [load_plan(store.root).fingerprint for store in stores]


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
    with pytest.raises(DecantError, match=r"^teacher 'toy': the teacher gave NaN, infinity .* for 1 of 1 images"):
        run_together(stores, {"data": data})
    assert list(committed_shards(tmp_path / "large", load_plan(tmp_path / "large"))) == [0]
    assert list(committed_shards(tmp_path / "tars", load_plan(tmp_path / "tars"))) == [0, 1]
    run(ALONE["tars"], {"data": data}, tmp_path / "tars")
    assert tree_bytes(tmp_path / "tars") == files["tars"]


def test_a_teacher_that_fails_is_given_up_and_the_other_store_is_finished(
    alone: tuple[Path, Files], fail_at: Callable[[int, Exception | float], None], tree_bytes: TreeBytes, tmp_path: Path
) -> None:
    data, files = alone
    plain = ALONE["large"].model_copy(update={"encoding": ALONE["plain"].encoding})
    stores = [(plain, tmp_path / "large"), (ALONE["tars"], tmp_path / "tars")]
    fail_at(9, ValueError("out of something"))
    failed, metrics = run_together(stores, {"data": data})
    assert isinstance(failed, QuarantineError)
    assert "2 of 6 shards of" in str(failed)
    assert "(first: shard 4: RuntimeError: teacher 'toy': ValueError: out of something)" in str(failed)
    assert isinstance(metrics, dict)
    assert metrics["shards"] == 6
    assert tree_bytes(tmp_path / "tars") == files["tars"]
    assert not (tmp_path / "large" / "manifest.json").exists()


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


# ---- on Ray ----------------------------------------------------------------------------------------------------------


class DyingWorker(Worker):
    """Is killed once, when the first store has its shard 2 and the second one has not."""

    def __call__(self, index: int) -> tuple[ShardEntry, ...]:
        died = self.stores[0].root.parent / "died"
        commit = ShardWriter.commit

        def commit_and_die(writer: ShardWriter) -> ShardEntry:
            entry = commit(writer)
            if index == 2 and not died.exists():
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return entry

        ShardWriter.commit = commit_and_die  # type: ignore[method-assign]
        try:
            return super().__call__(index)
        finally:
            ShardWriter.commit = commit  # type: ignore[method-assign]


@pytest.mark.ray
def test_ray_workers_that_die_between_two_stores_make_the_same_bytes(
    alone: tuple[Path, Files], tree_bytes: TreeBytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    data, files = alone
    names = ["plain", "tars"]
    on_ray = {"executor": "ray", "workers": 2}
    stores = [
        (cfg.model_copy(update={"run": cfg.run.model_copy(update=on_ray)}), root)
        for cfg, root in targets(tmp_path / "ray", names)
    ]
    monkeypatch.setattr("extract.run.Worker", DyingWorker)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        outcomes = run_together(stores, {"data": data})
    finally:
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    committed, died = receipt_path(tmp_path / "ray" / "plain", 2), tmp_path / "ray" / "died"
    assert committed.stat().st_mtime_ns <= died.stat().st_mtime_ns, "the next attempt makes the other store's alone"
    assert [isinstance(metrics, dict) for metrics in outcomes] == [True, True]
    assert read_all(tree_bytes, tmp_path / "ray", names) == {name: files[name] for name in names}
