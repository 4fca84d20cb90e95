"""The stage: a store becomes a student, whatever happens on the way and however the work is divided."""

import functools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from distill.config import DistillConfig, DistillRunConfig, OptimConfig
from distill.loss import feature_loss
from distill.run import run
from distill.stream import DistillStream
from distill.student import DistillModel, normalise_images
from distill.student_config import BeitStudent
from extract.config import ExtractConfig
from extract.run import run as extract
from storage.errors import ConfigError, DecantError, InputError, StoreBusyError
from storage.image_index import load_index
from storage.lock import hold_lock
from storage.reader import open_store
from storage.stage import Interrupted, SilentProgress

ToyStore = Callable[..., tuple[Path, Path]]
Fork = Callable[[Callable[[], object]], int]
CFG = DistillConfig(
    student=BeitStudent(input_px=32, patch_px=8, width=32, depth=2, heads=2), epochs=8, batch_size=8,
    optim=OptimConfig(base_lr=0.2, warmup_epochs=1), run=DistillRunConfig(device="cpu", threads=1),
)  # fmt: skip
"""16 images: 16 steps."""


@pytest.fixture
def inputs(toy_store: ToyStore) -> dict[str, Path]:
    data, store = toy_store(views=2)
    return {"data": data, "extract": store}


def with_run(**changes: Any) -> DistillConfig:
    return CFG.model_copy(update={"run": CFG.run.model_copy(update=changes)})


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


class SignalAt(SilentProgress):
    """Sends this process a signal after some step, and notes what is said."""

    def __init__(self, step: int, number: int = signal.SIGTERM) -> None:
        self.left, self.number = step, number
        self.said: list[str] = []

    def start(self, total: int, unit: str, done: int = 0) -> None:
        self.left -= done

    def advance(self, amount: int, **facts: object) -> None:
        self.left -= amount
        if self.left == 0:
            signal.raise_signal(self.number)

    def say(self, message: str) -> None:
        self.said.append(message)


def test_a_student_learns_what_the_store_says(inputs: dict[str, Path], tmp_path: Path) -> None:
    """The images say which tokens belong to them: dark and light ones differ."""
    cfg = CFG.model_copy(update={"epochs": 60, "drop_path": 0.0})
    metrics = run(cfg, inputs, tmp_path / "out")
    assert metrics["first_loss"] == pytest.approx(0.25, abs=0.08)
    assert metrics["final_loss"] < 0.6 * metrics["first_loss"]
    assert (metrics["steps"], metrics["images"], metrics["resumed_at"]) == (120, 16, [])
    assert [point["step"] for point in metrics["history"]] == list(range(1, 121))
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics

    # the published weights are the trained ones: they have the loss of the last steps on the store's own batches
    reader = open_store(inputs["extract"])
    model = DistillModel(cfg.student, [reader.plan.features], drop_path=0).eval()
    model.student.load_state_dict(safetensors.torch.load_file(tmp_path / "out" / "student.safetensors"))
    model.projectors.load_state_dict(safetensors.torch.load_file(tmp_path / "out" / "projector.safetensors"))
    batch = DistillStream([reader], load_index(inputs["data"]).location, cfg).load(119)
    with torch.no_grad():
        [pred] = model(normalise_images(batch.images_BHWC, torch.device("cpu")))
    assert float(feature_loss(pred, batch.stores[0].encoded["tokens"], beta=2.0)) == pytest.approx(
        metrics["final_loss"], rel=0.05
    )


def test_the_files_say_what_they_are_and_nothing_else_is_left(inputs: dict[str, Path], tmp_path: Path) -> None:
    run(CFG, inputs, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "student.safetensors",
        "projector.safetensors",
        "metrics.jsonl",
        "tensorboard",
        "LOCK",
    }
    with safe_open(tmp_path / "out" / "student.safetensors", "pt") as file:
        facts = file.metadata()
    assert BeitStudent.model_validate_json(facts["student"]) == CFG.student
    assert facts["store"] == open_store(inputs["extract"]).manifest.fingerprint


@pytest.mark.parametrize(
    "changes",
    [{"loaders": 1, "prefetch": 1}, {"loaders": 5, "prefetch": 9}, {"image_cache_mb": 0}, {"checkpoint_seconds": 1e-9}],
)
def test_how_the_work_is_divided_changes_no_bit(
    changes: dict[str, Any], inputs: dict[str, Path], tmp_path: Path
) -> None:
    plain, other = run(CFG, inputs, tmp_path / "plain"), run(with_run(**changes), inputs, tmp_path / "other")
    assert files(tmp_path / "plain") == files(tmp_path / "other")
    assert plain["history"] == other["history"]


