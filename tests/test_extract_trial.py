"""A trial of an extraction: what it measures, on which workers, and that it leaves nothing behind."""

from collections.abc import Callable
from pathlib import Path

import pytest

from extract import trial
from extract.config import ExecutionConfig, ExtractConfig
from extract.filling import Target
from extract.jobs import Job
from extract.run import run
from extract.timing import StageSeconds
from extract.trial import Trial, TrialWorker, Tried, run_trial
from storage.encodings import Int8
from storage.errors import InputError
from storage.image_index import load_index
from storage.image_list import ImageList
from storage.lock import hold_lock
from storage.receipts import receipt_path
from storage.stage import Interrupted, StopRequest
from storage.whitening import MeanStd

RUN = ExecutionConfig(executor="inline", batch_size=4, device="cpu")
CFG = ExtractConfig(teacher="toy", views=2, records_per_shard=6, run=RUN)
MakeIndex = Callable[..., tuple[Path, object]]


@pytest.fixture
def images(make_index: MakeIndex) -> ImageList:
    return load_index(make_index()[0]).split("train")


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"encoding": Int8()}, {"whitening": MeanStd()}, {"layout": "wds"},
        {"run": RUN.model_copy(update={"executor": "process", "workers": 2})},
    ],
    ids=str,
)  # fmt: skip
def test_images_are_counted_until_there_are_no_more(
    images: ImageList, tmp_path: Path, changes: dict[str, object]
) -> None:
    before = listing(tmp_path)
    cfg = CFG.model_copy(update=changes)
    found = run_trial([Target(cfg, tmp_path / "runs" / "store")], images, seconds=60)
    assert found.images == 16
    assert found.workers == max(1, cfg.run.workers)
    assert 0 < found.seconds < 60 and found.start_seconds > 0
    assert found.images_per_second == 16 / found.seconds
    assert found.batch_sizes == (4,)
    assert found.peak_gpu_bytes == 0
    assert 50e6 < found.peak_memory_bytes < 20e9
    spent = found.stage_seconds
    assert min(spent.decode, spent.forward, spent.write) > 0
    assert spent.forward + spent.wait + spent.encode + spent.write < found.seconds * found.workers
    assert found.bottleneck is not None and found.bottleneck.advice
    assert listing(tmp_path) == before


class SlowWorker(TrialWorker):
    """Takes two seconds of a clock that does not wait."""

    def __call__(self, job: Job) -> Tried:  # type: ignore[override]
        clock.now += 2.0
        clock.begun.append(job.shard)
        return super().__call__(job)


class Clock:
    def __init__(self) -> None:
        self.now, self.begun = 100.0, list[int]()

    def monotonic(self) -> float:
        return self.now


clock = Clock()


def test_it_ends_with_the_shard_in_which_the_time_is_over(
    images: ImageList, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock.__init__()  # type: ignore[misc]
    monkeypatch.setattr(trial, "TrialWorker", SlowWorker)
    monkeypatch.setattr(trial, "time", clock)
    found = run_trial([Target(CFG.model_copy(update={"records_per_shard": 2}), tmp_path / "store")], images, seconds=7)
    assert (found.images, found.seconds) == (4, 8.0)
    assert found.images_per_second == 0.5
    assert found.hours_for(3600) == 2.0
    assert len(set(clock.begun)) == 4 and clock.begun != sorted(clock.begun), "random shards"


def test_two_teachers_are_tried_in_one_pass_whatever_there_is_of_their_stores(
    make_index: MakeIndex, tmp_path: Path
) -> None:
    data, _ = make_index()
    whole = CFG.model_copy(update={"run": RUN.model_copy(update={"audit_records": 0})})
    run(whole, {"data": data}, tmp_path / "half")
    receipt_path(tmp_path / "half", 1).unlink()
    other = CFG.model_copy(update={"input_px": 48, "run": RUN.model_copy(update={"batch_size": 8})})
    with hold_lock(tmp_path / "half"):
        locked = listing(tmp_path)
        targets = [Target(CFG, tmp_path / "half"), Target(other, tmp_path / "new")]
        found = run_trial(targets, load_index(data).split("train"), seconds=60)
        assert listing(tmp_path) == locked
    assert found.images == 16 and found.batch_sizes == (4, 8)


def test_what_fails_is_said_and_leaves_nothing(
    images: ImageList, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **named: object) -> None:
        raise OSError("the sky is falling")

    before = listing(tmp_path)
    monkeypatch.setattr("extract.worker.extract_shard", fail)
    with pytest.raises(InputError, match="a trial of the extraction failed: OSError: the sky is falling"):
        run_trial([Target(CFG, tmp_path / "store")], images)
    assert listing(tmp_path) == before
    assert not list(tmp_path.rglob(".trial-*"))


def test_a_stop_ends_it_and_leaves_nothing(images: ImageList, tmp_path: Path) -> None:
    stop = StopRequest()
    stop.signal_name = "SIGINT"
    with pytest.raises(Interrupted):
        run_trial([Target(CFG, tmp_path / "store")], images, stop=stop)
    assert not list(tmp_path.rglob(".trial-*"))


def test_what_a_killed_trial_left_is_removed_and_another_one_at_work_is_not(images: ImageList, tmp_path: Path) -> None:
    for name in (".trial-killed", ".trial-at-work"):
        (tmp_path / name / "store").mkdir(parents=True)
        (tmp_path / name / "store" / "plan.json").touch()
    with hold_lock(tmp_path / ".trial-at-work"):
        run_trial([Target(CFG, tmp_path / "store")], images, seconds=60)
        assert [path.name for path in tmp_path.glob(".trial-*")] == [".trial-at-work"]
        assert (tmp_path / ".trial-at-work" / "store" / "plan.json").exists()


def test_no_images_cannot_be_tried(tmp_path: Path, image_list: Callable[[int], ImageList]) -> None:
    with pytest.raises(InputError, match="no image"):
        run_trial([Target(CFG, tmp_path / "store")], image_list(0))


def test_rates_are_told_from_what_was_counted() -> None:
    found = Trial(100, 20.0, 3600.0, 2, (8,), StageSeconds(), 0, 0)
    assert found.images_per_second == 5.0
    assert found.hours_for(18_000) == 2.0
