"""The fine-tuning stage: members, what they depend on, what is kept, and what an interrupt leaves."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distill.checkpoint import load_weights, save_weights
from distill.config import OptimConfig, TrainRunConfig
from distill.student import build_student, normalise_images
from distill.student_config import TimmStudent, find_student
from finetune import run as stage
from finetune.classifier import build_classifier, count_correct
from finetune.config import FinetuneConfig
from storage.atomic import read_json
from storage.errors import DamagedError
from storage.image_index import load_index
from storage.stage import Interrupted, SilentProgress
from tests.fixtures.students import SWINV2, VIT

TOY = find_student("toy")
CFG = FinetuneConfig(
    epochs=2, batch_size=4, optim=OptimConfig(base_lr=0.03, warmup_epochs=1), drop_path=0.2,
    run=TrainRunConfig(threads=1, loaders=1),
)  # fmt: skip
Inputs = dict[str, Path]


def write_student(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    state = build_student(TOY, drop_path=0.0).state_dict()
    save_weights(folder / "student.safetensors", state, {"student": TOY.model_dump_json()})
    return folder


@pytest.fixture
def inputs(make_index: Callable[..., tuple[Path, object]], tmp_path: Path) -> Inputs:
    """16 images to train on, 4 held out, and a student that nobody distilled."""
    return {"data": make_index()[0], "distill": write_student(tmp_path / "student", 0)}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Inputs], tuple[Path, dict[str, Any]]]:
    """What a run that nothing stops makes of `inputs`, which are the same in every test: its folder and metrics."""
    folder = tmp_path_factory.mktemp("undisturbed")
    made: list[dict[str, Any]] = []

    def run(inputs: Inputs) -> tuple[Path, dict[str, Any]]:
        if not made:
            made.append(stage.run(CFG, inputs, folder))
        return folder, made[0]

    return run


class Recorder(SilentProgress):
    """Keeps what is said; sends this process a signal after some steps."""

    def __init__(self, stop_after: int = 0) -> None:
        self.said: list[str] = []
        self.steps, self.stop_after = 0, stop_after

    def advance(self, amount: int, **facts: object) -> None:
        self.steps += amount
        if self.steps == self.stop_after:
            os.kill(os.getpid(), signal.SIGINT)

    def say(self, message: str) -> None:
        self.said.append(message)


def weights(folder: Path) -> dict[str, bytes]:
    """The bytes of every member's classifier."""
    return {path.parent.name: path.read_bytes() for path in sorted(folder.glob("*/classifier.safetensors"))}