def test_seeds_and_settings_change_the_student(inputs: dict[str, Path], tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [{}, {"seed": 1}, {"drop_path": 0.3}, {"beta": 1.0}, {"batch_size": 7}]
    found = []
    for number, change in enumerate(changes):
        run(CFG.model_copy(update=change), inputs, tmp_path / str(number))
        found.append(files(tmp_path / str(number))["student.safetensors"])
    assert len(set(found)) == len(changes)


@pytest.mark.parametrize(
    ("steps", "number"), [([1, 2, 15], signal.SIGTERM), ([7, 12], signal.SIGINT), ([16], signal.SIGTERM)]
)
def test_stopped_and_continued_it_is_the_same_student(
    steps: list[int], number: int, inputs: dict[str, Path], tmp_path: Path
) -> None:
    whole = run(CFG, inputs, tmp_path / "whole")
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    for step in steps:
        with pytest.raises(Interrupted):
            run(CFG, inputs, tmp_path / "stopped", SignalAt(step, number))
        assert not files(tmp_path / "stopped")
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
    last = SignalAt(-1)
    metrics = run(with_run(loaders=3, prefetch=2), inputs, tmp_path / "stopped", last)
    assert last.said == [f"resuming at step {steps[-1]} of 16"]
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")
    assert metrics["history"] == whole["history"]
    assert metrics["resumed_at"] == steps
    assert (tmp_path / "stopped" / "checkpoints").exists(), "until the stage has its result"


@pytest.mark.parametrize("layout", ["zarr", "wds"])
@pytest.mark.parametrize("encoding", ["fp16", "int8"])
def test_killed_at_any_step_with_any_loaders_it_is_the_same_student(
    layout: str, encoding: str, make_index: Callable[..., tuple[Path, Any]], fork: Fork, tmp_path: Path
) -> None:
    """Killed after steps 1, 2, 7 and 16 by SIGKILL; every time with other loaders, at last with the first ones."""
    data, _ = make_index()
    store = ExtractConfig.model_validate(
        {"teacher": "toy", "views": 2, "layout": layout, "encoding": {"kind": encoding}, "records_per_shard": 6,
         "run": {"executor": "inline", "device": "cpu", "audit_records": 0}}
    )  # fmt: skip
    extract(store, {"data": data}, tmp_path / "store")
    inputs = {"data": data, "extract": tmp_path / "store"}
    whole = run(CFG, inputs, tmp_path / "whole")
    for step, loaders in [(1, 3), (2, 1), (7, 5), (16, 2)]:
        cfg = with_run(loaders=loaders, checkpoint_seconds=1e-9)
        killed = fork(functools.partial(run, cfg, inputs, tmp_path / "killed", SignalAt(step, signal.SIGKILL)))
        assert os.WTERMSIG(os.waitpid(killed, 0)[1]) == signal.SIGKILL
    metrics = run(CFG, inputs, tmp_path / "killed")
    assert metrics["resumed_at"] == [1, 6, 15], "a step that was not saved is made again"
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert metrics["history"] == whole["history"]


def test_other_settings_or_another_store_start_anew(inputs: dict[str, Path], tmp_path: Path) -> None:
    other = CFG.model_copy(update={"beta": 1.0})
    run(other, inputs, tmp_path / "plain")
    with pytest.raises(Interrupted):
        run(CFG, inputs, tmp_path / "out", SignalAt(9))
    progress = SignalAt(-1)
    assert run(other, inputs, tmp_path / "out", progress)["resumed_at"] == []
    assert not progress.said
    assert files(tmp_path / "out") == files(tmp_path / "plain")


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_a_student_of_another_grid_is_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    student = CFG.student.model_copy(update={"input_px": 64})
    with pytest.raises(ConfigError, match=r"8x8 \(64 px, patch 8\).*'toy' has 4x4; set distill\.student\.input_px=32"):
        run(CFG.model_copy(update={"student": student}), inputs, tmp_path / "out")


def test_a_folder_in_use_is_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    with hold_lock(tmp_path / "out"), pytest.raises(StoreBusyError):
        run(CFG, inputs, tmp_path / "out")


def test_a_store_that_is_not_there_is_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no store"):
        run(CFG, inputs | {"extract": tmp_path / "nothing"}, tmp_path / "out")
    (inputs["extract"] / "manifest.json").unlink()
    with pytest.raises(InputError, match="unfinished"):
        run(CFG, inputs, tmp_path / "out")


def test_a_student_that_runs_away_is_stopped_and_its_images_are_listed(inputs: dict[str, Path], tmp_path: Path) -> None:
    optim = OptimConfig(base_lr=1e12, warmup_epochs=0)
    with pytest.raises(ConfigError, match=r"stopped before the update; .*lower optim\.base_lr"):
        run(CFG.model_copy(update={"optim": optim}), inputs, tmp_path / "out")
    (report,) = (tmp_path / "out").glob("non-finite-step-*.json")
    keys = json.loads(report.read_text())["keys"]
    assert len(keys) == 8
    assert set(keys) <= set(load_index(inputs["data"]).split("train").keys)
    assert not files(tmp_path / "out")


def test_another_resize_is_mentioned(inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.views.resize_version", lambda: "99.0")
    progress = SignalAt(-1)
    run(CFG, inputs, tmp_path / "out", progress)
    assert len(progress.said) == 1
    assert "here it is cykooz-resizer 99.0: the student may see slightly other pixels" in progress.said[0]


def test_too_little_memory_is_told_with_the_settings_that_need_less(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")

    monkeypatch.setattr("distill.session.train", train)
    with pytest.raises(DecantError, match=r"2\.00 GiB\.; set ACCUMULATE=4, or distill\.run\.checkpoint_activations"):
        run(with_run(accumulate=2), inputs, tmp_path / "out")