def without_times(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    times = ("train_seconds", "resumed_at")
    return [{key: value for key, value in member.items() if key not in times} for member in metrics["members"]]


def test_every_start_with_every_seed_is_a_member(inputs: Inputs, tmp_path: Path) -> None:
    metrics = stage.run(CFG.model_copy(update={"seeds": (0, 3)}), inputs, tmp_path / "out")
    names = [(member["start"], member["seed"]) for member in metrics["members"]]
    assert names == [("scratch", 0), ("scratch", 3), ("distilled", 0), ("distilled", 3)]
    assert len(set(weights(tmp_path / "out").values())) == 4
    assert (metrics["num_train"], metrics["num_eval"], metrics["classes"]) == (16, 4, ["dark", "light"])
    assert metrics["majority_accuracy"] == 0.5
    for member in metrics["members"]:
        assert [point["step"] for point in member["history"]] == list(range(1, 9))
        assert (member["num_eval"], member["num_bad"]) == (4, 0)
    assert not list((tmp_path / "out").rglob("step-*")), "finished members keep no checkpoint"


@pytest.mark.parametrize("student", [VIT, SWINV2])
def test_students_of_other_networks(inputs: Inputs, tmp_path: Path, student: TimmStudent) -> None:
    state = build_student(student, drop_path=0.0).state_dict()
    facts = {"student": student.model_dump_json()}
    save_weights(inputs["distill"] / "student.safetensors", state, facts)
    metrics = stage.run(CFG.model_copy(update={"epochs": 1}), inputs, tmp_path / "out")
    assert [member["num_eval"] for member in metrics["members"]] == [4, 4]
    assert len(set(weights(tmp_path / "out").values())) == 2


def test_accuracy_is_that_of_the_saved_weights(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The saved classifier, loaded anew, looks at the held-out images one by one; nothing is dropped then."""
    logits_seen: list[torch.Tensor] = []
    monkeypatch.setattr(
        stage, "count_correct", lambda logits, labels: logits_seen.append(logits) or count_correct(logits, labels)
    )
    large_steps = OptimConfig(base_lr=3.0, warmup_epochs=0)
    changes = {"epochs": 1, "seeds": (1,), "drop_path": 0.9, "optim": large_steps}
    metrics = stage.run(CFG.model_copy(update=changes), inputs, tmp_path / "out")
    images = load_index(inputs["data"]).split("eval")
    assert [len(logits) for logits in logits_seen] == [4, 4], "one batch for each member"
    for member, found in zip(metrics["members"], logits_seen, strict=True):
        model = build_classifier(TOY, num_classes=2, drop_path=0.0, weights=None).eval()
        model.load_state_dict(load_weights(tmp_path / "out" / f"{member['start']}-1" / "classifier.safetensors"))
        correct = 0
        for position in range(len(images)):
            image = images.read_image(position)
            view = CFG.eval_sampler.view(images.keys[position], 0, image.shape[:2])
            pixels = torch.from_numpy(CFG.renderer.render_view(image, view, TOY.input_px).copy())
            with torch.inference_mode():
                [logits] = model(normalise_images(pixels[None], torch.device("cpu")))
            torch.testing.assert_close(found[position], logits, rtol=0, atol=1e-4)
            correct += int(logits.argmax()) == images.labels[position]
        assert member["accuracy"] == correct / 4


def test_scratch_does_not_depend_on_the_distilled_weights(
    inputs: Inputs, tmp_path: Path, undisturbed: Callable[..., Any]
) -> None:
    first = weights(undisturbed(inputs)[0])
    write_student(inputs["distill"], 7)
    stage.run(CFG, inputs, tmp_path / "out")
    second = weights(tmp_path / "out")
    assert first["scratch-0"] == second["scratch-0"]
    assert first["distilled-0"] != second["distilled-0"]


@pytest.fixture
def copied(inputs: Inputs, undisturbed: Callable[[Inputs], tuple[Path, object]], tmp_path: Path) -> Path:
    """A finished run's folder of one's own."""
    return shutil.copytree(undisturbed(inputs)[0], tmp_path / "out")


def test_finished_members_are_reused(inputs: Inputs, copied: Path, undisturbed: Callable[..., Any]) -> None:
    again = Recorder()
    stamps = {path: path.stat().st_mtime_ns for path in copied.rglob("*.safetensors")}
    assert stage.run(CFG, inputs, copied, again) == undisturbed(inputs)[1]
    assert again.steps == 0
    assert [line for line in again.said if "done before" in line] == again.said
    assert {path: path.stat().st_mtime_ns for path in copied.rglob("*.safetensors")} == stamps


@pytest.mark.parametrize(
    ("change", "steps"),
    [
        (lambda cfg, inputs: cfg.model_copy(update={"label_smoothing": 0.0}), 16),
        (lambda cfg, inputs: cfg.model_copy(update={"eval_sampler": CFG.eval_sampler.model_copy(
            update={"fraction": 0.5})}), 16),
        (lambda cfg, inputs: cfg.model_copy(update={"run": TrainRunConfig(threads=1, loaders=2)}), 0),
        (lambda cfg, inputs: cfg.model_copy(update={"seeds": (0, 1)}), 16),
        (lambda cfg, inputs: cfg.model_copy(update={"starts": ("distilled",)}), 0),
        (lambda cfg, inputs: write_student(inputs["distill"], 7) and cfg, 8),
    ],
    ids=["setting", "evaluation", "threads", "one more seed", "one start fewer", "other student"],
)  # fmt: skip
def test_members_are_reused_exactly_when_nothing_changed(
    inputs: Inputs, copied: Path, change: Callable[[FinetuneConfig, Inputs], FinetuneConfig], steps: int
) -> None:
    recorder = Recorder()
    stage.run(change(CFG, inputs), inputs, copied, recorder)
    assert recorder.steps == steps


def test_another_image_is_another_member(
    inputs: Inputs, copied: Path, tmp_path: Path, make_index: Callable[..., object]
) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "images" / "dark" / "000.png")
    make_index(tmp_path / "images")
    recorder = Recorder()
    stage.run(CFG, inputs, copied, recorder)
    assert recorder.steps == 16


@pytest.mark.parametrize("stop_after", [1, 5, 8, 9, 14])
def test_an_interrupted_member_ends_with_the_same_bytes(
    inputs: Inputs, tmp_path: Path, undisturbed: Callable[..., Any], stop_after: int
) -> None:
    """Step 8 is the last one of the first member, step 9 the first of the second."""
    folder, whole = undisturbed(inputs)
    with pytest.raises(Interrupted, match="SIGINT"):
        stage.run(CFG, inputs, tmp_path / "out", Recorder(stop_after))
    assert not (tmp_path / "out" / "distilled-0" / "result.json").exists()
    recorder = Recorder()
    metrics = stage.run(CFG, inputs, tmp_path / "out", recorder)
    assert recorder.steps == 16 - stop_after, "nothing is trained twice"
    assert weights(tmp_path / "out") == weights(folder)
    assert without_times(metrics) == without_times(whole)


def test_a_stop_after_the_last_step_of_a_member_is_not_forgotten(inputs: Inputs, tmp_path: Path) -> None:
    class StopWhenDone(Recorder):
        def say(self, message: str) -> None:
            super().say(message)
            if message.startswith("distilled, seed 0: "):
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        stage.run(CFG, inputs, tmp_path / "out", StopWhenDone())
    assert read_json(tmp_path / "out" / "distilled-0" / "result.json")["metrics"]["num_eval"] == 4


def test_a_damaged_member_result_is_named(inputs: Inputs, copied: Path) -> None:
    path = copied / "scratch-0" / "result.json"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DamagedError, match=r"scratch-0.*result.json.*delete it"):
        stage.run(CFG, inputs, copied)
    path.write_text("[]")
    recorder = Recorder()
    stage.run(CFG, inputs, copied, recorder)
    assert recorder.steps == 8


def test_majority_accuracy() -> None:
    assert stage.majority_accuracy((2, 0, 2, 1, 2, 0)) == 0.5
    assert stage.majority_accuracy((4,)) == 1
    assert stage.majority_accuracy(tuple(np.repeat(range(10), 3).tolist())) == 0.1
